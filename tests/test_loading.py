"""Weight files: what is read, what is refused, and that nothing in a file runs."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file
from torch import nn

from tessera.modalities.errors import InputError
from tessera.weights import loading
from tessera.weights.loading import find_files, load_strict, read_state_dict
from tessera.weights.registry import model_info

STATE = {"encoder.weight": torch.arange(6.0).view(2, 3), "scale": torch.tensor(2.0)}


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def same(found: dict[str, torch.Tensor]) -> bool:
    return found.keys() == STATE.keys() and all(torch.equal(found[k], STATE[k]) for k in STATE)


def refused(path: Path, words: str) -> None:
    with pytest.raises(InputError) as caught:
        read_state_dict(path)
    assert words in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_safetensors_and_plain_pickles(tmp_path):
    save_file(STATE, tmp_path / "a.safetensors")
    assert same(read_state_dict(tmp_path / "a.safetensors"))
    for suffix in loading.PICKLED:
        torch.save(STATE, tmp_path / f"a{suffix}")
        assert same(read_state_dict(tmp_path / f"a{suffix}"))
    torch.save(STATE, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert same(read_state_dict(tmp_path / "old.pth"))


def test_nested_dicts_are_flattened_and_other_values_dropped(tmp_path):
    nested = {"epoch": 3, "names": ["a"], "encoder": {"weight": STATE["encoder.weight"]}}
    torch.save(nested | {"scale": STATE["scale"]}, tmp_path / "a.pt")
    assert same(read_state_dict(tmp_path / "a.pt"))


def test_shards_by_their_index(tmp_path):
    for number, (name, value) in enumerate(STATE.items()):
        save_file({name: value}, tmp_path / f"part-{number}.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": {n: f"part-{i}.safetensors" for i, n in enumerate(STATE)}})
    )
    assert same(read_state_dict(index))
    (tmp_path / "part-1.safetensors").unlink()
    refused(index, "is damaged")


def test_an_index_cannot_name_files_elsewhere(tmp_path):
    save_file(STATE, tmp_path / "secret.safetensors")
    (tmp_path / "model").mkdir()
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"scale": "../secret.safetensors"}}))
    refused(index, "is damaged")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_bad_indices_are_refused(tmp_path, text):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    refused(index, "is damaged")


@pytest.mark.parametrize("keep", [0, 4, 40, -1])
def test_truncated_safetensors_are_refused(tmp_path, keep):
    path = tmp_path / "a.safetensors"
    save_file(STATE, path)
    path.write_bytes(path.read_bytes()[:keep])
    refused(path, "is damaged or not a safetensors file")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("keep", [0, 0.1, 0.5, 0.95])
def test_truncated_pickles_are_refused(tmp_path, zipped, keep):
    path = tmp_path / "a.pt"
    torch.save(STATE, path, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    refused(path, ": ")


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_pickle_runs(tmp_path, zipped):
    path, target = tmp_path / "a.pt", tmp_path / "made"
    torch.save(STATE | {"x": Payload(target)}, path, _use_new_zipfile_serialization=zipped)
    refused(path, "holds more than plain tensors and was not opened")
    path.write_bytes(pickle.dumps(Payload(target)))
    refused(path, "holds more than plain tensors and was not opened")
    assert not target.exists()
    pickle.loads(path.read_bytes())
    assert target.exists()  # It would have run.


@pytest.mark.parametrize("value", [nn.Linear(2, 2), [1, 2], {"a": "text"}, "text"])
def test_pickles_of_other_things_are_refused(tmp_path, value):
    torch.save(value, tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"holds no tensors|holds more than plain tensors"):
        read_state_dict(tmp_path / "a.pt")


def test_files_that_are_no_weights_are_refused(tmp_path):
    refused(tmp_path / "none.safetensors", "There is no weight file")
    (tmp_path / "a.txt").write_text("hello")
    refused(tmp_path / "a.txt", "is not a weight file: give .safetensors or one of .pt")
    (tmp_path / "a.safetensors").write_text("hello " * 100)
    refused(tmp_path / "a.safetensors", "is damaged or not a safetensors file")
    (tmp_path / "a.bin").write_text("hello " * 100)
    refused(tmp_path / "a.bin", ": ")
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("hello.txt", "hello")
    refused(tmp_path / "a.pth", "is damaged")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight": None}, '"weight" is missing'),
        ({"gamma": torch.ones(2)}, '"gamma" is unknown'),
        ({"weight": torch.ones(3, 2)}, '"weight" is [3, 2], not [2, 3]'),
        (dict.fromkeys("abcd", torch.ones(1)), '"c" is unknown and 1 more'),
    ],
)
def test_strict_loading_names_what_does_not_fit(change, words):
    layer = nn.Linear(3, 2)
    state = {"weight": torch.ones(2, 3), "bias": torch.ones(2)} | change
    with pytest.raises(InputError) as caught:
        load_strict(layer, {name: value for name, value in state.items() if value is not None})
    assert words in str(caught.value) and "do not fit Linear" in str(caught.value)
    assert not (layer.bias == 1).any()  # Nothing of it was loaded.


def test_missing_local_files_are_named(tmp_path):
    with pytest.raises(
        InputError, match=r"model\.safetensors.* is missing: put model\.safetensors"
    ):
        find_files(model_info("titok-l-32"), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert find_files(model_info("titok-l-32"), tmp_path) == [tmp_path / "model.safetensors"]


def test_without_network_one_sentence_says_where_to_put_the_files(monkeypatch):
    def offline(*_, local_files_only=False, **__):
        if local_files_only:
            raise LocalEntryNotFoundError("not cached")
        raise ConnectionError("no route to host\nmore")

    monkeypatch.setattr(loading, "hf_hub_download", offline)
    with pytest.raises(InputError) as caught:
        find_files(model_info("titok-l-32"))
    message = str(caught.value)
    assert "yucornetto/tokenizer_titok_l32_imagenet (no route to host)" in message
    assert 'from_pretrained("titok-l-32", files=FOLDER)' in message and "\n" not in message
