"""Run the Triton kernels on a machine without a GPU, in Triton's interpreter."""

from __future__ import annotations

import os


def enable_interpreter() -> None:
    """Let every Triton kernel that is imported after this call run on the CPU.

    Triton 3.6 turns a loop bound into a number by ``int(array of one element)``, which numpy >= 2.4
    refuses: the bound is read as a scalar instead.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor
    if getattr(patch, "reads_scalars", False):
        return

    def patch_lang_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    patch_lang_tensor.reads_scalars = True
    interpreter._patch_lang_tensor = patch_lang_tensor
