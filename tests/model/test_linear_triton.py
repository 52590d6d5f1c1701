"""A linear for a few tokens, whatever its tiling, is the product: parts that are joined, rows that fill no block."""

import pytest
import torch

from tests.triton_kernels import DEVICE

from adapterd.model.launch_triton import zero_counts  # isort: skip  (needs the interpreter's setting)
from adapterd.model.linear_triton import Tiling, few_tokens_linear, tiling_of  # isort: skip

TILINGS = [Tiling(16, 32, 1), Tiling(32, 32, 2), Tiling(64, 16, 4), Tiling(16, 128, 1)]


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 5, 17])
@pytest.mark.parametrize(("has_bias", "adds"), [(False, False), (True, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
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
        rtol = 1e-5 if dtype == torch.float32 else 2.0**-7
        torch.testing.assert_close(y.cpu().double(), expected, atol=1e-4 if rtol < 1e-4 else 1e-1, rtol=rtol)
        assert not zero_counts(DEVICE).any()


@pytest.mark.parametrize("tiling", [Tiling(16, 32, 1), Tiling(16, 32, 2)], ids=str)
def test_is_the_product_of_whole_numbers_and_scales(tiling: Tiling) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 64)
    values, scales = torch.randint(-127, 128, (40, 64), dtype=torch.int8), torch.rand(40)
    expected = x.double() @ values.double().T * scales.double()
    y = torch.empty(3, 40, device=DEVICE)
    few_tokens_linear(x.to(DEVICE), values.to(DEVICE), y, tiling, scales=scales.to(DEVICE))
    torch.testing.assert_close(y.cpu().double(), expected, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("num_tokens", [1, 16, 17, 64])
@pytest.mark.parametrize(("d_out", "d_in"), [(6144, 4096), (4096, 14336), (128256, 4096), (50, 48)])
def test_tilings_fill_d_in(d_out: int, d_in: int, num_tokens: int) -> None:
    tiling = tiling_of(d_out, d_in, num_tokens, DEVICE)
    assert tiling is not None
    assert d_in % (tiling.block_in * tiling.num_splits) == 0


def test_many_tokens_and_odd_widths_are_the_librarys() -> None:
    assert tiling_of(4096, 4096, 65, DEVICE) is None
    assert tiling_of(4096, 100, 1, DEVICE) is None
