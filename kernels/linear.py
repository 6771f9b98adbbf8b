"""Linear layers on a CPU: oneDNN's float32 matrix product in place of MKL's.

PyTorch sends float32 ``F.linear`` to MKL, which uses AVX2 on AMD processors; oneDNN uses AVX-512
wherever there is any (one Zen 5 core: 220 against 100 GFLOP/s). Both multiply and add in float32,
in another order. The operator is the one that ``torch.compile`` emits for frozen CPU graphs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Below this many multiplications the operator's overhead (about 10 microseconds) outweighs what it
# gains. With one to four rows, as in decoding, both read the weights once, MKL at half the rate or less.
MIN_MULTIPLICATIONS = 2**19

_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias``: ``[..., in]``, ``[out, in]``, ``[out]`` -> ``[..., out]``.

    oneDNN where x is float32 on a CPU and nothing is to be differentiated; elsewhere `F.linear`.
    """
    if (
        _ONEDNN
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and weight.is_contiguous()  # With a strided weight oneDNN falls to its reference code.
        and x.numel() * weight.shape[0] >= MIN_MULTIPLICATIONS
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    ):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """``nn.Linear`` over `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
