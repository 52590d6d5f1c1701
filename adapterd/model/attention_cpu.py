"""Paged attention in C++: every sequence's keys and values are read where they lie, by block of the pool.

The same as attention.paged_attention_reference; a plan is only the list of slots, with no groups and no padding.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import accumulate

import torch

from adapterd.model.attention_one import Scoring
from adapterd.model.kv import KVPool


@dataclass(frozen=True)
class SlotPlan:
    """slot_mapping: int64 [num_tokens], where this step's tokens write. slots: int64, the contexts of all sequences
    one after another; sequences: int64 [num_sequences, 4], each one's first place in `slots`, context, first row
    and number of rows.
    """

    slot_mapping: torch.Tensor
    slots: torch.Tensor
    sequences: torch.Tensor


def plan_slots(slots_by_sequence: Seq[torch.Tensor], num_new_tokens: Seq[int]) -> SlotPlan:
    """The arguments of attention.plan_attention, on the CPU."""
    contexts = [len(slots) for slots in slots_by_sequence]
    places = accumulate(contexts[:-1], initial=0)
    rows = accumulate(num_new_tokens[:-1], initial=0)
    mapping = [slots[len(slots) - n :] for slots, n in zip(slots_by_sequence, num_new_tokens, strict=True)]
    return SlotPlan(
        torch.cat(mapping),
        torch.cat(list(slots_by_sequence)),
        torch.tensor(list(zip(places, contexts, rows, num_new_tokens, strict=True))),
    )


def native_scoring(scoring: Scoring) -> tuple[float, int, float, torch.Tensor | None]:
    """As the native operators take it: 0 for no window and for no softcap; sinks in float32, contiguous."""
    sinks = None if scoring.sinks is None else scoring.sinks.float().contiguous()
    return scoring.scale, scoring.sliding_window or 0, scoring.softcap or 0.0, sinks


def native_paged_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    plan: SlotPlan,
    scoring: Scoring,
) -> torch.Tensor:
    """As attention.paged_attention_reference, with float32 sums and weights throughout."""
    out: torch.Tensor = torch.ops.adapterd.paged_attention(
        query, keys, values, plan.slots, plan.sequences, *native_scoring(scoring)
    )
    return out


@dataclass(frozen=True)
class NativeContext:
    """One step of the runner, as attention.PagedContext."""

    pool: KVPool
    plan: SlotPlan

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scoring: Scoring,
    ) -> torch.Tensor:
        keys, values = self.pool.keys[layer], self.pool.values[layer]
        torch.ops.adapterd.write_kv(keys, values, self.plan.slot_mapping, key, value)
        return native_paged_attention(query, keys, values, self.plan, scoring)


def native_context(
    pool: KVPool, slots_by_sequence: Seq[torch.Tensor], num_new_tokens: Seq[int]
) -> NativeContext:
    return NativeContext(pool, plan_slots(slots_by_sequence, num_new_tokens))
