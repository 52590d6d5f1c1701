"""The kernels of a CUDA device at a real model's sizes, in 16 bits, against their references in more.

Tests with small numbers are tests/model/test_*_triton.py, which run here on the device as well.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch

from adapterd.model.attention import paged_attention_reference, plan_attention
from adapterd.model.attention_one import Scoring
from adapterd.model.int8 import int8_linear, quantize_rows
from adapterd.model.kernels import Kernels, choose_kernels
from adapterd.model.kv import KV_BLOCK_SIZE, KVPool, KVShape
from adapterd.model.lora import LoraProduct, LoraStep, Products, Segment
from tests.triton_kernels import DEVICE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BF16 = torch.bfloat16
LINEARS = {"q": (4096, 4096), "k": (1024, 4096), "gate": (14336, 4096), "down": (4096, 14336)}
RANKS = (4, 8, 16, 17, 32, 64)
"""Of the adapters, in turn."""


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return choose_kernels("triton", DEVICE, BF16)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference of a row over the row's length: a rounding to bfloat16 is 2**-9 of it."""
    difference = (found.double() - expected.double()).flatten(1).norm(dim=1)
    return float((difference / expected.double().flatten(1).norm(dim=1)).max())


def adapter(rank: int, seed: int) -> Products:
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=DEVICE)

    # In two extents, as pages that lie apart give them.
    parts = [rank] if rank < 8 else [rank - 3, 3]
    return {
        path: tuple(
            LoraProduct((draw(r, d_in) * d_in**-0.5).to(BF16), draw(r, d_out).to(BF16), 0.5) for r in parts
        )
        for path, (d_out, d_in) in LINEARS.items()
    }


def in_double(products: Products) -> Products:
    return {
        path: tuple(LoraProduct(part.a.double(), part.b_t.double(), part.scale) for part in parts)
        for path, parts in products.items()
    }


MIXES = {
    "decode, 32 adapters": [(1, i) for i in range(32)],
    "decode, some base": [(1, 0), (2, None), (1, 1), (3, None), (9, 2), (1, 3)],
    "one adapter": [(32, 5)],
    "prompts": [(300, 0), (5, None), (1, 1), (77, 4), (64, 5), (1, None)],
}


@pytest.mark.parametrize("mix", MIXES)
def test_adapters_of_any_ranks_are_added_within_a_rounding(kernels: Kernels, mix: str) -> None:
    """MIXES: (number of tokens, adapter) of one segment after another; None is the base."""
    products = {
        index: adapter(RANKS[index % len(RANKS)], index) for _, index in MIXES[mix] if index is not None
    }
    doubled = {index: in_double(found) for index, found in products.items()}
    step, reference = kernels.lora_step(), LoraStep()
    segments, exact, row = [], [], 0
    for count, index in MIXES[mix]:
        if index is not None:
            segments.append(Segment(row, row + count, products[index]))
            exact.append(Segment(row, row + count, doubled[index]))
        row += count
    step.begin(tuple(segments), row)
    reference.begin(tuple(exact), row)
    has_adapter = torch.zeros(row, dtype=torch.bool, device=DEVICE)
    for segment in segments:
        has_adapter[segment.start : segment.end] = True
    for path, (d_out, d_in) in LINEARS.items():
        x = torch.randn(row, d_in, device=DEVICE, dtype=BF16)
        y = torch.randn(row, d_out, device=DEVICE, dtype=BF16)
        found, expected = y.clone(), y.double()
        step.add(path, found, x)
        reference.add(path, expected, x.double())
        assert relative(found, expected) < 2**-7
        assert torch.equal(found[~has_adapter], y[~has_adapter])
        assert not torch.equal(found[has_adapter], y[has_adapter])


@dataclass(frozen=True)
class Kind:
    """What an attention layer asks for beside its shape."""

    sliding_window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False


KINDS = {
    "plain": Kind(),
    "window": Kind(sliding_window=1024),
    "softcap": Kind(softcap=30.0),
    "sinks": Kind(has_sinks=True),
    "all": Kind(sliding_window=512, softcap=50.0, has_sinks=True),
}
SHAPES = {"llama-3-8b": (32, 8, 128), "gemma-2-9b": (16, 8, 256)}
CONTEXTS = {
    "one": [(1, 1)],
    "one long": [(8100, 1)],
    "32 of any length": [(1 + 251 * i, 1) for i in range(32)],
    "chunks": [(3000, 700), (4100, 1), (513, 513), (17, 1), (2049, 5)],
}


def scattered_slots(contexts: Sequence[tuple[int, int]]) -> tuple[list[torch.Tensor], int]:
    """Each sequence's slots, its blocks anywhere in the pool; and how many blocks the pool has."""
    counts = [-(-length // KV_BLOCK_SIZE) for length, _ in contexts]
    places = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(0))
    slots, first = [], 0
    for (length, _), count in zip(contexts, counts, strict=True):
        blocks = places[first : first + count]
        slots.append((blocks[:, None] * KV_BLOCK_SIZE + torch.arange(KV_BLOCK_SIZE)).flatten()[:length])
        first += count
    return slots, sum(counts) + 3


@pytest.mark.parametrize("contexts", CONTEXTS)
@pytest.mark.parametrize(
    ("shape", "kind"),
    [*(("llama-3-8b", kind) for kind in KINDS), ("gemma-2-9b", "plain"), ("gemma-2-9b", "all")],
)
def test_attention_over_scattered_pages_is_within_two_roundings(
    kernels: Kernels, shape: str, kind: str, contexts: str
) -> None:
    num_heads, num_kv_heads, dim = SHAPES[shape]
    asked, new_tokens = KINDS[kind], [new for _, new in CONTEXTS[contexts]]
    slots, num_blocks = scattered_slots(CONTEXTS[contexts])
    pool = KVPool({0: KVShape(num_kv_heads, dim, dim)}, num_blocks, BF16, DEVICE)
    for stored in (pool.keys[0], pool.values[0]):
        stored.normal_()
    count = sum(new_tokens)
    query = torch.randn(count, num_heads, dim, device=DEVICE, dtype=BF16)
    key, value = (torch.randn(count, num_kv_heads, dim, device=DEVICE, dtype=BF16) for _ in range(2))
    sinks = torch.randn(num_heads, device=DEVICE, dtype=BF16) if asked.has_sinks else None
    context = kernels.paged_context(pool, slots, new_tokens)
    scoring = Scoring(dim**-0.5, asked.sliding_window, asked.softcap, sinks)
    found = context.attend(0, query, key, value, scoring)
    plan = plan_attention(slots, new_tokens, DEVICE)
    assert torch.equal(pool.keys[0][plan.slot_mapping], key)
    assert torch.equal(pool.values[0][plan.slot_mapping], value)
    expected = paged_attention_reference(
        query.float(),
        pool.keys[0].float(),
        pool.values[0].float(),
        plan,
        replace(scoring, sinks=None if sinks is None else sinks.float()),
    )
    # Weights and the result are rounded, each by 2**-9 at most.
    assert relative(found, expected) < 2**-7


@pytest.mark.parametrize("num_tokens", [1, 8, 17, 32, 300])
@pytest.mark.parametrize(("d_out", "d_in"), LINEARS.values(), ids=list(LINEARS))
def test_linears_in_8_bits_are_within_a_rounding(
    kernels: Kernels, d_out: int, d_in: int, num_tokens: int
) -> None:
    values, scales = quantize_rows(torch.randn(d_out, d_in, device=DEVICE) * 0.02)
    x = torch.randn(num_tokens, d_in, device=DEVICE, dtype=BF16)
    bias = torch.randn(d_out, device=DEVICE, dtype=BF16)
    for offset in (None, bias):
        found = kernels.int8_product(x, values, offset, scales)
        expected = int8_linear(x.double(), values, None if offset is None else offset.double(), scales)
        assert found.dtype == BF16
        assert relative(found, expected) < 2**-7
