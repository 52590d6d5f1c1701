"""What an adapter changes, module by module: a small closed set of kinds. Host tensors and numbers, no behaviour.

`model/lora.py` runs LoraMatrices on linears, which is nearly every adapter; `model/edits.py` runs the other kinds.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LoraMatrices:
    """What one linear gains: y += scale * (x @ a.T) @ b.T. a: [rank, d_in]; b: [d_out, rank].

    `module` is the linear's path in the base. The scale stays a number: folded into 16-bit b it would be
    rounded twice.
    """

    module: str
    a: torch.Tensor
    b: torch.Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class EmbeddingMatrices:
    """What an embedding gains: y += scale * a.T[ids] @ b.T, times the embedding's own factor if it has one.

    a: [rank, vocab_size]; b: [d, rank].
    """

    module: str
    a: torch.Tensor
    b: torch.Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class ExpertMatrices:
    """LoraMatrices of every expert of a mixture. a: [num_experts, rank, d_in]; b: [num_experts, d_out, rank].

    `parameter` is the stacked parameter's name in the module.
    """

    module: str
    parameter: str
    a: torch.Tensor
    b: torch.Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[1]


@dataclass(frozen=True)
class OutputAffine:
    """A linear's or embedding's output y, its LoRA product included, becomes y * factor + offset, by column.

    DoRA's magnitude is a factor, a trained bias an offset; both at once are one of these. [d_out] or None.
    `field` is the key of adapter_config.json that asks for it.
    """

    module: str
    field: str
    factor: torch.Tensor | None
    offset: torch.Tensor | None


@dataclass(frozen=True)
class ReplacedParameters:
    """The module computes with these tensors in place of its own. `tensors`: parameter name -> values.

    `scale` is that of the factors that were merged into them beside the base's weights; None where the file has them.
    """

    module: str
    field: str
    tensors: Mapping[str, torch.Tensor]
    scale: float | None = None


@dataclass(frozen=True)
class ReplacedRows:
    """Rows of an embedding, or of the head, in place of the base's. rows: [len(token_ids), d]."""

    module: str
    field: str
    token_ids: tuple[int, ...]
    rows: torch.Tensor


Edit = LoraMatrices | EmbeddingMatrices | ExpertMatrices | OutputAffine | ReplacedParameters | ReplacedRows
"""LoraMatrices among the edits are of modules outside `lora_targets`, which is the head."""


def tensors_of(edit: Edit) -> tuple[torch.Tensor, ...]:
    """All that an edit holds."""
    match edit:
        case LoraMatrices() | EmbeddingMatrices() | ExpertMatrices():
            return edit.a, edit.b
        case OutputAffine():
            return tuple(tensor for tensor in (edit.factor, edit.offset) if tensor is not None)
        case ReplacedParameters():
            return tuple(edit.tensors.values())
        case ReplacedRows():
            return (edit.rows,)


def field_that_cannot_be_added(edit: Edit) -> str | None:
    """The configuration key of an edit that has no meaning at half strength or beside another of its kind."""
    match edit:
        case OutputAffine() | ReplacedParameters() | ReplacedRows():
            return edit.field
        case _:
            return None
