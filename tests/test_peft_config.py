import json
import time
from dataclasses import fields
from typing import Any

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from adapterd.errors import AdapterRefused
from adapterd.peft_config import HARMLESS, PeftConfig, parse_peft_config

MODULES = [
    f"model.layers.{layer}.{block}"
    for layer in (0, 1, 11)
    for block in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.experts.3.down_proj")
]


def parse(**changes: Any) -> PeftConfig:
    return parse_peft_config(json.dumps({"peft_type": "LORA", **changes}).encode(), adapter="support")


def test_every_key_that_peft_writes_is_known_and_neutral_by_default() -> None:
    written = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]).to_dict()
    written["target_modules"] = ["q_proj"]
    config = parse_peft_config(json.dumps(written).encode(), adapter="support")
    assert (config.r, config.lora_alpha, config.target_modules) == (8, 8.0, ("q_proj",))
    assert {field.name for field in fields(LoraConfig)} >= set(written) - {"peft_version", "runtime_config"}


def test_harmless_keys_have_a_reason_and_change_nothing() -> None:
    plain = parse(r=4)
    for key, reason in HARMLESS.items():
        assert reason
        assert parse(r=4, **{key: "anything"}) == plain


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("peft_type", "IA3", "only LORA"),
        ("task_type", "SEQ_CLS", "only CAUSAL_LM"),
        ("bias", "some", "known are"),
        ("use_dora", 1, "true or false"),
        ("modules_to_save", "lm_head", "list of names"),
        ("trainable_token_indices", [-1], "token ids"),
        ("trainable_token_indices", {"lm_head": [2, 2]}, "occurs twice"),
        ("lora_bias", "yes", "true or false"),
        ("target_parameters", [3], "list of names"),
        ("alora_invocation_tokens", [5], "activated LoRA"),
        ("layer_replication", [[0, 4]], "repeated layers"),
        ("megatron_config", {"a": 1}, "Megatron"),
        ("arrow_config", {"top_k": 3}, "Arrow"),
        ("use_qalora", True, "QALoRA"),
        ("use_bdlora", {"nblocks": 2}, "block-diagonal"),
        ("kasa_config", {"x": 1}, "base's own weights"),
        ("monteclora_config", {"num_samples": 8}, "Monte Carlo"),
        ("ensure_weight_tying", "no", "true or false"),
        ("init_lora_weights", "pissa", "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", "pissa_niter_16", "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", "olora", "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", "corda", "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", "lora_ga", "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", "loftq", "quantised base"),
        ("init_lora_weights", "someday", "known are true, false"),
        ("use_rsloar", True, "did you mean 'use_rslora'"),
        ("auto_map", {"AutoModel": "evil.py"}, "unknown"),
        ("r", 0, "at least 1"),
        ("r", -1, "at least 1"),
        ("r", True, "at least 1"),
        ("r", 8.0, "at least 1"),
        ("r", "8", "at least 1"),
        ("lora_alpha", "16", "must be a number"),
        ("lora_alpha", None, "must be a number"),
        ("lora_alpha", 10**400, "too large"),
        ("use_rslora", 1, "true or false"),
        ("rank_pattern", [1], "patterns and values"),
        ("rank_pattern", {"q_proj": 0}, r"rank_pattern\['q_proj'\]=0"),
        ("alpha_pattern", {"q_proj": "x"}, r"alpha_pattern\['q_proj'\]"),
        ("alpha_pattern", {"q_proj[": 1}, "no regular expression"),
        ("target_modules", 5, "string or a list"),
        ("target_modules", [5], "string or a list"),
        ("target_modules", "(a+)+$", "exponential"),
        ("target_modules", "(a|aa)*$", "exponential"),
        ("target_modules", "((ab)*)*", "exponential"),
        ("target_modules", ".*" * 7, "at most 6 repeats"),
        ("target_modules", "a" * 5000, "5000 characters"),
        ("layers_to_transform", ["1"], "whole number"),
        ("layers_pattern", {"a": 1}, "string or a list"),
        ("base_model_name_or_path", 3, "must be a string"),
    ],
)
def test_what_is_not_applied_is_refused_by_name(key: str, value: object, message: str) -> None:
    with pytest.raises(AdapterRefused, match=message) as refusal:
        parse(**{key: value})
    assert "'support'" in refusal.value.message
    assert "adapter_config.json" in refusal.value.message


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cannot be read as JSON"),
        (b"{", "cannot be read as JSON"),
        (b"[]", "no JSON object"),
        (b"\xff\xfe{}", "cannot be read as JSON"),
        (b"\xef\xbb\xbf{}", "cannot be read as JSON"),
        (b'{"r": NaN}', "NaN is no JSON number"),
        (b'{"r": 4, "r": 8}', "occurs twice"),
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        (b'{"peft_type":' + b'{"a":' * 100_000, "nested too deeply"),
        (b'{"r": ' + b"9" * 5000 + b"}", "cannot be read as JSON"),
    ],
    ids=range(10),
)
def test_bad_json_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(AdapterRefused, match=message):
        parse_peft_config(data, adapter="support")


@pytest.mark.parametrize("use_rslora", [False, True])
def test_scale_is_alpha_over_rank_or_its_root(use_rslora: bool) -> None:
    config = parse(
        r=16, lora_alpha=8, use_rslora=use_rslora, rank_pattern={"o_proj": 4}, alpha_pattern={"o_proj": 3}
    )
    assert config.scale("model.layers.0.self_attn.q_proj") == (2.0 if use_rslora else 0.5)
    assert config.scale("model.layers.0.self_attn.o_proj") == (1.5 if use_rslora else 0.75)


PATTERNS = [
    "q_proj",
    "proj",
    "layers.1.self_attn.q_proj",
    r"^model\.layers\.1.*",
    r"layers\.\d+\.mlp\..*",
    "(up|o)_proj",
]


def test_patterns_match_as_pefts_own_function_does() -> None:
    ranks = {pattern: rank for rank, pattern in enumerate(PATTERNS, 2)}
    config = parse(r=64, rank_pattern=ranks)
    found = {module: config.rank(module) for module in MODULES}
    assert found == {module: ranks.get(get_pattern_key(ranks.keys(), module), 64) for module in MODULES}
    assert len(set(found.values())) > 3


TARGETS: list[dict[str, Any]] = [
    {"target_modules": ["q_proj"]},
    {"target_modules": ["proj"]},
    {"target_modules": ["model.layers.1.mlp.up_proj", "o_proj"]},
    {"target_modules": r".*\.layers\.1\..*"},
    {"target_modules": r"layers\.1"},
    {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": 11, "layers_pattern": "layers"},
    {"target_modules": ["down_proj"], "layers_to_transform": 3, "layers_pattern": ["experts"]},
    {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["self_attn.q_proj"]},
    {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*layers\.11\..*"},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": []},
]


@pytest.mark.parametrize("fields", TARGETS, ids=range(len(TARGETS)))
def test_targets_are_pefts_own(fields: dict[str, Any]) -> None:
    theirs = LoraConfig(**fields)
    ours = parse(**fields)

    def matches(module: str) -> bool:
        found = check_target_module_exists(theirs, module)
        return bool(found) and type(found).__name__ != "_ExcludedModule"

    assert [ours.targets(module) for module in MODULES] == [matches(module) for module in MODULES]


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?:.*?(?:vision|image).*?(?:self_attn|mlp).*?(?:k_proj|v_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:mlp)\.up)",
        r"model\.layers\.(0|1|2)\.self_attn\.(q|v)_proj",
        r"^(?!.*experts).*layers\.([0-9]|1[0-5])\..*(q_proj|up_proj)$",
    ],
)
def test_patterns_that_people_write_are_allowed_and_quick(pattern: str) -> None:
    config = parse(target_modules=pattern)
    began = time.perf_counter()
    for layer in range(64):
        config.targets(f"model.layers.{layer}.self_attn.some_long_projection_name")
    assert time.perf_counter() - began < 1.0
