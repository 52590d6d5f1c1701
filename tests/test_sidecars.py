import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from adapterd.core import BaseSpec
from adapterd.errors import AdapterRefused
from adapterd.sidecars import Sidecars, read_sidecars
from adapterd.token_table import TokenizerIdentity, tokenizer_fingerprint
from tests.tiny import byte_level_tokenizer

SPEC = BaseSpec("mini", "mini", "LlamaForCausalLM", "float32", 400, 256, {}, frozenset({2}))
TOKENIZER = byte_level_tokenizer()
PARSED = json.loads(TOKENIZER.backend_tokenizer.to_str())
IDENTITY = TokenizerIdentity(frozenset({tokenizer_fingerprint(PARSED)}), TOKENIZER.get_vocab())


def read(**files: Any) -> Sidecars:
    """File names with '_' for '.', and their content: bytes as they are, else as JSON."""
    contents = {
        name.replace("_json", ".json").replace("_jinja", ".jinja"): (
            value if isinstance(value, bytes) else json.dumps(value).encode()
        )
        for name, value in files.items()
    }
    return read_sidecars(contents.get, spec=SPEC, tokenizer=IDENTITY, adapter="support")


def test_nothing_beside_the_weights_leaves_all_to_the_base() -> None:
    assert read() == Sidecars(None, None, {})


def test_template_file_goes_before_tokenizer_config() -> None:
    config = {"chat_template": "config"}
    assert read(tokenizer_config_json=config).chat_template == "config"
    assert read(tokenizer_config_json=config, chat_template_jinja=b"file").chat_template == "file"


def test_default_of_named_templates_is_taken() -> None:
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert read(tokenizer_config_json={"chat_template": named}).chat_template == "d"
    with pytest.raises(AdapterRefused, match="none is 'default'"):
        read(tokenizer_config_json={"chat_template": named[:1]})


def test_the_bases_own_tokenizer_beside_the_weights_is_harmless() -> None:
    relaid = {**PARSED, "padding": None, "truncation": None, "version": "1.0"}
    merges = [" ".join(merge) for merge in PARSED["model"]["merges"]]
    relaid["model"] = {**PARSED["model"], "merges": merges}
    assert read(tokenizer_json=relaid, tokenizer_config_json={"eos_token": "<|im_end|>"}) == read()


def drop_merge(parsed: dict[str, Any]) -> None:
    parsed["model"]["merges"] = parsed["model"]["merges"][:-1]


def add_token(parsed: dict[str, Any]) -> None:
    parsed["added_tokens"].append({**parsed["added_tokens"][0], "id": 400, "content": "<new>"})


def swap_ids(parsed: dict[str, Any]) -> None:
    vocabulary = parsed["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def test_a_file_that_was_found_to_be_the_bases_is_not_parsed_again() -> None:
    identity = TokenizerIdentity(IDENTITY.fingerprints, IDENTITY.token_ids)
    file = json.dumps(PARSED).encode()
    parsed: list[bytes] = []

    def parse(data: bytes) -> Any:
        parsed.append(data)
        return json.loads(data)

    assert identity.is_same(file, parse)
    assert identity.is_same(file, parse)
    assert identity.is_same(file + b" ", parse)
    assert parsed == [file, file + b" "]
    other = json.dumps({**PARSED, "added_tokens": []}).encode()
    assert not identity.is_same(other, parse)
    assert not identity.is_same(other, parse)


@pytest.mark.parametrize("change", [drop_merge, add_token, swap_ids])
def test_another_tokenizer_is_refused(change: Callable[[dict[str, Any]], None]) -> None:
    parsed = json.loads(json.dumps(PARSED))
    change(parsed)
    with pytest.raises(AdapterRefused, match=r"tokenizer\.json differs"):
        read(tokenizer_json=parsed)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_json": {"model": 5}}, "cannot be understood"),
        ({"tokenizer_json": {"x": 1}}, "cannot be understood"),
        ({"added_tokens_json": {"<new>": 400}}, "no such token"),
        ({"added_tokens_json": {"<|im_end|>": 7}}, "the base has it as 2"),
        ({"tokenizer_config_json": {"added_tokens_decoder": {"9": {"content": "<x>"}}}}, "no such token"),
        ({"tokenizer_config_json": {"eos_token": "<nowhere>"}}, "no token of the base"),
        ({"tokenizer_config_json": {"chat_template": 5}}, "must be a string"),
        ({"chat_template_jinja": b"\xff"}, "not UTF-8"),
        ({"generation_config_json": {"eos_token_id": 400}}, "below 400"),
        ({"generation_config_json": {"eos_token_id": []}}, "below 400"),
        ({"generation_config_json": {"eos_token_id": "2"}}, "below 400"),
        ({"generation_config_json": {"do_sample": "yes"}}, "true or false"),
        ({"generation_config_json": {"do_sample": True, "temperature": -1}}, "out of range"),
        ({"generation_config_json": {"do_sample": True, "top_p": 0}}, "out of range"),
        ({"generation_config_json": {"do_sample": True, "top_p": True}}, "out of range"),
        ({"generation_config_json": {"do_sample": True, "top_k": 1.5}}, "whole number"),
        ({"generation_config_json": {"num_beams": 4}}, "num_beams=4 is not applied"),
        ({"generation_config_json": {"no_repeat_ngram_size": 3}}, "no_repeat_ngram_size=3 is not applied"),
        ({"generation_config_json": b"{"}, "cannot be read as JSON"),
    ],
)
def test_what_cannot_be_applied_is_refused(files: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterRefused, match=message) as refusal:
        read(**files)
    assert "'support'" in refusal.value.message


def test_end_tokens_come_from_generation_config_and_tokenizer_config() -> None:
    assert read(generation_config_json={"eos_token_id": [0, 5]}).eos_token_ids == {0, 5}
    assert read(generation_config_json={"eos_token_id": 2}).eos_token_ids is None
    assert read(tokenizer_config_json={"eos_token": "<|endoftext|>"}).eos_token_ids == {0, 2}
    assert read(tokenizer_config_json={"eos_token": {"content": "<|im_end|>"}}).eos_token_ids is None


def test_an_end_token_beyond_the_vocabulary_is_refused() -> None:
    """The tokenizer has it and the model does not: no answer could end with it."""
    small = replace(SPEC, vocab_size=2, eos_token_ids=frozenset({0}))
    config = json.dumps({"eos_token": "<|im_end|>"}).encode()
    with pytest.raises(AdapterRefused, match="has the id 2, and the base has 2 tokens"):
        read_sidecars(
            {"tokenizer_config.json": config}.get, spec=small, tokenizer=IDENTITY, adapter="support"
        )


def test_sampling_defaults_hold_only_where_sampling_is_on() -> None:
    values = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.0, "repetition_penalty": 1.1}
    assert read(generation_config_json={"do_sample": True, **values}).generation_defaults == values
    assert read(generation_config_json=values).generation_defaults == {"repetition_penalty": 1.1}
    assert read(generation_config_json={"do_sample": False, **values}).generation_defaults == {
        "temperature": 0.0,
        "repetition_penalty": 1.1,
    }


def test_what_transformers_writes_by_itself_is_accepted() -> None:
    from transformers import GenerationConfig

    written = GenerationConfig(eos_token_id=2, pad_token_id=0).to_dict()
    assert read(generation_config_json=written).eos_token_ids is None
