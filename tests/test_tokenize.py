"""Token shards: written once, resumed, by two processes, read by training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile

import pytest
import torch
from typer.testing import CliRunner

from tessera.app.commands import cli
from tessera.modalities.datasets import open_dataset
from tessera.modalities.errors import InputError
from tessera.modalities.image import fit_image, to_tensor
from tessera.modalities.token_shards import TokenShards
from tessera.tests.tiny import tiny_clip, tiny_pack, tiny_tokenizer
from tessera.training import tokenize
from tessera.training.config import load_recipe
from tessera.training.tasks import FlexARTask
from tessera.training.tokenize import tokenize_dataset


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    tiny_pack(folder / "pack")
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    tiny_clip().save_pretrained(folder / "clip")
    return folder


def contents(folder) -> dict[str, bytes]:
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            found |= {m.name: tar.extractfile(m).read() for m in tar}
    return found


def test_shards_hold_the_tokens_and_captions(parts, tmp_path):
    out = tmp_path / "tokens"
    written = tokenize_dataset(parts / "pack", out, parts / "tokenizer", shard_size=16)
    dataset = open_dataset(parts / "pack")
    assert written == 3 and len(dataset) == 38
    assert sorted(p.name for p in out.iterdir()) == [
        "tokens-000000.tar",
        "tokens-000001.tar",
        "tokens-000002.tar",
        "tokens.json",
    ]
    shards = TokenShards(out)
    assert len(shards) == 38
    model = tiny_tokenizer()
    for i in (0, 15, 16, 37):
        picture = to_tensor(fit_image(dataset.image(i), 32, background="white"))
        assert torch.equal(shards.tokens(i), model.encode(picture)[0])
        assert shards.captions(i) == dataset.captions(i)
        assert shards.name(i) == dataset.name(i)


def test_a_stopped_run_goes_on(parts, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "tokens"
    arguments = (parts / "pack", out, parts / "tokenizer")
    tokenize_dataset(parts / "pack", whole, parts / "tokenizer", shard_size=16)
    write = tokenize.write_shard

    def stop_in_the_second(path, samples):
        if path.name == "tokens-000001.tar":
            next(iter(samples))
            raise KeyboardInterrupt
        write(path, samples)

    monkeypatch.setattr(tokenize, "write_shard", stop_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        tokenize_dataset(*arguments, shard_size=16)
    assert [p.name for p in out.glob("*.tar")] == ["tokens-000000.tar"]
    with pytest.raises(InputError, match=r"tokens-000001\.tar.* is missing"):
        TokenShards(out)
    monkeypatch.setattr(tokenize, "write_shard", write)
    assert tokenize_dataset(*arguments, shard_size=16) == 2
    assert contents(out) == contents(whole)
    assert tokenize_dataset(*arguments, shard_size=16) == 0


def test_two_processes_share_the_shards(parts, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "tokens"
    tokenize_dataset(parts / "pack", whole, parts / "tokenizer", shard_size=16)
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\nfrom tessera.training.tokenize import tokenize_dataset\n"
        "tokenize_dataset(*sys.argv[1:], shard_size=16)\n",
        encoding="utf8",
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-addr", "127.0.0.1", "--master-port", "29571", str(script)]
    command += [str(parts / "pack"), str(out), str(parts / "tokenizer")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    assert contents(out) == contents(whole)


def test_other_arguments_and_other_folders_are_refused(parts, tmp_path):
    out = tmp_path / "tokens"
    tokenize_dataset(parts / "pack", out, parts / "tokenizer", shard_size=16)
    with pytest.raises(InputError, match="another tokenizer or shard size"):
        tokenize_dataset(parts / "pack", out, parts / "tokenizer", shard_size=10)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").touch()
    with pytest.raises(InputError, match="holds something else"):
        tokenize_dataset(parts / "pack", tmp_path / "other", parts / "tokenizer")
    with pytest.raises(InputError, match="batch_size must be at least 1, got 0"):
        tokenize_dataset(parts / "pack", out, parts / "tokenizer", batch_size=0)
    (out / "tokens-000001.tar").write_bytes(b"no tar")
    with pytest.raises(InputError, match="not a plain"):
        TokenShards(out)
    (out / "tokens.json").write_text("{}", encoding="utf8")
    with pytest.raises(InputError, match="damaged"):
        TokenShards(out)


def test_training_reads_shards(parts, tmp_path):
    out = tmp_path / "tokens"
    tokenize_dataset(parts / "pack", out, parts / "tokenizer", shard_size=16)
    overrides = [
        f"tokenizer={parts / 'tokenizer'}",
        f"clip={parts / 'clip'}",
        f"data.root={out}",
        "model={dim: 32, depth: 1, heads: 2, mlp_hidden: 48}",
        "loss.lengths=[8, 16]",
        "loss.weights=[1, 1]",
    ]
    task = FlexARTask(load_recipe("sticker-generator", overrides), torch.device("cpu"))
    assert torch.equal(task.tokens[5], TokenShards(out).tokens(5))
    batch = task.batch(0, 4, torch.Generator().manual_seed(0), slice(0, 4))
    loss, _ = task.model(**batch)
    assert loss.isfinite()
    index = json.loads((out / "tokens.json").read_text(encoding="utf8"))
    (out / "tokens.json").write_text(json.dumps({**index, "vocab_size": 99}), encoding="utf8")
    with pytest.raises(InputError, match="have vocab_size 99, the tokenizer 512"):
        FlexARTask(load_recipe("sticker-generator", overrides), torch.device("cpu"))


def test_the_command_line_writes_shards_and_refuses_bad_folders(parts, tmp_path):
    runner = CliRunner()
    arguments = ["tokenize", str(parts / "pack"), str(tmp_path / "tokens")]
    done = runner.invoke(cli, [*arguments, "--tokenizer", str(parts / "tokenizer")])
    assert done.exit_code == 0 and done.stdout.strip() == str(tmp_path / "tokens")
    assert len(TokenShards(tmp_path / "tokens")) == 38
    missing = runner.invoke(cli, ["tokenize", "no-such-folder", str(tmp_path / "other")])
    assert missing.exit_code == 2 and not (tmp_path / "other").exists()
