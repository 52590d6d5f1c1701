"""Native adapter products equal the reference for any mix of segments, ranks and extents, step after step."""

import itertools
import random

import pytest
import torch

from adapterd.model.lora import LoraProduct, LoraStep, Products, Segment
from adapterd.model.lora_cpu import NativeLoraStep
from tests.native_kernels import require_native_kernels

pytestmark = pytest.mark.usefixtures("several_threads")

LINEARS = {"q": (64, 48), "odd": (67, 33), "wide": (200, 1100)}  # (d_out, d_in)
RANKS = (1, 2, 5, 8, 16, 17, 64)


@pytest.fixture(autouse=True)
def _native() -> None:
    require_native_kernels()


def make_products(paths: list[str], ranks: list[int], dtype: torch.dtype, seed: int) -> Products:
    """One extent for each rank in each linear, as an adapter has whose pages lie apart."""
    generator = torch.Generator().manual_seed(seed)

    def extent(path: str, rank: int) -> LoraProduct:
        d_out, d_in = LINEARS[path]
        a = torch.randn(rank, d_in, generator=generator) * d_in**-0.5
        b_t = torch.randn(rank, d_out, generator=generator)
        return LoraProduct(a.to(dtype), b_t.to(dtype), 0.25 + seed % 3)

    return {path: tuple(extent(path, rank) for rank in ranks) for path in paths}


def in_double(segments: tuple[Segment, ...]) -> tuple[Segment, ...]:
    def widen(products: Products) -> Products:
        return {
            path: tuple(LoraProduct(p.a.double(), p.b_t.double(), p.scale) for p in parts)
            for path, parts in products.items()
        }

    return tuple(Segment(s.start, s.end, widen(s.products)) for s in segments)


def check(step: NativeLoraStep, segments: tuple[Segment, ...], num_tokens: int, dtype: torch.dtype) -> None:
    """Every linear against LoraStep in float64: sums in float32, the result rounded once."""
    reference = LoraStep()
    step.begin(segments, num_tokens)
    reference.begin(in_double(segments), num_tokens)
    untouched = torch.ones(num_tokens, dtype=torch.bool)
    for segment in segments:
        untouched[segment.start : segment.end] = False
    for path, (d_out, d_in) in LINEARS.items():
        x, y = torch.randn(num_tokens, d_in).to(dtype), torch.randn(num_tokens, d_out).to(dtype)
        found, expected = y.clone(), y.double()
        step.add(path, found, x)
        reference.add(path, expected, x.double())
        rounding = 2.0**-8 if dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(found.double(), expected, atol=5e-5, rtol=rounding)
        assert torch.equal(found[untouched], y[untouched])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", RANKS)
def test_every_rank_at_every_number_of_tokens(rank: int, dtype: torch.dtype) -> None:
    products = make_products(list(LINEARS), [rank], dtype, seed=rank)
    for num_tokens in (1, 2, 3, 4, 5, 7, 8, 13, 24, 25, 70):
        check(NativeLoraStep(), (Segment(0, num_tokens, products),), num_tokens, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mixed_segments_step_after_step(dtype: torch.dtype) -> None:
    """Adapters of other targets, ranks and extents come and go between steps, with tokens of the base between."""
    generator = random.Random(5)
    mixes = [
        make_products(
            generator.sample(list(LINEARS), generator.randint(1, 3)),
            [generator.choice(RANKS) for _ in range(generator.randint(1, 4))],
            dtype,
            seed,
        )
        for seed in range(9)
    ]
    step = NativeLoraStep()
    for _ in range(25):
        row, segments = 0, []
        for products in generator.sample(mixes, generator.randint(0, 9)):
            row += generator.choice([0, 0, 1, 3])
            # One mix may run in two segments of a step, and a segment may be empty.
            length = generator.choice([0, 1, 1, 2, 9, 30])
            segments.append(Segment(row, row + length, products))
            row += length
        check(step, tuple(segments), row + 2, dtype)


def test_a_batch_of_the_base_calls_nothing() -> None:
    step = NativeLoraStep()
    step.begin((Segment(0, 2, make_products(["q"], [4], torch.float32, 0)),), 2)
    step.begin((), 2)
    y = torch.zeros(2, 64)
    step.add("q", y, torch.ones(2, 48))
    assert torch.equal(y, torch.zeros(2, 64))


def test_an_adapter_that_returns_elsewhere_in_memory_is_found_there() -> None:
    """Products made anew, even if Python gives them the place of old ones, never meet the old addresses."""
    step = NativeLoraStep()
    for seed in range(20):
        check(step, (Segment(0, 3, make_products(["q"], [3, 2], torch.float32, seed)),), 3, torch.float32)
        check(step, (), 3, torch.float32)


def test_a_table_that_leaves_the_batch_is_refused() -> None:
    step = NativeLoraStep()
    step.begin((Segment(0, 5, make_products(["q"], [4], torch.float32, 0)),), 5)
    with pytest.raises(RuntimeError, match="tokens 0 to 5 of 3"):
        step.add("q", torch.zeros(3, 64), torch.ones(3, 48))


def test_types_of_x_and_y_must_agree() -> None:
    step = NativeLoraStep()
    step.begin((Segment(0, 3, make_products(["q"], [4], torch.float32, 0)),), 3)
    for x_type, y_type in itertools.permutations((torch.float32, torch.bfloat16)):
        with pytest.raises(RuntimeError, match="differ in type"):
            step.add("q", torch.zeros(3, 64, dtype=y_type), torch.ones(3, 48, dtype=x_type))
