"""Every way to multiply gives the same linear, and a model keeps its parameters whichever is chosen."""

import itertools
import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from adapterd.model.linear_cpu import (
    TOKEN_COUNTS,
    CpuLinear,
    by_bisection,
    candidates,
    float32_linear,
    native_linear,
    use_fastest_linears,
)
from tests.native_kernels import require_native_kernels

pytestmark = pytest.mark.usefixtures("several_threads")

SHAPES = [(1, 1), (4, 32), (16, 64), (17, 33), (3, 5), (130, 257), (50, 1024), (19, 2100)]  # (d_out, d_in)
TOKENS = [1, 2, 3, 4, 5, 6, 7, 12, 13, 70]


def draw(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def exact(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return F.linear(x.double(), weight.double(), None if bias is None else bias.double())


@pytest.mark.parametrize(("d_out", "d_in"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_native_linear_is_the_product_rounded_once(dtype: torch.dtype, d_out: int, d_in: int) -> None:
    require_native_kernels()
    weight, bias = draw(d_out, d_in, dtype=dtype), draw(d_out, dtype=dtype)
    for tokens, with_bias in itertools.product(TOKENS, (False, True)):
        x, b = draw(tokens, d_in, dtype=dtype), bias if with_bias else None
        expected = exact(x, weight, b)
        # float32 sums in some order, then at most half a unit in the last place of the result's type.
        rounding = 2.0**-8 * expected.abs() if dtype == torch.bfloat16 else 0.0
        allowed = 1e-6 * d_in**0.5 * 4 + rounding
        found = native_linear(x, weight, b)
        assert found.dtype == dtype
        assert ((found.double() - expected).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_linear_rounds_no_more_than_torch(dtype: torch.dtype) -> None:
    weight, bias, x = draw(1500, 900, dtype=dtype), draw(1500, dtype=dtype), draw(2, 9, 900, dtype=dtype)
    found = float32_linear(x, weight, bias)
    assert found.shape == (2, 9, 1500)
    assert found.dtype == dtype
    expected = exact(x, weight, bias)
    assert (found - expected).abs().max() <= 1.1 * (F.linear(x, weight, bias) - expected).abs().max()


def test_native_linear_keeps_leading_dimensions_and_reads_any_strides() -> None:
    require_native_kernels()
    weight = draw(24, 40, dtype=torch.float32)
    x = draw(40, 5, 2, dtype=torch.float32).permute(2, 1, 0)
    assert not x.is_contiguous()
    torch.testing.assert_close(native_linear(x, weight, None), F.linear(x, weight))
    assert native_linear(x[:, :0], weight, None).shape == (2, 0, 24)


def test_infinite_and_not_a_number_stay_in_their_row() -> None:
    require_native_kernels()
    for dtype in (torch.float32, torch.bfloat16):
        weight, x = draw(33, 70, dtype=dtype), draw(7, 70, dtype=dtype)
        x[2, 3], x[5, 69] = float("nan"), float("inf")
        found = native_linear(x, weight, None)
        assert found[2].isnan().all()
        assert not found[5].isfinite().any()
        assert found[[0, 1, 3, 4, 6]].isfinite().all()


def test_native_linear_refuses_what_it_cannot_read() -> None:
    require_native_kernels()
    weight = draw(8, 16, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="x has 15 columns, weight 16"):
        native_linear(draw(2, 15, dtype=torch.float32), weight, None)
    with pytest.raises(RuntimeError, match="differ in type"):
        native_linear(draw(2, 16, dtype=torch.bfloat16), weight, None)
    with pytest.raises(RuntimeError, match="contiguous matrix"):
        native_linear(draw(2, 8, dtype=torch.float32), weight.T, None)
    with pytest.raises(RuntimeError, match="float32 or bfloat16"):
        native_linear(draw(2, 16, dtype=torch.float16), weight.half(), None)


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 48)
        self.up = nn.Linear(48, 96)
        self.down = nn.Linear(96, 48, bias=False)
        self.head = nn.Linear(48, 50, bias=False)
        self.head.weight = self.embed.weight
        self.to(dtype)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.head(self.down(self.up(self.embed(ids)).relu()))
        return hidden


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.inference_mode()
def test_model_computes_the_same_with_the_same_parameters(
    dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    require_native_kernels()
    torch.manual_seed(0)
    model = Model(dtype)
    ids = torch.arange(300) % 50
    expected = model(ids)
    names, tied = list(model.state_dict()), model.embed.weight
    with caplog.at_level(logging.INFO, logger="adapterd"):
        use_fastest_linears(model, with_native=True)
    assert type(model.up) is CpuLinear
    assert isinstance(model.up, nn.Linear)
    assert list(model.state_dict()) == names
    assert model.head.weight is model.embed.weight is tied
    assert ("linears by number of tokens" in caplog.text) == (dtype != torch.float32)
    scale = expected.abs().max()
    for count in (1, 5, 300):
        difference = (model(ids[:count]) - expected[:count]).abs().max() / scale
        assert difference < {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]


def test_where_there_is_one_way_nothing_is_replaced() -> None:
    model = Model(torch.float32)
    use_fastest_linears(model, with_native=False)
    assert type(model.up) is nn.Linear
    assert list(candidates(torch.float32, with_native=False)) == ["torch"]
    assert "native" not in candidates(torch.float16, with_native=True)


@pytest.mark.parametrize("first_many", [1, 2, 8, 9, 33, 500, 513])
def test_the_fastest_is_found_at_every_count_by_asking_at_few(first_many: int) -> None:
    asked: list[int] = []

    def fastest(count: int) -> str:
        asked.append(count)
        return "many" if count >= first_many else "few"

    found = by_bisection(TOKEN_COUNTS, fastest)
    assert found == ["many" if count >= first_many else "few" for count in TOKEN_COUNTS]
    assert len(set(asked)) == len(asked) <= 5


def test_three_ways_may_follow_each_other() -> None:
    def fastest(count: int) -> str:
        return "one" if count == 1 else "some" if count <= 64 else "many"

    assert by_bisection(TOKEN_COUNTS, fastest) == [fastest(count) for count in TOKEN_COUNTS]
