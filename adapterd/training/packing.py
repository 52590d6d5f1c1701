"""Rows of one batch end to end in one line of tokens, each attending to itself alone; and the proof that it is so.

No padding is computed and no mask over all pairs is made: the rows meet in the linears, never in attention. The
seam is the one that serving uses, so what runs here is what runs there, with a gradient.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from adapterd.errors import BaseRefused
from adapterd.model.attention import ATTENTION_NAME, register_attention
from adapterd.model.attention_one import Scoring, attend_fused, attend_plainly
from adapterd.model.probe import build_model, shrink_config, spread_weights

logger = logging.getLogger(__name__)

_TOLERANCE = 1e-3
"""Of a gradient's own largest value: float32 sums in another order differ by some 1e-6, a wrong mask by some 1e-1."""
_PROBE_LENGTHS = (7, 11, 3)


@dataclass(frozen=True)
class PackedRows:
    """Attention of rows that lie end to end; travels to every layer as the forward keyword `paged`."""

    lengths: tuple[int, ...]

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scoring: Scoring,
    ) -> torch.Tensor:
        """Causal attention within each row, differentiable.

        query, key, value: [num_tokens, num_heads, dim]. Returns [num_tokens, num_heads, value_dim].
        """
        attend = attend_fused if scoring.is_fusable else attend_plainly
        # One split and one cat: a slice for each row would fill a gradient of all tokens each time.
        rows = zip(*(_split(tensor, self.lengths) for tensor in (query, key, value)), strict=True)
        return torch.cat([attend(q, k, v, scoring) for q, k, v in rows])


def _split(tensor: torch.Tensor, lengths: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    parts: tuple[torch.Tensor, ...] = tensor.split(lengths)  # type: ignore[no-untyped-call]
    return parts


def packing_problem(config: Any) -> str | None:
    """Why this family's rows cannot be packed, or None if they can.

    A few float32 layers of its own config compute rows packed and, by transformers' eager attention, each alone:
    loss and every gradient must agree. What differs where a family reads its neighbours (recurrent and
    convolutional layers), or does not pass forward keywords on to its attention.
    """
    family = config.model_type
    register_attention()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            difference = _largest_difference(config)
        except (
            Exception
        ) as error:  # whatever a family's own code raises, it is that family that is not packed
            reason = str(error).splitlines()[0] if isinstance(error, BaseRefused) else type(error).__name__
            return f"the {family} family cannot run packed rows ({reason})"
    logger.debug(
        "%s: loss and gradients of packed rows equal those of rows alone by %.1e", family, difference
    )
    if difference <= _TOLERANCE:
        return None
    return f"the {family} family gives other gradients for packed rows than for rows alone ({difference:.1e})"


def _largest_difference(config: Any) -> float:
    small = shrink_config(config)
    alone, packed = build_model(small, "eager"), build_model(small, ATTENTION_NAME)
    with torch.no_grad():
        spread_weights(alone)
    packed.load_state_dict(alone.state_dict())
    rows = [torch.randint(0, small.vocab_size, (length,)) for length in _PROBE_LENGTHS]
    loss_alone = torch.stack([_loss(alone, row[None, :-1], row[1:]) for row in rows]).sum()
    lengths = tuple(len(row) - 1 for row in rows)
    loss_packed = _loss(
        packed,
        torch.cat([row[:-1] for row in rows])[None],
        torch.cat([row[1:] for row in rows]),
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        paged=PackedRows(lengths),
    )
    for loss in (loss_alone, loss_packed):
        loss.backward()  # type: ignore[no-untyped-call]
    differences = [float((loss_alone - loss_packed).detach().abs() / loss_alone.detach().abs())]
    for (_, p), (_, q) in zip(alone.named_parameters(), packed.named_parameters(), strict=True):
        if (p.grad is None) != (q.grad is None):
            return float("inf")
        if p.grad is not None and q.grad is not None:
            peak = p.grad.abs().max().clamp(min=1e-6)
            differences.append(float((p.grad - q.grad).abs().max() / peak))
    worst = max(differences)
    return worst if worst == worst else float("inf")


def _loss(model: Any, ids: torch.Tensor, labels: torch.Tensor, **arguments: Any) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False, **arguments).logits[0].float()
    return F.cross_entropy(logits, labels, reduction="sum")


def row_positions(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """int64 [1, sum(lengths)]: each row counts from 0."""
    return torch.cat([torch.arange(length, device=device) for length in lengths])[None]
