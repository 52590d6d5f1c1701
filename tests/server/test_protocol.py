"""What a body may say: every field at its bounds, every neutral value, every refusal by name."""

import pytest

from adapterd.errors import InvalidRequest
from adapterd.server.protocol import UNSUPPORTED, ChatCompletionRequest, CompletionRequest
from adapterd.server.validation import validate

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "m", "prompt": "hi"}
NUMBERS = ("n", "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "seed")
NUMBERS += ("presence_penalty", "frequency_penalty", "repetition_penalty")


def chat(**fields: object) -> ChatCompletionRequest:
    return validate(ChatCompletionRequest, {**CHAT, **fields})


def refusal(model: type = ChatCompletionRequest, /, **fields: object) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as raised:
        validate(model, {**(CHAT if model is ChatCompletionRequest else TEXT), **fields})
    return raised.value


@pytest.mark.parametrize("field", NUMBERS)
@pytest.mark.parametrize("value", [True, "1", [], {}, 10**30, -(10**30), float("nan"), float("inf")])
def test_a_number_must_be_a_finite_number_within_bounds(field: str, value: object) -> None:
    assert refusal(**{field: value}).param == field


@pytest.mark.parametrize(
    ("field", "accepted", "refused"),
    [
        ("n", [1, 128], [0, 129, 1.0]),
        ("max_tokens", [1, 2**31 - 1], [0, -1, 2**31]),
        ("max_completion_tokens", [1], [0]),
        ("temperature", [0, 0.0, 2], [-0.1, 2.1]),
        ("top_p", [0.1, 1], [0, 1.1]),
        ("top_k", [-1, 0, 5], [-2, 2**31]),
        ("min_p", [0, 1], [-0.1, 1.1]),
        ("seed", [0, -(2**63), 2**63 - 1], [2**63]),
        ("presence_penalty", [-2, 2], [-2.1, 2.1]),
        ("repetition_penalty", [0.1, 1.5], [0, -1]),
        ("stop", ["x", ["x"] * 16], ["", [""], ["x"] * 17, ["x" * 257], [1], {}]),
        ("stop_token_ids", [[], [0, 5]], [[-1], [2**31], ["1"], 5]),
        ("logit_bias", [{}, {"5": -100}], [{"-1": 1}, {"x": 1}, {"5": 101}, {"5": "1"}, {"5": True}, []]),
        ("stream", [True, False], [1, "true"]),
        ("metadata", [{"a": "b"}], [{"a": 1}, {str(i): "" for i in range(17)}]),
        ("chat_template_kwargs", [{"enable_thinking": False, "x": 1.5}], [{"x": [1]}, {"x": {}}, []]),
        ("response_format", [{"type": "text"}], [{"type": "json_object"}, {}]),
        ("tools", [[]], [[{"type": "function"}]]),
        ("store", [False], [True]),
        ("service_tier", ["auto", "default"], ["flex"]),
        ("modalities", [["text"]], [["audio"]]),
        ("model", ["m"], ["", 3, "m" * 513]),
        ("messages", [CHAT["messages"]], [[], "hi", [3], [{}], [{"role": "tool", "content": ""}]]),
    ],
)
def test_bounds(field: str, accepted: list[object], refused: list[object]) -> None:
    for value in accepted:
        chat(**{field: value})
    for value in refused:
        param = refusal(**{field: value}).param
        assert param is not None
        assert param.startswith(field)


@pytest.mark.parametrize("field", sorted(ChatCompletionRequest.model_fields.keys() - CHAT.keys()))
def test_null_equals_absent(field: str) -> None:
    assert chat(**{field: None}) == chat()


@pytest.mark.parametrize("field", sorted(UNSUPPORTED))
def test_a_known_field_that_is_not_done_is_refused_with_the_way_out(field: str) -> None:
    error = refusal(**{field: "x"})
    assert (error.param, error.code) == (field, "unsupported_parameter")
    assert UNSUPPORTED[field] in error.message


def test_an_unknown_field_is_refused_with_the_nearest_name() -> None:
    error = refusal(temprature=1)
    assert (error.param, error.code) == ("temprature", "unknown_parameter")
    assert "Did you mean 'temperature'?" in error.message


def test_a_missing_field_is_named() -> None:
    error = refusal(messages=[{"role": "user"}])
    assert (error.param, error.code) == ("messages[0].content", "missing_required_parameter")


def test_only_text_parts_are_read() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat(messages=[{"role": "user", "content": parts}]).messages[0].content == "a\nb"
    image = [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}]
    error = refusal(messages=[{"role": "user", "content": image}])
    assert error.param == "messages[0].content"
    assert "'image_url'" in error.message
    assert "169.254" not in error.message


@pytest.mark.parametrize("prompt", ["", [], [""], [[]], [1, "a"], [True], [1.5], {}, ["a", []], [[1, "a"]]])
def test_a_prompt_has_one_of_four_shapes_and_is_not_empty(prompt: object) -> None:
    assert refusal(CompletionRequest, prompt=prompt).param == "prompt"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"best_of": 2}, "best_of"),
        ({"n": 128, "prompt": ["a", "b"]}, "prompt"),
        ({"suffix": "x"}, "suffix"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
    ],
)
def test_completions_refuse_what_does_not_go_together(fields: dict[str, object], param: str) -> None:
    assert refusal(CompletionRequest, **fields).param == param


def test_top_logprobs_need_logprobs() -> None:
    assert refusal(top_logprobs=2).param == "top_logprobs"
    assert chat(logprobs=True, top_logprobs=2).top_logprobs == 2


def test_a_long_value_of_a_client_is_not_repeated() -> None:
    assert "xxx" not in refusal(service_tier="x" * 1000).message
    assert len(refusal(**{"x" * 10_000: 1}).message) < 400
