"""From a body to SamplingParams: every field arrives, and defaults come in the right order."""

import pytest

from adapterd.core import SamplingParams
from adapterd.server.protocol import ChatCompletionRequest, CompletionRequest
from adapterd.server.sampling import sampling_params
from adapterd.server.validation import validate
from tests.server.fakes import SPEC

TEXT = {"model": "m", "prompt": "hi"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
DEFAULTS = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2}


def test_every_field_arrives() -> None:
    fields = {
        "max_tokens": 9,
        "min_tokens": 2,
        "temperature": 0.3,
        "top_k": 4,
        "top_p": 0.8,
        "min_p": 0.2,
        "seed": 11,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.4,
        "frequency_penalty": -0.4,
        "logit_bias": {"3": 1.5},
        "stop": ["x", "y"],
        "stop_token_ids": [5],
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "logprobs": 2,
        "echo": True,
    }
    body = validate(CompletionRequest, {**TEXT, **fields})
    assert sampling_params(body, DEFAULTS, SPEC, 2) == SamplingParams(
        max_tokens=9,
        min_tokens=2,
        temperature=0.3,
        top_k=4,
        top_p=0.8,
        min_p=0.2,
        seed=11,
        repetition_penalty=1.3,
        presence_penalty=0.4,
        frequency_penalty=-0.4,
        logit_bias=((3, 1.5),),
        stop=("x", "y"),
        stop_token_ids=(5,),
        include_stop_str_in_output=True,
        ignore_eos=True,
        skip_special_tokens=False,
        logprobs=2,
        prompt_logprobs=2,
    )


def test_what_is_left_out_is_the_models_own_default_and_then_openais() -> None:
    body = validate(CompletionRequest, TEXT)
    own = sampling_params(body, DEFAULTS, SPEC, 2)
    assert {name: getattr(own, name) for name in DEFAULTS} == DEFAULTS
    assert sampling_params(body, {}, SPEC, 2) == SamplingParams(max_tokens=16)


def test_zero_is_a_value_and_not_left_out() -> None:
    body = validate(CompletionRequest, {**TEXT, "temperature": 0, "top_k": 0, "min_p": 0})
    params = sampling_params(body, DEFAULTS, SPEC, 2)
    assert (params.temperature, params.top_k, params.min_p) == (0.0, 0, 0.0)


def test_top_k_minus_one_is_off() -> None:
    body = validate(CompletionRequest, {**TEXT, "top_k": -1})
    assert sampling_params(body, DEFAULTS, SPEC, 2).top_k == 0


@pytest.mark.parametrize(
    ("fields", "expected"), [({}, None), ({"logprobs": True}, 0), ({"logprobs": True, "top_logprobs": 3}, 3)]
)
def test_chat_asks_for_alternatives(fields: dict[str, object], expected: int | None) -> None:
    body = validate(ChatCompletionRequest, {**CHAT, **fields})
    assert sampling_params(body, {}, SPEC, 2).logprobs == expected
