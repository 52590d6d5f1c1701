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
from adapterd.model.lora import LoraBank, LoraStep, Segment
from adapterd.model.lora_kernels_triton import expand_kernel, shrink_kernel
from adapterd.model.lora_tables import RowTables
from adapterd.model.transfer import copy_to

BLOCK_ROWS = 16
"""Rank rows at a time: the least that tensor cores take, and the most common rank."""

SHORT_TILE, _LONG_TILE = 16, 64
_SHRINK_ROW_BYTES = 512
SHRINK_BYTES = (SHORT_TILE + BLOCK_ROWS) * _SHRINK_ROW_BYTES
"""What a shrink of short tiles has on the chip at a time: so many bytes of each token and of each rank row."""

_SPLIT_COLUMNS = 1024
"""A shrink is split over d_in into parts of about so many columns, which a program reads in two microseconds."""
_MAX_SPLITS = 16

MAX_GROUP = 3
"""Linears that one launch can serve: q, k and v."""

_MIN_TILES = 256


@dataclass(frozen=True)
class GroupStep:
    """What one step adds to a group of linears: `shrink`, or a kernel that does it beside others, then `expand`.

    linears: numbers of up to MAX_GROUP members, the first again where there are fewer. shrunk, partial, counts and
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
        sizes = [*self.d_outs, *[0] * (MAX_GROUP - len(self.d_outs))]
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


class TritonLoraStep(LoraStep):
    """LoraStep through Triton. Matrices must have the dtype of x: float32, bfloat16 or float16."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._tables = RowTables(device)
        self._fixed_tiles = torch.zeros(_MIN_TILES, 3, dtype=torch.int32, device=device)
        self._tiles = self._fixed_tiles
        self._num_tiles = 0
        self._max_rows = BLOCK_ROWS
        self._block_tokens = SHORT_TILE
        self._touched: frozenset[int] | None = frozenset()

    @property
    def generation(self) -> int:
        """Rises when what was captured in a CUDA graph before must be captured anew; see RowTables."""
        return self._tables.generation

    def reserve(self, bank: LoraBank, max_num_seqs: int, max_rank: int) -> None:
        """Make the tables of fixed steps large enough for what the bank can hold, before any is captured."""
        self._tables.reserve(bank, max_num_seqs, max_rank)
        size = max(max_num_seqs, _MIN_TILES)
        self._fixed_tiles = torch.zeros(size, 3, dtype=torch.int32, device=self._fixed_tiles.device)

    def begin(self, segments: tuple[Segment, ...], num_tokens: int) -> None:
        """The tables of a step whose kernels are launched one by one, for the linears that need them."""
        super().begin(segments, num_tokens)
        self._touched = frozenset()
        if not segments:
            return
        mixes = self._tables.place([segment.products for segment in segments])
        longest = max(segment.end - segment.start for segment in segments)
        # Longer than any step whose products are for few tokens: beside those there is room for short tiles alone.
        self._block_tokens = _LONG_TILE if longest > _LONG_TILE else SHORT_TILE
        tiles = _cut(segments, [mix.index for mix in mixes], self._block_tokens)
        self._num_tiles = len(tiles)
        self._max_rows = -(-max(mix.max_rows for mix in mixes) // BLOCK_ROWS) * BLOCK_ROWS
        self._touched = frozenset().union(*(mix.linears for mix in mixes))
        host = torch.tensor(tiles, dtype=torch.int32).view(-1, 3)
        self._tiles = torch.empty_like(host, device=self._fixed_tiles.device)
        copy_to(self._tiles, host)

    def begin_fixed(self, segments: tuple[Segment, ...], num_tokens: int) -> None:
        """The tables of a step of `num_tokens` in which any segments may run, kernels and grids being the same.

        Tiles lie in one place, as many as there are tokens; those that are not needed are empty.
        """
        assert num_tokens <= len(self._fixed_tiles)  # `reserve` was told so
        # A segment at least, so that the linears call their kernels: what a graph records serves any later step.
        super().begin(segments or (Segment(0, 0, {}),), num_tokens)
        mixes = self._tables.place([segment.products for segment in self.segments])
        self._tables.admit_rank(max(mix.max_rows for mix in mixes))
        tiles = _cut(self.segments, [mix.index for mix in mixes], SHORT_TILE)
        tiles += [(0, 0, 0)] * (num_tokens - len(tiles))
        self._tiles, self._num_tiles = self._fixed_tiles, num_tokens
        self._max_rows = self._tables.max_rank
        self._block_tokens, self._touched = SHORT_TILE, None
        copy_to(self._fixed_tiles[:num_tokens], torch.tensor(tiles, dtype=torch.int32).view(-1, 3))

    def add(self, path: str, y: torch.Tensor, x: torch.Tensor) -> None:
        group = self.group((path,), (y.shape[-1],), x)
        if group is not None:
            if y.dtype != x.dtype:
                raise RuntimeError(f"x is {x.dtype} and y is {y.dtype}; adapters are added in one type")
            group.shrink()
            group.expand(y)

    def group(
        self, paths: Sequence[str], d_outs: Sequence[int], x: torch.Tensor, *, is_beside: bool = False
    ) -> GroupStep | None:
        """What the step adds to up to MAX_GROUP linears of one input, nothing of it launched; None if nothing.

        is_beside: its shrink will run beside something longer, so that it need not be split.
        """
        tables = self._tables
        linears = [tables.number(path) for path in paths]
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
            bounds=tables.bounds,
            addresses=tables.addresses,
            scales=tables.scales,
            linears=[*linears, *linears[:1] * (MAX_GROUP - num_members)],
            d_outs=d_outs,
            num_tiles=self._num_tiles,
            num_splits=num_splits,
            max_rows=self._max_rows,
            is_aligned=all(size % per_16_bytes == 0 for size in (d_in, *d_outs)),
            block_tokens=self._block_tokens,
            block_in=_SHRINK_ROW_BYTES // x.element_size(),
        )


def _cut(segments: tuple[Segment, ...], mixes: list[int], block_tokens: int) -> list[tuple[int, int, int]]:
    """(first token, number of tokens, mix) of tiles of at most `block_tokens`, none across two segments."""
    return [
        (start, min(block_tokens, segment.end - start), mix)
        for segment, mix in zip(segments, mixes, strict=True)
        for start in range(segment.start, segment.end, block_tokens)
    ]
