"""The gated MLP: silu(gate) * up in one call between the linears.

As with norms, a module's name says little: each is asked on random numbers, and only one that answers as
down(silu(gate(x)) * up(x)) does is replaced.
"""

import logging
from collections.abc import Callable

import torch
from torch import nn

logger = logging.getLogger(__name__)

_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}
"""Of the largest output; 16 bits are rounded once less here than in the module."""

_SIZES = {
    torch.float32: (1.0, 0.01, 10.0, 1000.0),
    torch.bfloat16: (1.0, 0.01, 10.0, 1000.0),
    torch.float16: (1.0, 0.1, 10.0, 30.0),
}
"""Of the numbers that a module is asked with, small and large, so that a clamp or a limit is seen. float16 ends at
65504 and has few places below 1e-4, where a gate's product soon is.
"""


SiluMulFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(gate, up), of one shape -> silu(gate) * up in float32, rounded once."""


class FusedMLP(nn.Module):
    """A family's gated MLP with the same linears under the same names."""

    def __init__(
        self, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module, silu_mul: SiluMulFunction
    ) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj
        self._silu_mul = silu_mul

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down_proj(self._silu_mul(self.gate_proj(x), self.up_proj(x)))
        return y


def use_fused_mlps(model: nn.Module, silu_mul: SiluMulFunction) -> int:
    """Replace in place every MLP that is one; returns how many. Before the linears are wrapped."""
    found = {path: fused_mlp(module, silu_mul) for path, module in model.named_modules()}
    replaced = 0
    for path, mlp in found.items():
        if mlp is not None:
            model.set_submodule(path, mlp)
            replaced += 1
    logger.debug("%d MLPs have their gate in one call", replaced)
    return replaced


@torch.inference_mode()
def fused_mlp(module: nn.Module, silu_mul: SiluMulFunction) -> FusedMLP | None:
    """The module's stand-in if it computes down(silu(gate(x)) * up(x)), else None."""
    names = ("gate_proj", "up_proj", "down_proj")
    linears = [getattr(module, name, None) for name in names]
    own = {name for name, _ in module.named_parameters()}
    if not own <= {f"{name}.{part}" for name in names for part in ("weight", "bias")}:
        return None
    gate, up, down = linears
    if not (isinstance(gate, nn.Linear) and isinstance(up, nn.Linear) and isinstance(down, nn.Linear)):
        return None
    dtype = gate.weight.dtype
    if dtype not in _TOLERANCE or gate.weight.shape != up.weight.shape:
        return None
    x = torch.randn(4, gate.in_features, generator=torch.Generator().manual_seed(0))
    x = (x * torch.tensor(_SIZES[dtype])[:, None]).to(gate.weight.device, dtype)
    fused = FusedMLP(gate, up, down, silu_mul)
    try:
        expected = module(x)
    except (TypeError, ValueError, RuntimeError):
        return None  # it wants more than its input
    if not isinstance(expected, torch.Tensor):
        return None
    found = fused(x)
    error = (found.float() - expected.float()).abs().amax(-1)
    bound = _TOLERANCE[dtype] * expected.float().abs().amax(-1)
    return fused if bool((error <= bound).all()) else None
