"""What a request runs on: the base, one adapter, or several at weights. Pure functions of loaded adapters."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from adapterd.adapter import Adapter
from adapterd.core import BASE_ADAPTER, BASE_MIX, AdapterId, AdapterMix, BaseSpec
from adapterd.errors import InvalidRequest
from adapterd.model_name import Part

_NO_DEFAULTS: Mapping[str, float | int] = MappingProxyType({})


@dataclass(frozen=True)
class ResolvedModel:
    """What a `model` string means at this moment.

    `model` is its canonical form. `digest` is "base" for the base, an adapter's digest, or
    `d1*w1+d2*w2` for a composition. `chat_template` is None where the base's holds.
    """

    mix: AdapterMix
    model: str
    digest: str
    chat_template: str | None
    eos_token_ids: frozenset[int]
    generation_defaults: Mapping[str, float | int]
    adapter_names: tuple[str, ...]
    # Keeps the versions in memory until they are leased, should their names move on in between.
    adapters: tuple[Adapter, ...] = field(repr=False, compare=False, default=())


def resolve_base(spec: BaseSpec) -> ResolvedModel:
    digest = BASE_ADAPTER.digest
    return ResolvedModel(BASE_MIX, spec.name, digest, None, spec.eos_token_ids, _NO_DEFAULTS, ())


def compose(spec: BaseSpec, parts: Sequence[Part], adapters: Sequence[Adapter]) -> ResolvedModel:
    """One mix of `adapters`, each the current version of the part beside it.

    The same content twice adds up, and the order of the parts does not matter. Parts that name no chat
    template follow one that does; two different ones are an InvalidRequest. Generation defaults hold only
    where all parts agree.
    """
    _refuse_what_cannot_be_added(parts, adapters)
    mix = add_up(parts, [adapter.id for adapter in adapters])
    templates: dict[str, str] = {}
    for part, adapter in zip(parts, adapters, strict=True):
        if adapter.chat_template is not None:
            templates.setdefault(adapter.chat_template, part.name)
    if len(templates) > 1:
        first, second = itertools.islice(templates.values(), 2)
        raise InvalidRequest(
            f"{first!r} and {second!r} bring different chat templates and cannot be composed", param="model"
        )
    defaults = adapters[0].generation_defaults
    if any(adapter.generation_defaults != defaults for adapter in adapters):
        defaults = _NO_DEFAULTS
    eos = [spec.eos_token_ids if a.eos_token_ids is None else a.eos_token_ids for a in adapters]
    return ResolvedModel(
        mix=mix,
        model=canonical_model(spec.name, parts),
        digest=mix_digest(mix),
        chat_template=next(iter(templates), None),
        eos_token_ids=frozenset(itertools.chain(*eos)),
        generation_defaults=defaults,
        adapter_names=tuple(dict.fromkeys(part.name for part in parts)),
        adapters=tuple(adapters),
    )


def add_up(parts: Sequence[Part], ids: Sequence[AdapterId]) -> AdapterMix:
    """`ids`: what each part means. Raises InvalidRequest where the weights of one content cancel each other."""
    weights: dict[AdapterId, float] = {}
    for part, adapter_id in zip(parts, ids, strict=True):
        weights[adapter_id] = weights.get(adapter_id, 0.0) + part.weight
    for adapter_id, weight in weights.items():
        if weight == 0:
            raise InvalidRequest(
                f"the weights of {adapter_id.name!r} add up to 0; leave it out", param="model"
            )
    return tuple(sorted(weights.items()))


def canonical_model(base_name: str, parts: Sequence[Part]) -> str:
    return f"{base_name}:{'+'.join(_weighted(_versioned(part), part.weight) for part in parts)}"


def mix_digest(mix: AdapterMix) -> str:
    return "+".join(_weighted(adapter_id.digest, weight) for adapter_id, weight in mix)


def _refuse_what_cannot_be_added(parts: Sequence[Part], adapters: Sequence[Adapter]) -> None:
    """Trained biases, copies of modules and magnitudes have no half: PEFT's weighted sums leave them out in silence."""
    for part, adapter in zip(parts, adapters, strict=True):
        field = adapter.field_that_cannot_be_added
        if field is not None and (len(parts) > 1 or part.weight != 1):
            raise InvalidRequest(
                f"{part.name!r} was trained with {field}, which cannot be added to another adapter or scaled;"
                " ask for it alone",
                param="model",
            )


def _versioned(part: Part) -> str:
    return part.name if part.version is None else f"{part.name}@{part.version}"


def _weighted(name: str, weight: float) -> str:
    return name if weight == 1 else f"{name}*{weight:g}"
