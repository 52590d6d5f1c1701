"""Attention of one sequence over its own context, and what a layer asks of it beside queries, keys and values.

In torch's own operators, differentiable: serving computes chunks of prompts with it, training its packed rows.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class Scoring:
    """How a layer makes scores of products, and weights of scores; passed whole to whatever computes attention.

    scale: of the product. sliding_window: only so many positions count, a token's own the last of them. softcap c:
    c * tanh(score / c). sinks [num_heads]: a learned score that joins the softmax and whose weight is dropped
    (gpt-oss).
    """

    scale: float
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    def scores(self, products: torch.Tensor) -> torch.Tensor:
        """float32, from what queries and keys gave, of any shape."""
        scores = products.float() * self.scale
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)

    @property
    def is_fusable(self) -> bool:
        """Whether torch's fused kernel can compute it: neither softcap nor sinks."""
        return self.softcap is None and self.sinks is None


def attend_plainly(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring
) -> torch.Tensor:
    """out[t] = softmax(scores(q[t] . K[:p+1])) V[:p+1], p being the position of query t; softmax in float32.

    query: [num_rows, num_heads, key_dim], the last tokens of the context; key, value: [context, num_kv_heads, dim].
    Returns [num_rows, num_heads, value_dim] in value's dtype.
    """
    num_rows, num_heads, _ = query.shape
    context = len(key)
    groups = num_heads // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = scoring.scores(torch.einsum("thd,shd->hts", query, key))
    visible = _visible(num_rows, context, scoring.sliding_window, query.device)
    scores = scores.masked_fill(~visible, float("-inf"))
    if scoring.sinks is not None:
        sink = scoring.sinks.float()[:, None, None].expand(num_heads, num_rows, 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = scores.softmax(-1)[..., :context].to(value.dtype)
    return torch.einsum("hts,shd->thd", weights, value)


def attend_fused(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring
) -> torch.Tensor:
    """The same through torch's fused kernel, where it can compute it (`Scoring.is_fusable`)."""
    assert scoring.is_fusable
    num_rows, context, window = len(query), len(key), scoring.sliding_window
    whole = num_rows == context and (window is None or window >= context)
    out = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        attn_mask=None if whole else _visible(num_rows, context, window, query.device),
        is_causal=whole,
        scale=scoring.scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out[0].transpose(0, 1)


def _visible(num_rows: int, context: int, sliding_window: int | None, device: torch.device) -> torch.Tensor:
    """bool [num_rows, context]: which positions each of the last `num_rows` tokens may look at."""
    row_position = torch.arange(context - num_rows, context, device=device)[:, None]
    position = torch.arange(context, device=device)[None, :]
    visible = position <= row_position
    if sliding_window is not None:
        visible &= position > row_position - sliding_window
    return visible
