"""Linears of one input in one call, with what adapters add to each: equal to the products one by one."""

import pytest
import torch

from adapterd.model.int8 import quantize_rows
from adapterd.model.lora import LoraProduct, LoraStep, Products, Segment
from adapterd.model.lora_cpu import NativeLoraStep
from tests.model.test_lora_cpu import in_double
from tests.native_kernels import require_native_kernels

pytestmark = pytest.mark.usefixtures("several_threads")

D_IN = 1100
D_OUTS = {"wide": 1100, "narrow": 67, "plain": 128}
"""Enough rows for many tokens' way to take them 64 at a time; with a rest that is no whole block."""


@pytest.fixture(autouse=True)
def _native() -> None:
    require_native_kernels()


def products_of(paths: str, ranks: tuple[int, ...], dtype: torch.dtype, seed: int) -> Products:
    generator = torch.Generator().manual_seed(seed)

    def extent(path: str, rank: int) -> LoraProduct:
        a = torch.randn(rank, D_IN, generator=generator) * D_IN**-0.5
        b_t = torch.randn(rank, D_OUTS[path], generator=generator)
        return LoraProduct(a.to(dtype), b_t.to(dtype), 0.5 + seed)

    return {path: tuple(extent(path, rank) for rank in ranks) for path in paths.split()}


def mixed_segments(num_tokens: int, dtype: torch.dtype) -> tuple[Segment, ...]:
    """Tokens of the base before, between and after, an adapter of two extents, one that leaves linears alone, and an
    empty segment."""
    first, second, third = num_tokens // 8, num_tokens // 3, num_tokens // 2
    return (
        Segment(first, second, products_of("wide narrow", (16, 5), dtype, 0)),
        Segment(second, second, products_of("wide", (8,), dtype, 1)),
        Segment(second, third, products_of("narrow", (64,), dtype, 2)),
        Segment(third + 1, num_tokens - 1, products_of("wide", (1,), dtype, 3)),
    )


@pytest.mark.parametrize("num_tokens", [9, 49, 64, 131])
@pytest.mark.parametrize("is_int8", [False, True], ids=["plain", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linears_and_their_adapters(dtype: torch.dtype, is_int8: bool, num_tokens: int) -> None:
    torch.manual_seed(num_tokens)
    weights = [torch.randn(d_out, D_IN) * D_IN**-0.5 for d_out in D_OUTS.values()]
    biases = [torch.randn(67).to(dtype) if path == "narrow" else None for path in D_OUTS]
    scales: list[torch.Tensor | None] = [None] * len(weights)
    if is_int8:
        found = [quantize_rows(weight) for weight in weights]
        weights, scales = [values for values, _ in found], [scale for _, scale in found]
        exact = [values.double() * scale.double()[:, None] for values, scale in found]
    else:
        weights = [weight.to(dtype) for weight in weights]
        exact = [weight.double() for weight in weights]
    x = torch.randn(num_tokens, D_IN).to(dtype)
    segments = mixed_segments(num_tokens, dtype)
    step, reference = NativeLoraStep(), LoraStep()
    place = step.register(list(D_OUTS))
    step.begin(segments, num_tokens)
    reference.begin(in_double(segments), num_tokens)

    outputs = torch.ops.adapterd.linears(x, weights, scales, biases, *step.additions(place))

    for path, y, weight, bias in zip(D_OUTS, outputs, exact, biases, strict=True):
        expected = x.double() @ weight.T
        if bias is not None:
            expected += bias.double()
        reference.add(path, expected, x.double())
        if dtype == torch.float32:
            # Numbers of up to some 60, and on some processors products are rounded before they are added.
            tolerance = {"atol": 5e-5, "rtol": 1e-5}
        elif num_tokens <= 48:
            # y is rounded, then what adapters add to it: a last place of the larger of the two.
            tolerance = {"atol": 0.05, "rtol": 2.0**-7}
        else:
            # What adapters add meets the sums before they are rounded: half a last place, once.
            tolerance = {"atol": 2e-3, "rtol": 2.0**-8}
        torch.testing.assert_close(y.double(), expected, **tolerance)


def test_segments_out_of_order_are_refused() -> None:
    products = products_of("plain", (4,), torch.float32, 0)
    step = NativeLoraStep()
    place = step.register(["plain"])
    step.begin((Segment(2, 5, products), Segment(0, 1, products)), 5)
    with pytest.raises(RuntimeError, match="tokens from 0 on after those up to 5"):
        torch.ops.adapterd.linears(
            torch.ones(5, D_IN), [torch.ones(128, D_IN)], [None], [None], *step.additions(place)
        )
