"""Training of SaShiMi and ARDiT from a folder of recordings."""

from __future__ import annotations

import json

import pytest
import torch

from tessera.generators.autoregressive.sashimi import SaShiMi
from tessera.generators.flow.ardit import ARDiT
from tessera.modalities.audio import save_audio
from tessera.modalities.errors import InputError
from tessera.tokenizers.auto import AutoTokenizer
from tessera.training.config import load_recipe
from tessera.training.registry import TASKS
from tessera.training.trainer import parameter_groups, train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("sounds")
    generator = torch.Generator().manual_seed(0)
    for kind, pitch in (("low", 200), ("high", 900)):
        (root / kind).mkdir()
        for i in range(2):
            time = torch.arange(4000 + 800 * i) / 16_000
            tone = 0.3 * torch.sin(6.28 * pitch * time)
            tone = tone + 0.01 * torch.randn(tone.shape, generator=generator)
            save_audio(tone[None], 16_000, root / kind / f"tone_{i}.wav")
    return root


def recipe(name, folder, output, *changes):
    few = [f"training.{key}=2" for key in ("steps", "batch_size", "log_every", "save_every")]
    few += ["training.sample_every=2", f"data.root={folder}", f"output={output}"]
    return load_recipe(name, [*few, *changes])


SASHIMI = ("model.dim=8", "model.depth=1", "data.seconds=0.1", "data.sample_length=32")
ARDIT = ("model.dim=16", "model.depth=1", "model.heads=2", "data.seconds=0.2", "mel.n_mels=20")


def test_sashimi_learns_from_sub_folders(folder, tmp_path):
    model = SaShiMi.from_pretrained(train(recipe("sashimi", folder, tmp_path / "run", *SASHIMI)))
    assert model.config.classes == ["high", "low"]
    assert (tmp_path / "run" / "samples" / "000002.png").is_file()
    rows = [json.loads(row) for row in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["bits_per_sample"] == pytest.approx(rows[-1]["loss"] / 0.6931, rel=1e-3)
    plain = recipe("sashimi", folder, tmp_path, *SASHIMI, "data.classes=false")
    task = TASKS["sashimi"](plain, torch.device("cpu"))
    batch = task.batch(0, 2, torch.Generator().manual_seed(0), slice(1, 2))
    assert batch["tokens"].shape == (1, 1, 1600) and batch["labels"] is None


def test_ardit_learns_from_captions_and_from_sub_folders(folder, tmp_path):
    exported = train(recipe("ardit", folder, tmp_path / "run", *ARDIT))
    model = ARDiT.from_pretrained(exported)
    tokenizer = AutoTokenizer.from_pretrained(exported / "tokenizer")
    assert model.config.symbols == sorted(set("tone 01")) and not model.config.classes
    # 0.2 s are 19 frames for the 6 letters of "tone 0".
    assert model.config.latents_per_token == pytest.approx(19 / 6)
    assert model.latent_std.min() > 0.001
    made = model.generate([torch.Generator()], **model.encode_text(["tone"]), num_steps=1)
    assert tokenizer.decode(made).shape == (1, 1, 13 * 256)
    changes = ("data.text=none", "data.classes=true")
    task = TASKS["ardit"](recipe("ardit", folder, tmp_path, *ARDIT, *changes), torch.device("cpu"))
    batch = task.batch(0, 4, torch.Generator().manual_seed(0), slice(0, 4))
    assert sorted(batch["labels"].tolist()) == [0, 0, 1, 1] and "text" not in batch


def test_recipes_that_mean_nothing(folder, tmp_path):
    device = torch.device("cpu")
    with pytest.raises(InputError, match=r"data\.text is characters"):
        TASKS["ardit"](recipe("ardit", folder, tmp_path, "data.text=letters"), device)
    with pytest.raises(InputError, match="Only the speech pack has phones"):
        TASKS["ardit"](recipe("ardit", folder, tmp_path, *ARDIT, "data.text=phones"), device)


def test_state_spaces_are_not_decayed():
    model = SaShiMi(dim=8, depth=1, pool=(2,), d_state=4)
    decayed, spared = (group["params"] for group in parameter_groups(model, 0.1))
    layer = model.backbone.middle[0].layer
    assert any(p is layer.A_imag for p in spared) and any(p is layer.C for p in decayed)
    assert len(decayed) + len(spared) == len(list(model.parameters()))
