"""The bank's pages: of what size, and matrices in them, cut by rows and whole where pages happen to lie side by side.

LoRA pairs lie by rank rows (`PageGeometry`). Of matrices of any other shape one that fits in a page shares it with
others and a larger one has pages of its own (`PageWriter`). How many pages that takes follows from shapes alone, so
that it can be booked before any page is chosen.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

_ALIGN_ELEMENTS = 64
_TYPICAL_RANKS = (8, 16, 32)


@dataclass(frozen=True)
class PageGeometry:
    """How rank rows lie in pages: `rows_per_page[module]` rows of d_in + d_out elements fit in one page."""

    page_elements: int
    rows_per_page: Mapping[str, int]

    @classmethod
    def choose(cls, targets: Mapping[str, tuple[int, int]], longest_row: int = 0) -> "PageGeometry":
        """The page size, of a few multiples of the longest row, that wastes least at usual ranks.

        longest_row: elements of the longest row that must lie in one page besides.
        """
        rows = {module: d_in + d_out for module, (d_out, d_in) in targets.items()}
        longest = max([_ALIGN_ELEMENTS, longest_row, *rows.values()])
        longest = -(-longest // _ALIGN_ELEMENTS) * _ALIGN_ELEMENTS

        def cost(page: int) -> int:
            return sum(-(-rank // (page // row)) * page for rank in _TYPICAL_RANKS for row in rows.values())

        step = max(longest // 4 // _ALIGN_ELEMENTS, 1) * _ALIGN_ELEMENTS
        page = min(range(longest, 4 * longest + 1, step), key=lambda size: (cost(size), size))
        return cls(page, {module: page // row for module, row in rows.items()})

    def num_pages(self, ranks: Iterable[tuple[str, int]]) -> int:
        """Pages that (module, rank) pairs take, however the free pages happen to lie."""
        return sum(-(-rank // self.rows_per_page[module]) for module, rank in ranks)


def adapter_bytes_of_rank(
    targets: Mapping[str, tuple[int, int]], rank: int, dtype: torch.dtype, *, longest_row: int = 0
) -> int:
    """What an adapter of this rank on every target takes in a bank."""
    geometry = PageGeometry.choose(targets, longest_row)
    return geometry.num_pages((module, rank) for module in targets) * geometry.page_elements * dtype.itemsize


@dataclass(frozen=True)
class PagedRows:
    """A matrix [num_rows, width] as views of the bank's buffer, each of some consecutive rows."""

    pieces: tuple[torch.Tensor, ...]

    def whole(self) -> torch.Tensor:
        """The matrix; a copy if it lies in several pieces."""
        return self.pieces[0] if len(self.pieces) == 1 else torch.cat(self.pieces)

    def take(self, rows: torch.Tensor) -> torch.Tensor:
        """matrix[rows]. rows: int64 [n]."""
        if len(self.pieces) == 1:
            return self.pieces[0][rows]
        found = self.pieces[0].new_empty(len(rows), self.pieces[0].shape[1])
        start = 0
        for piece in self.pieces:
            inside = (rows >= start) & (rows < start + len(piece))
            found[inside] = piece[rows[inside] - start]
            start += len(piece)
        return found

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """x @ matrix.T. x: [n, width]; returns [n, num_rows]."""
        if len(self.pieces) == 1:
            return x @ self.pieces[0].T
        return torch.cat([x @ piece.T for piece in self.pieces], dim=1)


class PageWriter:
    """Writes matrices into pages of `buffer` that were set aside, in the order in which they were counted."""

    def __init__(
        self,
        buffer: torch.Tensor,
        page_elements: int,
        pages: Sequence[int],
        copy: Callable[[torch.Tensor, torch.Tensor], object] = torch.Tensor.copy_,
    ) -> None:
        """copy(target, source) fills a view of the buffer from host memory."""
        self._buffer = buffer
        self._page = page_elements
        self._pages = pages
        self._copy = copy
        self.itemsize = buffer.dtype.itemsize

    @staticmethod
    def num_pages(shapes: Iterable[Sequence[int]], page_elements: int) -> int:
        """Pages that matrices of these shapes take, however free pages happen to lie.

        Raises ValueError for a matrix whose row is longer than a page.
        """
        shared = _SharedPages(page_elements)
        own = 0
        for num_rows, width in shapes:
            if width > page_elements:
                raise ValueError(f"a row of {width} elements is longer than a page of {page_elements}")
            if num_rows * width > page_elements:
                own += -(-num_rows // (page_elements // width))
            else:
                shared.place(num_rows * width)
        return shared.count + own

    def write(self, matrices: Sequence[torch.Tensor]) -> Iterator[PagedRows]:
        """Copy matrices [num_rows, width] and give each as it lies now. A meta tensor is given room and no values."""
        shared = _SharedPages(self._page)
        places = [shared.place(m.numel()) if m.numel() <= self._page else None for m in matrices]
        taken = shared.count
        for matrix, place in zip(matrices, places, strict=True):
            num_rows, width = matrix.shape
            if place is not None:
                page, offset = place
                spans = [(self._pages[page] * self._page + offset, num_rows)]
            else:
                count = -(-num_rows // (self._page // width))
                spans = self._spans(self._pages[taken : taken + count], num_rows, width)
                taken += count
            pieces, row = [], 0
            for start, rows in spans:
                piece = self._buffer[start : start + rows * width].view(rows, width)
                if matrix.device.type != "meta":
                    self._copy(piece, matrix[row : row + rows])
                pieces.append(piece)
                row += rows
            yield PagedRows(tuple(pieces))

    def as_integers(self, room: PagedRows, values: Sequence[int]) -> PagedRows:
        """int64 values [len(values), 1] in room that was written without any, each in a row of 8 bytes."""
        column = torch.tensor(values)[:, None]
        pieces, row = [], 0
        for piece in room.pieces:
            integers = piece.view(torch.int64)
            self._copy(integers, column[row : row + len(piece)])
            pieces.append(integers)
            row += len(piece)
        return PagedRows(tuple(pieces))

    def _spans(self, pages: Sequence[int], num_rows: int, width: int) -> list[tuple[int, int]]:
        """(first element, number of rows) of each run of pages that lie side by side."""
        spans: list[tuple[int, int]] = []
        for first, count in consecutive_runs(pages):
            rows = min(count * self._page // width, num_rows)
            if rows:
                spans.append((first * self._page, rows))
                num_rows -= rows
        assert num_rows == 0
        return spans


class _SharedPages:
    """Next fit: a matrix goes into the page at hand if it still fits there, else into a new one."""

    def __init__(self, page_elements: int) -> None:
        self._page = page_elements
        self._used = page_elements
        self.count = 0

    def place(self, num_elements: int) -> tuple[int, int]:
        """(which of the shared pages, first element in it)."""
        if self._used + num_elements > self._page:
            self.count += 1
            self._used = 0
        offset = self._used
        self._used += -(-num_elements // _ALIGN_ELEMENTS) * _ALIGN_ELEMENTS
        return self.count - 1, offset


def consecutive_runs(pages: Sequence[int]) -> list[tuple[int, int]]:
    """[3, 4, 5, 9] -> [(3, 3), (9, 1)]: first page and length of each run."""
    runs: list[tuple[int, int]] = []
    for page in pages:
        if runs and runs[-1][0] + runs[-1][1] == page:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((page, 1))
    return runs
