"""A decoder layer of the Llama kind on a CUDA device: four products and five kernels between them.

q, k and v are one product, gate and up another; what a layer adds to its input is summed by the product itself. Which
layers are of the kind says layers.py.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from adapterd.model.attention_triton import TritonContext, triton_context, triton_paged_attention
from adapterd.model.int8 import Int8Linear
from adapterd.model.kv import KVShape
from adapterd.model.layers import LINEARS, FusedLayer, LayerParts, use_fused_layers
from adapterd.model.linear_triton import few_tokens_linear, tiling_of
from adapterd.model.lora import LoraStep
from adapterd.model.lora_triton import GroupStep, TritonLoraStep
from adapterd.model.pointwise_triton import Heads, triton_rms_norm, triton_silu_mul, turn_and_write


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


class TritonLayer(FusedLayer):
    def __init__(
        self,
        parts: LayerParts,
        linears: Sequence[nn.Linear],
        own: Callable[..., torch.Tensor],
        step: TritonLoraStep,
    ) -> None:
        super().__init__(parts.path, own, step)
        named = {f"{parts.path}.{name}": linear for name, linear in zip(LINEARS, linears, strict=True)}
        paths = list(named)
        self._qkv, self._o, self._gate_up, self._down = (
            Projection({path: named[path] for path in members}, step)
            for members in (paths[:3], paths[3:4], paths[4:6], paths[6:])
        )
        self._norm, self._mlp_norm, *head_norms = parts.norms
        q_norm, k_norm = head_norms or (None, None)
        shape = parts.shape
        num_heads = linears[0].out_features // shape.key_dim
        self._heads = Heads(num_heads, shape.num_heads, shape.key_dim, shape.value_dim, q_norm, k_norm)
        self._attention = parts.attention

    def applies(self, num_tokens: int, paged: object) -> bool:
        return isinstance(paged, TritonContext)

    def compute(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        paged: TritonContext,
    ) -> torch.Tensor:
        cos, sin = position_embeddings
        hidden = hidden_states.view(-1, hidden_states.shape[-1])
        attention, plan = self._attention, paged.plan

        x = triton_rms_norm(hidden, self._norm.weight, self._norm.eps, self._norm.offset)
        query = turn_and_write(
            self._qkv(x),
            cos[0],
            sin[0],
            self._heads,
            paged.pool,
            attention.layer,
            plan.slot_mapping,
        )
        attended = triton_paged_attention(
            query,
            paged.pool.keys[attention.layer],
            paged.pool.values[attention.layer],
            plan,
            attention.scoring,
        )
        self._o.add_to(hidden, attended.view(len(hidden), -1))

        x = triton_rms_norm(hidden, self._mlp_norm.weight, self._mlp_norm.eps, self._mlp_norm.offset)
        gate, up = self._gate_up(x).tensor_split(2, dim=1)
        self._down.add_to(hidden, triton_silu_mul(gate, up))
        return hidden_states


def fuse_triton(model: Any, step: LoraStep, shapes: Mapping[int, KVShape], run: Callable[[], object]) -> None:
    """As kernels.Fuse: every layer of the Llama kind gets its fused forward, and the head one for few tokens."""
    assert isinstance(step, TritonLoraStep)
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        head.forward = FewTokensForward(head)  # type: ignore[assignment]

    def make(parts: LayerParts, layer: nn.Module) -> TritonLayer | None:
        linears = [
            inner
            for inner in (linear.inner for linear in parts.linears)
            if isinstance(inner, nn.Linear) and type(inner) in (nn.Linear, Int8Linear)
        ]
        if len(linears) != len(LINEARS) or parts.shape.key_dim % 2:
            return None
        groups = [linears[:3], linears[3:4], linears[4:6], linears[6:]]
        if not all(_is_alike(group) for group in groups):
            return None
        return TritonLayer(parts, linears, layer.forward, step)

    use_fused_layers(model, shapes, triton_context, make)


def _is_alike(linears: Sequence[nn.Linear]) -> bool:
    """Whether these can be one product: all with a bias or none, and of one type."""
    return len({(type(linear), linear.bias is None) for linear in linears}) == 1
