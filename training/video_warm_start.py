"""A start for NBP's tokenizer that needs no search: local principal components in space and time.

From random weights the encoder must find what to say and the decoder how to read it, through a
quantizer that at first gives nearly all clips the same ids. Here both begin as the linear code that such
a search tends to find first (Karhunen 1947, Loeve 1948): each layer that shrinks a clip keeps the
principal components of the block that it takes together, the first ones are the codes, and the
decoder puts the blocks back. The layers next to codes and pixels are fitted by least squares. Residual units begin as their skips; training goes on from there to what is not linear.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modalities.errors import InputError
from ..tokenizers.video.nbp import (
    CausalConv3d,
    DepthToSpace,
    NBPTokenizer,
    ResidualUnit,
)

# Spread of a whitened component before the quantizer's tanh; about the least error for 8 levels.
SPREAD = 0.6
RIDGE = 1e-3  # Of the mean square of the features.
ROWS = 40_000  # Places that a least-squares fit looks at.


@torch.no_grad()
def local_components(tokenizer: NBPTokenizer, videos: Tensor) -> None:
    """Write a tokenizer after `init_weights`, in place.

    Args:
        tokenizer: with ``end_norms`` False.
        videos: ``[M, 3, T, S, S]`` in [-1, 1], some dozens.

    Raises:
        InputError: a tokenizer with norms at its ends, through which no linear code passes.
    """
    if tokenizer.config.end_norms:
        raise InputError("start: components needs model.end_norms false.")
    for module in tokenizer.modules():
        if isinstance(module, ResidualUnit) and module.skip is not None:
            nn.init.dirac_(module.skip.conv.weight)
    x = (videos + 1) / 2
    *shrinking, last = tokenizer.encoder
    bases = []
    for layer in shrinking:
        if isinstance(layer, CausalConv3d):
            bases.append(_write_components(layer, x))
        x = layer(x)
    components = x[:, : tokenizer.quantizer.dim]
    wanted = SPREAD * components / components.std((0, 2, 3, 4), keepdim=True)
    _fit(last, x, wanted)

    codes = tokenizer.quantizer(last(x).movedim(1, -1))[0].movedim(-1, 1)
    layers = list(tokenizer.decoder)
    _fit(layers[0], codes, x)
    y = layers[0](codes)
    end = next(i for i in reversed(range(len(layers))) if isinstance(layers[i], CausalConv3d))
    bases = bases[:0:-1]  # Not that of the first layer, which takes no block together.
    for number, layer in enumerate(layers[1:end], start=1):
        if isinstance(layer, CausalConv3d) and isinstance(layers[number + 1], DepthToSpace):
            _write_blocks(layer, *bases.pop(0))
        y = layer(y)
    target = (videos + 1) / 2
    for layer in tokenizer.encoder[:1]:
        if not isinstance(layer, CausalConv3d):
            target = layer(target)
    if end + 1 < len(layers):
        # The two orders of the values of a square differ: pixels first, then colours.
        side = layers[-1].space
        target = target.unflatten(1, (3, side, side)).movedim(1, 3).flatten(1, 3)
    _fit(layers[end], y, target)


def _block(layer: CausalConv3d) -> tuple[slice, slice, slice]:
    """The taps that see the block which a step of the stride takes together."""
    time, space = layer.stride
    return (
        slice(3 - time, 3),
        *(2 * (slice(1, 1 + space),)),
    )


def _write_components(layer: CausalConv3d, x: Tensor) -> tuple[Tensor, Tensor]:
    """Set a layer to the principal components of its blocks; basis ``[t s s, C, K]`` and mean."""
    weight = layer.conv.weight
    time, space = layer.stride
    channels, size = weight.shape[1], time * space**2 * weight.shape[1]
    # A layer that gathers the block, channels fastest.
    gather = CausalConv3d(channels, size, layer.kernel, layer.stride)
    nn.init.zeros_(gather.conv.bias)
    picked = torch.zeros(time, space, space, channels, channels, 3, 3, 3)
    taps = _block(layer)
    for t in range(time):
        for h in range(space):
            for w in range(space):
                at = (taps[0].start + t, taps[1].start + h, taps[2].start + w)
                picked[t, h, w, :, :, at[0], at[1], at[2]] = torch.eye(channels)
    picked = picked.flatten(0, 3)
    gather.conv.weight.copy_(picked)
    rows = gather(x).movedim(1, -1).flatten(0, 3)
    mean = rows.mean(0)
    values, basis = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
    kept = min(len(weight), size)
    basis = basis.flip(1)[:, :kept]
    scale = values[-1].sqrt()  # The first component leaves with unit variance.
    nn.init.zeros_(weight)
    nn.init.zeros_(layer.conv.bias)
    weight[:kept] = torch.einsum("pk,pcthw->kcthw", basis, picked) / scale
    layer.conv.bias[:kept] = -(basis.T @ mean) / scale
    blocks = (time * space**2, channels)
    return (basis * scale).unflatten(0, blocks), mean.unflatten(0, blocks)


def _write_blocks(layer: CausalConv3d, basis: Tensor, mean: Tensor) -> None:
    """Set a layer in front of `DepthToSpace` to the blocks that components stand for.

    Args:
        basis, mean: ``[t s s, C, K]`` and ``[t s s, C]`` of the layer that took the blocks together.
    """
    nn.init.zeros_(layer.conv.weight)
    nn.init.zeros_(layer.conv.bias)
    weight = layer.conv.weight.unflatten(0, (len(basis), -1))[..., 2, 1, 1]
    bias = layer.conv.bias.unflatten(0, (len(basis), -1))
    _, channels, count = (min(pair) for pair in zip(weight.shape, basis.shape, strict=True))
    weight[:, :channels, :count] = basis[:, :channels, :count]
    bias[:, :channels] = mean[:, :channels]


def _fit(layer: CausalConv3d | nn.Conv3d, x: Tensor, wanted: Tensor) -> None:
    """Set a layer of stride 1 to the best map from x to ``wanted``, whose channels may be fewer."""
    conv = layer.conv if isinstance(layer, CausalConv3d) else layer
    kernel = conv.weight.shape[2]
    edge, before = kernel // 2, kernel - 1
    padded = F.pad(x, (edge, edge, edge, edge, before, 0), mode="replicate") if before else x
    windows = padded
    for axis in (2, 3, 4):
        windows = windows.unfold(axis, kernel, 1)
    windows = windows.permute(0, 2, 3, 4, 1, 5, 6, 7)
    places = windows.shape[:4].numel()
    picked = torch.randperm(places, generator=torch.Generator().manual_seed(0))[:ROWS]
    at = torch.unravel_index(picked, windows.shape[:4])
    features = windows[at].flatten(1)
    target = wanted.movedim(1, -1)[at]
    centre, mean = features.mean(0), target.mean(0)
    features = features - centre
    gram = features.T @ features / len(features)
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
    found = torch.linalg.solve(gram, features.T @ (target - mean) / len(features)).T
    count = len(found)
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    conv.weight[:count] = found.view(count, *conv.weight.shape[1:])
    conv.bias[:count] = mean - found @ centre
