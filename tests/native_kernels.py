"""Tests of the C++ operators build them once; only a machine without a compiler skips them."""

import pytest

from adapterd.model import native


def require_native_kernels() -> None:
    if native.find_compiler() is None and not native.library_path().exists():
        pytest.skip("no C++ compiler on this machine")
    native.build()
    assert native.load()
