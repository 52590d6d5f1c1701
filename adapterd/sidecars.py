"""What lies beside an adapter's weights and changes its answers: template, end tokens, generation defaults.

PEFT ignores these files; people who save a tokenizer with their adapter mean them.
"""

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from adapterd.core import BaseSpec
from adapterd.errors import AdapterRefused
from adapterd.peft_config import parse_json_object
from adapterd.token_table import TokenizerIdentity

_ANY_SIZE = math.inf
# Value ranges, both ends included; the lower one is open where a value of 0 makes no sense.
_SAMPLING_RANGES: Mapping[str, tuple[float, float]] = {
    "temperature": (0.0, _ANY_SIZE),
    "top_p": (1e-9, 1.0),
    "top_k": (0, _ANY_SIZE),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-9, _ANY_SIZE),
}
_GENERATION_HARMLESS = frozenset(
    {
        "_from_model_config",
        "bos_token_id",
        "cache_implementation",
        "decoder_start_token_id",
        "do_sample",
        "eos_token_id",
        "max_length",
        "max_new_tokens",
        "pad_token_id",
        "transformers_version",
        "trust_remote_code",
        "use_cache",
    }
)
_GENERATION_NEUTRAL: Mapping[str, object] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "length_penalty": 1.0,
    "diversity_penalty": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "min_length": 0,
}


@dataclass(frozen=True)
class Sidecars:
    """None where the base's own holds. `generation_defaults`: what a request that says nothing gets."""

    chat_template: str | None
    eos_token_ids: frozenset[int] | None
    generation_defaults: Mapping[str, float | int]


def read_sidecars(
    read: Callable[[str], bytes | None], *, spec: BaseSpec, tokenizer: TokenizerIdentity, adapter: str
) -> Sidecars:
    """`read(name)` gives a file's bytes or None. Raises AdapterRefused for what cannot be applied."""

    def parsed(name: str) -> dict[str, Any]:
        data = read(name)
        return {} if data is None else parse_json_object(data, file=name, adapter=adapter)

    tokenizer_config = parsed("tokenizer_config.json")
    generation = parsed("generation_config.json")
    template = read("chat_template.jinja")
    _check_tokenizer(read, parsed, tokenizer_config, tokenizer, adapter)
    return Sidecars(
        chat_template=_chat_template(template, tokenizer_config, adapter),
        eos_token_ids=_eos_token_ids(generation, tokenizer_config, spec, tokenizer, adapter),
        generation_defaults=_generation_defaults(generation, adapter),
    )


def _chat_template(file: bytes | None, tokenizer_config: Mapping[str, Any], adapter: str) -> str | None:
    """A chat_template.jinja goes before tokenizer_config.json's; of several named ones, the default."""
    if file is not None:
        try:
            # Thousands of adapters bring the same few templates: each is kept once.
            return sys.intern(file.decode())
        except UnicodeDecodeError as error:
            raise AdapterRefused(f"adapter {adapter!r}: chat_template.jinja is not UTF-8") from error
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        if "default" not in named:
            raise AdapterRefused(
                f"adapter {adapter!r}: tokenizer_config.json names chat templates, but none is 'default'"
            )
        template = named["default"]
    if template is not None and not isinstance(template, str):
        raise AdapterRefused(f"adapter {adapter!r}: tokenizer_config.json: chat_template must be a string")
    return None if template is None else sys.intern(template)


def _check_tokenizer(
    read: Callable[[str], bytes | None],
    parsed: Callable[[str], dict[str, Any]],
    tokenizer_config: Mapping[str, Any],
    tokenizer: TokenizerIdentity,
    adapter: str,
) -> None:
    """An adapter's tokenizer must be the base's: other ids would mean other rows of the embedding."""
    own = read("tokenizer.json")
    if own is not None:
        try:
            is_same = tokenizer.is_same(
                own, lambda data: parse_json_object(data, file="tokenizer.json", adapter=adapter)
            )
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise AdapterRefused(
                f"adapter {adapter!r}: tokenizer.json cannot be understood: {error!r}"
            ) from error
        if not is_same:
            raise AdapterRefused(
                f"adapter {adapter!r}: tokenizer.json differs from the base's in vocabulary, merges or added"
                " tokens; new tokens need a base that has them. Remove the file if the adapter does not rely on it"
            )
    added: list[tuple[object, object]] = list(parsed("added_tokens.json").items())
    for token_id, entry in (tokenizer_config.get("added_tokens_decoder") or {}).items():
        if isinstance(entry, dict) and str(token_id).isdecimal():
            added.append((entry.get("content"), int(token_id)))
    for token, token_id in added:
        known = tokenizer.token_ids.get(token) if isinstance(token, str) else None
        if known is None or known != token_id:
            raise AdapterRefused(
                f"adapter {adapter!r}: its tokenizer adds {token!r} as id {token_id};"
                f" the base has {'no such token' if known is None else f'it as {known}'}"
            )


def _eos_token_ids(
    generation: Mapping[str, Any],
    tokenizer_config: Mapping[str, Any],
    spec: BaseSpec,
    tokenizer: TokenizerIdentity,
    adapter: str,
) -> frozenset[int] | None:
    """generation_config.json's ids, else the base's; the adapter's own eos_token is added to either."""
    stated = generation.get("eos_token_id")
    ids = set(spec.eos_token_ids)
    if stated is not None:
        listed = stated if isinstance(stated, list) else [stated]
        if not listed or not all(type(i) is int and 0 <= i < spec.vocab_size for i in listed):
            raise AdapterRefused(
                f"adapter {adapter!r}: generation_config.json: eos_token_id={stated} must be ids"
                f" below {spec.vocab_size}"
            )
        ids = set(listed)
    token = tokenizer_config.get("eos_token")
    if isinstance(token, dict):
        token = token.get("content")
    if token is not None:
        if token not in tokenizer.token_ids:
            raise AdapterRefused(
                f"adapter {adapter!r}: tokenizer_config.json: eos_token={token!r} is no token of the base"
            )
        token_id = tokenizer.token_ids[token]
        if token_id >= spec.vocab_size:
            raise AdapterRefused(
                f"adapter {adapter!r}: tokenizer_config.json: eos_token={token!r} has the id {token_id}, and the base"
                f" has {spec.vocab_size} tokens: no answer could end with it; remove it, or name another"
            )
        ids.add(token_id)
    return None if ids == spec.eos_token_ids else frozenset(ids)


def _generation_defaults(generation: Mapping[str, Any], adapter: str) -> dict[str, float | int]:
    """do_sample false is greedy; sampling values count only where do_sample is true, as in transformers."""

    def refusal(key: str, reason: str) -> AdapterRefused:
        return AdapterRefused(
            f"adapter {adapter!r}: generation_config.json: {key}={generation[key]!r} {reason}"
        )

    do_sample = generation.get("do_sample")
    if do_sample not in (None, True, False):
        raise refusal("do_sample", "must be true or false")
    defaults: dict[str, float | int] = {}
    for key, value in generation.items():
        if key in _GENERATION_HARMLESS or value is None:
            continue
        if key not in _SAMPLING_RANGES:
            if value is not False and value != _GENERATION_NEUTRAL.get(key):
                raise refusal(key, "is not applied by adapterd; remove it from the adapter")
            continue
        low, high = _SAMPLING_RANGES[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise refusal(key, f"is out of range ({low:g} to {high:g})")
        if key == "top_k" and not isinstance(value, int):
            raise refusal(key, "must be a whole number")
        if do_sample or key == "repetition_penalty":
            defaults[key] = value
    if do_sample is False:
        defaults["temperature"] = 0.0
    return defaults
