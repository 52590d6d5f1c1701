"""add_lora on a CUDA device, in Triton: one pair of kernels for a group of linears, whatever adapters a step mixes.

A LoRA pair is a sum over rank rows, row i being A[i] with B[:, i]. So the device holds one table of rank rows
(where A's row lies, where B's column lies, which scale), each mix's rows for one linear side by side: ranks of
any size, pages that lie apart and several adapters at once are all the same case, and nothing is padded. A step
uploads no more than its tiles: which tokens run which mix. All tables keep their place, so that kernels captured
in a CUDA graph find other adapters there at the next replay.

Source: Punica, arXiv 2310.18547, section 4 (shrink, then expand; shrink split over d_in); differs: rank rows
gathered by address instead of one padded rank, and the split sums are added in the expand, so no atomics.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from adapterd.model.launch_triton import launch_options
from adapterd.model.lora import LoraStep, Products, Segment

_BLOCK_ROWS = 16
"""Rank rows at a time: the least that tensor cores take, and the most common rank."""

_SHORT_TILE, _LONG_TILE = 16, 64
_MAX_PROGRAMS = 1024
"""A shrink is split over d_in until about so many programs run: some eight for each processor of a large chip."""

_MAX_GROUP = 3
"""Linears that one launch can serve: q, k and v."""


@triton.jit
def shrink_kernel(
    x,  # [num_tokens, d_in]
    partial,  # float32 [NUM_SPLITS, num_members, num_tokens, max_rows]: written
    tiles,  # int32 [num_tiles, 3]: first token, number of tokens (0: none), mix
    bounds,  # int32 [num_mixes, num_linears, 2]: a mix's rank rows for a linear
    addresses,  # int64 [num_rows, 2]: of A's row, of B's column
    scales,  # float32 [num_rows]
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
    """partial[split, member, t, r] = scale_r * x[t, split's part] . A_r, for the rank rows r of t's mix."""
    tile, member, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, count, mix = (
        tl.load(tiles + 3 * tile),
        tl.load(tiles + 3 * tile + 1),
        tl.load(tiles + 3 * tile + 2),
    )
    linear = tl.where(member == 0, linear_0, tl.where(member == 1, linear_1, linear_2))
    begin = tl.load(bounds + (mix * num_linears + linear) * 2)
    end = tl.load(bounds + (mix * num_linears + linear) * 2 + 1)
    if CHAINED:
        gdc_wait()
        gdc_launch_dependents()
    if (count > 0) & (end > begin):
        offsets = tl.arange(0, BLOCK_TOKENS)
        is_token = offsets < count
        tokens = (first + offsets).to(tl.int64)
        part = tl.cdiv(tl.cdiv(d_in, NUM_SPLITS), BLOCK_IN) * BLOCK_IN
        part_end = tl.minimum((split + 1) * part, d_in)
        lines = (split * tl.num_programs(1) + member) * num_tokens + tokens
        for row in range(begin, end, BLOCK_ROWS):
            rows = row + tl.arange(0, BLOCK_ROWS)
            is_row = rows < end
            a = tl.load(addresses + rows * 2, mask=is_row, other=0)
            a_rows = a.to(tl.pointer_type(x.dtype.element_ty))
            if ALIGNED:
                a_rows = tl.multiple_of(a_rows, [16])
            total = tl.zeros([BLOCK_TOKENS, BLOCK_ROWS], dtype=tl.float32)
            for start in range(split * part, part_end, BLOCK_IN):
                columns = start + tl.arange(0, BLOCK_IN)
                is_column = columns < d_in
                x_part = tl.load(
                    x + tokens[:, None] * x_stride + columns[None, :],
                    mask=is_token[:, None] & is_column[None, :],
                    other=0.0,
                )
                a_part = tl.load(
                    a_rows[None, :] + columns[:, None], mask=is_row[None, :] & is_column[:, None], other=0.0
                )
                total = tl.dot(x_part, a_part, total, input_precision=PRECISION)
            scale = tl.load(scales + rows, mask=is_row, other=0.0)
            tl.store(
                partial + lines[:, None] * max_rows + (rows - begin)[None, :],
                total * scale[None, :],
                mask=is_token[:, None] & is_row[None, :],
            )


@triton.jit
def expand_kernel(
    y,  # [num_tokens, sum of d_out]: changed in place
    partial,
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
    NUM_SPLITS: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    CHAINED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """y[t, member's columns] += sum over the rank rows r of t's mix of (sum over splits of partial) * B_r."""
    block, tile = tl.program_id(0), tl.program_id(1)
    member, linear, d_out, offset = 0, linear_0, d_out_0, 0
    if NUM_MEMBERS > 1:
        blocks_0, blocks_1 = tl.cdiv(d_out_0, BLOCK_OUT), tl.cdiv(d_out_1, BLOCK_OUT)
        member = (block >= blocks_0).to(tl.int32) + (block >= blocks_0 + blocks_1).to(tl.int32)
        linear = tl.where(member == 0, linear_0, tl.where(member == 1, linear_1, linear_2))
        d_out = tl.where(member == 0, d_out_0, tl.where(member == 1, d_out_1, d_out_2))
        offset = tl.where(member == 0, 0, tl.where(member == 1, d_out_0, d_out_0 + d_out_1))
        block -= tl.where(member == 0, 0, tl.where(member == 1, blocks_0, blocks_0 + blocks_1))
    first, count, mix = (
        tl.load(tiles + 3 * tile),
        tl.load(tiles + 3 * tile + 1),
        tl.load(tiles + 3 * tile + 2),
    )
    begin = tl.load(bounds + (mix * num_linears + linear) * 2)
    end = tl.load(bounds + (mix * num_linears + linear) * 2 + 1)
    columns = block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    is_column = columns < d_out
    # On their way before shrink has ended: of most adapters these are all.
    b_part = _b_rows(
        addresses, begin, tl.where(count > 0, end, begin), columns, is_column, y, ALIGNED, BLOCK_ROWS
    )
    if CHAINED:
        gdc_wait()
        gdc_launch_dependents()
    if (count > 0) & (end > begin):
        offsets = tl.arange(0, BLOCK_TOKENS)
        is_token = offsets < count
        tokens = (first + offsets).to(tl.int64)
        total = tl.zeros([BLOCK_TOKENS, BLOCK_OUT], dtype=tl.float32)
        row = begin
        while row < end:
            rows = row + tl.arange(0, BLOCK_ROWS)
            is_row = rows < end
            shrunk = tl.zeros([BLOCK_TOKENS, BLOCK_ROWS], dtype=tl.float32)
            for split in range(NUM_SPLITS):
                lines = (split * NUM_MEMBERS + member) * num_tokens + tokens
                shrunk += tl.load(
                    partial + lines[:, None] * max_rows + (rows - begin)[None, :],
                    mask=is_token[:, None] & is_row[None, :],
                    other=0.0,
                )
            if y.dtype.element_ty == tl.float32:
                total = tl.dot(shrunk, b_part, total, input_precision=PRECISION)
            else:
                # In two pieces of 16 bits, so that tensor cores multiply what shrink summed in float32.
                high = shrunk.to(y.dtype.element_ty)
                low = (shrunk - high.to(tl.float32)).to(y.dtype.element_ty)
                total = tl.dot(high, b_part, total)
                total = tl.dot(low, b_part, total)
            row += BLOCK_ROWS
            b_part = _b_rows(addresses, row, end, columns, is_column, y, ALIGNED, BLOCK_ROWS)
        place = y + tokens[:, None] * y_stride + (offset + columns)[None, :]
        mask = is_token[:, None] & is_column[None, :]
        before = tl.load(place, mask=mask, other=0.0).to(tl.float32)
        tl.store(place, (before + total).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _b_rows(addresses, row, end, columns, is_column, y, ALIGNED: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """[BLOCK_ROWS, BLOCK_OUT]: columns of B, of the rank rows from `row` on; zeros from `end` on."""
    rows = row + tl.arange(0, BLOCK_ROWS)
    is_row = rows < end
    b = tl.load(addresses + rows * 2 + 1, mask=is_row, other=0)
    b_rows = b.to(tl.pointer_type(y.dtype.element_ty))
    if ALIGNED:
        b_rows = tl.multiple_of(b_rows, [16])
    return tl.load(b_rows[:, None] + columns[None, :], mask=is_row[:, None] & is_column[None, :], other=0.0)


@dataclass(frozen=True)
class _MixRows:
    """Where a mix stands in the tables. `products` keeps its matrices alive, and its identity from being reused."""

    products: Products
    index: int
    linears: frozenset[int]


class TritonLoraStep(LoraStep):
    """LoraStep through Triton. Matrices must have the dtype of x: float32, bfloat16 or float16.

    `generation` counts how often a table had to move or change its shape: what was captured in a CUDA graph
    before must be captured anew. Tables double, so this happens a few times in a daemon's life.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.generation = 0
        self._linears: dict[str, int] = {}
        self._mixes: dict[int, _MixRows] = {}
        self._num_rows = 0
        self._max_rows = 4 * _BLOCK_ROWS  # of one mix in one linear; a stride, so it may be too large
        self._bounds = torch.zeros(64, 256, 2, dtype=torch.int32, device=device)
        self._addresses = torch.zeros(1 << 16, 2, dtype=torch.long, device=device)
        self._scales = torch.zeros(1 << 16, device=device)
        self._fixed_tiles = torch.zeros(256, 3, dtype=torch.int32, device=device)
        self._tiles = self._fixed_tiles
        self._num_tiles = 0
        self._block_tokens = _SHORT_TILE
        self._touched: frozenset[int] | None = frozenset()

    def begin(self, segments: tuple[Segment, ...], num_tokens: int) -> None:
        """The tables of a step whose kernels are launched one by one, for the linears that need them."""
        super().begin(segments, num_tokens)
        self._touched = frozenset()
        if not segments:
            return
        mixes = self._place(segments)
        longest = max(segment.end - segment.start for segment in segments)
        self._block_tokens = _LONG_TILE if longest >= _LONG_TILE else _SHORT_TILE
        tiles = _cut(segments, [mix.index for mix in mixes], self._block_tokens)
        self._num_tiles = len(tiles)
        self._touched = frozenset().union(*(mix.linears for mix in mixes))
        host = torch.tensor(tiles, dtype=torch.int32).view(-1, 3)
        self._tiles = torch.empty_like(host, device=self._fixed_tiles.device)
        _copy(self._tiles, host)

    def begin_fixed(self, segments: tuple[Segment, ...], num_tokens: int) -> None:
        """The tables of a step of `num_tokens` in which any segments may run, kernels and grids being the same.

        Tiles lie in one place, as many as there are tokens; those that are not needed are empty.
        """
        # A segment at least, so that the linears call their kernels: what a graph records serves any later step.
        super().begin(segments or (Segment(0, 0, {}),), num_tokens)
        mixes = self._place(self.segments)
        tiles = _cut(self.segments, [mix.index for mix in mixes], _SHORT_TILE)
        tiles += [(0, 0, 0)] * (num_tokens - len(tiles))
        if num_tokens > len(self._fixed_tiles):
            self._fixed_tiles = self._fixed_tiles.new_zeros(_doubled(len(self._fixed_tiles), num_tokens), 3)
            self.generation += 1
        self._tiles, self._num_tiles = self._fixed_tiles, num_tokens
        self._block_tokens, self._touched = _SHORT_TILE, None
        _copy(self._fixed_tiles[:num_tokens], torch.tensor(tiles, dtype=torch.int32).view(-1, 3))

    def add(self, path: str, y: torch.Tensor, x: torch.Tensor) -> None:
        self.add_group((path,), (y.shape[-1],), y, x)

    def add_group(
        self, paths: Sequence[str], d_outs: Sequence[int], y: torch.Tensor, x: torch.Tensor
    ) -> None:
        """The same for up to three linears of one input, whose outputs lie side by side in y's columns."""
        linears = [self._number(path) for path in paths]
        if self._touched is not None and self._touched.isdisjoint(linears):
            return
        if y.dtype != x.dtype:
            raise RuntimeError(f"x is {x.dtype} and y is {y.dtype}; adapters are added in one type")
        num_tokens, d_in = x.shape
        num_members, num_tiles = len(linears), self._num_tiles
        x = x if x.stride(-1) == 1 else x.contiguous()
        block_in = 128 if x.dtype == torch.float32 else 256
        num_splits = max(min(-(-d_in // block_in), _MAX_PROGRAMS // (num_tiles * num_members)), 1)
        per_16_bytes = 16 // x.element_size()
        aligned = all(size % per_16_bytes == 0 for size in (d_in, *d_outs))
        block_out = 256 if max(d_outs) >= 4096 and self._block_tokens == _SHORT_TILE else 128
        padded = [*linears, *linears[:1] * (_MAX_GROUP - num_members)]
        sizes = [*d_outs, *[0] * (_MAX_GROUP - num_members)]
        partial = torch.empty(
            num_splits * num_members * num_tokens * self._max_rows, dtype=torch.float32, device=x.device
        )
        settings = {
            "NUM_SPLITS": num_splits,
            "ALIGNED": aligned,
            # Triton's own choice for float32 would be tf32.
            "PRECISION": "ieee",
            **launch_options(x.device),
            "BLOCK_TOKENS": self._block_tokens,
            "BLOCK_ROWS": _BLOCK_ROWS,
        }
        num_linears = self._bounds.shape[1]
        shrink_kernel[(num_tiles, num_members, num_splits)](
            x, partial, self._tiles, self._bounds, self._addresses, self._scales, *padded,
            num_linears, num_tokens, self._max_rows, d_in, x.stride(0),
            **settings, BLOCK_IN=block_in, num_warps=4, num_stages=3,
        )  # fmt: skip
        num_blocks = sum(-(-size // block_out) for size in d_outs)
        expand_kernel[(num_blocks, num_tiles)](
            y, partial, self._tiles, self._bounds, self._addresses, *padded, *sizes,
            num_linears, num_tokens, self._max_rows, y.stride(0),
            **settings, NUM_MEMBERS=num_members, BLOCK_OUT=block_out, num_warps=4, num_stages=2,
        )  # fmt: skip

    def _number(self, path: str) -> int:
        """Linears are numbered as they are met. Only a linear that some mix has or some forward called is one."""
        number = self._linears.setdefault(path, len(self._linears))
        if number >= self._bounds.shape[1]:
            wider = self._bounds.new_zeros(self._bounds.shape[0], 2 * self._bounds.shape[1], 2)
            wider[:, : self._bounds.shape[1]] = self._bounds
            self._bounds = wider
            self.generation += 1
        return number

    def _place(self, segments: tuple[Segment, ...]) -> list[_MixRows]:
        """Every segment's mix in the tables; the mixes of earlier steps stay there while there is room."""
        wanted = {id(segment.products): segment.products for segment in segments}
        missing = [products for key, products in wanted.items() if key not in self._mixes]
        num_new_rows = sum(_num_rows(products) for products in missing)
        if (
            len(self._mixes) + len(missing) > len(self._bounds)
            or self._num_rows + num_new_rows > len(self._addresses)
        ):  # fmt: skip
            self._mixes, self._num_rows, missing = {}, 0, list(wanted.values())
            self._make_room(len(missing), sum(_num_rows(products) for products in missing))
        for products in missing:
            self._mixes[id(products)] = self._write(products)
        return [self._mixes[id(segment.products)] for segment in segments]

    def _make_room(self, num_mixes: int, num_rows: int) -> None:
        """Twice what one step needs, so that the next step's newcomers do not push everyone out."""
        if 2 * num_mixes > len(self._bounds):
            shape = _doubled(len(self._bounds), 2 * num_mixes), *self._bounds.shape[1:]
            self._bounds = self._bounds.new_zeros(shape)
            self.generation += 1
        if 2 * num_rows > len(self._addresses):
            size = _doubled(len(self._addresses), 2 * num_rows)
            self._addresses = self._addresses.new_zeros(size, 2)
            self._scales = self._scales.new_zeros(size)
            self.generation += 1

    def _write(self, products: Products) -> _MixRows:
        # Every path gets its number before the row of bounds is made as wide as the table.
        numbers = {path: self._number(path) for path in products}
        bounds = torch.zeros(self._bounds.shape[1], 2, dtype=torch.int32)
        extents: list[tuple[int, int, int, int, int]] = []
        scales: list[float] = []
        row = self._num_rows
        for path, parts in products.items():
            first = row
            for part in parts:
                rank = part.a.shape[0]
                a_step, b_step = (tensor.stride(0) * tensor.element_size() for tensor in (part.a, part.b_t))
                extents.append((rank, part.a.data_ptr(), a_step, part.b_t.data_ptr(), b_step))
                scales.append(part.scale)
                row += rank
            bounds[numbers[path], 0], bounds[numbers[path], 1] = first, row
            while row - first > self._max_rows:
                self._max_rows *= 2
                self.generation += 1
        if extents:
            ranks, a_rows, a_steps, b_rows, b_steps = torch.tensor(extents, dtype=torch.long).unbind(1)
            starts = ranks.cumsum(0) - ranks
            within = torch.arange(int(ranks.sum())) - starts.repeat_interleave(ranks)
            of = torch.arange(len(ranks)).repeat_interleave(ranks)
            rows = torch.stack([a_rows[of] + within * a_steps[of], b_rows[of] + within * b_steps[of]], dim=1)
            _copy(self._addresses[self._num_rows : row], rows)
            _copy(self._scales[self._num_rows : row], torch.tensor(scales)[of])
        index = len(self._mixes)
        _copy(self._bounds[index], bounds)
        self._num_rows = row
        return _MixRows(
            products, index, frozenset(numbers[path] for path, parts in products.items() if parts)
        )


def _num_rows(products: Products) -> int:
    return sum(part.a.shape[0] for parts in products.values() for part in parts)


def _cut(segments: tuple[Segment, ...], mixes: list[int], block_tokens: int) -> list[tuple[int, int, int]]:
    """(first token, number of tokens, mix) of tiles of at most `block_tokens`, none across two segments."""
    return [
        (start, min(block_tokens, segment.end - start), mix)
        for segment, mix in zip(segments, mixes, strict=True)
        for start in range(segment.start, segment.end, block_tokens)
    ]


def _doubled(size: int, wanted: int) -> int:
    while size < wanted:
        size *= 2
    return size


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """Host to device without waiting: torch keeps pinned memory until the copy has run."""
    if target.device.type == "cuda":
        target.copy_(source.pin_memory(), non_blocking=True)
    else:
        target.copy_(source)
