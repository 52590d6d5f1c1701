"""A decoder layer of the Llama kind in one C++ call; see layers.py for which layers those are."""

from collections.abc import Callable, Mapping

import torch
from torch import nn

from adapterd.model.attention_cpu import NativeContext, native_context, native_scoring
from adapterd.model.grouped import GroupedLinear
from adapterd.model.grouped_cpu import group_linears
from adapterd.model.kv import KVShape
from adapterd.model.layers import LINEARS, FusedLayer, LayerParts, use_fused_layers
from adapterd.model.linear_cpu import AnyCpuLinear, native_linear
from adapterd.model.lora import LoraStep
from adapterd.model.lora_cpu import NativeLoraStep


class NativeLayer(FusedLayer):
    """`place`: where the step's table keeps the additions of this layer's linears."""

    def __init__(
        self,
        parts: LayerParts,
        linears: list[AnyCpuLinear],
        own: Callable[..., torch.Tensor],
        step: NativeLoraStep,
        place: range,
    ) -> None:
        super().__init__(parts.path, own, step)
        self._choice = linears[0].choice
        self._weights = [linear.matrix for linear in linears]
        self._scales = [linear.scales for linear in linears]
        self._biases = [linear.bias for linear in linears]
        self._norms = [norm.weight for norm in parts.norms]
        self._norm_numbers = [number for norm in parts.norms for number in (norm.eps, norm.offset)]
        self._layer = parts.attention.layer
        self._scoring = native_scoring(parts.attention.scoring)
        self._additions = step.additions
        self._place = place
        self._compute: Callable[..., torch.Tensor] = torch.ops.adapterd.decoder_layer.default

    def applies(self, num_tokens: int, paged: object) -> bool:
        return isinstance(paged, NativeContext) and self._choice.way(num_tokens) is native_linear

    def compute(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        paged: NativeContext,
    ) -> torch.Tensor:
        table: torch.Tensor | None = None
        bounds: list[int] = []
        if self._step.segments:
            table, bounds = self._additions(self._place)
        plan = paged.plan
        return self._compute(
            hidden_states,
            *position_embeddings,
            self._weights,
            self._scales,
            self._biases,
            self._norms,
            self._norm_numbers,
            table,
            bounds,
            paged.pool.keys[self._layer],
            paged.pool.values[self._layer],
            plan.slot_mapping,
            plan.slots,
            plan.sequences,
            *self._scoring,
        )


def fuse_native(
    model: nn.Module, step: LoraStep, shapes: Mapping[int, KVShape], run: Callable[[], object]
) -> None:
    """As kernels.Fuse: linears of one input together, then every layer of the Llama kind in one call."""
    assert isinstance(step, NativeLoraStep)
    group_linears(model, step, run)

    def make(parts: LayerParts, layer: nn.Module) -> NativeLayer | None:
        inners = [linear.inner for linear in parts.linears if isinstance(linear, GroupedLinear)]
        linears = [inner for inner in inners if isinstance(inner, AnyCpuLinear)]
        place = step.place([f"{parts.path}.{name}" for name in LINEARS])
        if len(linears) != len(LINEARS) or place is None:
            return None
        return NativeLayer(parts, linears, layer.forward, step, place)

    use_fused_layers(model, shapes, native_context, make)
