"""Decoder layers of the Llama kind in one C++ call; see layers.py for which layers those are."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

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
    """`all_layers`: the C++ object that holds the model's layers, to which this one is added.
    `place`: where the step's table keeps the additions of this layer's linears.
    """

    def __init__(
        self,
        parts: LayerParts,
        linears: list[AnyCpuLinear],
        own: Callable[..., torch.Tensor],
        step: NativeLoraStep,
        place: range,
        all_layers: Any,
    ) -> None:
        super().__init__(parts.path, own, step)
        self._choice = linears[0].choice
        self._number: int = all_layers.add(
            [linear.matrix for linear in linears],
            [linear.scales for linear in linears],
            [linear.bias for linear in linears],
            [norm.weight for norm in parts.norms],
            [number for norm in parts.norms for number in (norm.eps, norm.offset)],
            *native_scoring(parts.attention.scoring),
        )
        self._layer = parts.attention.layer
        self._additions = step.additions
        self._place = place
        self._compute: Callable[..., torch.Tensor] = all_layers.run

    def applies(self, num_tokens: int, paged: object) -> bool:
        return isinstance(paged, NativeContext) and self._choice.way(num_tokens) is native_linear

    def compute(
        self,
        run: Sequence[Self],
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        paged: NativeContext,
    ) -> torch.Tensor:
        table: torch.Tensor | None = None
        bounds: list[int] = []
        if self._step.segments:
            for layer in run:
                table, own = self._additions(layer._place)
                bounds += own
        plan, pool = paged.plan, paged.pool
        return self._compute(
            [layer._number for layer in run],
            hidden_states,
            *position_embeddings,
            table,
            bounds,
            [pool.keys[layer._layer] for layer in run],
            [pool.values[layer._layer] for layer in run],
            plan.slot_mapping,
            plan.slots,
            plan.sequences,
        )


def fuse_native(
    model: nn.Module, step: LoraStep, shapes: Mapping[int, KVShape], run: Callable[[], object]
) -> None:
    """As kernels.Fuse: linears of one input together, then all layers of the Llama kind in one call."""
    assert isinstance(step, NativeLoraStep)
    group_linears(model, step, run)
    all_layers = torch.classes.adapterd.DecoderLayers()

    def make(parts: LayerParts, layer: nn.Module) -> NativeLayer | None:
        inners = [linear.inner for linear in parts.linears if isinstance(linear, GroupedLinear)]
        linears = [inner for inner in inners if isinstance(inner, AnyCpuLinear)]
        place = step.place([f"{parts.path}.{name}" for name in LINEARS])
        if len(linears) != len(LINEARS) or place is None:
            return None
        return NativeLayer(parts, linears, layer.forward, step, place, all_layers)

    use_fused_layers(model, shapes, native_context, make)
