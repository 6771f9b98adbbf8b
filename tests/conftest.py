"""Where there is no GPU, Triton's kernels run in its interpreter."""

import importlib.util

import torch

if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    from tessera.kernels.interpreter import enable_interpreter

    enable_interpreter()
