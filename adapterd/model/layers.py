"""Whole decoder layers computed in a few calls, where a layer is of the Llama kind.

A layer is not recognised by its name. Its parts must be there (seven linears, two or four RMSNorms, a gated MLP), and
what the fast way makes of a few tokens must be what the layer itself makes of them; any other layer stays as it is.
On a CPU the family's probe then checks the result against transformers, as it checks everything else.
"""

import logging
import operator
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, ClassVar, Self

import torch
from torch import nn

from adapterd.model.attention import AttentionContext, ContextFactory
from adapterd.model.attention_one import Scoring
from adapterd.model.kv import KV_BLOCK_SIZE, KVPool, KVShape
from adapterd.model.lora import LoraLinear, LoraStep
from adapterd.model.mlps import FusedMLP
from adapterd.model.norms import FusedRMSNorm

logger = logging.getLogger(__name__)

LINEARS = (
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
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-5, torch.float16: 2.0**-8}
"""Of the largest number that the layer adds to its input; 16 bits are rounded at fewer places in the fast way."""
_ROUNDING = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
"""Of each number of the output: its own last place, which may be more than the layer adds."""


@dataclass(frozen=True)
class AttentionCall:
    """What a layer handed to attention beside queries, keys and values."""

    layer: int
    scoring: Scoring


@dataclass(frozen=True)
class LayerParts:
    """A layer of the Llama kind. linears in the order of LINEARS; norms: before attention, before the MLP, and, of
    families that have them, of queries' and of keys' heads.
    """

    path: str
    linears: list[LoraLinear]
    norms: list[FusedRMSNorm]
    attention: AttentionCall
    shape: KVShape


class FusedLayer(ABC):
    """The forward of a decoder layer; falls back to the layer's own where the fast way does not apply.

    It computes the layers that follow as well, as far as they go the fast way: each of them is then called with its
    own output, and hands it on.

    `errors` is what `compute` raises where the device cannot do it.
    """

    errors: ClassVar[tuple[type[Exception], ...]] = (RuntimeError,)

    def __init__(self, path: str, own: Callable[..., torch.Tensor], step: LoraStep) -> None:
        self._own = own
        self._step = step
        self._prefix = f"{path}."
        self._following: tuple[Self, ...] = ()
        self._edited: frozenset[str] | None = None
        self._run: tuple[Self, ...] = ()
        self._output: torch.Tensor | None = None

    def is_followed_by(self, layers: Sequence[Self]) -> None:
        """These are called next, one after another, each with the output of the one before and else the same."""
        self._following = tuple(layers)
        self._edited = None

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if hidden_states is self._output:
            self._output = None
            return hidden_states
        paged = kwargs.get("paged")
        run = self._unedited()
        if not run or not self.applies(hidden_states.shape[-2], paged):
            return self._own(hidden_states, *args, **kwargs)
        output = self.compute(run, hidden_states, kwargs["position_embeddings"], paged)
        for layer in run[1:]:
            layer._output = output
        return output

    def _unedited(self) -> tuple[Self, ...]:
        """This layer and those after it up to one with hooks on its modules, which the fast way does not pass by."""
        if self._step.edited is not self._edited:
            self._edited = self._step.edited
            edited = self._edited
            self._run = tuple(
                takewhile(
                    lambda layer: not any(module.startswith(layer._prefix) for module in edited),
                    (self, *self._following),
                )
            )
        return self._run

    @abstractmethod
    def applies(self, num_tokens: int, paged: object) -> bool:
        """Whether a step of so many tokens with this attention context can go the fast way."""

    @abstractmethod
    def compute(
        self,
        run: Sequence[Self],
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        paged: Any,
    ) -> torch.Tensor:
        """The output of the last layer of `run`, of which this is the first; all are of this class.

        hidden_states [1, num_tokens, hidden_size], which may be changed; cos and sin [1, num_tokens, key_dim].
        """


Make = Callable[[LayerParts, nn.Module], FusedLayer | None]
"""The fast way of a layer with these parts, or None if there is none."""


class _Recorder:
    """An attention context that notes what it is asked."""

    def __init__(self, context: AttentionContext) -> None:
        self._context = context
        self.calls: list[AttentionCall] = []

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scoring: Scoring,
    ) -> torch.Tensor:
        self.calls.append(AttentionCall(layer, scoring))
        return self._context.attend(layer, query, key, value, scoring)


@dataclass
class _Turn:
    """One layer's turn in a forward of the model."""

    inputs: torch.Tensor
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None
    output: torch.Tensor | None = None
    attention: AttentionCall | None = None

    def leads_to(self, other: "_Turn") -> bool:
        """Whether the other layer was called with what this one gave, and with the same angles."""
        mine, others = self.position_embeddings or (), other.position_embeddings or ()
        same_angles = len(mine) == len(others) and all(map(operator.is_, mine, others))
        return other.inputs is self.output and same_angles


@torch.inference_mode()
def use_fused_layers(
    model: nn.Module, shapes: Mapping[int, KVShape], make_context: ContextFactory, make: Make
) -> int:
    """Give every layer of the Llama kind its fast forward; returns how many. After use_fused_norms and -mlps."""
    layers = {path: m for path, m in model.named_modules() if len(_linears(m)) == len(LINEARS)}
    context, seen = _watch(model, layers, shapes, make_context) if layers else (None, {})
    fused: dict[str, FusedLayer] = {}
    reasons = Counter({"they have other linears than Llama's": len(shapes) - len(layers)})
    for path, layer in layers.items():
        assert context is not None
        try:
            fused[path] = layer.forward = _fused(path, layer, seen.get(path), shapes, context, make)
        except _NotAlike as reason:
            reasons[str(reason)] += 1
    _string_together(fused, seen)
    why = "; ".join(f"{count} not: {reason}" for reason, count in reasons.items() if count > 0)
    logger.info("%d of %d decoder layers run fused%s", len(fused), len(shapes), why and f"; {why}")
    return len(fused)


def _string_together(fused: Mapping[str, FusedLayer], turns: Mapping[str, "_Turn"]) -> None:
    """Tell each layer which ones follow it, with nothing in between. `turns` are in order."""
    following: list[FusedLayer] = []
    next_turn: _Turn | None = None
    for path, turn in reversed(list(turns.items())):
        if next_turn is None or not turn.leads_to(next_turn):
            following = []
        if layer := fused.get(path):
            layer.is_followed_by(following)
            following = [layer, *following]
        next_turn = turn if layer else None


class _NotAlike(Exception):
    """Why a layer with the linears of the Llama kind keeps its own forward."""


def _find(layer: nn.Module, name: str) -> nn.Module | None:
    try:
        return layer.get_submodule(name)
    except AttributeError:
        return None


def _linears(layer: nn.Module) -> list[LoraLinear]:
    found = (_find(layer, name) for name in LINEARS)
    return [linear for linear in found if isinstance(linear, LoraLinear)]


def _norms(layer: nn.Module) -> list[FusedRMSNorm]:
    names = [*_LAYER_NORMS, *(name for name in _HEAD_NORMS if _find(layer, name) is not None)]
    found = {name: _find(layer, name) for name in names}
    norms = {name: norm for name, norm in found.items() if isinstance(norm, FusedRMSNorm)}
    if len(norms) < len(names):
        raise _NotAlike(f"{next(name for name in names if name not in norms)} is no RMSNorm of one weight")
    return list(norms.values())


def _watch(
    model: nn.Module,
    layers: dict[str, nn.Module],
    shapes: Mapping[int, KVShape],
    make_context: ContextFactory,
) -> tuple[AttentionContext, dict[str, _Turn]]:
    """One forward of two short sequences, and what each layer was given and gave."""
    first = next(model.parameters())
    pool = KVPool(shapes, len(_NUM_TOKENS), first.dtype, first.device)
    slots = [i * KV_BLOCK_SIZE + torch.arange(count) for i, count in enumerate(_NUM_TOKENS)]
    context = make_context(pool, slots, _NUM_TOKENS)
    recorder = _Recorder(context)
    seen: dict[str, _Turn] = {}
    hooks = []
    for path, layer in layers.items():

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: str = path) -> None:
            inputs = args[0] if args else kwargs["hidden_states"]
            seen[path] = _Turn(inputs, kwargs.get("position_embeddings"))

        def after(_: nn.Module, args: tuple[Any, ...], output: object, path: str = path) -> None:
            seen[path].output = output if isinstance(output, torch.Tensor) else None
            seen[path].attention = recorder.calls[-1]

        hooks += [
            layer.register_forward_pre_hook(before, with_kwargs=True),
            layer.register_forward_hook(after),
        ]
    try:
        ids = torch.arange(1, 1 + sum(_NUM_TOKENS), device=first.device)[None]
        positions = torch.cat([torch.arange(count) for count in _NUM_TOKENS]).to(first.device)[None]
        model(input_ids=ids, position_ids=positions, use_cache=False, paged=recorder)
    finally:
        for hook in hooks:
            hook.remove()
    return context, seen


def _fused(
    path: str,
    layer: nn.Module,
    seen: _Turn | None,
    shapes: Mapping[int, KVShape],
    context: AttentionContext,
    make: Make,
) -> FusedLayer:
    """Raises _NotAlike."""
    norms = _norms(layer)
    if not isinstance(_find(layer, "mlp"), FusedMLP):
        raise _NotAlike("their MLP is not down(silu(gate) * up)")
    if seen is None or seen.attention is None or seen.output is None or seen.position_embeddings is None:
        raise _NotAlike("they are called in another way")
    attention = seen.attention
    fused = make(LayerParts(path, _linears(layer), norms, attention, shapes[attention.layer]), layer)
    if fused is None:
        raise _NotAlike("their linears are not of one kind")
    try:
        found = fused.compute([fused], seen.inputs.clone(), seen.position_embeddings, context)
    except fused.errors as error:
        raise _NotAlike(str(error).partition("\n")[0]) from error
    output = seen.output.float()
    bound = _TOLERANCE[found.dtype] * (output - seen.inputs.float()).abs().max()
    bound = bound + _ROUNDING[found.dtype] * output.abs()
    if not bool(((found.float() - output).abs() <= bound).all()):
        raise _NotAlike("they compute something else")
    return fused
