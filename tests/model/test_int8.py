"""Linears of 8 bits: the reference, the C++ operator and Triton's kernel are one product; rounding stays in bounds."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from adapterd.errors import BaseRefused
from adapterd.model.base import load_base
from adapterd.model.int8 import (
    Int8Linear,
    dequantize_rows,
    int8_linear,
    quantize_linears,
    quantize_rows,
    round_linears,
)
from adapterd.model.linear_cpu import CpuInt8Linear, float32_linear, native_linear, use_fastest_linears
from tests.model.test_linear_cpu import SHAPES, TOKENS, draw
from tests.native_kernels import require_native_kernels
from tests.tiny import tiny_llama

pytestmark = pytest.mark.usefixtures("several_threads")

DTYPES = [torch.float32, torch.bfloat16]


def written_out(
    x: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None, scales: torch.Tensor
) -> torch.Tensor:
    weight = values.double() * scales.double()[:, None]
    return F.linear(x.double(), weight, None if bias is None else bias.double())


def allowed(expected: torch.Tensor, d_in: int, dtype: torch.dtype) -> torch.Tensor:
    """float32 sums in some order, then at most half a unit in the last place of the result's type."""
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-22
    return 1e-6 * d_in**0.5 * 4 + rounding * expected.abs()


def allowed_for_fixed(x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What native/fixed.h may add in bfloat16: each x off by half a unit of its 1024 columns, as chance has it.

    A unit is a 2^-14th of the block's largest at most; ten standard deviations of the sum of such errors.
    """
    weight = values.double() * scales.double()[:, None]
    variance = torch.zeros(x.shape[0], weight.shape[0], dtype=torch.float64)
    for block_x, block_w in zip(x.double().split(1024, 1), weight.split(1024, 1), strict=True):
        unit = 2.0**-14 * block_x.abs().amax(1, keepdim=True)
        variance += (unit * block_w.norm(dim=1)) ** 2 / 12
    return 10 * variance.sqrt()


@pytest.mark.parametrize(("d_out", "d_in"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_way_multiplies_the_weight_that_is_written_out(
    dtype: torch.dtype, d_out: int, d_in: int
) -> None:
    values, scales = quantize_rows(draw(d_out, d_in, dtype=dtype))
    bias = draw(d_out, dtype=dtype)
    ways = [int8_linear, float32_linear]
    require_native_kernels()
    ways.append(native_linear)
    for tokens, b in itertools.product(TOKENS, (None, bias)):
        x = draw(tokens, d_in, dtype=dtype)
        expected = written_out(x, values, b, scales)
        for way in ways:
            found = way(x, values, b, scales)
            bound = allowed(expected, d_in, dtype)
            if way is native_linear and dtype == torch.bfloat16:
                bound += allowed_for_fixed(x, values, scales)
            assert found.dtype == dtype
            assert ((found.double() - expected).abs() <= bound).all(), way


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 17, 70])
def test_triton_multiplies_the_weight_that_is_written_out(tokens: int, dtype: torch.dtype) -> None:
    from tests.triton_kernels import DEVICE, IS_INTERPRETED

    from adapterd.model.int8_triton import int8_linear_triton  # isort: skip  (needs the interpreter's setting)

    for d_out, d_in in [(24, 40), (130, 257)]:
        values, scales = quantize_rows(draw(d_out, d_in, dtype=dtype))
        x = draw(tokens, d_in, dtype=dtype)
        # The interpreter cuts off where a GPU rounds to bfloat16.
        bfloat16 = 2.0**-7 if IS_INTERPRETED else 2.0**-8
        rounding = {torch.float32: 1e-6, torch.bfloat16: bfloat16, torch.float16: 2.0**-11}[dtype]
        for bias in (None, draw(d_out, dtype=dtype)):
            expected = written_out(x, values, bias, scales)
            on_device = [t if t is None else t.to(DEVICE) for t in (x, values, bias, scales)]
            found = int8_linear_triton(*on_device).cpu().double()  # type: ignore[arg-type]
            assert ((found - expected).abs() <= rounding * expected.abs() + 2e-4).all()


def test_a_weight_is_at_most_half_a_step_off_and_a_row_of_zeros_stays_zero() -> None:
    weight = draw(40, 300, dtype=torch.bfloat16)
    weight[7] = 0
    values, scales = quantize_rows(weight)
    assert values.dtype == torch.int8
    assert (
        (dequantize_rows(values, scales, torch.float32) - weight.float()).abs() <= 0.5001 * scales[:, None]
    ).all()
    assert not values[7].any()
    # What was rounded once is not rounded again.
    again, same_scales = quantize_rows(dequantize_rows(values, scales, torch.float32))
    assert torch.equal(again, values)
    torch.testing.assert_close(same_scales, scales)


@pytest.mark.parametrize("tokens", [1, 7])
def test_numbers_near_the_largest_of_their_columns_stay_exact(tokens: int) -> None:
    """A bfloat16 within a 128th of the largest of its 1024 columns keeps all its bits, whatever other columns hold."""
    require_native_kernels()
    generator = torch.Generator().manual_seed(5)
    d_in = 2100
    x = torch.randint(1, 128, (tokens, d_in), generator=generator).to(torch.bfloat16)
    x[:, 1024:2048] *= 2.0**-20
    x[0, 2060] = 128 * 127.0
    values = torch.randint(-1, 2, (9, d_in), generator=generator).to(torch.int8)
    values[:, 2060] = 0
    expected = written_out(x, values, None, torch.ones(9))
    found = native_linear(x, values, None, torch.ones(9))
    assert torch.equal(found, expected.to(torch.bfloat16))


def test_native_operator_in_bfloat16_keeps_what_is_not_finite_and_what_is_tiny() -> None:
    require_native_kernels()
    values = torch.full((5, 300), 64, dtype=torch.int8)
    x = torch.zeros(6, 300, dtype=torch.bfloat16)
    x[1, 7], x[2, 299], x[3, 0] = float("inf"), float("nan"), -float("inf")
    x[4, 3], x[5, 3] = 2.0**-126, 1e-40
    y = native_linear(x, values, None, torch.ones(5)).float()
    assert not y[0].any()
    assert not y[1:4].isfinite().any()
    assert (y[4] == 64 * 2.0**-126).all()
    assert (y[5].abs() <= 2.0**-119).all()


def test_native_operator_refuses_whole_numbers_without_scales_and_scales_without_them() -> None:
    require_native_kernels()
    values, scales = quantize_rows(draw(8, 16, dtype=torch.float32))
    x = draw(2, 16, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="scales"):
        native_linear(x, values, None)
    with pytest.raises(RuntimeError, match="scales"):
        native_linear(x, values.float(), None, scales)
    with pytest.raises(RuntimeError, match="one for each row"):
        native_linear(x, values, None, scales[:-1])


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.gate = nn.Linear(16, 4)
        self.up = nn.Linear(16, 24)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight


def test_routers_and_embeddings_keep_their_weights_and_a_tied_head_gets_its_own() -> None:
    model = Routed()
    before = model.embed.weight.clone()
    saved = quantize_linears(model)
    assert type(model.gate) is nn.Linear
    assert isinstance(model.up, Int8Linear)
    assert isinstance(model.head, Int8Linear)
    assert torch.equal(model.embed.weight, before)
    assert (model.head.weight - before).abs().max() <= model.head.scales.max()
    # up: 3 bytes of 4 less and a scale for each row; the head was the embedding's, and now takes memory of its own.
    assert saved == 24 * 16 * 3 - 24 * 4 - (50 * 16 + 50 * 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_float32_model_is_given_the_very_weights_that_a_base_of_any_type_multiplies(
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(0)
    model = Routed()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    served = copy.deepcopy(model).to(dtype)
    quantize_linears(served)
    round_linears(model, dtype)
    for rounded, linear in ((model.up, served.up), (model.head, served.head)):
        assert isinstance(linear, Int8Linear)
        assert torch.equal(rounded.weight, dequantize_rows(linear.values, linear.scales, torch.float32))
    for name in ("embed.weight", "gate.weight", "up.bias"):
        assert torch.equal(model.state_dict()[name], before[name])


def test_chosen_ways_keep_the_module_an_int8_linear() -> None:
    model = Routed().to(torch.bfloat16)
    quantize_linears(model)
    x = draw(3, 16, dtype=torch.bfloat16)
    expected = model.up(x)
    require_native_kernels()
    use_fastest_linears(model, with_native=True)
    assert type(model.up) is CpuInt8Linear
    torch.testing.assert_close(model.up(x), expected, rtol=2.0**-7, atol=1e-6)


def test_bitsandbytes_is_refused_where_it_cannot_run(tmp_path: Path) -> None:
    tiny_llama(tmp_path)
    with pytest.raises(BaseRefused, match="needs a CUDA device; on cpu use --quantization int8"):
        load_base(str(tmp_path), device="cpu", quantization="bnb-4bit")
