"""What stands between a decoder's linears, in C++: RMSNorm, and the gate of an MLP."""

import torch


def native_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * (weight + offset) over the last dimension, in float32, rounded once.

    x: [..., n]; weight: [n]; both float32 or both bfloat16.
    """
    y: torch.Tensor = torch.ops.adapterd.rms_norm(x, weight, eps, offset)
    return y


def native_silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up in float32, rounded once. gate, up: one shape, both float32 or both bfloat16."""
    y: torch.Tensor = torch.ops.adapterd.silu_mul(gate, up)
    return y
