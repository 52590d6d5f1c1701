"""A linear for a few tokens on a CUDA device, in Triton: a decode step waits for weights, so they stream.

Each program owns some rows of the weight, or a part of them along d_in; its first weights are on their way before the
kernel in front has ended. The parts of a row are summed by whichever program comes last, in a fixed order, so the
result does not depend on who that is. The first half of what adapters add runs beside it, in the same launch.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from adapterd.model.launch_triton import launch_options, num_processors, shared_bytes, zero_counts
from adapterd.model.lora_kernels_triton import shrink_tile
from adapterd.model.lora_triton import BLOCK_ROWS, SHORT_TILE, SHRINK_BYTES, GroupStep

MAX_TOKENS = 64
"""For more, products are bound by arithmetic rather than by weights, and the vendor's library is better."""


@triton.jit
def few_tokens_linear_kernel(
    x,  # [num_tokens, d_in]
    weight,  # [d_out, d_in], of x's type or int8
    weight_scales,  # float32 [d_out] if IS_INT8, else anything
    bias,  # [d_out], or anything if HAS_BIAS is not set
    y,  # [num_tokens, d_out]: written, or added to if ADDS
    partial,  # float32 [NUM_SPLITS, num_blocks, BLOCK_OUT, BLOCK_TOKENS]: written if there are splits
    counts,  # int32 [num_blocks]: zeros, before and after
    num_tokens,
    d_out,
    d_in,
    part,
    num_blocks,
    x_stride,
    y_stride,
    # As in shrink_tile; anything if NUM_MEMBERS is 0.
    shrunk,
    tiles,
    bounds,
    addresses,
    scales,
    linear_0,
    linear_1,
    linear_2,
    num_tiles,
    num_linears,
    max_rows,
    IS_INT8: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADDS: tl.constexpr,
    PRECISION: tl.constexpr,
    CHAINED: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    NUM_MEMBERS: tl.constexpr,
    ALIGNED: tl.constexpr,
    SHRINK_TOKENS: tl.constexpr,
    SHRINK_ROWS: tl.constexpr,
    SHRINK_IN: tl.constexpr,
):
    """y[t, j] = x[t] . weight[j] + bias[j], in float32; `part` of d_in is one split's, a multiple of BLOCK_IN.

    Programs beside those of the product shrink tiles of x for the adapters of NUM_MEMBERS linears.
    """
    # First those that shrink: they take long and read little, and so run beside all others.
    num_shrink = num_tiles * NUM_MEMBERS
    program = tl.program_id(0) - num_shrink
    if program >= 0:
        block, split = program % num_blocks, program // num_blocks
        rows = block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        tokens = tl.arange(0, BLOCK_TOKENS)
        columns = split * part + tl.arange(0, BLOCK_IN)
        is_row, is_token = (rows < d_out)[:, None], (tokens < num_tokens)[None, :]
        w_places = weight + rows[:, None].to(tl.int64) * d_in + columns[None, :]
        x_places = x + tokens[None, :] * x_stride + columns[:, None]
        w_part = tl.load(w_places, mask=is_row, other=0)
        if CHAINED:
            gdc_wait()
            gdc_launch_dependents()
        x_part = tl.load(x_places, mask=is_token, other=0.0)
        total = tl.dot(_like(w_part, x, IS_INT8), x_part, input_precision=PRECISION)
        for start in range(BLOCK_IN, part, BLOCK_IN):
            w_part = tl.load(w_places + start, mask=is_row, other=0)
            x_part = tl.load(x_places + start, mask=is_token, other=0.0)
            total = tl.dot(_like(w_part, x, IS_INT8), x_part, total, input_precision=PRECISION)
        is_last = True
        if NUM_SPLITS > 1:
            inner = tl.arange(0, BLOCK_OUT)[:, None] * BLOCK_TOKENS + tokens[None, :]
            stride = num_blocks * BLOCK_OUT * BLOCK_TOKENS
            own = partial + block * BLOCK_OUT * BLOCK_TOKENS + inner
            tl.store(own + split * stride, total)
            tl.debug_barrier()
            is_last = tl.atomic_add(counts + block, 1, sem="acq_rel") == NUM_SPLITS - 1
            if is_last:
                total = tl.zeros([BLOCK_OUT, BLOCK_TOKENS], dtype=tl.float32)
                for other in tl.static_range(NUM_SPLITS):
                    total += tl.load(own + other * stride, cache_modifier=".cg")
                tl.store(counts + block, 0)
        if is_last:
            if IS_INT8:
                total *= tl.load(weight_scales + rows, mask=rows < d_out, other=0.0)[:, None]
            if HAS_BIAS:
                total += tl.load(bias + rows, mask=rows < d_out, other=0.0).to(tl.float32)[:, None]
            y_places = y + tokens[None, :] * y_stride + rows[:, None]
            if ADDS:
                total += tl.load(y_places, mask=is_row & is_token, other=0.0).to(tl.float32)
            tl.store(y_places, total.to(y.dtype.element_ty), mask=is_row & is_token)
    elif NUM_MEMBERS > 0:
        program += num_shrink
        tile, member = program % num_tiles, program // num_tiles
        linear = tl.where(member == 0, linear_0, tl.where(member == 1, linear_1, linear_2))
        shrink_tile(
            x, shrunk, shrunk, counts, tiles, bounds, addresses, scales,
            tile, member, 0, linear, NUM_MEMBERS, num_linears, num_tokens, max_rows, d_in, x_stride,
            1, ALIGNED, PRECISION, CHAINED, SHRINK_TOKENS, SHRINK_ROWS, SHRINK_IN,
        )  # fmt: skip


@triton.jit
def _like(weights, x, IS_INT8: tl.constexpr):
    """Every whole number of 8 bits is exact in bfloat16 and float16."""
    return weights.to(tl.float32).to(x.dtype.element_ty) if IS_INT8 else weights


@dataclass(frozen=True)
class Tiling:
    """How the kernel cuts a product: a program's rows, columns at a time, and programs that share a row."""

    block_out: int
    block_in: int
    num_splits: int
    num_stages: int = 4
    num_warps: int = 4


def tiling_of(
    d_out: int,
    d_in: int,
    num_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    has_group: bool = False,
) -> Tiling | None:
    """What was fastest for Llama-3-8B's shapes on an H200 (bench/LOG.md), with no more stages than the chip has room
    for; None where this kernel is not the fastest.

    has_group: adapters are shrunk beside it, which needs room for several programs on a processor.
    """
    if num_tokens > MAX_TOKENS or d_in % 16:
        return None
    tiling = _fastest(d_out, d_in, num_tokens, num_processors(device), has_group=has_group)
    room = shared_bytes(device)
    while tiling_bytes(tiling, num_tokens, dtype, has_group=has_group) > room:
        if tiling.num_stages > 2:
            tiling = replace(tiling, num_stages=tiling.num_stages - 1)
        elif tiling.block_in > 16:
            tiling = replace(tiling, block_in=tiling.block_in // 2)
        else:
            return None
    return tiling


def _fastest(d_out: int, d_in: int, num_tokens: int, processors: int, *, has_group: bool) -> Tiling:
    if num_tokens > 16 and d_out >= 128 * 1.5 * processors:
        return Tiling(128, _divisor(d_in, 128), 1, num_stages=3 if has_group else 4, num_warps=8)
    num_blocks = triton.cdiv(d_out, 64)
    if num_blocks >= 0.7 * processors:
        is_short = num_blocks < 1.5 * processors
        return Tiling(64, _divisor(d_in, 64 if is_short else 128), 1, num_stages=8 if is_short else 4)
    # Too few rows for all processors: their parts are shared.
    block_in = _divisor(d_in, 128)
    num_splits = 1
    room = processors if num_tokens > 16 else 2 * processors
    while 2 * num_blocks * num_splits <= room and d_in % (2 * block_in * num_splits) == 0:
        num_splits *= 2
    return Tiling(64, block_in, num_splits, num_stages=3 if has_group else 4)


def tiling_bytes(tiling: Tiling, num_tokens: int, dtype: torch.dtype, *, has_group: bool) -> int:
    """Memory on the chip that a program takes at most: a stage is a piece of weights with one of x, and what is
    loaded ahead of all stages has a place of its own."""
    stage = (tiling.block_out + _block_tokens(num_tokens)) * tiling.block_in * dtype.itemsize
    return (tiling.num_stages + 1) * max(stage, SHRINK_BYTES if has_group else 0)


def _block_tokens(num_tokens: int) -> int:
    """Tensor cores take sixteen at least."""
    return max(int(triton.next_power_of_2(num_tokens)), 16)


def _divisor(size: int, largest: int) -> int:
    """The largest power of two up to `largest`, itself one, that divides size."""
    while size % largest:
        largest //= 2
    return largest


def few_tokens_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    y: torch.Tensor,
    tiling: Tiling,
    *,
    adds: bool = False,
    bias: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
    group: GroupStep | None = None,
) -> None:
    """y = x @ weight.T + bias, in place, or y += that if `adds`.

    x: [num_tokens, d_in], at most MAX_TOKENS; weight: [d_out, d_in], of x's type, or int8 with scales float32 [d_out];
    d_in a multiple of block_in * num_splits; y: [num_tokens, d_out]. `group`: of the same x; its shrink is done too.
    """
    num_tokens, d_in = x.shape
    d_out = len(weight)
    num_blocks = triton.cdiv(d_out, tiling.block_out)
    block_tokens = _block_tokens(num_tokens)
    assert d_in % (tiling.block_in * tiling.num_splits) == 0
    counts = zero_counts(x.device)
    assert num_blocks <= len(counts)
    partial = counts
    if tiling.num_splits > 1:
        size = tiling.num_splits * num_blocks * tiling.block_out * block_tokens
        partial = torch.empty(size, dtype=torch.float32, device=x.device)
    num_programs = num_blocks * tiling.num_splits
    shrink = [x] * 5 + [0] * 6
    members = 0
    if group is not None:
        members = len(group.d_outs)
        assert group.num_splits == 1
        assert group.block_tokens == SHORT_TILE
        num_programs += group.num_tiles * members
        shrink = [
            group.shrunk, group.tiles, group.bounds, group.addresses, group.scales,
            *group.linears, group.num_tiles, group.bounds.shape[1], group.max_rows,
        ]  # fmt: skip
    few_tokens_linear_kernel[(num_programs,)](
        x, weight, weight if scales is None else scales, weight if bias is None else bias, y, partial, counts,
        num_tokens, d_out, d_in, d_in // tiling.num_splits, num_blocks, x.stride(0), y.stride(0), *shrink,
        IS_INT8=scales is not None, HAS_BIAS=bias is not None, ADDS=adds,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32", **launch_options(x.device),
        NUM_SPLITS=tiling.num_splits, BLOCK_TOKENS=block_tokens,
        BLOCK_OUT=tiling.block_out, BLOCK_IN=tiling.block_in, NUM_MEMBERS=members,
        ALIGNED=group is not None and group.is_aligned,
        SHRINK_TOKENS=SHORT_TILE, SHRINK_ROWS=BLOCK_ROWS,
        SHRINK_IN=16 if group is None else group.block_in,
        num_warps=tiling.num_warps, num_stages=tiling.num_stages,
    )  # fmt: skip
