"""LoRA on the experts of a mixture that transformers holds as stacked parameters, without merging anything.

The reference for semantics is PEFT's `ParamWrapper`: expert e runs with W_e + scale * B_e A_e. Here a token's product
with B_e A_e is added to its product with W_e, expert by expert, through the attributes that transformers' experts
interface gives every such module (has_gate, has_bias, is_transposed, _apply_gate).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from adapterd.model.pages import PagedRows

INTERFACE = ("has_gate", "has_bias", "is_transposed", "_apply_gate", "act_fn", "down_proj", "num_experts")


@dataclass(frozen=True)
class ExpertFactors:
    """a: num_experts * rank rows of [d_in]; b: num_experts * d_out rows of [rank]."""

    a: PagedRows
    b: PagedRows
    num_experts: int
    rank: int
    d_out: int
    scale: float

    def product(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        """scale * x @ A_e.T @ B_e.T. x: [n, d_in]."""
        device = x.device
        a = self.a.take(torch.arange(expert * self.rank, (expert + 1) * self.rank, device=device))
        b = self.b.take(torch.arange(expert * self.d_out, (expert + 1) * self.d_out, device=device))
        return (x @ a.T) @ b.T * self.scale

    def scaled(self, factor: float) -> "ExpertFactors":
        return ExpertFactors(self.a, self.b, self.num_experts, self.rank, self.d_out, self.scale * factor)


def is_adaptable(module: nn.Module) -> bool:
    """Whether the module is a mixture of this interface, held on one device, without a norm after each expert."""
    stacked = [name for name, parameter in module.named_parameters(recurse=False) if parameter.dim() == 3]
    known = {"gate_up_proj", "up_proj", "down_proj"}
    return (
        bool(stacked)
        and set(stacked) <= known
        and all(hasattr(module, name) for name in INTERFACE if name != "act_fn")
        and not getattr(module, "has_post_expert_norm", False)
    )


def add_to_experts(
    experts: Any,
    states: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    factors: Mapping[str, ExpertFactors],
) -> torch.Tensor:
    """The mixture's output for some tokens, with `factors` added to its parameters.

    states: [n, d]; index: [n, top_k], the experts of each token; weights: [n, top_k], theirs in the sum.
    """
    result = torch.zeros_like(states)
    up_name = "gate_up_proj" if experts.has_gate else "up_proj"
    for expert in sorted(set(index.flatten().tolist())):
        if expert >= experts.num_experts:
            continue  # transformers' mark for "no expert here"
        token, place = (index == expert).nonzero(as_tuple=True)
        x = states[token]
        hidden = _product(experts, up_name, x, expert, factors)
        hidden = experts._apply_gate(hidden) if experts.has_gate else experts.act_fn(hidden)
        out = _product(experts, "down_proj", hidden, expert, factors)
        result.index_add_(0, token, (out * weights[token, place, None]).to(result.dtype))
    return result


def _product(
    experts: Any, name: str, x: torch.Tensor, expert: int, factors: Mapping[str, ExpertFactors]
) -> torch.Tensor:
    weight = getattr(experts, name)[expert]
    y = x @ weight if experts.is_transposed else F.linear(x, weight)
    if experts.has_bias:
        y = y + getattr(experts, f"{name}_bias")[expert]
    if name in factors:
        y = y + factors[name].product(x, expert)
    return y
