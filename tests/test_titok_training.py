"""Training of TiTok: losses, the joint GAN step, resume, two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torchvision.models import convnext_small

from tessera.modalities.errors import InputError
from tessera.tests.tiny import tiny_pack
from tessera.tokenizers.auto import AutoTokenizer
from tessera.training.checkpoints import newest_checkpoint
from tessera.training.config import load_recipe
from tessera.training.losses import AdversarialLoss, ConvNeXtLoss, PatchDiscriminator
from tessera.training.tasks import TiTokTask
from tessera.training.trainer import train

TINY = {
    "image_size": 32,
    "model.num_latent_tokens": 8,
    "model.codebook_size": 64,
    "model.token_size": 8,
    "model.encoder_dim": 32,
    "model.encoder_depth": 1,
    "model.encoder_heads": 2,
    "model.decoder_dim": 32,
    "model.decoder_depth": 2,
    "model.decoder_heads": 2,
    "discriminator": "{channels: 32, levels: 2, grid: 4}",
    "loss.gan_start": 1,
    "training.precision": "fp32",
    "training.steps": 4,
    "training.batch_size": 4,
    "training.warmup": 2,
    "training.log_every": 1,
    "training.save_every": 2,
    "training.sample_every": 4,
}
VAE = {"model.quantize_mode": "vae", "model.quantizer_options": "{}"}
VAE |= {"loss.weights": "{regularizer: 1e-6, lpips: 1.0, convnext: 0.1, gan: 0.1}"}


@pytest.fixture(scope="module")
def pack(tmp_path_factory) -> Path:
    return tiny_pack(tmp_path_factory.mktemp("pack"))


@pytest.fixture
def recipe_of(pack, tmp_path):
    """(output, **overrides) -> a tiny recipe that writes to ``tmp_path / output``."""

    def make(output: str = "run", **overrides):
        settings = {"data.root": pack, **TINY, **overrides, "output": tmp_path / output}
        return load_recipe("sticker-titok", [f"{key}={value}" for key, value in settings.items()])

    return make


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Everything in the newest checkpoint of a run, running averages of the losses included."""
    folder = newest_checkpoint(run)
    return {
        f"{part}/{key}": value
        for part in ("model", "ema")
        for key, value in load_file(folder / f"{part}.safetensors").items()
    }


def log(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["vq", "vae"])
def test_a_short_run_lowers_the_loss(recipe_of, tmp_path, kind):
    more = {"training.steps": 40, "training.lr": 0.003, "training.batch_size": 8}
    more |= {"training.sample_every": 40, "loss.gan_start": 30, **(VAE if kind == "vae" else {})}
    model = train(recipe_of(**more))
    rows = log(tmp_path / "run")
    first, last = (sum(row["l2"] for row in part) / 5 for part in (rows[:5], rows[-5:]))
    assert last < 0.6 * first
    assert all(("gan" in row) == (row["step"] > 30) for row in rows)
    assert {"perplexity", "vq"} <= rows[0].keys() if kind == "vq" else "kl" in rows[0]
    with Image.open(tmp_path / "run" / "samples" / "000040.png") as grid:
        assert grid.size == (16 * 34 + 2, 2 * 34 + 2)
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert tokenizer.encode(torch.zeros(1, 3, 32, 32)).shape[:2] == (1, 8)


def stop_at(monkeypatch, index: int) -> None:
    original = TiTokTask.batch

    def batch(self, number, *rest):
        if number == index:
            raise InterruptedError
        return original(self, number, *rest)

    monkeypatch.setattr(TiTokTask, "batch", batch)


@pytest.mark.parametrize(
    "options",
    [{}, VAE, {"model.quantizer_options": "{ema: true, revive: true}"}],
    ids=["vq", "vae", "ema"],
)
def test_killed_and_resumed_equals_uninterrupted(recipe_of, tmp_path, monkeypatch, options):
    train(recipe_of("whole", **options))
    torch.manual_seed(99)  # Whatever state a new process begins with.
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(InterruptedError):
            train(recipe_of("parts", **options))
    assert newest_checkpoint(tmp_path / "parts").name == "checkpoint-2"
    before = weights(tmp_path / "parts")
    train(recipe_of("parts", **options), resume=True)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert [key for key in whole if not torch.equal(whole[key], parts[key])] == []
    moved = [key for key in whole if not torch.equal(whole[key], before[key])]
    for part in ("tokenizer.encoder", "tokenizer.decoder", "adversarial.discriminator"):
        assert any(key.startswith(f"model/{part}") for key in moved)
    assert "model/adversarial.real_mean" in moved
    assert ("model/tokenizer.quantizer.usage" in moved) == (options is not VAE)


def test_two_processes_equal_one_with_the_joined_batch(recipe_of, tmp_path):
    """The second step has the discriminator, the revived codes and the running means in it."""
    train(recipe_of("one", **{"training.steps": 2}))
    recipe = recipe_of("two", **{"training.steps": 2})
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "tessera", "train", str(tmp_path / "recipe.yaml")]
    ours = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        command, env=os.environ | ours, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert max(float((one[key] - two[key]).abs().max()) for key in one) < 1e-5


def test_no_discriminator_at_weight_zero(recipe_of, tmp_path):
    no_gan = {"loss.weights": "{regularizer: 1.0, lpips: 1.0, convnext: 0.1, gan: 0.0}"}
    train(recipe_of(**no_gan, **{"training.steps": 2}))
    assert not any("adversarial" in key for key in weights(tmp_path / "run"))


# The losses


def test_joint_backward_gives_each_network_its_own_gradient():
    torch.manual_seed(0)
    loss = AdversarialLoss(PatchDiscriminator(32, 2, 4), lecam=0.5)
    loss.real_mean.fill_(0.3)
    loss.fake_mean.fill_(-0.2)
    real, fake = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32).requires_grad_()
    generator, discriminator, _ = loss.eval()(real, fake)
    (generator + discriminator).backward()

    (expected,) = torch.autograd.grad(-loss.discriminator(fake).mean(), fake)
    assert torch.allclose(fake.grad, expected, atol=1e-7) and fake.grad.any()
    real_logits, fake_logits = loss.discriminator(real), loss.discriminator(fake.detach())
    hinge = (1 - real_logits).relu().mean() + (1 + fake_logits).relu().mean()
    lecam = (real_logits + 0.2).relu().square().mean() + (0.3 - fake_logits).relu().square().mean()
    own = torch.autograd.grad(0.5 * hinge + 0.5 * lecam, list(loss.discriminator.parameters()))
    for parameter, gradient in zip(loss.discriminator.parameters(), own, strict=True):
        assert torch.allclose(parameter.grad, gradient, atol=1e-6) and gradient.any()


def test_running_means_of_the_logits():
    loss = AdversarialLoss(PatchDiscriminator(32, 2, 4), decay=0.9)
    images = torch.randn(2, 3, 32, 32)
    loss(images, images)
    expected = 0.1 * loss.discriminator(images).mean()
    assert torch.allclose(loss.real_mean, expected) and torch.allclose(loss.fake_mean, expected)
    loss.eval()(images, images)
    assert torch.allclose(loss.real_mean, expected)


@pytest.mark.parametrize(("size", "levels", "grid"), [(64, 3, 8), (32, 2, 8), (64, 3, 16)])
def test_discriminator_shapes(size, levels, grid):
    logits = PatchDiscriminator(32, levels, grid)(torch.randn(2, 3, size, size))
    assert logits.shape == (2, 1, grid, grid)


def test_convnext_loss(tmp_path):
    torch.save(convnext_small(weights=None).state_dict(), tmp_path / "convnext.pth")
    loss = ConvNeXtLoss(tmp_path / "convnext.pth").eval()
    images = (torch.rand(1, 3, 32, 32) * 2 - 1).requires_grad_()
    assert loss(images, images) == 0
    loss(images, torch.zeros(1, 3, 32, 32)).backward()
    assert images.grad.any()
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="do not fit ConvNeXt"):
        ConvNeXtLoss(tmp_path / "other.pth")


def test_lpips_wants_larger_pictures(recipe_of):
    with pytest.raises(InputError, match="LPIPS needs pictures of at least 64 pixels, got 32"):
        train(recipe_of(**{"perceptual.lpips": "alexnet.pth"}))
