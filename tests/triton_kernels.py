"""Triton's kernels run on a CUDA device where there is one, else in its interpreter (see tests/conftest.py)."""

from dataclasses import replace

import pytest
import torch

triton = pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IS_INTERPRETED = DEVICE.type == "cpu"


def teach_interpreter_bfloat16() -> None:
    """The interpreter multiplies the bits of bfloat16 as integers; numpy has no such type. Here in float32."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    plain = builder.create_dot

    def create_dot(self, a, b, d, *others):  # type: ignore[no-untyped-def]
        def widen(handle):  # type: ignore[no-untyped-def]
            return self.cast_impl(handle, tl.float32) if handle.dtype.scalar == tl.bfloat16 else handle

        return plain(self, widen(a), widen(b), d, *others)

    builder.create_dot = create_dot


def keep_language_interpreted() -> None:
    """The interpreter puts its own operations into triton.language at every launch and at every call of a device
    function, which takes most of its time. Once is enough, since in this process nothing but the interpreter runs
    kernels: once for each module of kernels, since what it replaces depends on what the module imports.
    """
    from triton.runtime import interpreter

    plain = interpreter._patch_lang
    done: set[str] = set()

    def patch_once(function):  # type: ignore[no-untyped-def]
        if function.__module__ not in done:
            plain(function)  # the changes it returns are not undone
            done.add(function.__module__)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_once


def compute_no_check_for_nothing() -> None:
    """It widens every operation on whole numbers to look for an overflow, and drops what it finds: debug is off."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = replace(builder.options, sanitize_overflow=False)


if IS_INTERPRETED:
    teach_interpreter_bfloat16()
    keep_language_interpreted()
    compute_no_check_for_nothing()
