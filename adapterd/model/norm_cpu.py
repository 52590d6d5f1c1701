"""RMSNorm on a CPU in C++, in place of the eight operators that most families write it with.

Families write it differently (weight or 1 + weight, rounding before or after), and a name says nothing: so each
module is asked, in float32 on random numbers, and only one that answers as the operator does is replaced.
"""

import copy
import logging

import torch
from torch import nn

logger = logging.getLogger(__name__)

_TOLERANCE = 1e-5


def native_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * (weight + offset) over the last dimension, in float32, rounded once.

    x: [..., n]; weight: [n]; both float32 or both bfloat16.
    """
    y: torch.Tensor = torch.ops.adapterd.rms_norm(x, weight, eps, offset)
    return y


class NativeRMSNorm(nn.Module):
    """A family's RMSNorm with the same parameter. offset: 1 where the weight is kept as its distance from one."""

    def __init__(self, weight: nn.Parameter, eps: float, offset: float) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps
        self.offset = offset

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return native_rms_norm(hidden_states, self.weight, self.eps, self.offset)


def use_native_norms(model: nn.Module) -> int:
    """Replace in place every RMSNorm that is one; returns how many."""
    found = [(path, replacement(module)) for path, module in model.named_modules()]
    replaced = 0
    for path, norm in found:
        if norm is not None:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, norm)
            replaced += 1
    logger.debug("%d norms run in C++", replaced)
    return replaced


@torch.inference_mode()
def replacement(module: nn.Module) -> NativeRMSNorm | None:
    """The module's stand-in if it computes an RMSNorm of its last dimension, else None."""
    if not type(module).__name__.endswith("RMSNorm"):
        return None
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1 or not isinstance(eps, float):
        return None
    if weight.dtype not in (torch.float32, torch.bfloat16) or len(list(module.parameters())) != 1:
        return None
    own = copy.deepcopy(module).float()
    # Small numbers beside ordinary ones, so that eps and its place are seen too.
    x = torch.randn(4, weight.shape[0], generator=torch.Generator().manual_seed(0))
    x = x * torch.tensor([[1.0], [0.01], [1e-3], [30.0]])
    expected = own(x)
    for offset in (0.0, 1.0):
        found = native_rms_norm(x, weight.float(), eps, offset)
        if torch.allclose(found, expected, rtol=_TOLERANCE, atol=_TOLERANCE):
            return NativeRMSNorm(weight, eps, offset)
    return None
