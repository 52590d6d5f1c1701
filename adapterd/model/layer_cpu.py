"""Whole decoder layers in one C++ call, where a layer is of the Llama kind.

A layer is not recognised by its name. Its parts must be there (seven linears, two or four RMSNorms, a gated MLP), and
what one call makes of a few tokens must be what the layer itself makes of them; any other layer stays as it is. The
family's probe then checks the result against transformers, as it checks everything else.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from adapterd.model.attention_cpu import NativeContext, native_context
from adapterd.model.grouped_cpu import GroupedLinear
from adapterd.model.kv import KV_BLOCK_SIZE, KVPool, KVShape
from adapterd.model.linear_cpu import AnyCpuLinear, native_linear
from adapterd.model.lora_cpu import NativeLoraStep
from adapterd.model.mlp_cpu import NativeMLP
from adapterd.model.norm_cpu import NativeRMSNorm

logger = logging.getLogger(__name__)

_LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
_LAYER_NORMS = ("input_layernorm", "post_attention_layernorm")
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_NUM_TOKENS = (3, 2)
"""Of the two sequences that a layer is tried on."""
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-5}
"""Of the largest number that the layer adds to its input; bfloat16 is rounded at fewer places in one call."""


@dataclass(frozen=True)
class AttentionCall:
    """What a layer handed to attention beside queries, keys and values."""

    layer: int
    scale: float
    sliding_window: int | None
    softcap: float | None
    sinks: torch.Tensor | None


class _Recorder:
    """An attention context that notes what it is asked."""

    def __init__(self, context: NativeContext) -> None:
        self._context = context
        self.calls: list[AttentionCall] = []

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scale: float,
        sliding_window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        self.calls.append(AttentionCall(layer, scale, sliding_window, softcap, sinks))
        return self._context.attend(
            layer,
            query,
            key,
            value,
            scale=scale,
            sliding_window=sliding_window,
            softcap=softcap,
            sinks=sinks,
        )


class NativeLayer:
    """The forward of a decoder layer; falls back to the layer's own where one call does not apply."""

    def __init__(
        self,
        path: str,
        own: Callable[..., torch.Tensor],
        linears: Sequence[AnyCpuLinear],
        norms: Sequence[NativeRMSNorm],
        attention: AttentionCall,
        step: NativeLoraStep,
        place: range,
    ) -> None:
        self._own = own
        self._choice = linears[0].choice
        self._weights = [linear.matrix for linear in linears]
        self._scales = [linear.scales for linear in linears]
        self._biases = [linear.bias for linear in linears]
        self._norms = [norm.weight for norm in norms]
        self._norm_numbers = [number for norm in norms for number in (norm.eps, norm.offset)]
        self._attention = attention
        self._sinks = None if attention.sinks is None else attention.sinks.float().contiguous()
        self._step = step
        self._place = place
        self._prefix = f"{path}."
        self._edited: frozenset[str] = frozenset()
        self._is_edited = False
        self._compute: Callable[..., torch.Tensor] = torch.ops.adapterd.decoder_layer.default

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        num_tokens = hidden_states.shape[-2]
        paged = kwargs.get("paged")
        if not isinstance(paged, NativeContext) or self._choice.way(num_tokens) is not native_linear:
            return self._own(hidden_states, *args, **kwargs)
        if self._step.edited is not self._edited:
            self._edited = self._step.edited
            self._is_edited = any(module.startswith(self._prefix) for module in self._edited)
        if self._is_edited:  # by hooks on modules, which one call does not pass by
            return self._own(hidden_states, *args, **kwargs)
        return self.compute(hidden_states, kwargs["position_embeddings"], paged)

    def compute(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        paged: NativeContext,
    ) -> torch.Tensor:
        table: torch.Tensor | None = None
        bounds: list[int] = []
        if self._step.segments:
            table, bounds = self._step.additions(self._place)
        attention, plan = self._attention, paged.plan
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
            paged.pool.keys[attention.layer],
            paged.pool.values[attention.layer],
            plan.slot_mapping,
            plan.slots,
            plan.sequences,
            attention.scale,
            attention.sliding_window or 0,
            attention.softcap or 0.0,
            self._sinks,
        )


@dataclass
class _Seen:
    """One layer's turn in a forward of the model."""

    inputs: torch.Tensor
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None
    output: object = None
    attention: AttentionCall | None = None


@torch.inference_mode()
def use_native_layers(model: nn.Module, step: NativeLoraStep, shapes: dict[int, KVShape]) -> int:
    """Give every layer of the Llama kind its forward in one call; returns how many. After group_linears."""
    layers = {path: m for path, m in model.named_modules() if _parts(m) is not None}
    if not layers:
        return 0
    context, seen = _watch(model, layers, shapes)
    replaced = 0
    for path, layer in layers.items():
        native = _replacement(path, layer, step, seen.get(path), context)
        if native is not None:
            # The instance's, not the class's: another model of this family is not touched.
            layer.forward = native
            replaced += 1
    logger.info("%d of %d decoder layers run in one call each", replaced, len(shapes))
    return replaced


def _parts(layer: nn.Module) -> tuple[list[AnyCpuLinear], list[NativeRMSNorm]] | None:
    def find(name: str) -> nn.Module | None:
        try:
            return layer.get_submodule(name)
        except AttributeError:
            return None

    names = [*_LAYER_NORMS, *(name for name in _HEAD_NORMS if find(name) is not None)]
    norms = [norm for norm in map(find, names) if isinstance(norm, NativeRMSNorm)]
    grouped = [linear for linear in map(find, _LINEARS) if isinstance(linear, GroupedLinear)]
    linears = [linear.inner for linear in grouped if isinstance(linear.inner, AnyCpuLinear)]
    if len(linears) != len(_LINEARS) or len(norms) != len(names) or not isinstance(find("mlp"), NativeMLP):
        return None
    return linears, norms


def _watch(
    model: nn.Module, layers: dict[str, nn.Module], shapes: dict[int, KVShape]
) -> tuple[NativeContext, dict[str, _Seen]]:
    """One forward of two short sequences, and what each layer was given and gave."""
    dtype = next(model.parameters()).dtype
    pool = KVPool(shapes, len(_NUM_TOKENS), dtype, torch.device("cpu"))
    slots = [i * KV_BLOCK_SIZE + torch.arange(count) for i, count in enumerate(_NUM_TOKENS)]
    context = native_context(pool, slots, _NUM_TOKENS)
    recorder = _Recorder(context)
    seen: dict[str, _Seen] = {}
    hooks = []
    for path, layer in layers.items():

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: str = path) -> None:
            inputs = args[0] if args else kwargs["hidden_states"]
            seen[path] = _Seen(inputs, kwargs.get("position_embeddings"))

        def after(_: nn.Module, args: tuple[Any, ...], output: object, path: str = path) -> None:
            seen[path].output = output
            seen[path].attention = recorder.calls[-1]

        hooks += [
            layer.register_forward_pre_hook(before, with_kwargs=True),
            layer.register_forward_hook(after),
        ]
    try:
        ids = torch.arange(1, 1 + sum(_NUM_TOKENS))[None]
        positions = torch.cat([torch.arange(count) for count in _NUM_TOKENS])[None]
        model(input_ids=ids, position_ids=positions, use_cache=False, paged=recorder)
    finally:
        for hook in hooks:
            hook.remove()
    return context, seen


def _replacement(
    path: str, layer: nn.Module, step: NativeLoraStep, seen: _Seen | None, context: NativeContext
) -> NativeLayer | None:
    parts = _parts(layer)
    place = step.place([f"{path}.{name}" for name in _LINEARS])
    if parts is None or place is None or seen is None or seen.attention is None:
        return None
    if not isinstance(seen.output, torch.Tensor) or seen.position_embeddings is None:
        return None
    linears, norms = parts
    native = NativeLayer(path, layer.forward, linears, norms, seen.attention, step, place)
    try:
        found = native.compute(seen.inputs, seen.position_embeddings, context)
    except RuntimeError as error:
        logger.debug("%s is not run in one call: %s", path, error)
        return None
    added = (seen.output - seen.inputs).float().abs().max()
    difference = (found - seen.output).float().abs().max()
    return native if bool(difference <= _TOLERANCE[found.dtype] * added) else None
