"""Adapters on the device: the memory they live in, the linears they change, and the reference product.

The bank is a budget in bytes, not a number of padded slots: a rank-8 adapter on q and v costs rank 8 on q and v.
One buffer is cut into pages of one size. A matrix pair of rank r is r rank rows, row i being A[i] with B[:, i];
since x A'B' is a sum over rank rows, a pair may lie in several extents of consecutive pages, so any free page
is usable by any adapter and the buffer never fragments. Which adapter is resident is booked by engine/slots.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from adapterd.adapter import Adapter
from adapterd.core import AdapterDigest, AdapterId, AdapterMix
from adapterd.model.edits import DeviceEdit, Edits, num_edit_pages, scaled, upload_edits
from adapterd.model.pages import PageGeometry, PageWriter, consecutive_runs

_MAX_MIXES = 1024
"""Factors are the clients' to choose, so what is kept of mixes needs a bound."""


def add_lora(y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b_t: torch.Tensor, scale: float) -> None:
    """y += scale * (x @ a.T) @ b_t, in place.

    x: [num_tokens, d_in]; a: [rank, d_in]; b_t: [rank, d_out]; y: [num_tokens, d_out].
    """
    y.addmm_(x @ a.T, b_t, alpha=scale)


@dataclass(frozen=True)
class LoraProduct:
    """One extent ready to multiply: a [rows, d_in], b_t [rows, d_out], views of the bank's buffer."""

    a: torch.Tensor
    b_t: torch.Tensor
    scale: float


Products = Mapping[str, tuple[LoraProduct, ...]]
"""Module path -> what to add there."""


Copy = Callable[[torch.Tensor, torch.Tensor], object]
"""(target, source): fill a view of the bank from host memory."""


class LoraBank:
    """Device memory of adapters. `take`, `fill` and `evict` follow the decisions of engine/slots.py.

    `fill` may run in a thread of its own, beside steps that use other adapters; the rest belongs to the runner's.
    """

    def __init__(
        self,
        targets: Mapping[str, tuple[int, int]],
        budget_bytes: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        longest_row: int = 0,
    ) -> None:
        self.geometry = PageGeometry.choose(targets, longest_row)
        self.page_bytes = self.geometry.page_elements * dtype.itemsize
        self.num_pages = max(budget_bytes // self.page_bytes, 0)
        self._buffer = torch.empty(self.num_pages * self.geometry.page_elements, dtype=dtype, device=device)
        self._free = list(range(self.num_pages))
        self._pages: dict[AdapterDigest, list[int]] = {}
        self._products: dict[AdapterDigest, Products] = {}
        self._edits: dict[AdapterDigest, Edits] = {}
        self._mixes: dict[AdapterMix, Products] = {}
        self._mixed_edits: dict[AdapterMix, Edits] = {}

    def pages_of(self, adapter: Adapter) -> int:
        matrices = self.geometry.num_pages((m.module, m.a.shape[0]) for m in adapter.modules)
        return matrices + num_edit_pages(
            adapter.edits, self.geometry.page_elements, self._buffer.dtype.itemsize
        )

    def take(self, adapter: Adapter) -> None:
        """Set pages aside for an adapter. engine/slots.py has made sure that they suffice."""
        num_pages = self.pages_of(adapter)
        assert adapter.id.digest not in self._pages
        assert num_pages <= len(self._free)
        self._pages[adapter.id.digest], self._free = self._free[:num_pages], self._free[num_pages:]

    def fill(self, adapter: Adapter, copy: Copy = torch.Tensor.copy_) -> None:
        """Copy an adapter's matrices into the pages taken for it; from then on it has products."""
        pages = self._pages[adapter.id.digest]
        products: dict[str, tuple[LoraProduct, ...]] = {}
        taken = 0
        for matrices in adapter.modules:
            count = self.geometry.num_pages([(matrices.module, matrices.a.shape[0])])
            runs = consecutive_runs(pages[taken : taken + count])
            taken += count
            products[matrices.module] = self._fill(matrices.a, matrices.b, matrices.scale, runs, copy)
        if adapter.edits:
            writer = PageWriter(self._buffer, self.geometry.page_elements, pages[taken:], copy)
            self._edits[adapter.id.digest] = upload_edits(adapter.edits, writer)
        self._products[adapter.id.digest] = products

    def evict(self, adapter_id: AdapterId) -> None:
        """Give an adapter's pages back, filled or not. Its views must not be used after."""
        self._products.pop(adapter_id.digest, None)
        self._free = sorted(self._free + self._pages.pop(adapter_id.digest))
        self._edits.pop(adapter_id.digest, None)
        # Only its own mixes: to put those of everyone else together again would cost the next step.
        for known in (self._mixes, self._mixed_edits):
            for mix in [mix for mix in known if any(other == adapter_id for other, _ in mix)]:
                del known[mix]

    def edits(self, mix: AdapterMix) -> Edits:
        """What a mix changes beside linears' LoRA; nearly always nothing."""
        if not self._edits or not any(adapter_id.digest in self._edits for adapter_id, _ in mix):
            return {}
        found = self._mixed_edits.get(mix)
        if found is None:
            merged: dict[str, tuple[DeviceEdit, ...]] = {}
            for adapter_id, factor in mix:
                for module, edits in scaled(self._edits.get(adapter_id.digest, {}), factor):
                    merged[module] = (*merged.get(module, ()), *edits)
            if len(self._mixed_edits) >= _MAX_MIXES:
                self._mixed_edits.clear()
            found = self._mixed_edits[mix] = merged
        return found

    def products(self, mix: AdapterMix) -> Products:
        """What a mix adds, module by module; each factor multiplies its adapter's own scale."""
        if len(mix) == 1 and mix[0][1] == 1.0:
            return self._products[mix[0][0].digest]
        found = self._mixes.get(mix)
        if found is None:
            merged: dict[str, list[LoraProduct]] = {}
            for adapter_id, factor in mix:
                for module, parts in self._products[adapter_id.digest].items():
                    scaled = [LoraProduct(part.a, part.b_t, part.scale * factor) for part in parts]
                    merged.setdefault(module, []).extend(scaled)
            if len(self._mixes) >= _MAX_MIXES:
                self._mixes.clear()
            found = self._mixes[mix] = {module: tuple(parts) for module, parts in merged.items()}
        return found

    def _fill(
        self, a: torch.Tensor, b: torch.Tensor, scale: float, runs: list[tuple[int, int]], copy: Copy
    ) -> tuple[LoraProduct, ...]:
        rank, d_in = a.shape
        d_out = b.shape[0]
        page = self.geometry.page_elements
        parts: list[LoraProduct] = []
        row = 0
        for first, count in runs:
            rows = min(count * page // (d_in + d_out), rank - row)
            if rows == 0:
                break
            start = first * page
            a_part = self._buffer[start : start + rows * d_in].view(rows, d_in)
            start += rows * d_in
            b_part = self._buffer[start : start + rows * d_out].view(rows, d_out)
            copy(a_part, a[row : row + rows])
            copy(b_part, b[:, row : row + rows].T)
            parts.append(LoraProduct(a_part, b_part, scale))
            row += rows
        assert row == rank
        return tuple(parts)

    def check_integrity(self) -> None:
        """Books balance: every page is free or belongs to exactly one adapter."""
        held = [page for pages in self._pages.values() for page in pages]
        assert sorted(held + self._free) == list(range(self.num_pages))


@dataclass(frozen=True)
class Segment:
    """Tokens [start, end) of a batch run one mix. Tokens of the base belong to no segment."""

    start: int
    end: int
    products: Products
    edits: Edits = field(default_factory=dict)


class LoraStep:
    """What the wrapped linears of one model share: the segments of the step that is running, and their products.

    This is the reference, one call for each adapter and linear; lora_cpu.py does the same in one for each linear.
    `edited` are the modules that hooks rewrite in this step (`editor.py`): none of them may be computed unasked.
    """

    def __init__(self) -> None:
        self.segments: tuple[Segment, ...] = ()
        self.num_tokens = 0
        self.num_begun = 0
        self.edited: frozenset[str] = frozenset()

    def reserve(self, bank: LoraBank, max_num_seqs: int, max_rank: int) -> None:
        """Said once at start: whose adapters will run, in how many sequences a step, of what rank at most.

        The reference needs no room for them.
        """

    def begin(self, segments: tuple[Segment, ...], num_tokens: int) -> None:
        """The step about to run: all its tokens, and those of them that run a mix, in order."""
        self.segments, self.num_tokens = segments, num_tokens
        self.num_begun += 1

    def add(self, path: str, y: torch.Tensor, x: torch.Tensor) -> None:
        """Add to y [num_tokens, d_out], in place, what the segments' mixes make of x [num_tokens, d_in] there."""
        for segment in self.segments:
            span = slice(segment.start, segment.end)
            for product in segment.products.get(path, ()):
                add_lora(y[span], x[span], product.a, product.b_t, product.scale)


class LoraLinear(nn.Module):
    """A linear-like module with the running step's adapters added to its output. The module itself is untouched."""

    def __init__(self, inner: nn.Module, path: str, step: LoraStep) -> None:
        super().__init__()
        self.inner = inner
        self.path = path
        self.step = step

    @property
    def weight(self) -> torch.Tensor:
        """The inner weight: some families ask a linear for its dtype or device."""
        weight = self.inner.weight
        assert isinstance(weight, torch.Tensor)
        return weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.inner(x)
        if self.step.segments:
            rows, flat = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
            if rows.shape[0] != self.step.num_tokens:
                raise RuntimeError(f"{self.path} saw {rows.shape[0]} of {self.step.num_tokens} tokens")
            self.step.add(self.path, flat, rows)
        return y


def wrap_linears(
    model: nn.Module, step: LoraStep, is_target: Callable[[str], bool]
) -> dict[str, tuple[int, int]]:
    """Wrap in place every nn.Linear, and GPT-2's Conv1D, whose path is a target; returns path -> (d_out, d_in)."""
    targets: dict[str, tuple[int, int]] = {}
    found = [(path, m) for path, m in model.named_modules() if is_target(path)]
    for path, linear in found:
        if isinstance(linear, nn.Linear):
            targets[path] = (linear.out_features, linear.in_features)
        elif isinstance(linear, Conv1D):
            targets[path] = (linear.nf, linear.nx)
        else:
            continue
        model.set_submodule(path, LoraLinear(linear, path, step))
    return targets
