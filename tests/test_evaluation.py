from __future__ import annotations

import json
import random

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from tessera.evaluation.evaluate import evaluate, sample_names
from tessera.evaluation.metrics import (
    diversity,
    frechet_distance,
    load_lpips,
    psnr,
    retrieval_ranks,
    ssim,
)
from tessera.modalities.datasets import StickerPack, open_dataset
from tessera.modalities.errors import InputError
from tessera.tests.tiny import tiny_pack, tiny_pipeline, tiny_tokenizer


def test_psnr_of_a_known_error():
    reference = torch.zeros(2, 3, 32, 32)
    image = reference.clone()
    image[0] += 0.2  # A tenth of the range is 20 dB.
    image[1] += 0.02
    assert torch.allclose(psnr(image, reference), torch.tensor([20.0, 40.0]), atol=1e-3)
    assert psnr(reference, reference).tolist() == [100, 100]
    # What a screen cannot show is no error.
    white = torch.ones(1, 3, 32, 32)
    assert psnr(white * 1.5, white).item() == 100


def test_ssim_of_constant_pictures_is_its_luminance_term():
    a, b, c1 = 0.5, -0.25, (0.01 * 2) ** 2
    first, second = torch.full((3, 3, 32, 32), a), torch.full((3, 3, 32, 32), b)
    expected = (2 * a * b + c1) / (a * a + b * b + c1)
    assert torch.allclose(ssim(first, second), torch.full((3,), expected), atol=1e-4)
    noise = torch.rand(1, 3, 32, 32) * 2 - 1
    assert ssim(noise, noise).shape == (1,)
    assert ssim(noise, noise).item() == pytest.approx(1)


def exact_gaussian(mean: torch.Tensor, root: torch.Tensor, count: int) -> torch.Tensor:
    """Samples whose mean is ``mean`` and whose covariance is ``root @ root.T``, both exactly."""
    dim = len(mean)
    white = torch.randn(count, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    white = torch.linalg.qr(white - white.mean(0)).Q * (count - 1) ** 0.5
    return white @ root.T + mean


def test_frechet_distance_of_two_gaussians():
    mean = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    deviations = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)
    rotation = torch.linalg.qr(torch.arange(9.0).view(3, 3).double() + torch.eye(3)).Q
    first = exact_gaussian(mean, rotation @ torch.diag(deviations), 50)
    second = exact_gaussian(mean + 2, rotation @ torch.diag(deviations + 1), 80)
    # With shared axes: |m1 - m2|^2 plus the squared differences of the deviations.
    assert frechet_distance(first, second) == pytest.approx(3 * 4 + 3 * 1)
    assert frechet_distance(second, first) == pytest.approx(15)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_with_different_axes_matches_the_matrix_square_root():
    generator = torch.Generator().manual_seed(1)
    first = torch.randn(40, 6, dtype=torch.float64, generator=generator)
    second = first.flip(1) * torch.arange(1, 7) + 1
    product = first.T.cov() @ second.T.cov()
    root = torch.linalg.eigvals(product).real.sqrt().sum()
    means = (first.mean(0) - second.mean(0)).square().sum()
    expected = means + first.T.cov().trace() + second.T.cov().trace() - 2 * root
    assert frechet_distance(first, second) == pytest.approx(expected.item())


def test_frechet_distance_of_fewer_pictures_than_dimensions():
    features = torch.randn(5, 64, generator=torch.Generator().manual_seed(2))
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(features, features + 0.5) == pytest.approx(16, rel=1e-5)
    with pytest.raises(InputError, match="at least 2"):
        frechet_distance(features[:1], features)


def test_diversity():
    same = torch.tensor([[1.0, 0.0]]).expand(4, 2)
    axes = torch.eye(4)
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert diversity(same[None]) == pytest.approx(0)
    assert diversity(axes[None]) == pytest.approx(1)
    assert diversity(opposite[None]) == pytest.approx(2)
    assert diversity(torch.stack([axes[:2, :2], opposite])) == pytest.approx(1.5)


def test_rank_of_a_planted_match():
    candidates = torch.eye(6)
    queries = torch.tensor([[0.9, 0.1, 0, 0, 0, 0], [0.9, 0.5, 0.7, 0, 0, 0]])
    assert retrieval_ranks(queries, candidates, torch.tensor([0, 1])).tolist() == [1, 3]
    # Features that tell nothing must not rank first.
    assert retrieval_ranks(torch.ones(1, 6), candidates, torch.tensor([2])).tolist() == [6]


@pytest.fixture
def pack(tmp_path):
    return tiny_pack(tmp_path / "pack")


def test_one_name_is_drawn_of_each_concept(pack):
    dataset = StickerPack(pack)
    joined = ("blue circle", "blue square", "blue ring")
    for i, sticker in enumerate(dataset.stickers):
        if sticker.name in joined:
            dataset.stickers[i] = type(sticker)(**{**vars(sticker), "base": "blue"})
    names = sample_names(dataset, 100, random.Random(0))
    assert len(names) == 19 - 2
    assert sum(name in names for name in joined) == 1
    for name, pictures in names.items():
        assert {dataset.name(i) for i in pictures} == {name}
        assert len(pictures) == 2
    assert len(sample_names(dataset, 5, random.Random(0))) == 5


SETTINGS = {"names": 6, "pictures": 2, "seeds": 3, "repeated": 2, "batch_size": 4}


def test_evaluate_a_pipeline(pack, tmp_path, capsys):
    out = tmp_path / "report.json"
    report = evaluate(tiny_pipeline(), pack, out=out, **SETTINGS)
    assert json.loads(out.read_text("utf8")) == report
    shown = capsys.readouterr()
    assert not shown.out
    assert "Reconstruction of 2 pictures (test), 32x32" in shown.err

    reconstruction = report["reconstruction"]
    assert reconstruction["split"] == "test"
    assert [row["tokens"] for row in reconstruction["by_tokens"]] == [1, 2, 4, 8, 16]
    assert all(0 < row["psnr"] < 30 and -1 < row["ssim"] < 1 for row in reconstruction["by_tokens"])

    retrieval = report["generation"]["retrieval"]
    assert {split: row["names"] for split, row in retrieval.items()} == {"train": 6, "test": 1}
    # One test name alone would always be the best: it competes with training names.
    assert [row["candidates"] for row in retrieval.values()] == [6, 6]
    for row in retrieval.values():
        for kind in ("generated", "real"):
            assert 0 <= row[kind]["top_1"] <= row[kind]["top_5"] <= 1
            assert 1 <= row[kind]["mean_rank"] <= 6

    spread = report["generation"]["diversity"]
    assert spread["names"] == 2 and spread["seeds"] == 3
    assert spread["generated"] > 0
    assert spread["real"] is None  # The pack has two pictures of each name.
    distance = report["generation"]["frechet"]
    assert distance["pictures"] == distance["references"] == 6
    assert distance["generated"] > distance["real"] > 0


def test_evaluation_repeats_and_does_not_depend_on_the_batch(pack):
    pipeline = tiny_pipeline()
    first = evaluate(pipeline, pack, **SETTINGS)
    again = evaluate(pipeline, pack, **{**SETTINGS, "batch_size": 1})
    other = evaluate(pipeline, pack, **SETTINGS, seed=100)
    assert again["generation"]["retrieval"] == first["generation"]["retrieval"]
    assert again["generation"]["frechet"]["generated"] == pytest.approx(
        first["generation"]["frechet"]["generated"], rel=1e-3
    )
    assert other["generation"]["frechet"] != first["generation"]["frechet"]


def test_a_perfect_model_reaches_the_ceiling(pack, monkeypatch):
    """A pipeline that draws the real picture of a prompt, and a CLIP that knows it by its name."""
    pipeline = tiny_pipeline()
    train, test = StickerPack(pack), StickerPack(pack, splits=("test",))
    names = sorted({train.name(i) for i in range(len(train))} | {test.name(0)})

    def stream(prompts, generator, output_type):
        assert output_type == "pt" and len(generator) == len(prompts)
        yield type("Partial", (), {"step": 1, "images": coded([names.index(p) for p in prompts])})()

    def coded(positions):
        return torch.tensor(positions).view(-1, 1, 1, 1).expand(-1, 3, 32, 32) / len(names)

    def features(positions):
        return F.one_hot(torch.tensor(positions), len(names)).float()

    def read(dataset, indices, size):
        return coded([names.index(dataset.name(i)) for i in indices])

    monkeypatch.setattr(pipeline, "stream", stream)
    monkeypatch.setattr(
        pipeline.clip,
        "encode_image",
        lambda x: features((x[:, 0, 0, 0] * len(names)).round().int().tolist()),
    )
    monkeypatch.setattr(
        pipeline.clip, "encode_text", lambda texts: features([names.index(t) for t in texts])
    )
    monkeypatch.setattr("tessera.evaluation.evaluate._read_pictures", read)
    generation = evaluate(pipeline, pack, **SETTINGS)["generation"]
    for row in generation["retrieval"].values():
        perfect = {"top_1": 1, "top_5": 1, "mean_rank": 1}
        assert row["generated"] == row["real"] == perfect
    assert generation["diversity"]["generated"] == 0
    assert generation["frechet"]["generated"] == pytest.approx(0, abs=1e-9)


def test_evaluate_a_tokenizer_on_a_folder(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for colour in ("red", "blue", "green"):
        Image.new("RGB", (50, 40), colour).save(folder / f"{colour}.png")
    report = evaluate(tiny_tokenizer(), folder, pictures=10)
    assert "generation" not in report
    assert report["reconstruction"]["split"] == "all"
    assert report["reconstruction"]["pictures"] == 3


def test_names_of_a_folder_are_its_captions(tmp_path):
    for colour in ("red", "blue", "green"):
        Image.new("RGB", (50, 40), colour).save(tmp_path / f"{colour}_wall.png")
    report = evaluate(tiny_pipeline(), tmp_path, **SETTINGS)["generation"]
    assert report["retrieval"]["all"]["names"] == 3
    assert report["frechet"]["real"] is None
    assert report["frechet"]["references"] == 3
    names = sample_names(open_dataset(tmp_path), 9, random.Random(0))
    assert sorted(names) == ["blue wall", "green wall", "red wall"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": 1}, "names must be at least 2, got 1"),
        ({"seeds": 1}, "seeds must be at least 2"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"seed": -5}, "got -5"),
        ({"out": "missing/report.json"}, "does not exist"),
        ({"lpips_backbone": "missing.pth"}, "missing.pth"),
        ({"model": "no-such-model"}, "no-such-model"),
        ({"data": "no-such-folder"}, "no-such-folder"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_no_file(
    pack, tmp_path, monkeypatch, options, message
):
    monkeypatch.chdir(tmp_path)
    arguments = {"model": tiny_tokenizer(), "data": pack, "out": "report.json", **options}
    with pytest.raises(InputError, match=message):
        evaluate(**arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["pack"]


def test_lpips_is_the_published_formula(tmp_path):
    """Against the formula written out, over a random backbone (the trained one is a download)."""
    import torchmetrics.functional.image.lpips as torchmetrics_lpips
    from torchvision.models import alexnet

    torch.manual_seed(0)
    backbone = alexnet(weights=None).eval()
    path = tmp_path / "alexnet.pth"
    torch.save(backbone.state_dict(), path)
    folder = torchmetrics_lpips.__file__.removesuffix("lpips.py")
    heads = torch.load(f"{folder}lpips_models/alex.pth", map_location="cpu", weights_only=True)
    mean, std = torch.tensor([-0.03, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.45])

    def stages(x):
        x = (x - mean[:, None, None]) / std[:, None, None]
        for position, layer in enumerate(backbone.features):
            x = layer(x)
            if position in (1, 4, 7, 9, 11):
                yield F.normalize(x, dim=1)

    first, second = torch.rand(2, 3, 3, 64, 64) * 2 - 1
    expected = 0
    for number, (a, b) in enumerate(zip(stages(first), stages(second), strict=True)):
        weight = heads[f"lin{number}.model.1.weight"]
        expected = expected + F.conv2d((a - b).square(), weight).mean((1, 2, 3))
    model = load_lpips(path)
    assert torch.allclose(model(first, second).flatten(), expected, atol=1e-6)
    assert model(first, first).flatten().tolist() == [0, 0, 0]


def test_lpips_refuses_other_files_and_small_pictures(pack, tmp_path):
    from torchvision.models import alexnet

    path = tmp_path / "backbone.pth"
    for content in (b"", b"not weights", b"PK\x03\x04 broken"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"backbone\.pth"):
            load_lpips(path)
    torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(InputError, match=r"backbone\.pth"):
        load_lpips(path)
    torch.save(alexnet(weights=None).state_dict(), path)
    with pytest.raises(InputError, match="64 pixels or more, this model has 32"):
        evaluate(tiny_tokenizer(), pack, lpips_backbone=path)
