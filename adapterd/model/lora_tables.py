"""The tables that Triton's adapter kernels read: which rank rows each mix has for each linear, and where they lie.

They are made at start for all that adapter memory can hold and keep their place, so that what was captured in a CUDA
graph finds any adapter there. A mix stays in them until the room is needed for one that the step at hand runs.
"""

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from adapterd.model.lora import LoraBank, Products
from adapterd.model.transfer import copy_to

logger = logging.getLogger(__name__)

_MAX_RANK = 512
"""What graphs are ready for, on one linear and of all adapters of a mix. Room for 512 rows a token is a few MiB."""
_MIN_MIXES, _MIN_LINEARS, _MIN_ROWS, _MIN_RANK = 64, 256, 1 << 16, 64


@dataclass(eq=False)
class PlacedMix:
    """Where a mix stands: at `index` of bounds, with rank rows [first, first + num_rows) of the others.

    products: kept alive, and so their identity from being reused. max_rows: the most that it has for one linear;
    linears: numbers of those for which it has any.
    """

    products: Products
    index: int
    first: int
    num_rows: int
    max_rows: int
    linears: frozenset[int]


class RowTables:
    """bounds: int32 [num_mixes, num_linears, 2], a mix's first rank row for a linear and the row after its last;
    addresses: int64 [num_rows, 2], of A's row and of B's column; scales: float32 [num_rows].

    `generation` counts how often a table had to move after all: what was captured before must be captured anew. A
    single adapter never does that to tables made for its bank, and a composition hardly: its adapters' rows are there
    once for each composition that has them.
    """

    def __init__(self, device: torch.device) -> None:
        self.generation = 0
        self.max_rank = _MIN_RANK
        self.bounds = torch.zeros(_MIN_MIXES, _MIN_LINEARS, 2, dtype=torch.int32, device=device)
        self.addresses = torch.zeros(_MIN_ROWS, 2, dtype=torch.long, device=device)
        self.scales = torch.zeros(_MIN_ROWS, device=device)
        self._linears: dict[str, int] = {}
        self._mixes: dict[int, PlacedMix] = {}  # by identity, the one used last at the end
        self._free_indices = list(range(_MIN_MIXES))

    def reserve(self, bank: LoraBank, max_num_seqs: int, max_rank: int) -> None:
        """Make room for every row that the bank can hold and twice the mixes of a step, before anything is captured."""
        rows_per_page = bank.geometry.rows_per_page
        for path in rows_per_page:
            self.number(path)
        num_rows = bank.num_pages * max(rows_per_page.values(), default=0)
        self._resize(2 * max_num_seqs, num_rows)
        self.max_rank = max(self.max_rank, min(max(_MAX_RANK, _rounded_up(max_rank)), _rounded_up(num_rows)))
        self.generation = 0

    def number(self, path: str) -> int:
        """Linears are numbered as they are met. Only a linear that some mix has or some forward called is one."""
        number = self._linears.setdefault(path, len(self._linears))
        num_mixes, num_linears, _ = self.bounds.shape
        if number >= num_linears:
            wider = self.bounds.new_zeros(num_mixes, 2 * num_linears, 2)
            wider[:, :num_linears] = self.bounds
            self.bounds = wider
            self.generation += 1
        return number

    def place(self, step: Sequence[Products]) -> list[PlacedMix]:
        """Every mix of a step in the tables. Others leave, the longest unused first, only where room is needed."""
        wanted = {id(products): products for products in step}
        missing: list[tuple[Products, int]] = []
        for key, products in wanted.items():
            known = self._mixes.pop(key, None)
            if known is not None:
                self._mixes[key] = known
            else:
                missing.append((products, _num_rows(products)))
        if missing:
            self._make_room(len(missing), sum(num_rows for _, num_rows in missing), wanted.keys())
            for products, num_rows in missing:
                self._mixes[id(products)] = self._write(products, num_rows)
        return [self._mixes[id(products)] for products in step]

    def admit_rank(self, num_rows: int) -> None:
        """See that `max_rank` is at least the rows that a mix of a captured step has for one linear."""
        if num_rows > self.max_rank:
            logger.info(
                "a mix of %d rank rows on one linear: decode graphs are recorded anew for that", num_rows
            )
            self.max_rank = _doubled(self.max_rank, num_rows)
            self.generation += 1

    def _make_room(self, num_mixes: int, num_rows: int, kept: Collection[int]) -> None:
        num_free = len(self.addresses) - sum(mix.num_rows for mix in self._mixes.values())
        for key in [key for key in self._mixes if key not in kept]:
            if num_mixes <= len(self._free_indices) and num_rows <= num_free:
                return
            left = self._mixes.pop(key)
            self._free_indices.append(left.index)
            num_free += left.num_rows
        generation = self.generation
        least_mixes = len(self.bounds) - len(self._free_indices) + num_mixes
        least_rows = len(self.addresses) - num_free + num_rows
        self._resize(_doubled(len(self.bounds), least_mixes), _doubled(len(self.addresses), least_rows))
        if self.generation != generation:
            logger.info("a step has more rank rows than the adapter tables: decode graphs are recorded anew")

    def _resize(self, num_mixes: int, num_rows: int) -> None:
        """At least so large, with what they hold."""
        before = len(self.bounds)
        if num_mixes > before:
            self.bounds = _longer(self.bounds, num_mixes)
            self._free_indices += range(before, len(self.bounds))
            self.generation += 1
        if num_rows > len(self.addresses):
            self.addresses, self.scales = (
                _longer(table, num_rows) for table in (self.addresses, self.scales)
            )
            self.generation += 1

    def _gap(self, num_rows: int) -> int:
        """The first of so many rows that are free side by side; mixes are moved if they lie apart."""
        end = 0
        for mix in sorted(self._mixes.values(), key=lambda mix: mix.first):
            if mix.first - end >= num_rows:
                return end
            end = mix.first + mix.num_rows
        return end if len(self.addresses) - end >= num_rows else self._close_gaps()

    def _close_gaps(self) -> int:
        """Move all mixes to the front, on the device and in the order of its steps; the first row behind them."""
        moved = torch.zeros(len(self.bounds), dtype=torch.int32)
        spans: list[slice] = []
        end = 0
        for mix in sorted(self._mixes.values(), key=lambda mix: mix.first):
            spans.append(slice(mix.first, mix.first + mix.num_rows))
            moved[mix.index] = end - mix.first
            mix.first = end
            end += mix.num_rows
        for table in (self.addresses, self.scales):
            table[:end] = torch.cat([table[span] for span in spans])
        delta = torch.empty(len(moved), dtype=torch.int32, device=self.bounds.device)
        copy_to(delta, moved)
        self.bounds += delta[:, None, None]
        return end

    def _write(self, products: Products, num_rows: int) -> PlacedMix:
        # Every path gets its number before the row of bounds is made as wide as the table.
        numbers = {path: self.number(path) for path in products}
        first = row = self._gap(num_rows)
        bounds = torch.zeros(self.bounds.shape[1], 2, dtype=torch.int32)
        lines: list[int] = []
        spans: list[tuple[int, int]] = []
        extents: list[tuple[int, int, int, int, int]] = []
        scales: list[float] = []
        for path, parts in products.items():
            begin = row
            for part in parts:
                a, b_t = part.a, part.b_t
                rank, size = a.shape[0], a.element_size()
                extents.append((rank, a.data_ptr(), size * a.stride(0), b_t.data_ptr(), size * b_t.stride(0)))
                scales.append(part.scale)
                row += rank
            if row > begin:
                lines.append(numbers[path])
                spans.append((begin, row))
        if spans:
            bounds[lines] = torch.tensor(spans, dtype=torch.int32)
            ranks, a_rows, a_steps, b_rows, b_steps = torch.tensor(extents, dtype=torch.long).unbind(1)
            starts = ranks.cumsum(0) - ranks
            within = torch.arange(num_rows) - starts.repeat_interleave(ranks)
            of = torch.arange(len(ranks)).repeat_interleave(ranks)
            rows = torch.stack([a_rows[of] + within * a_steps[of], b_rows[of] + within * b_steps[of]], dim=1)
            copy_to(self.addresses[first:row], rows)
            copy_to(self.scales[first:row], torch.tensor(scales)[of])
        index = self._free_indices.pop()
        copy_to(self.bounds[index], bounds)
        max_rows = max((end - begin for begin, end in spans), default=0)
        return PlacedMix(products, index, first, num_rows, max_rows, frozenset(lines))


def _doubled(size: int, wanted: int) -> int:
    """`size`, doubled until it is `wanted` or more."""
    while size < wanted:
        size *= 2
    return size


def _longer(table: torch.Tensor, size: int) -> torch.Tensor:
    longer = table.new_zeros(size, *table.shape[1:])
    longer[: len(table)] = table
    return longer


def _num_rows(products: Products) -> int:
    return sum(part.a.shape[0] for parts in products.values() for part in parts)


def _rounded_up(num_rows: int) -> int:
    return -(-num_rows // _MIN_RANK) * _MIN_RANK
