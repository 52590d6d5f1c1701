"""Triton's attention equals plain softmax attention: the cases of test_attention.py, by block table."""

import itertools
from dataclasses import replace

import pytest
import torch

from adapterd.model.attention import paged_attention_reference
from adapterd.model.attention_one import Scoring
from adapterd.model.kv import KVPool, KVShape
from tests.model.test_attention import (
    MIXES,
    SCALE,
    VARIANTS,
    Case,
    Variant,
    attend,
    make_case,
    plain_attention,
    scoring_of,
)
from tests.triton_kernels import DEVICE, IS_INTERPRETED

from adapterd.model.attention_triton import (  # isort: skip  (needs the interpreter's setting)
    BlockPlan,
    plan_blocks,
    triton_context,
    triton_paged_attention,
)

WIDE = {
    "qwen": Variant(num_heads=4, num_kv_heads=2, key_dim=128, value_dim=128),
    "gemma": Variant(num_heads=2, num_kv_heads=1, key_dim=256, value_dim=256, softcap=50.0),
    "odd_widths": Variant(num_heads=6, num_kv_heads=2, key_dim=72, value_dim=40, sliding_window=21),
    "many_heads_a_key": Variant(num_heads=32, num_kv_heads=1, key_dim=24, value_dim=24, has_sinks=True),
}
# Contexts of several splits, and one token whose whole split the window hides.
LONG = [(400, 1), (37, 20), (1, 1)]
MIXED = [(9, 1), (30, 18), (1, 1), (40, 3)]


def attend_by_blocks(case: Case, variant: Variant, plan: BlockPlan | None = None) -> torch.Tensor:
    case = replace(case, sinks=None if case.sinks is None else case.sinks.to(DEVICE))
    return triton_paged_attention(
        case.query.to(DEVICE),
        case.keys.to(DEVICE),
        case.values.to(DEVICE),
        plan or plan_blocks(case.slots, case.num_new, DEVICE),
        scoring_of(case, variant),
    ).cpu()


@pytest.mark.parametrize(
    ("name", "mix"),
    [
        *itertools.product(VARIANTS, ["mixed"]),
        *itertools.product(["grouped", "window_of_one", "everything"], ["decode"]),
        *itertools.product(WIDE, ["long"]),
    ],
)
def test_equals_plain_softmax_attention(name: str, mix: str) -> None:
    variant = {**VARIANTS, **WIDE}[name]
    case = make_case(variant, {**MIXES, "mixed": MIXED, "long": LONG}[mix], torch.float32)
    if mix == "long":
        expected = attend(paged_attention_reference, case, variant).double()
    else:
        expected = plain_attention(case, variant)
    torch.testing.assert_close(attend_by_blocks(case, variant).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)], ids=str)
@pytest.mark.parametrize("name", ["grouped", "everything"])
def test_16_bit_stays_within_a_few_roundings_of_float64(
    name: str, dtype: torch.dtype, tolerance: float
) -> None:
    variant = VARIANTS[name]
    case = make_case(variant, MIXED, dtype)
    found = attend_by_blocks(case, variant)
    assert found.dtype == dtype
    assert (found.double() - plain_attention(case, variant)).abs().max() < tolerance


def test_slots_of_others_are_never_read() -> None:
    variant = VARIANTS["grouped"]
    case = make_case(variant, MIXED, torch.float32)
    before = attend_by_blocks(case, variant)
    others = torch.ones(len(case.keys), dtype=torch.bool)
    others[torch.cat(case.slots)] = False
    case.keys[others], case.values[others] = float("nan"), float("inf")
    assert torch.equal(attend_by_blocks(case, variant), before)


@pytest.mark.parametrize("name", ["window", "sinks"])
def test_rows_that_are_no_tokens_change_nothing(name: str) -> None:
    """A plan with more places than tokens, as a graph of fixed size has them."""
    variant = VARIANTS[name]
    case = make_case(variant, MIXES["decode"], torch.float32)
    plan = plan_blocks(case.slots, case.num_new, DEVICE)
    empty = plan.singles.new_zeros(2, 4)
    padded = replace(case, query=torch.cat([case.query, torch.full_like(case.query[:2], float("nan"))]))
    found = attend_by_blocks(padded, variant, replace(plan, singles=torch.cat([plan.singles, empty])))
    torch.testing.assert_close(found[:-2], attend_by_blocks(case, variant), atol=1e-6, rtol=1e-6)


def test_sequence_whose_values_overflowed_spoils_no_other() -> None:
    variant = VARIANTS["sinks"]
    case = make_case(variant, MIXES["decode"], torch.float32)
    sound = attend_by_blocks(case, variant)
    case.keys[case.slots[1]] = case.values[case.slots[1]] = float("nan")
    found = attend_by_blocks(case, variant)
    others = torch.arange(len(found)) != 1
    assert torch.equal(found[others], sound[others])
    assert found[1].isnan().all()


def test_a_step_writes_its_tokens_then_attends() -> None:
    generator = torch.Generator().manual_seed(3)
    pool = KVPool({0: KVShape(3, 16, 24)}, num_blocks=2, dtype=torch.float32, device=DEVICE)
    # As models hand them over: heads before tokens in memory, or a part of a wider tensor.
    query = torch.randn(6, 3, 16, generator=generator).transpose(0, 1).to(DEVICE)
    key = torch.randn(3, 3, 16, generator=generator).transpose(0, 1).to(DEVICE)
    value = torch.randn(3, 100, generator=generator)[:, 20:92].view(3, 3, 24).to(DEVICE)
    slots = [torch.arange(16, 18), torch.arange(0, 1)]
    context = triton_context(pool, slots, [2, 1])
    found = context.attend(0, query, key, value, Scoring(SCALE))
    assert torch.equal(pool.keys[0][[16, 17, 0]], key)
    assert torch.equal(pool.values[0][[16, 17, 0]], value)
    assert not pool.keys[0][1:16].any()
    # A token alone in its context attends to itself.
    torch.testing.assert_close(found[0], value[0].repeat_interleave(2, dim=0))
    torch.testing.assert_close(found[2], value[2].repeat_interleave(2, dim=0))


def test_a_row_without_a_slot_is_not_written() -> None:
    pool = KVPool({0: KVShape(2, 16, 16)}, num_blocks=1, dtype=torch.float32, device=DEVICE)
    context = triton_context(pool, [torch.arange(0, 2)], [2])
    context.plan.slot_mapping[0] = -1
    ones = torch.ones(2, 2, 16, device=DEVICE)
    context.attend(0, ones, ones, ones, Scoring(SCALE))
    assert pool.keys[0].sum(dim=(1, 2)).tolist() == [0.0, 32.0, *[0.0] * 14]


@pytest.mark.skipif(IS_INTERPRETED, reason="many tokens: for a CUDA device")
def test_long_prompts_on_a_device() -> None:
    variant = Variant(num_heads=32, num_kv_heads=8, key_dim=128, value_dim=128)
    case = make_case(variant, [(3000, 1000), (4100, 1), (777, 777)], torch.float32)
    expected = attend(paged_attention_reference, case, variant)
    torch.testing.assert_close(attend_by_blocks(case, variant), expected, atol=2e-5, rtol=1e-5)
