"""A decoder layer of the Llama kind on a CUDA device: four products and five kernels between them.

q, k and v are one product, gate and up another; what a layer adds to its input is summed by the product itself. Which
layers are of the kind says layers.py.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import nn

from adapterd.model.attention_triton import TritonContext, triton_context, triton_paged_attention
from adapterd.model.grouped_triton import group_linears
from adapterd.model.int8 import Int8Linear
from adapterd.model.kv import KVShape
from adapterd.model.launch_triton import LAUNCH_ERRORS
from adapterd.model.layers import LINEARS, FusedLayer, LayerParts, use_fused_layers
from adapterd.model.lora import LoraLinear, LoraStep
from adapterd.model.lora_triton import TritonLoraStep
from adapterd.model.pointwise_triton import Heads, triton_rms_norm, triton_silu_mul, turn_and_write
from adapterd.model.projection_triton import FewTokensForward, Projection, kind_of


class TritonLayer(FusedLayer):
    errors = LAUNCH_ERRORS

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
        run: Sequence[Self],
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        paged: TritonContext,
    ) -> torch.Tensor:
        for layer in run:
            layer._add_to(hidden_states, position_embeddings, paged)
        return hidden_states

    def _add_to(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        paged: TritonContext,
    ) -> None:
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


def fuse_triton(model: Any, step: LoraStep, shapes: Mapping[int, KVShape], run: Callable[[], object]) -> None:
    """As kernels.Fuse: every layer of the Llama kind gets its fused forward, and the head one for few tokens. In other
    layers linears of one input are put together."""
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
        if any(len(set(map(kind_of, group))) > 1 for group in groups):
            return None
        return TritonLayer(parts, linears, layer.forward, step)

    use_fused_layers(model, shapes, triton_context, make)
    fused = tuple(f"{path}." for path, m in model.named_modules() if isinstance(_forward(m), TritonLayer))
    linears = {path: m for path, m in model.named_modules() if isinstance(m, LoraLinear)}
    group_linears(model, step, {path: m for path, m in linears.items() if not path.startswith(fused)}, run)


def _forward(module: nn.Module) -> object:
    """The forward that was given to this module alone, if any."""
    return module.__dict__.get("forward")
