"""A linear for a few tokens, whatever its tiling, is the product: parts that are joined, rows that fill no block."""

import pytest
import torch

from tests.triton_kernels import DEVICE

from adapterd.model.linear_triton import FewTokensLinear, Tiling  # isort: skip  (needs the interpreter's setting)

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
    product = FewTokensLinear(DEVICE, chained=False)
    where = [None if t is None else t.to(DEVICE) for t in (x, weight, bias)]
    for _ in range(2):  # the second finds the counts as the first did
        y = before.to(DEVICE, copy=True) if adds else torch.full_like(before, float("nan"), device=DEVICE)
        product(where[0], where[1], where[2], y, tiling, adds=adds)  # type: ignore[arg-type]
        rtol = 1e-5 if dtype == torch.float32 else 2.0**-7
        torch.testing.assert_close(y.cpu().double(), expected, atol=1e-4 if rtol < 1e-4 else 1e-1, rtol=rtol)
