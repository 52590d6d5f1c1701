"""Paged attention on a CUDA device, in Triton: keys and values are read where they lie, by block table.

The same as attention.paged_attention_reference, for decoding and for chunks of prompts: one kernel works on a tile,
some tokens of one sequence times the query heads that share a key head. Where tiles are few, as in decoding, their
contexts are split among programs, and the last of them to be done joins the parts.

Source: FlashAttention-2, arXiv 2307.08691 (running softmax), and Flash-Decoding (splits over the context); differs:
pages of KV_BLOCK_SIZE tokens, softcap, sinks, and values of another width than keys.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from adapterd.model.attention_one import Scoring
from adapterd.model.kv import KV_BLOCK_SIZE, KVPool
from adapterd.model.launch_triton import launch_options, num_processors, zero_counts
from adapterd.model.transfer import to_device

_PROGRAMS_PER_PROCESSOR = 8
"""A decode is split over its contexts until about so many run."""

_MAX_SPLITS = 16
CHUNK_TOKENS = 64


@triton.jit
def write_kernel(
    key,  # [num_tokens, num_heads, KEY_DIM]
    value,  # [num_tokens, num_heads, VALUE_DIM]
    keys,  # [num_slots, num_heads, KEY_DIM]: written
    values,  # [num_slots, num_heads, VALUE_DIM]: written
    slot_mapping,  # int64 [num_tokens]; below 0: nowhere
    num_heads,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    CHAINED: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
):
    """keys[slot_mapping[t]] = key[t], and values alike."""
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
    slot = tl.load(slot_mapping + token)
    if CHAINED:
        gdc_wait()
        gdc_launch_dependents()
    if slot >= 0:
        columns = tl.arange(0, BLOCK_KEY)[None, :]
        mask = (heads < num_heads) & (columns < KEY_DIM)
        line = tl.load(key + token * key_token_stride + heads * key_head_stride + columns, mask=mask)
        tl.store(keys + (slot * num_heads + heads) * KEY_DIM + columns, line, mask=mask)
        columns = tl.arange(0, BLOCK_VALUE)[None, :]
        mask = (heads < num_heads) & (columns < VALUE_DIM)
        line = tl.load(value + token * value_token_stride + heads * value_head_stride + columns, mask=mask)
        tl.store(values + (slot * num_heads + heads) * VALUE_DIM + columns, line, mask=mask)


@triton.jit
def attend_kernel(
    query,  # [num_tokens, num_heads, KEY_DIM]
    keys,  # [num_slots, num_kv_heads, KEY_DIM]
    values,  # [num_slots, num_kv_heads, VALUE_DIM]
    out,  # [num_tokens, num_heads, VALUE_DIM]: written
    sums,  # float32 [num_tiles, num_heads, NUM_SPLITS, VALUE_DIM]: written if there are splits, not yet divided
    peaks,  # float32 [num_tiles, num_heads, NUM_SPLITS, 2]: likewise, greatest score and sum of weights
    counts,  # int32 [num_tiles * num_kv_heads]: zeros, before and after
    sinks,  # [num_heads]
    tiles,  # int32 [num_tiles, 4]: place of its table, first token, number of tokens (0: none), first position
    block_tables,  # int32: the sequences' blocks, one table after another
    query_token_stride,
    query_head_stride,
    scale,
    sliding_window,
    softcap,
    num_kv_heads,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
    PROGRAMS_PER_TILE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_CONTEXT: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
):
    """BLOCK_TOKENS of a tile times the GROUP query heads of one key head, over one split of the context."""
    tile, kv_head, split = tl.program_id(0) // PROGRAMS_PER_TILE, tl.program_id(1), tl.program_id(2)
    skipped = tl.program_id(0) % PROGRAMS_PER_TILE * BLOCK_TOKENS
    table, first = tl.load(tiles + 4 * tile), tl.load(tiles + 4 * tile + 1) + skipped
    count = tl.minimum(tl.load(tiles + 4 * tile + 2) - skipped, BLOCK_TOKENS)
    first_position = tl.load(tiles + 4 * tile + 3) + skipped
    num_heads = num_kv_heads * GROUP
    rows = tl.arange(0, BLOCK_TOKENS * BLOCK_GROUP)
    within, in_group = rows // BLOCK_GROUP, rows % BLOCK_GROUP
    heads = kv_head * GROUP + in_group
    is_row = (within < count) & (in_group < GROUP)
    tokens = (first + within).to(tl.int64)
    positions = first_position + within

    key_columns, value_columns = tl.arange(0, BLOCK_KEY), tl.arange(0, BLOCK_VALUE)
    if CHAINED:
        gdc_wait()
        gdc_launch_dependents()
    q = tl.load(
        query
        + tokens[:, None] * query_token_stride
        + heads[:, None] * query_head_stride
        + key_columns[None, :],
        mask=is_row[:, None] & (key_columns < KEY_DIM)[None, :],
        other=0.0,
    )
    peak = tl.full([BLOCK_TOKENS * BLOCK_GROUP], float("-inf"), dtype=tl.float32)
    weight_sum = tl.zeros([BLOCK_TOKENS * BLOCK_GROUP], dtype=tl.float32)
    total = tl.zeros([BLOCK_TOKENS * BLOCK_GROUP, BLOCK_VALUE], dtype=tl.float32)

    context_end = first_position + count
    context_begin = 0
    if HAS_WINDOW:
        context_begin = tl.maximum(first_position - sliding_window + 1, 0) // KV_BLOCK * KV_BLOCK
    part = tl.cdiv(tl.cdiv(context_end - context_begin, NUM_SPLITS), BLOCK_CONTEXT) * BLOCK_CONTEXT
    begin = context_begin + split * part
    end = tl.minimum(begin + part, context_end)
    if count <= 0:
        end = begin
    for start in range(begin, end, BLOCK_CONTEXT):
        places = start + tl.arange(0, BLOCK_CONTEXT)
        is_place = places < end
        block = tl.load(block_tables + table + places // KV_BLOCK, mask=is_place, other=0)
        lines = (block.to(tl.int64) * KV_BLOCK + places % KV_BLOCK) * num_kv_heads + kv_head
        k = tl.load(
            keys + lines[None, :] * KEY_DIM + key_columns[:, None],
            mask=is_place[None, :] & (key_columns < KEY_DIM)[:, None],
            other=0.0,
        )
        scores = tl.dot(q, k, input_precision="ieee") * scale
        if HAS_SOFTCAP:
            scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)  # tanh
        visible = is_place[None, :] & (places[None, :] <= positions[:, None])
        if HAS_WINDOW:
            visible = visible & (places[None, :] > positions[:, None] - sliding_window)
        scores = tl.where(visible, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        # Rows that have seen nothing yet: -inf minus -inf is NaN.
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp(scores - shift[:, None])
        fade = tl.exp(peak - shift)
        v = tl.load(
            values + lines[:, None] * VALUE_DIM + value_columns[None, :],
            mask=is_place[:, None] & (value_columns < VALUE_DIM)[None, :],
            other=0.0,
        )
        weight_sum = weight_sum * fade + tl.sum(weights, 1)
        total = tl.dot(weights.to(v.dtype), v, total * fade[:, None], input_precision="ieee")
        peak = new_peak

    is_last = True
    if NUM_SPLITS > 1:
        # One token a tile: the first of its rows.
        is_row = (within == 0) & (in_group < GROUP)
        places = (tile * num_heads + heads).to(tl.int64) * NUM_SPLITS
        is_sum = is_row[:, None] & (value_columns < VALUE_DIM)[None, :]
        tl.store(sums + (places + split)[:, None] * VALUE_DIM + value_columns[None, :], total, mask=is_sum)
        tl.store(peaks + (places + split) * 2, peak, mask=is_row)
        tl.store(peaks + (places + split) * 2 + 1, weight_sum, mask=is_row)
        tl.debug_barrier()
        count_place = counts + tile * num_kv_heads + kv_head
        is_last = tl.atomic_add(count_place, 1, sem="acq_rel") == NUM_SPLITS - 1
        if is_last:
            # Each part brought to the greatest score of all.
            peak = tl.full([BLOCK_TOKENS * BLOCK_GROUP], float("-inf"), dtype=tl.float32)
            for other in tl.static_range(NUM_SPLITS):
                found = tl.load(
                    peaks + (places + other) * 2, mask=is_row, other=float("-inf"), cache_modifier=".cg"
                )
                peak = tl.maximum(peak, found)
            # A row of NaN has seen no greatest score; its sum of weights keeps it NaN.
            peak = tl.where(is_row & (within < count) & (peak > float("-inf")), peak, 0.0)
            weight_sum = tl.zeros([BLOCK_TOKENS * BLOCK_GROUP], dtype=tl.float32)
            total = tl.zeros([BLOCK_TOKENS * BLOCK_GROUP, BLOCK_VALUE], dtype=tl.float32)
            for other in tl.static_range(NUM_SPLITS):
                place = places + other
                found = tl.load(peaks + place * 2, mask=is_row, other=float("-inf"), cache_modifier=".cg")
                fade = tl.exp(found - peak)
                part_sum = tl.load(peaks + place * 2 + 1, mask=is_row, other=0.0, cache_modifier=".cg")
                weight_sum += part_sum * fade
                part_total = tl.load(
                    sums + place[:, None] * VALUE_DIM + value_columns[None, :],
                    mask=is_sum,
                    other=0.0,
                    cache_modifier=".cg",
                )
                total += part_total * fade[:, None]
            tl.store(count_place, 0)
            is_row = is_row & (within < count)
    if is_last:
        if HAS_SINKS:
            sink = tl.load(sinks + heads, mask=is_row, other=0.0).to(tl.float32)
            new_peak = tl.maximum(peak, sink)
            fade = tl.exp(peak - new_peak)
            weight_sum = weight_sum * fade + tl.exp(sink - new_peak)
            total = total * fade[:, None]
        result = total / tl.where(is_row, weight_sum, 1.0)[:, None]
        tl.store(
            out + (tokens * num_heads + heads)[:, None] * VALUE_DIM + value_columns[None, :],
            result.to(out.dtype.element_ty),
            mask=is_row[:, None] & (value_columns < VALUE_DIM)[None, :],
        )


@dataclass(frozen=True)
class BlockPlan:
    """Where a step's tokens write and read: see plan_blocks, or cuda_graphs.py for one that keeps its place.

    slot_mapping: int64 [num_tokens], below 0 for a row that is no token; block_tables: int32, the sequences' blocks,
    one table after another; a tile is (place of its table there, first row, number of rows, position of the first
    row). singles: int32 [num_singles, 4], tiles of one token (or none); chunks: int32 [num_chunks, 4], of up to
    CHUNK_TOKENS.
    """

    slot_mapping: torch.Tensor
    block_tables: torch.Tensor
    singles: torch.Tensor
    chunks: torch.Tensor


def plan_blocks(
    slots_by_sequence: Seq[torch.Tensor], num_new_tokens: Seq[int], device: torch.device
) -> BlockPlan:
    """The arguments of attention.plan_attention. Blocks of KV_BLOCK_SIZE slots lie together in the pool."""
    mapping = torch.cat(
        [slots[len(slots) - n :] for slots, n in zip(slots_by_sequence, num_new_tokens, strict=True)]
    )
    blocks = [slots[::KV_BLOCK_SIZE] // KV_BLOCK_SIZE for slots in slots_by_sequence]
    singles: list[tuple[int, int, int, int]] = []
    chunks: list[tuple[int, int, int, int]] = []
    table, row = 0, 0
    for slots, count in zip(slots_by_sequence, num_new_tokens, strict=True):
        position = len(slots) - count
        if count == 1:
            singles.append((table, row, 1, position))
        else:
            chunks.extend(
                (table, row + offset, min(CHUNK_TOKENS, count - offset), position + offset)
                for offset in range(0, count, CHUNK_TOKENS)
            )
        table += -(-len(slots) // KV_BLOCK_SIZE)
        row += count
    return BlockPlan(
        to_device(mapping, device),
        to_device(torch.cat(blocks).to(torch.int32), device),
        _tile_table(singles, device),
        _tile_table(chunks, device),
    )


def _tile_table(tiles: list[tuple[int, int, int, int]], device: torch.device) -> torch.Tensor:
    return to_device(torch.tensor(tiles, dtype=torch.int32).view(-1, 4), device)


def triton_paged_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    plan: BlockPlan,
    scoring: Scoring,
) -> torch.Tensor:
    """As attention.paged_attention_reference; rows that are no token come back undefined."""
    num_tokens, num_heads, key_dim = query.shape
    num_kv_heads, value_dim = keys.shape[1], values.shape[2]
    window, softcap, sinks = scoring.sliding_window, scoring.softcap, scoring.sinks
    query = query if query.stride(-1) == 1 else query.contiguous()
    out = query.new_empty(num_tokens, num_heads, value_dim)
    group = num_heads // num_kv_heads
    block_group = triton.next_power_of_2(group)
    # What a program keeps on the chip: its queries, and a stretch of keys and values at a time.
    widest = max(key_dim, value_dim) * query.element_size()
    block_context = 64 if widest <= 256 else 32 if widest <= 512 else 16
    chunk_rows = 16 if query.element_size() == 4 else 64
    options = launch_options(query.device)

    def launch(
        tiles: torch.Tensor, programs_per_tile: int, block_tokens: int, padded_group: int, num_splits: int
    ) -> None:
        is_split = num_splits > 1
        parts = tiles.shape[0] * num_heads * num_splits if is_split else 0
        sums = torch.empty(parts * value_dim, dtype=torch.float32, device=query.device) if is_split else out
        peaks = torch.empty(parts * 2, dtype=torch.float32, device=query.device) if is_split else out
        block_value = max(triton.next_power_of_2(value_dim), 16)
        attend_kernel[(tiles.shape[0] * programs_per_tile, num_kv_heads, num_splits)](
            query, keys, values, out, sums, peaks, zero_counts(query.device),
            query if sinks is None else sinks, tiles, plan.block_tables,
            query.stride(0), query.stride(1),
            scoring.scale, window or 0, softcap or 1.0, num_kv_heads,
            GROUP=group, KEY_DIM=key_dim, VALUE_DIM=value_dim, HAS_WINDOW=window is not None,
            HAS_SOFTCAP=softcap is not None, HAS_SINKS=sinks is not None, NUM_SPLITS=num_splits,
            KV_BLOCK=KV_BLOCK_SIZE, PROGRAMS_PER_TILE=programs_per_tile,
            BLOCK_TOKENS=block_tokens, BLOCK_GROUP=padded_group, BLOCK_CONTEXT=block_context,
            BLOCK_KEY=max(triton.next_power_of_2(key_dim), 16), BLOCK_VALUE=block_value,
            **options, num_warps=4, num_stages=2,
        )  # fmt: skip

    if len(plan.singles):
        # Tensor cores take sixteen rows at least.
        programs = len(plan.singles) * num_kv_heads
        num_splits = triton.next_power_of_2(
            max(_PROGRAMS_PER_PROCESSOR * num_processors(query.device) // programs, 1)
        )
        num_splits = min(num_splits, _MAX_SPLITS)
        launch(plan.singles, 1, 1, max(block_group, 16), num_splits)
    if len(plan.chunks):
        block_tokens = max(chunk_rows // block_group, 1)
        launch(plan.chunks, CHUNK_TOKENS // block_tokens, block_tokens, block_group, 1)
    return out


def write_kv(
    pool: KVPool, layer: int, slot_mapping: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> None:
    """KVPool.write in one kernel; rows with a slot below 0 are left out."""
    num_tokens, num_heads, key_dim = key.shape
    value_dim = value.shape[2]
    key = key if key.stride(-1) == 1 else key.contiguous()
    value = value if value.stride(-1) == 1 else value.contiguous()
    block_heads = min(triton.next_power_of_2(num_heads), 8)
    write_kernel[(num_tokens, -(-num_heads // block_heads))](
        key, value, pool.keys[layer], pool.values[layer], slot_mapping, num_heads,
        key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        KEY_DIM=key_dim, VALUE_DIM=value_dim, BLOCK_HEADS=block_heads,
        BLOCK_KEY=triton.next_power_of_2(key_dim), BLOCK_VALUE=triton.next_power_of_2(value_dim),
        **launch_options(key.device), num_warps=4,
    )  # fmt: skip


@dataclass(frozen=True)
class TritonContext:
    """One step of the runner, as attention.PagedContext."""

    pool: KVPool
    plan: BlockPlan

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scoring: Scoring,
    ) -> torch.Tensor:
        write_kv(self.pool, layer, self.plan.slot_mapping, key, value)
        return triton_paged_attention(
            query, self.pool.keys[layer], self.pool.values[layer], self.plan, scoring
        )


def triton_context(
    pool: KVPool, slots_by_sequence: Seq[torch.Tensor], num_new_tokens: Seq[int]
) -> TritonContext:
    return TritonContext(pool, plan_blocks(slots_by_sequence, num_new_tokens, pool.device))
