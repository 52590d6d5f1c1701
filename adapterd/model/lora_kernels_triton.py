"""The Triton kernels of add_lora: shrink tiles of tokens to rank rows, expand them again. See lora_triton.py.

A tile's shrink may be split over d_in; whichever program of a split comes last adds the parts, in a fixed order.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _rows_of(tiles, bounds, tile, linear, num_linears):
    """(first token, number of tokens, first rank row, the row after the last) of a tile for a linear."""
    first, count = tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1)
    place = (tl.load(tiles + 3 * tile + 2) * num_linears + linear) * 2
    begin = tl.load(bounds + place)
    return first, count, begin, tl.where(count > 0, tl.load(bounds + place + 1), begin)


@triton.jit
def _pointers(addresses, row, end, like, ALIGNED: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """(pointers [BLOCK_ROWS], which of them are rank rows): to A's rows or, from addresses + 1, to B's columns."""
    rows = row + tl.arange(0, BLOCK_ROWS)
    is_row = rows < end
    found = tl.load(addresses + rows * 2, mask=is_row, other=0).to(tl.pointer_type(like.dtype.element_ty))
    if ALIGNED:
        found = tl.multiple_of(found, [16])
    return found, is_row


@triton.jit
def shrink_tile(
    x,  # [num_tokens, d_in]
    shrunk,  # float32 [num_members, num_tokens, max_rows]: written
    partial,  # float32 [NUM_SPLITS, num_members, num_tokens, max_rows]: written if there are splits
    counts,  # int32 [num_tiles * num_members]: zeros, before and after
    tiles,  # int32 [num_tiles, 3]: first token, number of tokens (0: none), mix
    bounds,  # int32 [num_mixes, num_linears, 2]: a mix's rank rows for a linear
    addresses,  # int64 [num_rows, 2]: of A's row, of B's column
    scales,  # float32 [num_rows]
    tile,
    member,
    split,
    linear,
    num_members,
    num_linears,
    num_tokens,
    max_rows,
    d_in,
    x_stride,
    NUM_SPLITS: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    CHAINED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """shrunk[member, t, r] = scale_r * x[t] . A_r for the tokens t of a tile and the rank rows r of its mix."""
    first, count, begin, end = _rows_of(tiles, bounds, tile, linear, num_linears)
    if CHAINED:
        gdc_wait()
        gdc_launch_dependents()
    if end > begin:
        offsets = tl.arange(0, BLOCK_TOKENS)
        is_token = (offsets < count)[:, None]
        tokens = (first + offsets).to(tl.int64)
        lines = (member * num_tokens + tokens)[:, None] * max_rows
        split_stride = tl.full([], 1, tl.int64) * num_members * num_tokens * max_rows
        part = tl.cdiv(tl.cdiv(d_in, NUM_SPLITS), BLOCK_IN) * BLOCK_IN
        part_end = tl.minimum((split + 1) * part, d_in)
        for row in range(begin, end, BLOCK_ROWS):
            a_rows, is_row = _pointers(addresses, row, end, x, ALIGNED, BLOCK_ROWS)
            total = tl.zeros([BLOCK_TOKENS, BLOCK_ROWS], dtype=tl.float32)
            for start in range(split * part, part_end, BLOCK_IN):
                columns = start + tl.arange(0, BLOCK_IN)
                is_column = columns < d_in
                x_part = tl.load(
                    x + tokens[:, None] * x_stride + columns[None, :],
                    mask=is_token & is_column[None, :],
                    other=0.0,
                )
                a_part = tl.load(
                    a_rows[None, :] + columns[:, None], mask=is_row[None, :] & is_column[:, None], other=0.0
                )
                total = tl.dot(x_part, a_part, total, input_precision=PRECISION)
            within = (row - begin + tl.arange(0, BLOCK_ROWS))[None, :]
            scale = tl.load(scales + row + tl.arange(0, BLOCK_ROWS), mask=is_row, other=0.0)
            mask = is_token & is_row[None, :]
            if NUM_SPLITS > 1:
                tl.store(partial + split * split_stride + lines + within, total * scale[None, :], mask=mask)
            else:
                tl.store(shrunk + lines + within, total * scale[None, :], mask=mask)
        if NUM_SPLITS > 1:
            tl.debug_barrier()
            place = counts + tile * num_members + member
            if tl.atomic_add(place, 1, sem="acq_rel") == NUM_SPLITS - 1:
                for row in range(begin, end, BLOCK_ROWS):
                    rows = tl.arange(0, BLOCK_ROWS)
                    mask = is_token & (row + rows < end)[None, :]
                    within = (row - begin + rows)[None, :]
                    total = tl.zeros([BLOCK_TOKENS, BLOCK_ROWS], dtype=tl.float32)
                    for other in tl.static_range(NUM_SPLITS):
                        total += tl.load(
                            partial + other * split_stride + lines + within,
                            mask=mask,
                            other=0.0,
                            cache_modifier=".cg",
                        )
                    tl.store(shrunk + lines + within, total, mask=mask)
                tl.store(place, 0)


@triton.jit
def shrink_kernel(
    x,
    shrunk,
    partial,
    counts,
    tiles,
    bounds,
    addresses,
    scales,
    linear_0,
    linear_1,
    linear_2,
    num_linears,
    num_tokens,
    max_rows,
    d_in,
    x_stride,
    NUM_SPLITS: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    CHAINED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """shrink_tile of every tile, member and split."""
    member = tl.program_id(1)
    linear = tl.where(member == 0, linear_0, tl.where(member == 1, linear_1, linear_2))
    shrink_tile(
        x, shrunk, partial, counts, tiles, bounds, addresses, scales, tl.program_id(0), member, tl.program_id(2),
        linear, tl.num_programs(1), num_linears, num_tokens, max_rows, d_in, x_stride,
        NUM_SPLITS, ALIGNED, PRECISION, CHAINED, BLOCK_TOKENS, BLOCK_ROWS, BLOCK_IN,
    )  # fmt: skip


@triton.jit
def expand_kernel(
    y,  # [num_tokens, sum of d_out]: changed in place
    shrunk,
    tiles,
    bounds,
    addresses,
    linear_0,
    linear_1,
    linear_2,
    d_out_0,
    d_out_1,
    d_out_2,
    num_linears,
    num_tokens,
    max_rows,
    y_stride,
    NUM_MEMBERS: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    CHAINED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """y[t, member's columns] += sum over the rank rows r of t's mix of shrunk[member, t, r] * B_r."""
    block, tile = tl.program_id(0), tl.program_id(1)
    member, linear, d_out, offset = 0, linear_0, d_out_0, 0
    if NUM_MEMBERS > 1:
        blocks_0, blocks_1 = tl.cdiv(d_out_0, BLOCK_OUT), tl.cdiv(d_out_1, BLOCK_OUT)
        member = (block >= blocks_0).to(tl.int32) + (block >= blocks_0 + blocks_1).to(tl.int32)
        linear = tl.where(member == 0, linear_0, tl.where(member == 1, linear_1, linear_2))
        d_out = tl.where(member == 0, d_out_0, tl.where(member == 1, d_out_1, d_out_2))
        offset = tl.where(member == 0, 0, tl.where(member == 1, d_out_0, d_out_0 + d_out_1))
        block -= tl.where(member == 0, 0, tl.where(member == 1, blocks_0, blocks_0 + blocks_1))
    first, count, begin, end = _rows_of(tiles, bounds, tile, linear, num_linears)
    b_rows, is_row = _pointers(addresses + 1, begin, end, y, ALIGNED, BLOCK_ROWS)
    if CHAINED:
        gdc_wait()
        gdc_launch_dependents()
    if end > begin:
        offsets = tl.arange(0, BLOCK_TOKENS)
        is_token = (offsets < count)[:, None]
        tokens = (first + offsets).to(tl.int64)
        lines = shrunk + (member * num_tokens + tokens)[:, None] * max_rows
        y_lines = y + tokens[:, None] * y_stride + offset
        rows = tl.arange(0, BLOCK_ROWS)[None, :]
        last_column = tl.minimum((block + 1) * BLOCK_OUT, d_out)
        if end - begin <= BLOCK_ROWS:
            # As most adapters are: what is expanded stays in registers, and B streams through.
            part = tl.load(lines + rows, mask=is_token & is_row[None, :], other=0.0)
            for start in range(block * BLOCK_OUT, last_column, BLOCK_COLUMNS):
                columns = (start + tl.arange(0, BLOCK_COLUMNS))[None, :]
                b_part = tl.load(
                    b_rows[:, None] + columns, mask=is_row[:, None] & (columns < d_out), other=0.0
                )
                total = _add_product(
                    part, b_part, tl.zeros([BLOCK_TOKENS, BLOCK_COLUMNS], tl.float32), PRECISION
                )
                _add_to(y_lines + columns, total, is_token & (columns < d_out))
        else:
            for start in range(block * BLOCK_OUT, last_column, BLOCK_COLUMNS):
                columns = (start + tl.arange(0, BLOCK_COLUMNS))[None, :]
                total = tl.zeros([BLOCK_TOKENS, BLOCK_COLUMNS], dtype=tl.float32)
                for row in range(begin, end, BLOCK_ROWS):
                    b_rows, is_row = _pointers(addresses + 1, row, end, y, ALIGNED, BLOCK_ROWS)
                    part = tl.load(lines + (row - begin) + rows, mask=is_token & is_row[None, :], other=0.0)
                    b_part = tl.load(
                        b_rows[:, None] + columns, mask=is_row[:, None] & (columns < d_out), other=0.0
                    )
                    total = _add_product(part, b_part, total, PRECISION)
                _add_to(y_lines + columns, total, is_token & (columns < d_out))


@triton.jit
def _add_product(part, b_part, total, PRECISION: tl.constexpr):
    """total + part @ b_part, part in float32."""
    if b_part.dtype == tl.float32:
        return tl.dot(part, b_part, total, input_precision=PRECISION)
    # In two pieces of 16 bits, so that tensor cores multiply what shrink summed in float32.
    high = part.to(b_part.dtype)
    low = (part - high.to(tl.float32)).to(b_part.dtype)
    return tl.dot(low, b_part, tl.dot(high, b_part, total))


@triton.jit
def _add_to(places, total, mask):
    before = tl.load(places, mask=mask, other=0.0).to(tl.float32)
    tl.store(places, (before + total).to(places.dtype.element_ty), mask=mask)
