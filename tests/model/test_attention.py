"""Paged attention equals its reference, which equals plain softmax attention over contiguous keys and values."""

import itertools
import random
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from adapterd.errors import BaseRefused
from adapterd.model.attention import (
    AttentionPlan,
    PagedContext,
    ShapeRecorder,
    paged_attention,
    paged_attention_forward,
    paged_attention_reference,
    plan_attention,
)
from adapterd.model.attention_one import Scoring
from adapterd.model.kv import KV_BLOCK_SIZE, KVPool, KVShape

CPU = torch.device("cpu")
SCALE = 0.3


@dataclass(frozen=True)
class Variant:
    num_heads: int = 4
    num_kv_heads: int = 4
    key_dim: int = 16
    value_dim: int = 16
    sliding_window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False


VARIANTS = {
    "plain": Variant(),
    "grouped": Variant(num_heads=6, num_kv_heads=2),
    "one_kv_head": Variant(num_kv_heads=1),
    "window": Variant(num_kv_heads=2, sliding_window=5),
    "window_of_one": Variant(sliding_window=1),
    "window_beyond_context": Variant(sliding_window=1000),
    "softcap": Variant(num_kv_heads=2, softcap=1.5),
    "sinks": Variant(num_kv_heads=2, has_sinks=True),
    "narrow_values": Variant(num_heads=8, num_kv_heads=4, value_dim=8),
    "everything": Variant(6, 3, 16, 24, sliding_window=7, softcap=2.0, has_sinks=True),
}
MIXES = {
    "decode": [(1, 1), (17, 1), (16, 1), (40, 1), (3, 1), (33, 1)],  # (context, tokens computed in this step)
    "chunks": [(7, 7), (40, 20), (18, 2), (33, 32)],
    "mixed": [(9, 1), (30, 12), (50, 1), (1, 1), (16, 16), (2, 1), (64, 3)],
}


@dataclass(frozen=True)
class Case:
    """A packed batch: sequences lie in shuffled blocks of one layer's pool."""

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    sinks: torch.Tensor | None
    slots: list[torch.Tensor]
    num_new: list[int]
    plan: AttentionPlan


def make_case(variant: Variant, mix: list[tuple[int, int]], dtype: torch.dtype, seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    num_blocks = [-(-context // KV_BLOCK_SIZE) for context, _ in mix]
    order = torch.randperm(sum(num_blocks) + 2, generator=generator)[: sum(num_blocks)].split(num_blocks)
    slots = [
        (blocks[:, None] * KV_BLOCK_SIZE + torch.arange(KV_BLOCK_SIZE)).flatten()[:context]
        for blocks, (context, _) in zip(order, mix, strict=True)
    ]
    num_slots = (sum(num_blocks) + 2) * KV_BLOCK_SIZE

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    num_new = [new for _, new in mix]
    return Case(
        query=draw(sum(num_new), variant.num_heads, variant.key_dim),
        keys=draw(num_slots, variant.num_kv_heads, variant.key_dim),
        values=draw(num_slots, variant.num_kv_heads, variant.value_dim),
        sinks=draw(variant.num_heads) if variant.has_sinks else None,
        slots=slots,
        num_new=num_new,
        plan=plan_attention(slots, num_new, CPU),
    )


def plain_attention(case: Case, variant: Variant) -> torch.Tensor:
    """One token and one head at a time, in float64."""
    rows = []
    starts = itertools.accumulate(case.num_new, initial=0)
    for start, slots, num_new in zip(starts, case.slots, case.num_new, strict=False):
        keys, values = case.keys[slots].double(), case.values[slots].double()
        for offset in range(num_new):
            end = len(slots) - num_new + offset + 1
            begin = max(end - variant.sliding_window, 0) if variant.sliding_window else 0
            heads = []
            for head in range(variant.num_heads):
                kv_head = head // (variant.num_heads // variant.num_kv_heads)
                scores = keys[begin:end, kv_head] @ case.query[start + offset, head].double() * SCALE
                if variant.softcap:
                    scores = variant.softcap * torch.tanh(scores / variant.softcap)
                total = scores.exp().sum()
                if case.sinks is not None:
                    total = total + case.sinks[head].double().exp()
                heads.append((scores.exp() / total) @ values[begin:end, kv_head])
            rows.append(torch.stack(heads))
    return torch.stack(rows)


def scoring_of(case: Case, variant: Variant) -> Scoring:
    return Scoring(SCALE, variant.sliding_window, variant.softcap, case.sinks)


def attend(function: object, case: Case, variant: Variant) -> torch.Tensor:
    found: torch.Tensor = function(  # type: ignore[operator]
        case.query, case.keys, case.values, case.plan, scoring_of(case, variant)
    )
    return found


@pytest.mark.parametrize("mix", sorted(MIXES))
@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_reference_and_fast_path_equal_plain_softmax_attention(name: str, mix: str) -> None:
    variant = VARIANTS[name]
    case = make_case(variant, MIXES[mix], torch.float32)
    expected = plain_attention(case, variant)
    for function in (paged_attention_reference, paged_attention):
        torch.testing.assert_close(attend(function, case, variant).double(), expected, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_16_bit_stays_within_a_few_roundings_of_float64(
    name: str, dtype: torch.dtype, tolerance: float
) -> None:
    """Outputs are of order one: the bound is some eight units in the last place."""
    variant = VARIANTS[name]
    case = make_case(variant, MIXES["mixed"], dtype)
    expected = plain_attention(case, variant)
    for function in (paged_attention_reference, paged_attention):
        found = attend(function, case, variant)
        assert found.dtype == dtype
        assert (found.double() - expected).abs().max() < tolerance


def test_fast_path_equals_reference_on_random_mixes() -> None:
    generator = random.Random(0)
    for seed in range(60):
        variant = generator.choice(list(VARIANTS.values()))
        mix = []
        for _ in range(generator.randint(1, 9)):
            context = generator.randint(1, 90)
            mix.append((context, generator.choice([1, 1, generator.randint(1, context)])))
        case = make_case(variant, mix, torch.float32, seed)
        torch.testing.assert_close(
            attend(paged_attention, case, variant),
            attend(paged_attention_reference, case, variant),
            atol=3e-6,
            rtol=1e-5,
        )


@pytest.mark.parametrize("name", sorted(VARIANTS))
@pytest.mark.parametrize("victim", range(len(MIXES["decode"])))
def test_sequence_whose_values_overflowed_spoils_no_other(name: str, victim: int) -> None:
    """Regression: rows were padded with slot 0, and a weight of zero times NaN is NaN."""
    variant = VARIANTS[name]
    case = make_case(variant, MIXES["decode"], torch.float32)
    sound = attend(paged_attention, case, variant)
    mine = torch.zeros(len(case.query), dtype=torch.bool)
    start = sum(case.num_new[:victim])
    mine[start : start + case.num_new[victim]] = True
    poisoned = torch.ones(len(case.keys), dtype=torch.bool)
    for index, slots in enumerate(case.slots):
        if index != victim:
            poisoned[slots] = False
    case.keys[poisoned] = case.values[poisoned] = float("nan")
    found = attend(paged_attention, case, variant)
    assert torch.equal(found[~mine], sound[~mine])
    assert found[mine].isnan().all()


def test_plan_covers_every_row_once_and_pads_less_than_half() -> None:
    generator = random.Random(4)
    for _ in range(50):
        mix = [
            (context, generator.choice([1, 1, context]))
            for context in (generator.randint(1, 300) for _ in range(12))
        ]
        slots = [torch.arange(context) + 1000 * index for index, (context, _) in enumerate(mix)]
        plan = plan_attention(slots, [new for _, new in mix], CPU)
        rows = [row for group in plan.groups for row in group.rows.tolist()]
        rows += [row for chunk in plan.chunks for row in range(chunk.start, chunk.end)]
        assert sorted(rows) == list(range(sum(new for _, new in mix)))
        written = [s for seq, (_, new) in zip(slots, mix, strict=True) for s in seq[-new:].tolist()]
        assert plan.slot_mapping.tolist() == written
        for group in plan.groups:
            assert group.slots.numel() < 2 * int(group.context_lens.sum())


class Layer(nn.Module):
    layer_idx = 0


def heads(num_heads: int, dim: int = 8, num_tokens: int = 3) -> torch.Tensor:
    return torch.randn(1, num_heads, num_tokens, dim)


@pytest.mark.parametrize("keyword", ["position_bias", "head_mask", "alibi"])
def test_keyword_that_would_be_ignored_is_refused_by_name(keyword: str) -> None:
    with pytest.raises(BaseRefused, match=f"Layer asks attention for {keyword}"):
        paged_attention_forward(
            Layer(), heads(2), heads(2), heads(2), None, paged=ShapeRecorder(), **{keyword: torch.ones(1)}
        )


def test_mask_that_would_be_ignored_is_refused() -> None:
    with pytest.raises(BaseRefused, match="attention_mask"):
        paged_attention_forward(
            Layer(), heads(2), heads(2), heads(2), torch.ones(1, 1, 3, 3), paged=ShapeRecorder()
        )


def test_family_that_drops_forward_keywords_is_refused_by_name() -> None:
    with pytest.raises(BaseRefused, match="Layer does not pass forward keywords"):
        paged_attention_forward(Layer(), heads(2), heads(2), heads(2), None)


def test_keywords_that_change_nothing_are_accepted_and_so_is_an_absent_one() -> None:
    recorder = ShapeRecorder()
    paged_attention_forward(
        Layer(), heads(4), heads(2, 8), heads(2, 6), None,
        paged=recorder, position_ids=torch.arange(3), use_cache=False, head_mask=None, dropout=0.0,
    )  # fmt: skip
    assert recorder.shapes == {0: KVShape(2, 8, 6)}


def test_layer_that_attends_twice_is_refused() -> None:
    recorder = ShapeRecorder()
    paged_attention_forward(Layer(), heads(2), heads(2), heads(2), None, paged=recorder)
    with pytest.raises(BaseRefused, match="twice in layer 0"):
        paged_attention_forward(Layer(), heads(2), heads(2), heads(2), None, paged=recorder)


def test_step_writes_its_keys_before_it_attends() -> None:
    pool = KVPool({0: KVShape(2, 8, 8)}, num_blocks=2, dtype=torch.float32, device=CPU)
    plan = plan_attention([torch.arange(20, 23)], [3], CPU)
    query, key, value = heads(4), heads(2), heads(2)
    out, weights = paged_attention_forward(
        Layer(), query, key, value, None, paged=PagedContext(pool, plan), scaling=SCALE
    )
    repeated = [tensor.repeat_interleave(2, dim=1) for tensor in (key, value)]
    expected = nn.functional.scaled_dot_product_attention(query, *repeated, is_causal=True, scale=SCALE)
    assert weights is None
    torch.testing.assert_close(out, expected.transpose(1, 2), atol=2e-6, rtol=1e-5)
    assert torch.equal(pool.keys[0][20:23], key[0].transpose(0, 1))
    assert not pool.keys[0][:20].any()
