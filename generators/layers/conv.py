"""Depthwise convolution along a scan, as in front of Mamba's scans."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def scan_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    causal: bool,
    seq_idx: Tensor | None = None,
    order: Tensor | None = None,
    history: Tensor | None = None,
) -> Tensor:
    """Convolve channels along the scan order; each output stays at its token's place.

    Args:
        x: ``[B, L, W]``.
        weight: ``[W, 1, K]``; causal: the last tap meets the token itself; else the middle one.
        seq_idx: int ``[B, L]``, documents that do not mix.
        order: int64 ``[L]``, the position that each step of the scan visits.
        history: ``[B, W, K - 1]``, inputs before the first token (causal), of document 0.
    """
    taps = weight.shape[-1]
    before = taps - 1 if causal else taps // 2
    rows = (x if order is None else x[:, order]).transpose(1, 2)
    if history is not None:
        padded = torch.cat([history.to(x.dtype), rows], dim=2)
    else:
        padded = F.pad(rows, (before, taps - 1 - before))
    if seq_idx is None:
        y = F.conv1d(padded, weight, bias, groups=len(weight))
    else:
        index = seq_idx if order is None else seq_idx[:, order]
        around = F.pad(index, (before, taps - 1 - before))[:, None]
        length = x.shape[1]
        y = sum(
            padded[..., k : k + length]
            * (around[..., k : k + length] == index[:, None])
            * weight[:, 0, k, None]
            for k in range(taps)
        )
        y = y if bias is None else y + bias[:, None]
    y = y.transpose(1, 2)
    if order is None:
        return y
    return torch.empty_like(y).index_copy(1, order, y)


def conv_state(
    x: Tensor, taps: int, history: Tensor | None = None, seq_idx: Tensor | None = None
) -> Tensor:
    """The last ``taps`` inputs of a causal `scan_conv`, newest last, ``[B, W, taps]``.

    Zeros stand for what came before the first token, and for tokens of earlier documents.
    """
    rows = x.transpose(1, 2)
    if seq_idx is not None:
        rows = rows * (seq_idx == seq_idx[:, -1:])[:, None]
        if history is not None:
            history = history * (seq_idx[:, -1] == 0)[:, None, None]
    if history is not None:
        rows = torch.cat([history.to(x.dtype), rows], dim=2)
    return F.pad(rows, (max(taps - rows.shape[2], 0), 0))[..., -taps:].contiguous()


def conv_step(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """One token ``[B, W]`` of a causal `scan_conv`; ``state [B, W, K]`` shifts in place."""
    state.copy_(state.roll(-1, dims=2))
    state[..., -1] = x
    y = (state * weight[:, 0]).sum(2)
    return (y if bias is None else y + bias).to(x.dtype)
