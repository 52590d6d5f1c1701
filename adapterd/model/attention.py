"""Attention over paged keys and values, behind the function that transformers models call.

`paged_attention_reference` says what is computed, one sequence at a time; `paged_attention` computes the same
in few calls: sequences that add one token are gathered into groups of similar length, the others run one by one
through torch's fused kernel. Both have one signature and one test.
"""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from transformers import AttentionInterface

from adapterd.errors import BaseRefused
from adapterd.model.attention_one import Scoring, attend_fused, attend_plainly
from adapterd.model.kv import KV_BLOCK_SIZE, KVPool, KVShape

ATTENTION_NAME = "adapterd_paged"


@dataclass(frozen=True)
class DecodeGroup:
    """Sequences that add one token each and have about the same context.

    rows: int64 [num_rows], their places among the batch's tokens; slots: int64 [num_rows, max_context], padded
    with the row's own first slot; context_lens: int64 [num_rows].
    """

    rows: torch.Tensor
    slots: torch.Tensor
    context_lens: torch.Tensor


@dataclass(frozen=True)
class ChunkSpan:
    """One sequence that adds several tokens: rows [start, end) of the batch, its context's slots int64 [context]."""

    start: int
    end: int
    slots: torch.Tensor


@dataclass(frozen=True)
class AttentionPlan:
    """Where this step's tokens write and read; made once a step, used by every layer.

    slot_mapping: int64 [num_tokens]. Every row belongs to exactly one group or chunk. A sequence's context is
    all its computed tokens and those of this step; its rows are the last of them.
    """

    slot_mapping: torch.Tensor
    groups: tuple[DecodeGroup, ...]
    chunks: tuple[ChunkSpan, ...]


def plan_attention(
    slots_by_sequence: Seq[torch.Tensor], num_new_tokens: Seq[int], device: torch.device
) -> AttentionPlan:
    """Sort a packed batch into groups and chunks.

    slots_by_sequence: for each sequence int64 [context] on the CPU, new tokens included; num_new_tokens: how
    many of its last context tokens are computed in this step.
    """
    starts = [0]
    for count in num_new_tokens:
        starts.append(starts[-1] + count)
    mapping = torch.cat(
        [slots[len(slots) - n :] for slots, n in zip(slots_by_sequence, num_new_tokens, strict=True)]
    )
    chunks: list[ChunkSpan] = []
    buckets: dict[int, list[int]] = {}
    for index, (slots, (start, end)) in enumerate(zip(slots_by_sequence, pairwise(starts), strict=True)):
        if end - start == 1:
            # Lengths within a factor of two share a group: at most half of a gather is padding.
            buckets.setdefault(len(slots).bit_length(), []).append(index)
        else:
            chunks.append(ChunkSpan(start, end, slots.to(device)))
    groups = []
    for members in buckets.values():
        padded = torch.nn.utils.rnn.pad_sequence(
            [slots_by_sequence[i] for i in members], batch_first=True, padding_value=-1
        )
        # Padding has weight zero, but 0 * NaN is NaN: a row reads no slot but its own, so one sequence whose
        # values overflow spoils no other.
        padded = torch.where(padded < 0, padded[:, :1], padded)
        groups.append(
            DecodeGroup(
                rows=torch.tensor([starts[i] for i in members], device=device),
                slots=padded.to(device),
                context_lens=torch.tensor([len(slots_by_sequence[i]) for i in members], device=device),
            )
        )
    return AttentionPlan(mapping.to(device), tuple(groups), tuple(chunks))


def paged_attention_reference(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    plan: AttentionPlan,
    scoring: Scoring,
) -> torch.Tensor:
    """`attend_plainly` for each token over its own sequence.

    query: [num_tokens, num_heads, key_dim]; keys, values: one layer of the pool. Returns [num_tokens, num_heads,
    value_dim] in query's dtype.
    """
    out = query.new_empty(query.shape[0], query.shape[1], values.shape[-1])
    for group in plan.groups:
        for row, slots, length in zip(
            group.rows.tolist(), group.slots, group.context_lens.tolist(), strict=True
        ):
            slots = slots[:length]
            out[row : row + 1] = attend_plainly(query[row : row + 1], keys[slots], values[slots], scoring)
    for chunk in plan.chunks:
        rows = slice(chunk.start, chunk.end)
        out[rows] = attend_plainly(query[rows], keys[chunk.slots], values[chunk.slots], scoring)
    return out


def paged_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    plan: AttentionPlan,
    scoring: Scoring,
) -> torch.Tensor:
    """The same as `paged_attention_reference`, in few calls."""
    out = query.new_empty(query.shape[0], query.shape[1], values.shape[-1])
    for group in plan.groups:
        out[group.rows] = _attend_group(query, keys, values, group, scoring)
    attend = attend_fused if scoring.is_fusable else attend_plainly
    for chunk in plan.chunks:
        rows = slice(chunk.start, chunk.end)
        out[rows] = attend(query[rows], keys[chunk.slots], values[chunk.slots], scoring)
    return out


def _attend_group(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    group: DecodeGroup,
    scoring: Scoring,
) -> torch.Tensor:
    num_rows, context = group.slots.shape
    num_kv_heads = keys.shape[1]
    # Query heads that share a key head become rows of one product: no key is repeated in memory.
    grouped = query[group.rows].view(num_rows, num_kv_heads, -1, query.shape[-1])
    key = keys[group.slots].permute(0, 2, 3, 1)
    value = values[group.slots].permute(0, 2, 1, 3)
    scores = scoring.scores(torch.matmul(grouped, key))
    position = torch.arange(context, device=query.device)[None, :]
    hidden = position >= group.context_lens[:, None]
    if scoring.sliding_window is not None:
        hidden |= position < group.context_lens[:, None] - scoring.sliding_window
    scores = scores.masked_fill(hidden[:, None, None, :], float("-inf"))
    if scoring.sinks is not None:
        sink = scoring.sinks.float().view(1, num_kv_heads, -1, 1).expand(num_rows, -1, -1, 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = scores.softmax(-1)[..., :context].to(query.dtype)
    return torch.matmul(weights, value).reshape(num_rows, query.shape[1], -1)


class AttentionContext(Protocol):
    """What travels to every attention layer as the forward keyword `paged`.

    All new keys and values are written before any is read: a row's context may hold rows of another sequence in the
    same step, where both have the same prefix.
    """

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scoring: Scoring,
    ) -> torch.Tensor:
        """query, key, value: [num_tokens, num_heads, dim] -> [num_tokens, num_heads, value_dim]."""
        ...


@dataclass(frozen=True)
class PagedContext:
    """One step of the runner: writes the new keys and values, then attends."""

    pool: KVPool
    plan: AttentionPlan

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scoring: Scoring,
    ) -> torch.Tensor:
        self.pool.write(layer, self.plan.slot_mapping, key, value)
        return paged_attention(query, self.pool.keys[layer], self.pool.values[layer], self.plan, scoring)


ContextFactory = Callable[[KVPool, Seq[torch.Tensor], Seq[int]], AttentionContext]
"""(pool, slots by sequence, number of new tokens by sequence), as plan_attention has them, for one step."""


def paged_context(
    pool: KVPool, slots_by_sequence: Seq[torch.Tensor], num_new_tokens: Seq[int]
) -> PagedContext:
    """A step through torch's own operators, on any device."""
    return PagedContext(pool, plan_attention(slots_by_sequence, num_new_tokens, pool.device))


class ShapeRecorder:
    """Asks a model what each layer stores for a token, by one forward of one token: no guess from its config."""

    def __init__(self) -> None:
        self.shapes: dict[int, KVShape] = {}

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scoring: Scoring,
    ) -> torch.Tensor:
        if layer in self.shapes:
            raise BaseRefused(f"the base calls attention twice in layer {layer}; it cannot be served")
        self.shapes[layer] = KVShape(key.shape[1], key.shape[2], value.shape[2])
        return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)


class TrialContext:
    """Has each layer attend once, by a step of two sequences, the last token being one of them: for what can only be
    known by running it."""

    def __init__(self, make_context: ContextFactory) -> None:
        self._make_context = make_context

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scoring: Scoring,
    ) -> torch.Tensor:
        shape = KVShape(key.shape[1], key.shape[2], value.shape[2])
        counts = (len(query) - 1, 1)
        pool = KVPool({layer: shape}, len(counts), key.dtype, key.device)
        slots = [i * KV_BLOCK_SIZE + torch.arange(count) for i, count in enumerate(counts)]
        return self._make_context(pool, slots, counts).attend(layer, query, key, value, scoring)


# Keywords that transformers models pass along and that change nothing here: positions are in the rotary
# embedding already, and causality, packing and caching are the plan's.
_HARMLESS = frozenset(
    {
        "position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states",
        "return_dict", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "is_causal",
        "num_items_in_batch", "output_router_logits",
    }
)  # fmt: skip


def paged_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    paged: AttentionContext | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: object,
) -> tuple[torch.Tensor, None]:
    """transformers' attention signature: query [1, num_heads, num_tokens, dim] -> [1, num_tokens, num_heads, dim].

    Raises BaseRefused when the family hands over something that this function would have to ignore.
    """
    family = type(module).__name__
    if paged is None:
        raise BaseRefused(f"{family} does not pass forward keywords on to its attention; it cannot be served")
    ignored = [name for name, given in others.items() if given is not None and name not in _HARMLESS]
    if attention_mask is not None:
        ignored.append("attention_mask")
    if ignored:
        raise BaseRefused(f"{family} asks attention for {', '.join(sorted(ignored))}, which is not supported")
    out = paged.attend(
        int(module.layer_idx),  # type: ignore[arg-type]
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        Scoring(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap, s_aux),
    )
    return out[None], None


def register_attention() -> None:
    """Make the name known to transformers. A name without a mask function gets no mask built; see model/probe.py."""
    AttentionInterface.register(ATTENTION_NAME, paged_attention_forward)
