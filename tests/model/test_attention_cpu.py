"""Native attention equals plain softmax attention: the cases of test_attention.py, on slots instead of groups."""

import itertools

import pytest
import torch

from adapterd.model.attention import paged_attention_reference
from adapterd.model.attention_cpu import native_context, native_paged_attention, plan_slots
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
from tests.native_kernels import require_native_kernels

pytestmark = pytest.mark.usefixtures("several_threads")

WIDE = {
    "qwen": Variant(num_heads=16, num_kv_heads=8, key_dim=128, value_dim=128),
    "odd_widths": Variant(num_heads=6, num_kv_heads=2, key_dim=72, value_dim=40, sliding_window=21),
    "many_heads_a_key": Variant(num_heads=32, num_kv_heads=1, key_dim=24, value_dim=24, has_sinks=True),
}
LONG = [(1100, 1), (200, 200), (37, 5), (1, 1)]


@pytest.fixture(autouse=True)
def _native() -> None:
    require_native_kernels()


def attend_natively(case: Case, variant: Variant) -> torch.Tensor:
    return native_paged_attention(
        case.query,
        case.keys,
        case.values,
        plan_slots(case.slots, case.num_new),
        scoring_of(case, variant),
    )


@pytest.mark.parametrize(
    ("name", "mix"), [*itertools.product(VARIANTS, MIXES), *itertools.product(WIDE, ["mixed", "long"])]
)
def test_equals_plain_softmax_attention(name: str, mix: str) -> None:
    variant = {**VARIANTS, **WIDE}[name]
    case = make_case(variant, {**MIXES, "long": LONG}[mix], torch.float32)
    if mix == "long":
        expected = attend(paged_attention_reference, case, variant).double()
    else:
        expected = plain_attention(case, variant)
    torch.testing.assert_close(attend_natively(case, variant).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [*VARIANTS, *WIDE])
def test_in_16_bits_only_the_result_is_rounded(name: str) -> None:
    variant = {**VARIANTS, **WIDE}[name]
    case = make_case(variant, MIXES["mixed"], torch.bfloat16)
    expected = plain_attention(case, variant)
    found = attend_natively(case, variant)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=2.0**-8)


def test_slots_of_others_are_never_read() -> None:
    variant = VARIANTS["grouped"]
    case = make_case(variant, MIXES["mixed"], torch.float32)
    before = attend_natively(case, variant)
    own = torch.cat(case.slots)
    others = torch.ones(len(case.keys), dtype=torch.bool)
    others[own] = False
    case.keys[others], case.values[others] = float("nan"), float("inf")
    assert torch.equal(attend_natively(case, variant), before)


def test_a_step_writes_its_tokens_then_attends() -> None:
    generator = torch.Generator().manual_seed(3)
    pool = KVPool({0: KVShape(2, 16, 16)}, num_blocks=2, dtype=torch.float32, device=torch.device("cpu"))
    query, key, value = (torch.randn(3, heads, 16, generator=generator) for heads in (4, 2, 2))
    slots = [torch.arange(16, 18), torch.tensor([5])]
    context = native_context(pool, slots, [2, 1])
    found = context.attend(0, query, key, value, Scoring(SCALE))
    assert torch.equal(pool.keys[0][[16, 17, 5]], key)
    # A token alone in its context attends to itself.
    torch.testing.assert_close(found[0], value[0].repeat_interleave(2, dim=0))
    torch.testing.assert_close(found[2], value[2].repeat_interleave(2, dim=0))
