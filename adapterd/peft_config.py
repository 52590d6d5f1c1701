"""adapter_config.json, read strictly: a key is honoured, harmless for a stated reason, or refused by name.

Knows PEFT's LoraConfig of 0.18 to 0.21. Reads no tensors.
"""

import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from adapterd.errors import AdapterRefused
from adapterd.file_names import CONFIG_FILE
from adapterd.peft_fields import Fields

Bias = Literal["none", "all", "lora_only"]

_HONOURED = frozenset(
    {
        "peft_type",
        "task_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "bias",
        "lora_bias",
        "use_dora",
        "modules_to_save",
        "trainable_token_indices",
        "target_parameters",
        "ensure_weight_tying",
        "init_lora_weights",
        "base_model_name_or_path",
    }
)

HARMLESS: Mapping[str, str] = {
    "lora_dropout": "acts in training only",
    "inference_mode": "freezes the weights, changes no output",
    "fan_in_fan_out": "how the base stores its weight; A and B are applied alike either way",
    "revision": "which revision of the base was trained on, for people",
    "peft_version": "which PEFT wrote the file",
    "auto_mapping": "the base's class, for a base that is no transformers model",
    "runtime_config": "never read back by PEFT itself",
    "loftq_config": "how the weights began; LoftQ itself is refused by init_lora_weights",
    "eva_config": "how the weights began; its ranks are written into rank_pattern",
    "corda_config": "how the weights began; CorDA itself is refused by init_lora_weights",
    "lora_ga_config": "how the weights began; LoRA-GA itself is refused by init_lora_weights",
    "megatron_core": "a module name that only megatron_config would use",
    "qalora_group_size": "read only when use_qalora is set, which is refused",
}

_REFUSED: Mapping[str, str] = {
    "alora_invocation_tokens": "activated LoRA, which changes weights in mid-sequence, is not supported",
    "layer_replication": "it builds another base out of repeated layers",
    "megatron_config": "Megatron's parallel layers are not supported",
    "arrow_config": "Arrow's routing between adapters is not supported",
    "use_qalora": "QALoRA pools the inputs of A, which is not supported",
    "use_bdlora": "block-diagonal factors are not supported",
    "velora_config": "what VeLoRA keeps for its backward pass is not read; without it and its lora_velora_embed tensors"
    " the adapter is plain LoRA",
    "kasa_config": "KaSA truncates the base's own weights",
    "monteclora_config": "Monte Carlo LoRA is not supported",
    "enable_lora": "the merged projections of PEFT before 0.3 are not supported",
    "merge_weights": "the merged projections of PEFT before 0.3 are not supported",
}

_EXACT_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica"})
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "lora_ga")


@dataclass(frozen=True)
class PeftConfig:
    """What an adapter_config.json says of the weights beside it."""

    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_modules: str | tuple[str, ...] | None
    exclude_modules: str | tuple[str, ...] | None
    layers_to_transform: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]
    base_model_name: str | None
    bias: Bias = "none"
    lora_bias: bool = False
    use_dora: bool = False
    modules_to_save: tuple[str, ...] = ()
    trainable_token_indices: tuple[int, ...] | Mapping[str, tuple[int, ...]] | None = None
    target_parameters: tuple[str, ...] = ()
    ensure_weight_tying: bool = False

    def rank(self, module: str) -> int:
        return self.rank_pattern.get(_pattern_key(self.rank_pattern, module), self.r)

    def scale(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) with rsLoRA, by this module's own rank and alpha."""
        rank = self.rank(module)
        alpha = self.alpha_pattern.get(_pattern_key(self.alpha_pattern, module), self.lora_alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def targets(self, module: str) -> bool:
        """Whether PEFT would put an adapter on this module (its `check_target_module_exists`)."""
        if self._excludes(module):
            return False
        if self.target_modules is None:
            return not self.target_parameters
        if isinstance(self.target_modules, str):
            if self.target_modules == "all-linear":
                return True
            return re.fullmatch(self.target_modules, module) is not None
        if module in self.target_modules:
            return True
        if not _ends_with_any(module, self.target_modules):
            return False
        if not self.layers_to_transform:
            return True
        layer = self._layer_of(module)
        return layer is not None and layer in self.layers_to_transform

    def saves(self, module: str) -> bool:
        """Whether PEFT would keep a trained copy of this module: by any end of its path, so "norm" is layernorm too."""
        return any(module.endswith(name) for name in self.modules_to_save)

    def targets_parameter(self, name: str) -> bool:
        """Whether PEFT would put an adapter on this bare parameter."""
        return name in self.target_parameters or _ends_with_any(name, self.target_parameters)

    def _excludes(self, module: str) -> bool:
        if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in self.modules_to_save):
            return True
        if not self.exclude_modules:
            return False
        if isinstance(self.exclude_modules, str):
            return re.fullmatch(self.exclude_modules, module) is not None
        return module in self.exclude_modules or _ends_with_any(module, self.exclude_modules)

    def _layer_of(self, module: str) -> int | None:
        if not self.layers_pattern:
            match = re.match(r".*?\.[^.]*\.(?P<index>\d+)\.", module)
            return int(match["index"]) if match else None
        for pattern in self.layers_pattern:
            match = re.match(rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\.", module)
            if match:
                return int(match["index"])
        return None


def parse_peft_config(data: bytes, *, adapter: str) -> PeftConfig:
    """Read adapter_config.json; AdapterRefused names the key, its value and what would be accepted."""
    fields = parse_json_object(data, file=CONFIG_FILE, adapter=adapter)
    reader = Fields(fields, adapter)
    _refuse_what_is_not_applied(fields, reader)
    rank_pattern = reader.mapping("rank_pattern")
    alpha_pattern = reader.mapping("alpha_pattern")
    config = PeftConfig(
        r=reader.rank("r", fields.get("r", 8)),
        lora_alpha=reader.number("lora_alpha", fields.get("lora_alpha", 8)),
        use_rslora=reader.boolean("use_rslora"),
        rank_pattern={
            key: reader.rank(f"rank_pattern[{key!r}]", value) for key, value in rank_pattern.items()
        },
        alpha_pattern={
            key: reader.number(f"alpha_pattern[{key!r}]", value) for key, value in alpha_pattern.items()
        },
        target_modules=reader.names("target_modules"),
        exclude_modules=reader.names("exclude_modules"),
        layers_to_transform=reader.layers(),
        layers_pattern=reader.patterns("layers_pattern"),
        base_model_name=reader.text("base_model_name_or_path"),
        bias=_bias(reader),
        lora_bias=reader.boolean("lora_bias"),
        use_dora=reader.boolean("use_dora"),
        modules_to_save=reader.list_of_names("modules_to_save"),
        trainable_token_indices=reader.token_indices("trainable_token_indices"),
        target_parameters=reader.list_of_names("target_parameters"),
        ensure_weight_tying=reader.boolean("ensure_weight_tying"),
    )
    patterns = (*config.rank_pattern, *config.alpha_pattern, *config.layers_pattern, *config.modules_to_save)
    for key in patterns:
        reader.check_pattern(key)
    for names in (config.target_modules, config.exclude_modules):
        if isinstance(names, str):
            reader.check_pattern(names)
    return config


def parse_json_object(data: bytes, *, file: str, adapter: str) -> dict[str, Any]:
    """A JSON object without duplicate keys, NaN, or nesting deep enough to exhaust the stack."""

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for key, value in pairs:
            if key in fields:
                raise ValueError(f"the key {key!r} occurs twice")
            fields[key] = value
        return fields

    def no_constant(name: str) -> float:
        raise ValueError(f"{name} is no JSON number")

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=no_duplicates, parse_constant=no_constant)
    except RecursionError as error:
        raise AdapterRefused(f"adapter {adapter!r}: {file} is nested too deeply") from error
    except ValueError as error:  # also UnicodeDecodeError and json.JSONDecodeError
        raise AdapterRefused(f"adapter {adapter!r}: {file} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise AdapterRefused(f"adapter {adapter!r}: {file} is no JSON object")
    return value


def _refuse_what_is_not_applied(fields: Mapping[str, Any], reader: Fields) -> None:
    for key in fields:
        if key in _REFUSED and fields[key] not in (None, False, [], {}):
            raise reader.refusal(key, _REFUSED[key])
        if key not in _HONOURED and key not in HARMLESS and key not in _REFUSED:
            near = difflib.get_close_matches(key, [*_HONOURED, *_REFUSED], n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise reader.refusal(
                key,
                f"this key is unknown{hint}; it may come from a PEFT newer than 0.21 and change the"
                " output. Remove it if it is at its neutral value",
            )
    if fields.get("peft_type") != "LORA":
        raise reader.refusal("peft_type", "only LORA adapters are supported")
    if fields.get("task_type") not in (None, "CAUSAL_LM"):
        raise reader.refusal("task_type", "only CAUSAL_LM is supported")
    _check_init(fields.get("init_lora_weights", True), reader)


def _check_init(init: object, reader: Fields) -> None:
    if isinstance(init, bool) or init in _EXACT_INITS:
        return
    if isinstance(init, str) and init.startswith(_BASE_CHANGING_INITS):
        raise reader.refusal(
            "init_lora_weights",
            "it changed the base's own weights in training, so these matrices do not fit the plain base;"
            " save the adapter again with PEFT's"
            " save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )
    if init == "loftq":
        raise reader.refusal(
            "init_lora_weights", "it belongs to a quantised base of its own, not to this one"
        )
    raise reader.refusal("init_lora_weights", f"known are true, false, {', '.join(sorted(_EXACT_INITS))}")


def _bias(reader: Fields) -> Bias:
    value = reader.text("bias")
    match value:
        case None | "none":
            return "none"
        case "all" | "lora_only":
            return value
    raise reader.refusal("bias", "known are 'none', 'all' and 'lora_only'")


def _pattern_key(patterns: Mapping[str, object], module: str) -> str:
    """PEFT's `get_pattern_key`: the first pattern that matches the module path or its end after a dot."""
    for pattern in patterns:
        if re.match(rf"(.*\.)?({pattern})$", module):
            return pattern
    return module


def _ends_with_any(module: str, names: Sequence[str]) -> bool:
    return any(module.endswith(f".{name}") for name in names)
