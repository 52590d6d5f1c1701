"""What adapters change beside LoRA on linears: trained embeddings and heads, norms, biases, DoRA, experts.

Each edit rewrites some rows of one module's output (`editor.py` calls it where a step needs it). Its tensors lie in
the bank's pages like all else.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.func import functional_call

from adapterd.deltas import (
    Edit,
    EmbeddingMatrices,
    ExpertMatrices,
    LoraMatrices,
    OutputAffine,
    ReplacedParameters,
    ReplacedRows,
)
from adapterd.model.experts import ExpertFactors, add_to_experts
from adapterd.model.pages import PagedRows, PageWriter


@dataclass
class Call:
    """One call of a module in a step, and the part of it that an edit is for. `output` is changed in place.

    `axis` counts tokens in the first input; `rows` are the segment's places along it.
    """

    module: nn.Module
    inputs: tuple[Any, ...]
    output: Any
    axis: int
    rows: slice

    def input(self, index: int = 0, axis: int | None = None) -> torch.Tensor:
        """The segment's part of an input, a view."""
        axis = self.axis if axis is None else axis
        part: torch.Tensor = self.inputs[index].narrow(
            axis, self.rows.start, self.rows.stop - self.rows.start
        )
        return part

    def flat_input(self) -> torch.Tensor:
        """The segment's part of the first input as rows: [num_rows, d_in]."""
        return self.input().reshape(-1, self.inputs[0].shape[-1])

    def flat_output(self) -> torch.Tensor:
        """The segment's part of the output as rows, a view: [num_rows, d_out]."""
        flat: torch.Tensor = self.output.view(-1, self.output.shape[-1])
        return flat[self.rows]


class DeviceEdit(Protocol):
    """An edit ready to run."""

    def apply(self, call: Call) -> None: ...


Edits = Mapping[str, tuple[DeviceEdit, ...]]
"""Module path -> what to do to its output, in order."""


@dataclass(frozen=True)
class _Linear:
    """LoRA on a linear whose output may be as wide as the vocabulary. a: [rank, d_in]; b: rows of [rank]."""

    a: PagedRows
    b: PagedRows
    scale: float

    def apply(self, call: Call) -> None:
        x = call.flat_input()
        call.flat_output().add_(self.b.multiply(x @ self.a.whole().T), alpha=self.scale)

    def scaled(self, factor: float) -> "_Linear":
        return _Linear(self.a, self.b, self.scale * factor)


@dataclass(frozen=True)
class _Embedding:
    """a: a row of [rank] for each token; b: [rank, d]."""

    a: PagedRows
    b: PagedRows
    scale: float

    def apply(self, call: Call) -> None:
        added = self.a.take(call.input().reshape(-1)) @ self.b.whole() * self.scale
        call.flat_output().add_(_embedded(call.module, added))

    def scaled(self, factor: float) -> "_Embedding":
        return _Embedding(self.a, self.b, self.scale * factor)


@dataclass(frozen=True)
class _Affine:
    factor: PagedRows | None
    offset: PagedRows | None

    def apply(self, call: Call) -> None:
        y = call.flat_output()
        if self.factor is not None:
            y.mul_(self.factor.whole().view(-1))
        if self.offset is not None:
            y.add_(self.offset.whole().view(-1))


@dataclass(frozen=True)
class _Rows:
    """Rows of the embedding, or columns of what the head gives. token_ids: a row of one number for each."""

    token_ids: PagedRows
    rows: PagedRows

    def apply(self, call: Call) -> None:
        y = call.flat_output()
        token_ids = self.token_ids.whole().view(-1)
        if isinstance(call.module, nn.Embedding):
            ids = call.input().reshape(-1)
            hit, place = (ids[:, None] == token_ids).nonzero(as_tuple=True)
            y[hit] = _embedded(call.module, self.rows.whole()[place])
        else:
            x = call.flat_input()
            y[:, token_ids] = x @ self.rows.whole().T


@dataclass(frozen=True)
class _Replaced:
    """The module's own forward over other tensors."""

    tensors: Mapping[str, PagedRows]
    shapes: Mapping[str, torch.Size]

    def apply(self, call: Call) -> None:
        module = call.module
        if isinstance(module, nn.Embedding) and module.max_norm is None:
            call.flat_output().copy_(_embedded(module, self.tensors["weight"].take(call.input().reshape(-1))))
        elif isinstance(module, nn.Linear) and "weight" in self.tensors:
            x = call.flat_input()
            y = self.tensors["weight"].multiply(x)
            bias = self.tensors["bias"].whole().view(-1) if "bias" in self.tensors else module.bias
            call.flat_output().copy_(y if bias is None else y + bias)
        else:
            tensors = {name: rows.whole().view(self.shapes[name]) for name, rows in self.tensors.items()}
            _overwrite(call, functional_call(module, tensors, (call.input(),)))


@dataclass(frozen=True)
class _Experts:
    """Factors of one or both of a mixture's stacked parameters, by the parameter's name."""

    factors: Mapping[str, ExpertFactors]

    def apply(self, call: Call) -> None:
        states, index, weights = (call.input(i, axis=0) for i in range(3))
        call.output[call.rows] = add_to_experts(call.module, states, index, weights, self.factors)

    def scaled(self, factor: float) -> "_Experts":
        return _Experts({name: factors.scaled(factor) for name, factors in self.factors.items()})


def num_edit_pages(edits: Sequence[Edit], page_elements: int, itemsize: int) -> int:
    """Pages that an adapter's edits take, however the free pages happen to lie."""
    return PageWriter.num_pages(
        (tensor.shape for edit in edits for tensor in _stored(edit, itemsize)), page_elements
    )


def upload_edits(edits: Sequence[Edit], writer: PageWriter) -> dict[str, tuple[DeviceEdit, ...]]:
    """Copy edits into pages, in the order in which they are to run: factors before what acts on the sum."""
    itemsize = writer.itemsize
    made: dict[str, list[DeviceEdit]] = {}
    stored = writer.write([tensor for edit in edits for tensor in _stored(edit, itemsize)])
    experts: dict[str, dict[str, ExpertFactors]] = {}
    for edit in edits:
        rows = [next(stored) for _ in _stored(edit, itemsize)]
        if isinstance(edit, ExpertMatrices):
            num_experts, rank, _ = edit.a.shape
            factors = experts.setdefault(edit.module, {})
            factors[edit.parameter] = ExpertFactors(
                rows[0], rows[1], num_experts, rank, edit.b.shape[1], edit.scale
            )
        else:
            made.setdefault(edit.module, []).append(_ready(edit, rows, writer))
    for module, factors in experts.items():
        made.setdefault(module, []).append(_Experts(factors))
    return {module: tuple(found) for module, found in made.items()}


def scaled(edits: Edits, factor: float) -> Iterator[tuple[str, tuple[DeviceEdit, ...]]]:
    """The same at another strength. Composition has refused what has none (`Adapter.field_that_cannot_be_added`)."""
    for module, found in edits.items():
        if factor == 1:
            yield module, found
        else:
            parts = [edit for edit in found if isinstance(edit, _Linear | _Embedding | _Experts)]
            assert len(parts) == len(found)
            yield module, tuple(edit.scaled(factor) for edit in parts)


def _stored(edit: Edit, itemsize: int) -> list[torch.Tensor]:
    """An edit's tensors as matrices whose rows are short: what is as long as the vocabulary goes down the rows."""
    match edit:
        case LoraMatrices():
            return [edit.a, edit.b]
        case EmbeddingMatrices():
            return [edit.a.T, edit.b.T]
        case ExpertMatrices():
            return [edit.a.flatten(0, 1), edit.b.flatten(0, 1)]
        case OutputAffine():
            return [tensor[:, None] for tensor in (edit.factor, edit.offset) if tensor is not None]
        case ReplacedParameters():
            return [_as_rows(tensor) for tensor in edit.tensors.values()]
        case ReplacedRows():
            # Token ids are kept as whole numbers, each in a row of as many elements as its bytes take: pages that do
            # not adjoin cut between rows.
            ids = torch.empty(len(edit.token_ids), 8 // itemsize, device="meta")
            return [ids, edit.rows]


def _ready(edit: Edit, rows: list[PagedRows], writer: PageWriter) -> DeviceEdit:
    match edit:
        case LoraMatrices():
            return _Linear(rows[0], rows[1], edit.scale)
        case EmbeddingMatrices():
            return _Embedding(rows[0], rows[1], edit.scale)
        case OutputAffine():
            offset = None if edit.offset is None else rows[-1]
            return _Affine(None if edit.factor is None else rows[0], offset)
        case ReplacedParameters():
            shapes = {name: tensor.shape for name, tensor in edit.tensors.items()}
            return _Replaced(dict(zip(edit.tensors, rows, strict=True)), shapes)
        case ReplacedRows():
            return _Rows(writer.as_integers(rows[0], edit.token_ids), rows[1])
        case ExpertMatrices():
            raise AssertionError("experts are put together by module")


def _as_rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1, 1) if tensor.dim() <= 1 else tensor.flatten(0, -2)


def _embedded(embedding: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """Rows as an embedding gives them: Gemma's multiply by a factor of their own, and PEFT follows them."""
    factor = getattr(embedding, "embed_scale", None)
    if factor is None:
        return rows
    return rows * (factor.to(rows.dtype) if isinstance(factor, torch.Tensor) else factor)


def _overwrite(call: Call, new: Any) -> None:
    """Put the segment's new output, one tensor or several, where the old one is."""
    old = call.output
    pairs = zip(old, new, strict=True) if isinstance(old, tuple) else [(old, new)]
    for whole, part in pairs:
        # Tokens lie along the one axis in which the part is smaller; it is the whole where none is.
        axis = next((i for i, (n, m) in enumerate(zip(whole.shape, part.shape, strict=True)) if n != m), None)
        place = whole if axis is None else whole.narrow(axis, call.rows.start, part.shape[axis])
        place.copy_(part)
