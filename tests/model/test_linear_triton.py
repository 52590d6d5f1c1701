"""A linear for a few tokens, whatever its tiling, is the product: parts that are joined, rows that fill no block."""

import pytest
import torch

from tests.triton_kernels import DEVICE

from adapterd.model.launch_triton import shared_bytes, zero_counts  # isort: skip  (needs the interpreter's setting)
from adapterd.model.linear_triton import Tiling, few_tokens_linear, tiling_bytes, tiling_of  # isort: skip

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}

TILINGS = [Tiling(16, 32, 1), Tiling(32, 32, 2), Tiling(64, 16, 4), Tiling(16, 128, 1)]


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 5, 17])
@pytest.mark.parametrize(("has_bias", "adds"), [(False, False), (True, True)])
@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
def test_is_the_product(
    tiling: Tiling, num_tokens: int, has_bias: bool, adds: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(num_tokens)
    d_out, d_in = 50, 128
    x, weight = torch.randn(num_tokens, d_in).to(dtype), torch.randn(d_out, d_in).to(dtype)
    bias = torch.randn(d_out).to(dtype) if has_bias else None
    before = torch.randn(num_tokens, d_out).to(dtype)
    expected = x.double() @ weight.double().T
    expected += bias.double() if bias is not None else 0
    expected += before.double() if adds else 0
    where = None if bias is None else bias.to(DEVICE)
    for _ in range(2):  # the second finds the counts as the first did
        y = before.to(DEVICE, copy=True) if adds else torch.full_like(before, float("nan"), device=DEVICE)
        few_tokens_linear(x.to(DEVICE), weight.to(DEVICE), y, tiling, adds=adds, bias=where)
        rtol = ROUNDING[dtype]
        torch.testing.assert_close(y.cpu().double(), expected, atol=10 * rtol, rtol=rtol)
        assert not zero_counts(DEVICE).any()


@pytest.mark.parametrize("tiling", [Tiling(16, 32, 1), Tiling(16, 32, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_is_the_product_of_whole_numbers_and_scales(tiling: Tiling, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 64).to(dtype)
    values, scales = torch.randint(-127, 128, (40, 64), dtype=torch.int8), torch.rand(40)
    expected = x.double() @ values.double().T * scales.double()
    y = torch.empty(3, 40, dtype=dtype, device=DEVICE)
    few_tokens_linear(x.to(DEVICE), values.to(DEVICE), y, tiling, scales=scales.to(DEVICE))
    torch.testing.assert_close(y.cpu().double(), expected, atol=1e-3, rtol=ROUNDING[dtype])


SHAPES = [(6144, 4096), (4096, 14336), (28672, 4096), (128256, 4096), (50, 48)]


@pytest.mark.parametrize("has_group", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 16, 17, 64])
@pytest.mark.parametrize(("d_out", "d_in"), SHAPES)
def test_tilings_divide_d_in_and_fit_the_chip(
    d_out: int, d_in: int, num_tokens: int, dtype: torch.dtype, has_group: bool
) -> None:
    tiling = tiling_of(d_out, d_in, num_tokens, dtype, DEVICE, has_group=has_group)
    assert tiling is not None
    assert d_in % (tiling.block_in * tiling.num_splits) == 0
    assert tiling_bytes(tiling, num_tokens, dtype, has_group=has_group) <= shared_bytes(DEVICE)


@pytest.mark.parametrize(
    ("tiling", "num_tokens", "expected"),
    [
        (Tiling(64, 128, 1, 4), 16, 102_400),
        (Tiling(64, 128, 4, 4), 32, 122_880),
        (Tiling(128, 128, 1, 3, 8), 32, 163_840),
        (Tiling(64, 64, 1, 8), 32, 110_592),
    ],
)
def test_bytes_of_a_tiling_are_what_triton_takes(tiling: Tiling, num_tokens: int, expected: int) -> None:
    """Read off the kernels that Triton 3.6 compiles for compute capability 9.0."""
    assert tiling_bytes(tiling, num_tokens, torch.bfloat16, has_group=False) == expected


def test_many_tokens_and_odd_widths_are_the_librarys() -> None:
    assert tiling_of(4096, 4096, 65, torch.bfloat16, DEVICE) is None
    assert tiling_of(4096, 100, 1, torch.bfloat16, DEVICE) is None
