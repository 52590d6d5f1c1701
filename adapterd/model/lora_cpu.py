"""add_lora on a CPU, in C++: one call a linear, however many adapters, segments and extents there are.

Once a step a table is put together: which rows of the batch meet which matrices. An adapter's part of it does not
change while it is resident and is kept from step to step, so that a step only joins and sorts a few tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from adapterd.model.lora import LoraStep, Products, Segment


@dataclass(frozen=True)
class _MixTable:
    """rows: int64 [num_extents, 4], address of A, address of B transposed, rank, scale (bits of a float64);
    linears: int64 [num_extents], which linear each belongs to. `products` keeps the matrices alive.
    """

    products: Products
    rows: torch.Tensor
    linears: torch.Tensor


class NativeLoraStep(LoraStep):
    """LoraStep through torch.ops.adapterd.add_lora. Matrices must have the dtype of x: float32 or bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self._linears: dict[str, int] = {}
        self._mixes: dict[int, _MixTable] = {}
        self._table = torch.empty(0, 6, dtype=torch.long)
        self._bounds: list[int] = [0]
        self._pairs: list[int] = []

    def register(self, paths: Sequence[str]) -> range:
        """Number linears, neighbours next to one another; for `additions`."""
        first = len(self._linears)
        self._linears.update((path, first + i) for i, path in enumerate(paths))
        return range(first, first + len(paths))

    def begin(self, segments: tuple[Segment, ...], num_tokens: int) -> None:
        super().begin(segments, num_tokens)
        # By identity: a mix's products are one object as long as it is resident, and the table holds on to it.
        known = self._mixes
        self._mixes = {
            id(s.products): known.get(id(s.products)) or self._mix_table(s.products) for s in segments
        }
        if not segments:
            self._bounds = [0] * (len(self._linears) + 1)
            return
        tables = [self._mixes[id(segment.products)] for segment in segments]
        lengths = torch.tensor([len(table.rows) for table in tables])
        spans = torch.tensor([[segment.start, segment.end] for segment in segments])
        rows = torch.cat(
            [spans.repeat_interleave(lengths, dim=0), torch.cat([table.rows for table in tables])], dim=1
        )
        linears = torch.cat([table.linears for table in tables])
        # Stable: within a linear the segments stay in order, and a segment's extents together.
        order = linears.argsort(stable=True)
        self._table = rows[order]
        self._bounds = torch.searchsorted(linears[order], torch.arange(len(self._linears) + 1)).tolist()
        self._pairs = [bound for pair in pairwise(self._bounds) for bound in pair]

    def place(self, paths: Sequence[str]) -> range | None:
        """The numbers of registered linears, if they are neighbours in this order."""
        numbers = [self._linears.get(path) for path in paths]
        first = numbers[0]
        if first is None or numbers != list(range(first, first + len(paths))):
            return None
        return range(first, first + len(paths))

    def additions(self, place: range) -> tuple[torch.Tensor, list[int]]:
        """The step's table, and for each registered linear of `place` its first row and the row after its last."""
        return self._table, self._pairs[2 * place.start : 2 * place.stop]

    def add(self, path: str, y: torch.Tensor, x: torch.Tensor) -> None:
        linear = self._linears.get(path)
        if linear is None:
            return
        first, last = self._bounds[linear], self._bounds[linear + 1]
        if first < last:
            torch.ops.adapterd.add_lora(y, x.contiguous(), self._table, first, last)

    def _mix_table(self, products: Products) -> _MixTable:
        parts = [
            (self._linears.setdefault(path, len(self._linears)), part)
            for path, extents in products.items()
            for part in extents
        ]
        scales = torch.tensor([part.scale for _, part in parts], dtype=torch.float64).view(torch.long)
        addresses = [[part.a.data_ptr(), part.b_t.data_ptr(), part.a.shape[0]] for _, part in parts]
        rows = torch.cat([torch.tensor(addresses).view(-1, 3), scales[:, None]], dim=1)
        return _MixTable(products, rows, torch.tensor([linear for linear, _ in parts]))
