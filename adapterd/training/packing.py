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
        *,
        scale: float,
        sliding_window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Causal attention within each row, differentiable.

        query, key, value: [num_tokens, num_heads, dim]. Scores, window, softcap and sinks as
        `model/attention.py` has them. Returns [num_tokens, num_heads, value_dim].
        """
        attend = _fused if softcap is None and sinks is None else _plain
        # One split and one cat: a slice for each row would fill a gradient of all tokens each time.
        rows = zip(*(_split(tensor, self.lengths) for tensor in (query, key, value)), strict=True)
        return torch.cat([attend(q, k, v, scale, sliding_window, softcap, sinks) for q, k, v in rows])


def _split(tensor: torch.Tensor, lengths: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    parts: tuple[torch.Tensor, ...] = tensor.split(lengths)  # type: ignore[no-untyped-call]
    return parts


def _fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    length = query.shape[0]
    whole = sliding_window is None or sliding_window >= length
    out = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        attn_mask=None if whole else _visible(length, sliding_window, query.device),
        is_causal=whole,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out[0].transpose(0, 1)


def _plain(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    length, num_heads, _ = query.shape
    groups = num_heads // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = torch.einsum("thd,shd->hts", query, key).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~_visible(length, sliding_window, query.device), float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.float()[:, None, None].expand(num_heads, length, 1)], dim=-1)
    weights = scores.softmax(-1)[..., :length].to(value.dtype)
    return torch.einsum("hts,shd->thd", weights, value)


def _visible(length: int, sliding_window: int | None, device: torch.device) -> torch.Tensor:
    """bool [length, length]: which positions each token of a row may look at."""
    position = torch.arange(length, device=device)
    visible = position[None, :] <= position[:, None]
    if sliding_window is not None:
        visible &= position[None, :] > position[:, None] - sliding_window
    return visible


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
