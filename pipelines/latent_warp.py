"""LatentWarp: Consistent Diffusion Latents for Zero-Shot Video-to-Video Translation (Bao et al., 2023).

Paper: arXiv 2311.00353. No code was published; what the paper leaves open is decided here. No weights of
its own: it changes how an image-to-image pipeline of diffusers denoises the frames of a video.

In the first part of the steps the latents of every frame are replaced, where the source video's optical
flow is reliable, by those of the frame before, warped by the flow. So corresponding places ask the same
of the attention, whose keys and values are those of the first frame and of the frame before.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ..modalities.errors import InputError
from ..weights.loading import load_strict, read_state_dict

Flow = Callable[[Tensor, Tensor], Tensor]


def warp(x: Tensor, flow: Tensor, mode: str = "nearest") -> Tensor:
    """Read ``[B, C, H, W]`` at ``p + flow(p)``, beyond the border as at the border.

    Args:
        flow: ``[B, 2, H, W]``, (dx, dy) in pixels of x.
        mode: "nearest", which keeps the variance of noisy latents, or "bilinear".
    """
    height, width = x.shape[2:]
    columns = torch.arange(width, device=x.device) + flow[:, 0]
    rows = torch.arange(height, device=x.device)[:, None] + flow[:, 1]
    grid = torch.stack(
        [columns * (2 / max(width - 1, 1)) - 1, rows * (2 / max(height - 1, 1)) - 1], dim=-1
    )
    return F.grid_sample(x, grid.to(x.dtype), mode, padding_mode="border", align_corners=True)


def consistency_mask(flow: Tensor, back: Tensor) -> Tensor:
    """Pixels that a flow and its inverse agree on: bool ``[B, 1, H, W]``.

    ``|F + G(p + F)|^2 <= 0.01 (|F|^2 + |G(p + F)|^2) + 0.5``, and p + F inside the picture (Sundaram et
    al., ECCV 2010).

    Args:
        flow, back: ``[B, 2, H, W]``, from one picture to the other and from there.
    """
    height, width = flow.shape[2:]
    returned = warp(back, flow, "bilinear")
    error = (flow + returned).square().sum(1, keepdim=True)
    size = flow.square().sum(1, keepdim=True) + returned.square().sum(1, keepdim=True)
    x = torch.arange(width, device=flow.device) + flow[:, :1]
    y = torch.arange(height, device=flow.device)[:, None] + flow[:, 1:]
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    return (error <= 0.01 * size + 0.5) & inside


def to_latent_size(flow: Tensor, mask: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Flow and mask of pixels -> of latents: mean flow of ``factor x factor`` pixels, in latent pixels;
    True where at least half of them are consistent."""
    small = F.avg_pool2d(flow, factor) / factor
    return small, F.avg_pool2d(mask.float(), factor) >= 0.5


def block_matching_flow(a: Tensor, b: Tensor, radius: int = 8, window: int = 7) -> Tensor:
    """Optical flow without weights: the shift, in whole pixels up to the radius, that changes the
    window around a pixel least. For tests and quick trials: `raft_flow` is better.

    Args:
        a, b: ``[B, 3, H, W]``.

    Returns:
        ``[B, 2, H, W]``, (dx, dy): where each pixel of ``a`` is found in ``b``.
    """
    height, width = a.shape[2:]
    padded = F.pad(b, [radius] * 4, mode="replicate")
    shifts = [(x, y) for y in range(-radius, radius + 1) for x in range(-radius, radius + 1)]
    flow = torch.zeros_like(a[:, :2])
    least = torch.full_like(a[:, :1], torch.inf)
    for x, y in sorted(shifts, key=lambda shift: shift[0] ** 2 + shift[1] ** 2):
        moved = padded[..., radius + y :, radius + x :][..., :height, :width]
        difference = (a - moved).abs().mean(1, keepdim=True)
        border = F.pad(difference, [window // 2] * 4, mode="replicate")
        cost = F.avg_pool2d(border, window, stride=1)
        better = cost < least
        least = torch.where(better, cost, least)
        flow = torch.where(better, flow.new_tensor([x, y]).view(1, 2, 1, 1), flow)
    return flow


def raft_flow(weights: str | Path | None = None, device: str | torch.device = "cpu") -> Flow:
    """RAFT (arXiv 2003.12039) of torchvision, the small one, as a `Flow`; frames of 128 pixels or more.

    Args:
        weights: torchvision's state dict (``raft_small_C_T_V2-01064c6d.pth``); default its download.

    Raises:
        InputError: the file is missing or holds something else.
    """
    from torchvision.models.optical_flow import Raft_Small_Weights, raft_small

    if weights is None:
        network = raft_small(weights=Raft_Small_Weights.C_T_V2)
    else:
        network = raft_small(weights=None)
        load_strict(network, read_state_dict(weights))
    network = network.to(device).eval()

    @torch.no_grad()
    def flow(a: Tensor, b: Tensor) -> Tensor:
        return network(a.to(device), b.to(device))[-1].to(a.device)

    return flow


class CrossFrameAttention:
    """A self-attention's processor whose keys and values come from the first frame and the one before.

    Args:
        processor: that computes the attention.
        frames: of the batch; with guidance the batch holds them twice.
    """

    def __init__(self, processor: Callable[..., Tensor], frames: int):
        self.processor, self.frames = processor, frames

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        if encoder_hidden_states is None:
            rows = hidden_states.unflatten(0, (-1, self.frames))
            before = [max(i - 1, 0) for i in range(self.frames)]
            seen = torch.cat([rows[:, :1].expand_as(rows), rows[:, before]], dim=2)
            encoder_hidden_states = seen.flatten(0, 1)
        return self.processor(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


class LatentWarp:
    """Video to video over an image-to-image pipeline of diffusers with 4-D latents.

    Its scheduler should be deterministic (DDIM, DPM-Solver): noise that is added on the way breaks what
    warping makes alike. Where the pipeline has a ``unet``, its self-attentions look across frames.

    Example:
        >>> pipe = StableDiffusionImg2ImgPipeline.from_pretrained(...)
        >>> video = LatentWarp(pipe, raft_flow())(video, "a watercolour", strength=0.6)

    Args:
        pipeline: takes ``image``, ``generator`` and ``callback_on_step_end``, and makes its first
            latents in ``prepare_latents``, as the pipelines of diffusers do.
        flow: two batches of frames ``[n, 3, H, W]`` in [-1, 1] -> ``[n, 2, H, W]``: for each pixel of
            the first, where it is in the second.

    Raises:
        InputError: a pipeline without these.
    """

    def __init__(self, pipeline: DiffusionPipeline, flow: Flow):
        parameters = inspect.signature(pipeline.__call__).parameters
        wanted = {"image", "generator", "callback_on_step_end", "output_type"}
        if not wanted <= set(parameters) or not hasattr(pipeline, "prepare_latents"):
            raise InputError(
                f"LatentWarp needs an image-to-image pipeline of diffusers; {type(pipeline).__name__} "
                f"lacks {', '.join(sorted(wanted - set(parameters))) or 'prepare_latents'}."
            )
        self.pipeline, self.flow = pipeline, flow

    def __call__(self, video: Tensor, prompt: str | None = None, **settings) -> Tensor:
        """``[1, 3, T, H, W]`` in [-1, 1] -> the same shape. Arguments as of `stream`.

        Raises:
            InputError: a video of another shape.
        """
        if video.ndim != 5 or video.shape[:2] != (1, 3) or video.shape[2] < 1:
            raise InputError(
                f"A video of shape [1, 3, T, H, W] is needed, got {list(video.shape)}."
            )
        return torch.stack(list(self.stream(video.unbind(2), prompt, **settings)), dim=2)

    @torch.no_grad()
    def stream(
        self,
        frames: Iterable[Tensor],
        prompt: str | None = None,
        warp_until: float = 0.5,
        chunk_size: int = 8,
        seed: int = 0,
        conditions: Mapping[str, Callable[[Tensor], Any]] | None = None,
        callback: Callable[[int], None] | None = None,
        **settings,
    ) -> Iterator[Tensor]:
        """Yield new frames ``[1, 3, H, W]`` in [-1, 1]; memory does not grow with the video.

        Chunks overlap by one frame, whose latents of every step are kept, so that the chain of warps
        goes on from one chunk to the next.

        Args:
            frames: of the source, ``[1, 3, H, W]`` in [-1, 1].
            warp_until: share of the steps, from the noisy end, in which latents are warped: 0 never,
                1 always.
            chunk_size: frames denoised together, 2 or more.
            seed: of the noise, which is the same for all frames.
            conditions: what else the pipeline takes one of a frame, as functions of the frames
                ``[n, 3, H, W]`` (``{"control_image": canny}``).
            callback: ``(frames made)`` after each chunk; closing the iterator stops.
            settings: of the pipeline (``strength``, ``num_inference_steps``, ``guidance_scale`` ...);
                prompts and embeddings of one are used for all frames.

        Raises:
            InputError: a setting out of range, or frames of different sizes.
        """
        if not 0 <= warp_until <= 1:
            raise InputError(f"warp_until must lie in 0 to 1, got {warp_until}.")
        if chunk_size < 2:
            raise InputError(f"A chunk must hold 2 frames or more, got {chunk_size}.")
        settings = {**settings, "prompt": prompt}
        trail: list[Tensor] = []
        made, chunk = 0, []
        for frame in frames:
            if chunk and frame.shape != chunk[0].shape:
                raise InputError(
                    f"All frames must have one size, got {list(chunk[0].shape)} and "
                    f"{list(frame.shape)}."
                )
            chunk.append(frame)
            if len(chunk) == chunk_size:
                new, trail = self._chunk(chunk, trail, warp_until, seed, conditions, settings)
                made += len(new)
                yield from new
                if callback is not None:
                    callback(made)
                chunk = chunk[-1:]
        if len(chunk) > (1 if trail else 0):
            new, _ = self._chunk(chunk, trail, warp_until, seed, conditions, settings)
            yield from new
            if callback is not None:
                callback(made + len(new))

    def _chunk(
        self,
        chunk: list[Tensor],
        trail: list[Tensor],
        warp_until: float,
        seed: int,
        conditions: Mapping[str, Callable[[Tensor], Any]] | None,
        settings: dict[str, Any],
    ) -> tuple[Iterator[Tensor], list[Tensor]]:
        """New frames of a chunk, and the latents ``[1, C, h, w]`` of its last frame at every step.

        Args:
            trail: of its first frame, which the chunk before has made; empty in the first chunk.
        """
        source = torch.cat(chunk)
        flows, masks, count = None, None, len(source)
        if warp_until > 0 and count > 1:
            flows = self.flow(source[1:], source[:-1])
            masks = consistency_mask(flows, self.flow(source[:-1], source[1:]))
        seen: list[Tensor] = []

        def adapt(latents: Tensor, warped: bool) -> Tensor:
            """What the next step starts from; noted for the next chunk."""
            nonlocal flows, masks
            if trail:
                latents = torch.cat([trail[len(seen)].to(latents), latents[1:]])
            if warped and flows is not None:
                if not seen:
                    factor = source.shape[-1] // latents.shape[-1]
                    flows, masks = to_latent_size(flows, masks, factor)
                latents = chain(latents, flows.to(latents), masks.to(latents.device))
            seen.append(latents[-1:])
            return latents

        def after_step(pipeline: Any, step: int, _time: Any, values: dict) -> dict:
            done = (step + 1) / pipeline.num_timesteps
            return {"latents": adapt(values["latents"], done < warp_until)}

        extra = {name: make(source) for name, make in (conditions or {}).items()}
        for name, value in settings.items():
            if isinstance(value, str) and "prompt" in name:
                extra[name] = [value] * count
            elif isinstance(value, Tensor) and name.endswith("_embeds"):
                extra[name] = value.expand(count, *value.shape[1:])
            else:
                extra[name] = value
        with self._patched(count, lambda latents: adapt(latents, warp_until > 0)):
            images = self.pipeline(
                image=(source + 1) / 2,
                generator=[torch.Generator().manual_seed(seed) for _ in range(count)],
                output_type="pt",
                callback_on_step_end=after_step,
                **extra,
            ).images
        return (images[1 if trail else 0 :] * 2 - 1).split(1), seen

    @contextmanager
    def _patched(self, frames: int, adapt: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """The pipeline with adapted first latents and attention across frames, for one call."""
        pipeline = self.pipeline
        prepare = pipeline.prepare_latents

        def prepare_latents(*args, **kwargs) -> Tensor:
            latents = prepare(*args, **kwargs)
            if not isinstance(latents, Tensor) or latents.ndim != 4:
                raise InputError(
                    f"LatentWarp warps latents of shape [frames, C, h, w]; "
                    f"{type(pipeline).__name__} makes others."
                )
            return adapt(latents)

        unet = getattr(pipeline, "unet", None)
        if unet is not None:
            processors = dict(unet.attn_processors)
            unet.set_attn_processor(
                {
                    name: CrossFrameAttention(processor, frames) if ".attn1." in name else processor
                    for name, processor in processors.items()
                }
            )
        pipeline.prepare_latents = prepare_latents
        try:
            yield
        finally:
            del pipeline.prepare_latents
            if unet is not None:
                unet.set_attn_processor(processors)


def chain(latents: Tensor, flows: Tensor, masks: Tensor) -> Tensor:
    """Each frame's latents from those of the frame before, where the mask says so.

    Args:
        latents: ``[f, C, h, w]``.
        flows, masks: ``[f - 1, 2, h, w]`` and bool ``[f - 1, 1, h, w]``, from each frame but the first to
            the one before.
    """
    done = [latents[:1]]
    for z, flow, mask in zip(latents[1:].split(1), flows.split(1), masks.split(1), strict=True):
        done.append(torch.where(mask, warp(done[-1], flow), z))
    return torch.cat(done)
