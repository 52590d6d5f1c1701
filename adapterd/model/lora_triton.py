"""add_lora on a CUDA device, in Triton: one pair of kernels for a group of linears, whatever adapters a step mixes.

A LoRA pair is a sum over rank rows, row i being A[i] with B[:, i]. So the device holds one table of rank rows
(where A's row lies, where B's column lies, which scale), each mix's rows for one linear side by side: ranks of
any size, pages that lie apart and several adapters at once are all the same case, and nothing is padded. A step
uploads no more than its tiles: which tokens run which mix. All tables keep their place, so that kernels captured
in a CUDA graph find other adapters there at the next replay.

Source: Punica, arXiv 2310.18547, section 4 (shrink, then expand; shrink split over d_in); differs: rank rows
gathered by address instead of one padded rank, and split sums added in a fixed order by whoever comes last.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton

from adapterd.model.launch_triton import launch_options, zero_counts
from adapterd.model.lora import LoraStep, Products, Segment
from adapterd.model.lora_kernels_triton import expand_kernel, shrink_kernel

BLOCK_ROWS = 16
"""Rank rows at a time: the least that tensor cores take, and the most common rank."""

SHORT_TILE, _LONG_TILE = 16, 64
_SHRINK_ROW_BYTES = 512
SHRINK_BYTES = (SHORT_TILE + BLOCK_ROWS) * _SHRINK_ROW_BYTES
"""What a shrink of short tiles has on the chip at a time: so many bytes of each token and of each rank row."""

_SPLIT_COLUMNS = 1024
"""A shrink is split over d_in into parts of about so many columns, which a program reads in two microseconds."""
_MAX_SPLITS = 16

_MAX_GROUP = 3
"""Linears that one launch can serve: q, k and v."""


@dataclass(frozen=True)
class GroupStep:
    """What one step adds to a group of linears: `shrink`, or a kernel that does it beside others, then `expand`.

    linears: numbers of up to _MAX_GROUP members, the first again where there are fewer. shrunk, partial, counts and
    the tables are as in lora_kernels_triton.shrink_tile.
    """

    x: torch.Tensor
    shrunk: torch.Tensor
    partial: torch.Tensor
    counts: torch.Tensor
    tiles: torch.Tensor
    bounds: torch.Tensor
    addresses: torch.Tensor
    scales: torch.Tensor
    linears: Sequence[int]
    d_outs: Sequence[int]
    num_tiles: int
    num_splits: int
    max_rows: int
    is_aligned: bool
    block_tokens: int
    block_in: int

    def shrink(self) -> None:
        num_tokens, d_in = self.x.shape
        shrink_kernel[(self.num_tiles, len(self.d_outs), self.num_splits)](
            self.x, self.shrunk, self.partial, self.counts, self.tiles, self.bounds, self.addresses, self.scales,
            *self.linears, self.bounds.shape[1], num_tokens, self.max_rows, d_in, self.x.stride(0),
            NUM_SPLITS=self.num_splits, **self._settings(), BLOCK_IN=self.block_in,
            num_warps=4 if self.block_tokens == SHORT_TILE else 8, num_stages=3,
        )  # fmt: skip

    def expand(self, y: torch.Tensor) -> None:
        """y: [num_tokens, sum of d_outs], changed in place."""
        # Few long programs: each finds its rows by four loads that wait for one another, then streams.
        is_short = self.block_tokens == SHORT_TILE
        block_out = 1024 if is_short and max(self.d_outs) >= 8192 else 512
        num_blocks = sum(-(-size // block_out) for size in self.d_outs)
        sizes = [*self.d_outs, *[0] * (_MAX_GROUP - len(self.d_outs))]
        expand_kernel[(num_blocks, self.num_tiles)](
            y, self.shrunk, self.tiles, self.bounds, self.addresses, *self.linears, *sizes,
            self.bounds.shape[1], len(self.x), self.max_rows, y.stride(0),
            NUM_MEMBERS=len(self.d_outs), **self._settings(), BLOCK_OUT=block_out,
            BLOCK_COLUMNS=256 if is_short and y.element_size() == 2 else 128, num_warps=4, num_stages=3,
        )  # fmt: skip

    def _settings(self) -> dict[str, object]:
        return {
            "ALIGNED": self.is_aligned,
            # Triton's own choice for float32 would be tf32.
            "PRECISION": "ieee",
            **launch_options(self.x.device),
            "BLOCK_TOKENS": self.block_tokens,
            "BLOCK_ROWS": BLOCK_ROWS,
        }


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
        self._max_rows = 4 * BLOCK_ROWS  # of one mix in one linear; a stride, so it may be too large
        self._bounds = torch.zeros(64, 256, 2, dtype=torch.int32, device=device)
        self._addresses = torch.zeros(1 << 16, 2, dtype=torch.long, device=device)
        self._scales = torch.zeros(1 << 16, device=device)
        self._fixed_tiles = torch.zeros(256, 3, dtype=torch.int32, device=device)
        self._tiles = self._fixed_tiles
        self._num_tiles = 0
        self._block_tokens = SHORT_TILE
        self._touched: frozenset[int] | None = frozenset()

    def begin(self, segments: tuple[Segment, ...], num_tokens: int) -> None:
        """The tables of a step whose kernels are launched one by one, for the linears that need them."""
        super().begin(segments, num_tokens)
        self._touched = frozenset()
        if not segments:
            return
        mixes = self._place(segments)
        longest = max(segment.end - segment.start for segment in segments)
        # Longer than any step whose products are for few tokens: beside those there is room for short tiles alone.
        self._block_tokens = _LONG_TILE if longest > _LONG_TILE else SHORT_TILE
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
        tiles = _cut(self.segments, [mix.index for mix in mixes], SHORT_TILE)
        tiles += [(0, 0, 0)] * (num_tokens - len(tiles))
        if num_tokens > len(self._fixed_tiles):
            self._fixed_tiles = self._fixed_tiles.new_zeros(_doubled(len(self._fixed_tiles), num_tokens), 3)
            self.generation += 1
        self._tiles, self._num_tiles = self._fixed_tiles, num_tokens
        self._block_tokens, self._touched = SHORT_TILE, None
        _copy(self._fixed_tiles[:num_tokens], torch.tensor(tiles, dtype=torch.int32).view(-1, 3))

    def add(self, path: str, y: torch.Tensor, x: torch.Tensor) -> None:
        self.add_group((path,), (y.shape[-1],), y, x)

    def add_group(
        self, paths: Sequence[str], d_outs: Sequence[int], y: torch.Tensor, x: torch.Tensor
    ) -> None:
        """The same for up to three linears of one input, whose outputs lie side by side in y's columns."""
        group = self.group(paths, d_outs, x)
        if group is not None:
            if y.dtype != x.dtype:
                raise RuntimeError(f"x is {x.dtype} and y is {y.dtype}; adapters are added in one type")
            group.shrink()
            group.expand(y)

    def group(
        self, paths: Sequence[str], d_outs: Sequence[int], x: torch.Tensor, *, is_beside: bool = False
    ) -> GroupStep | None:
        """What the step adds to these linears, nothing of it launched; None if no mix of the step touches them.

        is_beside: its shrink will run beside something longer, so that it need not be split.
        """
        linears = [self._number(path) for path in paths]
        if self._touched is not None and self._touched.isdisjoint(linears):
            return None
        num_tokens, d_in = x.shape
        num_members = len(linears)
        x = x if x.stride(-1) == 1 else x.contiguous()
        num_splits = 1
        if not is_beside:
            num_splits = min(triton.next_power_of_2(-(-d_in // _SPLIT_COLUMNS)), _MAX_SPLITS)
        size = num_members * num_tokens * self._max_rows
        sums = torch.empty((1 + (num_splits if num_splits > 1 else 0)) * size, device=x.device)
        per_16_bytes = 16 // x.element_size()
        return GroupStep(
            x=x,
            shrunk=sums[:size],
            partial=sums[size:],
            counts=zero_counts(x.device),
            tiles=self._tiles,
            bounds=self._bounds,
            addresses=self._addresses,
            scales=self._scales,
            linears=[*linears, *linears[:1] * (_MAX_GROUP - num_members)],
            d_outs=d_outs,
            num_tiles=self._num_tiles,
            num_splits=num_splits,
            max_rows=self._max_rows,
            is_aligned=all(size % per_16_bytes == 0 for size in (d_in, *d_outs)),
            block_tokens=self._block_tokens,
            block_in=_SHRINK_ROW_BYTES // x.element_size(),
        )

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
