"""Muon for stacks of equal matrices, in float32.

Source: Jordan et al., Muon, 2024 (momentum, then five Newton-Schulz steps towards the nearest orthogonal matrix), with
the update scaled to AdamW's size as in Liu et al., arXiv 2502.16982. `torch.optim.Muon` does the same, one matrix at a
time and in bfloat16: on a CPU without bfloat16 units that took more time than forward and backward together.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5


def orthogonalise(stack: Tensor) -> Tensor:
    """The matrices of `stack` [n, rows, cols], rows <= cols, with all singular values moved near 1."""
    a, b, c = COEFFICIENTS
    x: Tensor = stack / (stack.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon(torch.optim.Optimizer):
    """Muon over 2-D parameters; those of one shape (up to transposition) are orthogonalised together."""

    def __init__(
        self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.02
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update from the gradients, in place."""
        for group in self.param_groups:
            stacks: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
            for param in group["params"]:
                if param.grad is not None:
                    rows, cols = sorted(param.shape)
                    stacks[rows, cols].append(param)
            for (rows, cols), params in stacks.items():
                directions = []
                for param in params:
                    gradient = param.grad
                    assert gradient is not None  # only such were collected above
                    state = self.state[param]
                    if not state:
                        state["momentum_buffer"] = torch.zeros_like(param)
                    buffer = state["momentum_buffer"]
                    buffer.lerp_(gradient, 1 - group["momentum"])
                    direction = gradient.lerp(buffer, group["momentum"])
                    directions.append(direction if param.shape[0] <= param.shape[1] else direction.mT)
                updates = orthogonalise(torch.stack(directions))
                size = group["lr"] * 0.2 * max(rows, cols) ** 0.5
                for param, update in zip(params, updates, strict=True):
                    param.mul_(1 - group["lr"] * group["weight_decay"])
                    param.add_(update if param.shape[0] <= param.shape[1] else update.mT, alpha=-size)
