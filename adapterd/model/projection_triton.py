"""Linears of one input as one product on a CUDA device, with the adapters of the step; in Triton for few tokens."""

from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from adapterd.model.int8 import Int8Linear
from adapterd.model.linear_triton import few_tokens_linear, tiling_of
from adapterd.model.lora_triton import GroupStep, TritonLoraStep


class Projection:
    """Linears of one input as one product, their outputs side by side, with the step's adapters.

    The members keep their parameters, which become views of the common ones: nothing is held twice.
    """

    def __init__(self, members: Mapping[str, nn.Linear], step: TritonLoraStep) -> None:
        self.paths = tuple(members)
        linears = tuple(members.values())
        self.d_outs = tuple(linear.out_features for linear in linears)
        self._step = step
        self._int8 = [linear for linear in linears if isinstance(linear, Int8Linear)]
        self.bias = _joined(linears, "bias")
        self.weight = _joined(linears, "values" if self._int8 else "weight")
        self.scales = _joined(linears, "scales") if self._int8 else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [num_tokens, d_in] -> [num_tokens, sum of d_outs]."""
        y = torch.empty(len(x), sum(self.d_outs), dtype=x.dtype, device=x.device)
        self._compute(x, y, adds=False)
        return y

    def add_to(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """y [num_tokens, sum of d_outs] += what __call__ gives, in place; rounded once where the product can sum."""
        self._compute(x, y, adds=True)

    def _compute(self, x: torch.Tensor, y: torch.Tensor, *, adds: bool) -> None:
        assert self.weight is not None
        d_out, d_in = self.weight.shape
        has_group = bool(self._step.segments)
        tiling = tiling_of(d_out, d_in, len(x), x.dtype, x.device, has_group=has_group)
        group = self._group(x, is_beside=tiling is not None) if has_group else None
        if tiling is not None:
            few_tokens_linear(
                x, self.weight, y, tiling,
                adds=adds, bias=self.bias, scales=self.scales, group=group,
            )  # fmt: skip
        else:
            self._product(x, y, adds=adds)
            if group is not None:
                group.shrink()
        if group is not None:
            group.expand(y)

    def _product(self, x: torch.Tensor, y: torch.Tensor, *, adds: bool) -> None:
        assert self.weight is not None
        if self.scales is not None:
            found = self._int8[0].product(x, self.weight, self.bias, self.scales)
            y.copy_(y + found if adds else found)
        elif adds:
            y.addmm_(x, self.weight.T)
            if self.bias is not None:
                y += self.bias
        elif self.bias is not None:
            torch.addmm(self.bias, x, self.weight.T, out=y)
        else:
            torch.mm(x, self.weight.T, out=y)

    def _group(self, x: torch.Tensor, *, is_beside: bool) -> GroupStep | None:
        if len(x) != self._step.num_tokens:
            raise RuntimeError(f"{self.paths[0]} saw {len(x)} of {self._step.num_tokens} tokens")
        return self._step.group(self.paths, self.d_outs, x, is_beside=is_beside)


def _joined(linears: Sequence[nn.Linear], name: str) -> torch.Tensor | None:
    """One tensor with the rows of all, which become views of it; None where they have none."""
    tensors = [getattr(linear, name) for linear in linears]
    if tensors[0] is None:
        return None
    # A model may have been made in inference mode or not: what is made here serves in both.
    with torch.inference_mode(False), torch.no_grad():
        joined = (
            torch.cat([tensor.detach() for tensor in tensors]) if len(tensors) > 1 else tensors[0].detach()
        )
        views = joined.split([len(tensor) for tensor in tensors])
        for linear, tensor, view in zip(linears, tensors, views, strict=True):
            is_parameter = isinstance(tensor, nn.Parameter)
            setattr(linear, name, nn.Parameter(view, requires_grad=False) if is_parameter else view)
    return joined


def kind_of(linear: nn.Linear) -> Hashable:
    """Linears of one kind can be one product: of one class and type, all with a bias or none."""
    dtype = linear.dtype if isinstance(linear, Int8Linear) else linear.weight.dtype
    return type(linear), dtype, linear.bias is None


class FewTokensForward:
    """The forward of a linear of the base alone: adapters that change it do so by hooks."""

    def __init__(self, linear: nn.Linear) -> None:
        self._linear = linear

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self._linear.weight, self._linear.bias
        rows = x.reshape(-1, x.shape[-1])
        d_out, d_in = weight.shape
        tiling = tiling_of(d_out, d_in, len(rows), x.dtype, x.device)
        if tiling is None:
            return F.linear(x, weight, bias)
        y = torch.empty(len(rows), len(weight), dtype=x.dtype, device=x.device)
        few_tokens_linear(rows, weight, y, tiling, bias=bias)
        return y.view(*x.shape[:-1], -1)
