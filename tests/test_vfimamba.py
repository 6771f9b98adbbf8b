"""VFIMamba: scan orders, sizes, tiles, Nx interpolation, training, published names."""

from __future__ import annotations

import pytest
import torch

from tessera.generators.linear_video.vfimamba import (
    VFIMamba,
    laplacian_loss,
    scan_orders,
    warp,
)
from tessera.modalities.errors import InputError
from tessera.weights.convert.vfimamba import convert_state_dict
from tessera.weights.loading import load_strict
from tessera.weights.registry import list_models, model_info


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return VFIMamba(dim=4, depths=(1, 1, 1, 1, 1)).eval()


def frames(count, height, width, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [torch.rand(1, 3, height, width, generator=random) * 2 - 1 for _ in range(count)]


def test_scan_orders():
    """The frames take turns pixel by pixel; both orders visit every place once."""
    rows, columns = 2, 3
    by_rows, by_columns, read = scan_orders(rows, columns, torch.device("cpu"))
    size = rows * columns
    assert by_rows[:4].tolist() == [0, size, 1, size + 1]
    assert by_columns[:4].tolist() == [0, size, columns, size + columns]
    for order in (by_rows, by_columns, read):
        assert torch.equal(order.sort().values, torch.arange(2 * size))
    # As published: halves of the column-wise sequence, each read as a transposed frame.
    sequence = torch.arange(2 * size)
    halves = sequence.view(2, columns, rows).transpose(1, 2).flatten()
    at_place = torch.empty_like(sequence)
    at_place[by_columns] = sequence
    assert torch.equal(at_place[read][by_rows], halves)


def test_warp_shifts_by_whole_pixels():
    x = torch.arange(20.0).view(1, 1, 4, 5)
    flow = torch.zeros(1, 2, 4, 5)
    flow[:, 0] = 2
    torch.testing.assert_close(warp(x, flow)[..., :3], x[..., 2:])
    torch.testing.assert_close(warp(x, flow)[..., 3:], x[..., 4:].expand(-1, -1, -1, 2))


@pytest.mark.parametrize("size", [(1, 1), (33, 70), (32, 64)])
def test_any_size(model, size):
    first, last = frames(2, *size)
    middle = model.interpolate(first, last)
    assert middle.shape == first.shape
    assert middle.abs().max() <= 1
    halved = model.interpolate(first, last, flow_scale=0.5, tta=True)
    assert halved.shape == first.shape


def test_half_precision(model):
    first, last = frames(2, 32, 32)
    half = VFIMamba(**dict(model.config)).eval()
    half.load_state_dict(model.state_dict())
    middle = half.to(torch.bfloat16).interpolate(first, last)
    assert middle.dtype == torch.float32
    assert (middle - model.interpolate(first, last)).abs().mean() < 0.1


def test_batch_items_do_not_mix(model):
    first, last = frames(2, 32, 32), frames(2, 32, 32, seed=1)
    both = model.interpolate(torch.cat(first), torch.cat(last))
    for i in range(2):
        alone = model.interpolate(first[i], last[i])
        torch.testing.assert_close(both[i : i + 1], alone, atol=1e-4, rtol=0)


def test_colours_are_reversed_for_the_network(model):
    first, last = frames(2, 32, 32)
    images = (torch.cat([first.flip(1), last.flip(1)], dim=1) + 1) / 2
    with torch.no_grad():
        expected = model.predict(images).flip(1) * 2 - 1
    torch.testing.assert_close(model.interpolate(first, last), expected)


def test_tiles(model):
    """One tile over everything changes nothing; tiles of a frame without details agree."""
    first, last = frames(2, 64, 128)
    whole = model.interpolate(first, last, tile=128, overlap=16)
    images = (torch.cat([first.flip(1), last.flip(1)], dim=1) + 1) / 2
    with torch.no_grad():
        expected = model.predict(images, local="reduced").flip(1) * 2 - 1
    torch.testing.assert_close(whole, expected)
    saved = model.refinement.conv.weight.detach().clone()
    try:
        # Without what the U-Net adds, tiles must join to the frames merged by the whole's motion.
        torch.nn.init.zeros_(model.refinement.conv.weight)
        with torch.no_grad():
            motion, _ = model.motion(images, 0.5, 0.5, "reduced")
        tiled = model.interpolate(first, last, flow_scale=0.5, tile=32, overlap=8)
        torch.testing.assert_close(tiled, motion.merged.clamp(0, 1).flip(1) * 2 - 1)
    finally:
        model.refinement.conv.weight.data.copy_(saved)


@pytest.mark.parametrize(("factor", "times"), [(2, [0.5]), (3, [1 / 3, 2 / 3])])
def test_stream(model, factor, times):
    clip = frames(3, 32, 32)
    seen = []
    out = list(model.stream(clip, factor, callback=seen.append))
    assert len(out) == factor * 2 + 1
    assert seen == list(range(1, factor * 2 + 1))
    for i, frame in enumerate(clip):
        assert out[factor * i] is frame
    for i, time in enumerate(times, start=1):
        torch.testing.assert_close(out[i], model.interpolate(clip[0], clip[1], time))


def test_powers_of_two_halve_intervals(model):
    clip = frames(2, 32, 32)
    out = list(model.stream(clip, 4))
    middle = model.interpolate(*clip)
    torch.testing.assert_close(out[2], middle)
    torch.testing.assert_close(out[1], model.interpolate(clip[0], middle))
    torch.testing.assert_close(out[3], model.interpolate(middle, clip[1]))


def test_laplacian_loss():
    x, y = torch.rand(2, 1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert laplacian_loss(x, x) == 0
    assert laplacian_loss(x, y) > 0
    # A constant difference has no details: only the last level sees it.
    torch.testing.assert_close(laplacian_loss(x + 0.25, x), torch.tensor(0.25))


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    model = VFIMamba(dim=4, depths=(1, 1, 1, 1, 1))
    first, target, last = frames(3, 32, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(6):
        loss, parts = model(first, last, target, torch.tensor([0.5]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert set(parts) == {"laplacian", "stages", "psnr"}
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    assert not unused
    with torch.no_grad():
        plain, parts = model(first, last, target)
        weighed, _ = model(first, last, target, decibels=0.1)
        pulled, told = model(first, last, target, flow=torch.zeros(1, 4, 32, 32), pull=0.1)
    torch.testing.assert_close(weighed, plain - 0.1 * parts["psnr"])
    assert told["pixels"] > 0 and pulled > plain


def test_published_names():
    """Files carry the prefix of a wrapper, and tables that nothing reads."""
    value = torch.zeros(4 * 2)
    published = {
        "module.feature_bone.block3.blocks.0.self_attention.Ds": value,
        "module.feature_bone.block3.attn_mask": value,
        "other": value,
    }
    state = convert_state_dict(published, {})
    assert {name: list(v.shape) for name, v in state.items()} == {
        "features.blocks.3.0.scan.D": [4, 2]
    }
    with pytest.raises(InputError, match="unet2"):
        convert_state_dict({"unet2.conv.weight": value}, {})
    with pytest.raises(InputError, match="missing"):
        load_strict(VFIMamba(dim=4, depths=(1, 1, 1, 1, 1)), state)


def test_registry():
    assert list_models(task="frame-interpolation", shipped=False) == ["vfimamba-s", "vfimamba"]
    info = model_info("MCG-NJU/VFIMamba_S")
    with torch.device("meta"):
        model = info.model_class()(**info.config)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == info.parameters


def test_save_and_load(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = VFIMamba.from_pretrained(tmp_path)
    first, last = frames(2, 32, 32)
    torch.testing.assert_close(again.interpolate(first, last), model.interpolate(first, last))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timestep": 1.0}, "between 0 and 1, got 1.0"),
        ({"tile": 50}, "got 50"),
        ({"flow_scale": 0.3}, "got 0.3"),
        ({"frame1": torch.zeros(1, 3, 32, 64)}, "same|shape"),
    ],
)
def test_errors(model, change, message):
    first, last = frames(2, 32, 32)
    with pytest.raises(InputError, match=message):
        model.interpolate(**{"frame0": first, "frame1": last, **change})


def test_clip_errors(model):
    with pytest.raises(InputError, match="two frames"):
        list(model.stream(frames(1, 32, 32)))
    with pytest.raises(InputError, match="got 1"):
        list(model.stream(frames(2, 32, 32), 1))
    with pytest.raises(InputError, match="33x32"):
        model(*[torch.zeros(1, 3, 32, 33)] * 3)
