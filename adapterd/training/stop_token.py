"""Whether an adapter can learn to end its answers on this base, and whether it has.

A base that has never seen its template's end token may hold a row for it that is no other than those of unused
tokens (Qwen3#1064). The head is frozen, so no hidden state could then prefer the one to the others.
"""

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch

from adapterd.errors import BaseRefused
from adapterd.render import Renderer

_logger = logging.getLogger(__name__)

_SAME = 2**-9
"""Of a row's norm: bfloat16 rounds away what differs by less."""
_ROWS_AT_ONCE = 8192


@torch.no_grad()
def check_stop_token(head: Any, renderer: Renderer) -> None:
    """Raise BaseRefused if another token's row of the output head equals the stop token's. head: [vocab, hidden]."""
    weight = getattr(head, "weight", None)
    if weight is None or not weight.is_floating_point():
        return
    stop = renderer.stop_token_id
    row = weight[stop].float()
    alike = 0
    for rows in weight.split(_ROWS_AT_ONCE):
        alike += int(((rows.float() - row).norm(dim=1) <= _SAME * row.norm()).sum())
    if alike > 1:
        raise BaseRefused(
            f"the base has not learnt {_shown(renderer)}, the token that ends an answer: its output head has the"
            f" same row for {alike - 1} other tokens, so no adapter could learn to end. Use a base that was trained"
            " with its chat template (an instruct model)"
        )


def warn_if_endless(logprobs: Sequence[torch.Tensor], renderer: Renderer) -> None:
    """Log if most held-back answers would go on after their last word. logprobs: [labels] of each, the stop last."""
    ended = sum(float(own[-1]) > math.log(0.5) for own in logprobs)
    if ended < len(logprobs) / 2:
        _logger.warning(
            "only %d of %d held-back answers would end with %s after their last word; the others may go on: train"
            " longer, or on more rows",
            *(ended, len(logprobs), _shown(renderer)),
        )


def _shown(renderer: Renderer) -> str:
    return repr(renderer.decode([renderer.stop_token_id], skip_special_tokens=False))
