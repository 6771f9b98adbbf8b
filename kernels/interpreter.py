"""Run the Triton kernels on a machine without a GPU, in Triton's interpreter."""

from __future__ import annotations

import os


def enable_interpreter() -> None:
    """Let every Triton kernel that is imported after this call run on the CPU.

    Two faults of Triton 3.6 are mended: it turns a loop bound into a number by ``int(array of one
    element)``, which numpy >= 2.4 refuses, and its products take the bits of bfloat16 for integers.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    if getattr(interpreter, "mended", False):
        return
    interpreter.mended = True
    patch, create_dot = (
        interpreter._patch_lang_tensor,
        interpreter.InterpreterBuilder.create_dot,
    )

    def patch_lang_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def widen(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot_of_floats(self, a, b, *rest):
        return create_dot(self, widen(a), widen(b), *rest)

    interpreter._patch_lang_tensor = patch_lang_tensor
    interpreter.InterpreterBuilder.create_dot = create_dot_of_floats
