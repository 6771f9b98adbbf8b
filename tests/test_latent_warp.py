"""LatentWarp over a tiny random pipeline of diffusers."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    StableDiffusionImg2ImgPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)

from tessera.modalities.errors import InputError
from tessera.pipelines.latent_warp import (
    CrossFrameAttention,
    LatentWarp,
    block_matching_flow,
    chain,
    consistency_mask,
    raft_flow,
    to_latent_size,
    warp,
)

SIZE = 32


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=8,
    )
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    pipe = StableDiffusionImg2ImgPipeline(
        vae, None, None, unet, scheduler, None, None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def settings(**changes):
    random = torch.Generator().manual_seed(1)
    return {
        "prompt_embeds": torch.randn(1, 3, 8, generator=random),
        "negative_prompt_embeds": torch.randn(1, 3, 8, generator=random),
        "num_inference_steps": 4,
        "strength": 0.5,
        "guidance_scale": 2.0,
        **changes,
    }


def clip(frames, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.rand(1, 3, frames, SIZE, SIZE, generator=random) * 2 - 1


def no_motion(a, b):
    return torch.zeros(len(a), 2, *a.shape[2:])


def nothing_fits(a, b):
    """Flows that lead out of the picture."""
    return torch.full((len(a), 2, *a.shape[2:]), 1000.0)


def test_warp_follows_the_flow():
    """Pixels moved right by 8 k since the frame before: latents move right by k, exactly."""
    latents = torch.randn(1, 4, 4, 8, generator=torch.Generator().manual_seed(0))
    flow = torch.zeros(1, 2, 32, 64)
    flow[:, 0] = -16
    small, mask = to_latent_size(flow, torch.ones(1, 1, 32, 64, dtype=torch.bool), 8)
    assert mask.all()
    torch.testing.assert_close(warp(latents, small)[..., 2:], latents[..., :-2], atol=0, rtol=0)


def test_mask_of_latents_is_the_majority():
    mask = torch.zeros(1, 1, 8, 16, dtype=torch.bool)
    mask[..., :4] = True
    mask[..., 8:11] = True
    assert to_latent_size(torch.zeros(1, 2, 8, 16), mask, 8)[1].tolist() == [[[[True, False]]]]


def test_consistency_of_a_moving_square():
    """What the square uncovers was not to be seen before; nothing else is doubtful."""
    before, now = torch.zeros(2, 1, 16, 16).bool()
    before[:, 4:8, 2:6] = True
    now[:, 4:8, 6:10] = True
    flow, back = torch.zeros(2, 1, 2, 16, 16)
    flow[:, 0] = torch.where(now, -4.0, 0.0)
    back[:, 0] = torch.where(before, 4.0, 0.0)
    mask = consistency_mask(flow, back)[0, 0]
    uncovered = (before & ~now)[0]
    assert torch.equal(mask, ~uncovered)
    flow[:, 1] = -1
    assert not consistency_mask(flow, torch.zeros_like(flow))[:, :, 0].any()


def test_chain_carries_the_first_frame():
    latents = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    flows, masks = torch.zeros(2, 2, 4, 4), torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    masks[..., :2] = True
    out = chain(latents, flows, masks)
    assert torch.equal(out[..., :2], latents[:1, ..., :2].expand(3, -1, -1, -1))
    assert torch.equal(out[..., 2:], latents[..., 2:])


def test_block_matching_finds_a_shift():
    random = torch.Generator().manual_seed(0)
    picture = torch.rand(1, 3, 16, 16, generator=random)
    picture = torch.nn.functional.interpolate(picture, (64, 64), mode="bicubic")
    flow = block_matching_flow(picture, picture.roll((-3, 5), (2, 3)))
    middle = flow[..., 16:-16, 16:-16]
    expected = torch.tensor([5.0, -3.0]).view(1, 2, 1, 1).expand_as(middle)
    assert (middle == expected).float().mean() > 0.95


def test_raft_without_download(tmp_path):
    from torchvision.models.optical_flow import raft_small

    path = tmp_path / "raft.pth"
    torch.save(raft_small(weights=None).state_dict(), path)
    frames = torch.rand(1, 3, 128, 128) * 2 - 1
    assert raft_flow(path)(frames, frames).shape == (1, 2, 128, 128)
    with pytest.raises(InputError, match="no weight file"):
        raft_flow(tmp_path / "other.pth")


@pytest.mark.parametrize("chunk_size", [8, 2])
def test_a_still_video_stays_still(pipe, chunk_size):
    """Zero flow everywhere reliable: every frame is the first one, over chunks too."""
    out = LatentWarp(pipe, no_motion)(clip(4), warp_until=1, chunk_size=chunk_size, **settings())
    assert out.shape == (1, 3, 4, SIZE, SIZE)
    torch.testing.assert_close(out, out[:, :, :1].expand_as(out), atol=1e-4, rtol=0)
    free = LatentWarp(pipe, no_motion)(clip(4), warp_until=0, chunk_size=chunk_size, **settings())
    assert not torch.allclose(free[:, :, 1:], out[:, :, 1:], atol=1e-2)


def test_without_reliable_flow_nothing_is_warped(pipe):
    never = LatentWarp(pipe, no_motion)(clip(3), warp_until=0, **settings())
    nowhere = LatentWarp(pipe, nothing_fits)(clip(3), warp_until=1, **settings())
    torch.testing.assert_close(never, nowhere)


def test_attention_looks_across_frames(pipe):
    """The first frame is as it were alone; another frame depends on those before it, not after it."""
    edit = LatentWarp(pipe, no_motion)
    video = clip(3)
    out = edit(video, warp_until=0, **settings())
    alone = edit(video[:, :, :1], warp_until=0, **settings())
    torch.testing.assert_close(out[:, :, :1], alone, atol=1e-4, rtol=0)
    other = torch.cat([video[:, :, :2], clip(1, seed=9)], dim=2)
    changed = edit(other, warp_until=0, **settings())
    torch.testing.assert_close(changed[:, :, :2], out[:, :, :2], atol=1e-4, rtol=0)
    first = torch.cat([clip(1, seed=9), video[:, :, 1:]], dim=2)
    assert not torch.allclose(
        edit(first, warp_until=0, **settings())[:, :, 2], out[:, :, 2], atol=1e-3
    )


def test_pipeline_is_left_as_it_was(pipe):
    processors = dict(pipe.unet.attn_processors)
    prepare = pipe.prepare_latents
    edit = LatentWarp(pipe, no_motion)
    edit(clip(2), **settings())
    with pytest.raises(ValueError, match="strength"):
        edit(clip(2), **settings(strength=2.0))
    assert pipe.unet.attn_processors == processors
    assert pipe.prepare_latents == prepare
    assert not any(isinstance(p, CrossFrameAttention) for p in pipe.unet.attn_processors.values())


def test_stream(pipe):
    """Chunks come as they are done; each goes on from the last frame of the one before."""
    counts, calls = [], []

    def flow(a, b):
        calls.append(len(a))
        return no_motion(a, b)

    edit = LatentWarp(pipe, flow)
    frames = list(
        edit.stream(clip(5).unbind(2), chunk_size=3, callback=counts.append, **settings())
    )
    assert [list(frame.shape) for frame in frames] == [[1, 3, SIZE, SIZE]] * 5
    assert counts == [3, 5]
    assert calls == [2, 2, 2, 2]
    exact = list(edit.stream(clip(3).unbind(2), chunk_size=3, **settings()))
    assert len(exact) == 3


def test_conditions_are_made_of_the_frames_of_a_chunk(pipe):
    seen = []

    def make(frames):
        seen.append(frames)
        return None

    video = clip(3)
    LatentWarp(pipe, no_motion)(
        video, chunk_size=2, conditions={"ip_adapter_image": make}, **settings()
    )
    assert torch.equal(torch.cat([seen[0], seen[1][1:]]), video[0].transpose(0, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"warp_until": 2.0}, "got 2.0"),
        ({"chunk_size": 1}, "got 1"),
        ({"video": torch.zeros(2, 3, 4, 8, 8)}, r"\[2, 3, 4, 8, 8\]"),
    ],
)
def test_errors(pipe, change, message):
    with pytest.raises(InputError, match=message):
        LatentWarp(pipe, no_motion)(**{"video": clip(2), **settings(), **change})


def test_unfit_pipelines(pipe):
    unet = UNet2DModel(
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=8,
    )
    with pytest.raises(InputError, match="image"):
        LatentWarp(DDIMPipeline(unet, DDIMScheduler()), no_motion)
    frames = [torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 64)]
    with pytest.raises(InputError, match="one size"):
        list(LatentWarp(pipe, no_motion).stream(frames, **settings()))
