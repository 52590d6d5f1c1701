"""RMSNorm in one call, in place of the eight operators that most families write it with.

Families write it differently (weight or 1 + weight, rounding before or after), and a name says nothing: so each
module is asked, in float32 on random numbers, and only one that answers as the operator does is replaced.
"""

import copy
import logging
from collections.abc import Callable

import torch
from torch import nn

logger = logging.getLogger(__name__)

_TOLERANCE = 1e-5

RMSNormFunction = Callable[[torch.Tensor, torch.Tensor, float, float], torch.Tensor]
"""(x [..., n], weight [n], eps, offset) -> x / sqrt(mean(x^2) + eps) * (weight + offset), in float32, rounded once."""


class FusedRMSNorm(nn.Module):
    """A family's RMSNorm with the same parameter. offset: 1 where the weight is kept as its distance from one."""

    def __init__(self, weight: nn.Parameter, eps: float, offset: float, compute: RMSNormFunction) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps
        self.offset = offset
        self._compute = compute

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self._compute(hidden_states, self.weight, self.eps, self.offset)


def use_fused_norms(model: nn.Module, compute: RMSNormFunction) -> int:
    """Replace in place every RMSNorm that is one; returns how many."""
    found = [(path, fused_norm(module, compute)) for path, module in model.named_modules()]
    replaced = 0
    for path, norm in found:
        if norm is not None:
            model.set_submodule(path, norm)
            replaced += 1
    logger.debug("%d norms run in one call", replaced)
    return replaced


@torch.inference_mode()
def fused_norm(module: nn.Module, compute: RMSNormFunction) -> FusedRMSNorm | None:
    """The module's stand-in if it computes an RMSNorm of its last dimension, else None."""
    if not type(module).__name__.endswith("RMSNorm"):
        return None
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1 or not isinstance(eps, float):
        return None
    if not weight.is_floating_point() or len(list(module.parameters())) != 1:
        return None
    own = copy.deepcopy(module).float()
    # Small numbers beside ordinary ones, so that eps and its place are seen too.
    x = torch.randn(4, weight.shape[0], generator=torch.Generator().manual_seed(0))
    x = (x * torch.tensor([[1.0], [0.01], [1e-3], [30.0]])).to(weight.device)
    expected = own(x)
    try:
        compute(x.to(weight.dtype), weight, eps, 0.0)
    except RuntimeError:
        return None  # the operator has no such type
    for offset in (0.0, 1.0):
        found = compute(x, weight.float(), eps, offset)
        if torch.allclose(found, expected, rtol=_TOLERANCE, atol=_TOLERANCE):
            return FusedRMSNorm(weight, eps, offset, compute)
    return None
