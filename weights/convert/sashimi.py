"""Published SaShiMi state dicts -> `SaShiMi`, or -> its backbone (names of state-spaces/s4).

Besides the names of the standalone backbone those of version 3, in which the checkpoints were written,
are known: there the backbone's names begin with "model.", beside "encoder." and "decoder.".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...generators.layers.s4 import discretize_bilinear
from ...modalities.errors import InputError

# Version 3 -> the standalone backbone.
_VERSION_3 = [
    (r"\.kernel\.kernel\.L$", ".kernel.l_kernel"),
    (r"\.kernel\.kernel\.", ".kernel."),
    (r"(?<!\.layer)\.layer\.(kernel\.|D$)", r".layer.layer.\1"),
    (r"\.log_dt$", ".inv_dt"),
    (r"\.(inv_w_real|log_w_real)$", ".A_real"),
]
_KERNEL = {
    "inv_dt": "log_dt",
    "A_real": "log_A_real",
    "A_imag": "A_imag",
    "B": "B",
    "C": "C",
    "P": "P",
    "l_kernel": "l_kernel",
}
_LAYER = [
    (r"layer\.layer\.kernel\.(\w+)", lambda m: f"layer.{_KERNEL.get(m[1], m[1])}"),
    (r"layer\.layer\.D", "layer.D"),
    (r"layer\.output_linear\.0\.(weight|bias)", r"layer.output.\1"),
    (r"layer\.ff\.0\.0\.(weight|bias)", r"layer.fc1.\1"),
    (r"layer\.ff\.2\.(weight|bias)", r"layer.fc2.\1"),
    (r"norm\.(weight|bias)", r"norm.\1"),
]


def convert_state_dict(
    published: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Rename; spread parameters that channels share; make C independent of a length.

    A published C of mode "dplr" is ``C (1 - dA^L)`` for the length L in ``l_kernel`` (0: C itself).

    Args:
        config: arguments of `SaShiMi`; "unet" of the backbone is read where it is there.

    Raises:
        InputError: a name that no published SaShiMi has.
    """
    tiers, depth = len(config["pool"]), config["depth"]
    unet = bool(config.get("unet", False))
    whole = any(name.startswith("model.") for name in published)
    state: dict[str, Tensor] = {}
    for name, value in published.items():
        old = name
        for pattern, replacement in _VERSION_3:
            old = re.sub(pattern, replacement, old)
        if old.endswith((".kernel.omega", ".kernel.z")):  # Tables of the roots of unity.
            continue
        if old.endswith(".w_imag"):
            old, value = old.removesuffix("w_imag") + "A_imag", -value
        if whole and old.startswith("encoder.") and value.ndim == 2:
            new = "embedding.weight"
        elif whole and old.startswith("decoder."):
            new = "head.weight" if value.ndim == 2 else "head.bias"
        else:
            new = _rename(old.removeprefix("model."), tiers, depth, unet)
            if new is not None and whole:
                new = f"backbone.{new}"
        if new is None:
            raise InputError(f'"{name}" is not a weight of a published SaShiMi of this kind.')
        state[new] = value
    prefixes = [name.removesuffix("log_dt") for name in state if name.endswith(".log_dt")]
    for prefix in prefixes:
        _convert_s4(state, prefix)
    return {
        name: value[..., 0] if value.ndim == 3 and name.endswith(".weight") else value
        for name, value in state.items()
    }


def _rename(name: str, tiers: int, depth: int, unet: bool) -> str | None:
    """A name of the standalone backbone -> ours; None where it is unknown."""
    if name in ("norm.weight", "norm.bias"):
        return name
    match = re.fullmatch(r"(d|c|u)_layers\.(\d+)\.(.+)", name)
    if match is None:
        return None
    part, index, rest = match[1], int(match[2]), match[3]
    if part == "c":
        return _join(f"middle.{index}", rest)
    if part == "d":
        tier, place = divmod(index, 2 * depth + 1) if unet else (index, 2 * depth)
        if place < 2 * depth:
            return _join(f"tiers.{tier}.before.{place}", rest)
        pool = "down"
    else:
        tier = tiers - 1 - index
        place, _, rest = rest.partition(".")
        if not place.isdigit():
            return None
        if int(place):
            return _join(f"tiers.{tier}.layers.{int(place) - 1}", rest)
        pool = "up"
    return f"tiers.{tier}.{pool}.{rest[7:]}" if rest in ("linear.weight", "linear.bias") else None


def _join(prefix: str, rest: str) -> str | None:
    for pattern, replacement in _LAYER:
        match = re.fullmatch(pattern, rest)
        if match:
            new = replacement(match) if callable(replacement) else match.expand(replacement)
            return f"{prefix}.{new}"
    return None


def _convert_s4(state: dict[str, Tensor], prefix: str) -> None:
    """The kernel's parameters under a prefix, in place."""
    log_dt = state[f"{prefix}log_dt"] = state[f"{prefix}log_dt"].flatten()
    channels = len(log_dt)
    for name in ("log_A_real", "A_imag", "B", "P"):
        value = state.get(f"{prefix}{name}")
        if value is None:
            continue
        if name in ("B", "P") and value.ndim == 4:
            value = value[0]
        copies = channels // len(value)
        state[f"{prefix}{name}"] = value.repeat(copies, *[1] * (value.ndim - 1))
    if f"{prefix}A_imag" in state:
        # Published as the imaginary part with the other sign.
        state[f"{prefix}A_imag"] = -state[f"{prefix}A_imag"]
    if f"{prefix}D" in state:
        state[f"{prefix}D"] = state[f"{prefix}D"].flatten()
    length = int(state.pop(f"{prefix}l_kernel", torch.tensor(0)))
    if length and f"{prefix}P" in state:
        real = state[f"{prefix}log_A_real"].double()
        A = torch.complex(-real.exp(), state[f"{prefix}A_imag"].double())
        P, B = (torch.view_as_complex(state[f"{prefix}{n}"].double().contiguous()) for n in "PB")
        dA, _ = discretize_bilinear(log_dt.double(), A, P, B)
        one = torch.eye(dA.shape[-1], dtype=dA.dtype)
        C = state[f"{prefix}C"]
        rows = torch.cat([C[..., 0], -C[..., 1]], dim=-1).double()
        left = (one - torch.linalg.matrix_power(dA, length)).mT
        rows = torch.linalg.solve(left, rows[..., None])[..., 0].chunk(2, dim=-1)
        state[f"{prefix}C"] = torch.stack([rows[0], -rows[1]], dim=-1).to(C.dtype)
