"""Triton's kernels run on a CUDA device where there is one, else in its interpreter (see tests/conftest.py)."""

import pytest
import torch

triton = pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IS_INTERPRETED = DEVICE.type == "cpu"


def teach_interpreter_bfloat16() -> None:
    """The interpreter multiplies the bits of bfloat16 as integers; numpy has no such type. Here in float32."""
    if not IS_INTERPRETED:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    plain = builder.create_dot
    if getattr(plain, "knows_bfloat16", False):
        return

    def create_dot(self, a, b, d, *others):  # type: ignore[no-untyped-def]
        def widen(handle):  # type: ignore[no-untyped-def]
            return self.cast_impl(handle, tl.float32) if handle.dtype.scalar == tl.bfloat16 else handle

        return plain(self, widen(a), widen(b), d, *others)

    create_dot.knows_bfloat16 = True  # type: ignore[attr-defined]
    builder.create_dot = create_dot


teach_interpreter_bfloat16()
