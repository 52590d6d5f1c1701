"""Any mixture of options against the real daemon is answered, whole; a bad one is named, and the daemon lives on."""

import json

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# option: values that are served, values that are refused
OPTIONS: dict[str, tuple[list[object], list[object]]] = {
    "n": ([1, 2, 3], [0]),
    "stream": ([True, False, None], ["yes"]),
    "temperature": ([0, 0.001, 1, 2, None], [-1, 2.1, "1"]),
    "top_p": ([0.0001, 0.5, 1], [0, 1.1]),
    "top_k": ([-1, 0, 1, 5, 1000], [-2, 2**31]),
    "min_p": ([0, 0.5, 1], [2]),
    "seed": ([0, -1, 2**63 - 1, -(2**63)], [2**63]),
    "presence_penalty": ([-2, 0, 2], [3]),
    "frequency_penalty": ([-2, 0, 2], [-3]),
    "repetition_penalty": ([0.01, 1, 100], [0]),
    "logit_bias": ([{}, {"3": -100, "5": 100}], [{"-1": 1}, {"3": 101}, {"99999": 1}]),
    "stop": (["e", ["a", " t", "\n", "日"]], ["", [""]]),
    "stop_token_ids": ([[], [7, 8, 9]], [[-1], [99_999]]),
    "min_tokens": ([0, 1, 5], [6, 100]),
    "ignore_eos": ([True, False], [0]),
    "skip_special_tokens": ([True, False], ["no"]),
    "include_stop_str_in_output": ([True, False], [1]),
    "return_token_ids": ([True, False], [1]),
    "cache_salt": (["a", "b", None], ["", 1]),
    "model": (["tiny", "base", "tiny:support", "medical", "tiny:support*0.5+medical*-1"], ["x", "tiny:a+b"]),
}
TEXT_OPTIONS = OPTIONS | {
    "echo": ([True, False], [1]),
    "logprobs": ([0, 1, 20, None], [21, True]),
    "prompt": (["Hello", ["a", "é日"], [1, 5, 300], [[1], [2, 3]]], ["", [], [99_999]]),
}
CHAT_OPTIONS = OPTIONS | {
    "logprobs": ([True], [2]),
    "top_logprobs": ([0, 20, None], [21]),
    "max_completion_tokens": ([5, None], [0]),
}
DEFAULTS: dict[str, object] = {"model": "tiny", "max_tokens": 5}
TEXT = ("/v1/completions", DEFAULTS | {"prompt": "Hello"}, TEXT_OPTIONS)
CHAT = (
    "/v1/chat/completions",
    DEFAULTS | {"messages": [{"role": "user", "content": "Hello"}], "logprobs": True},
    CHAT_OPTIONS,
)


def served(options: dict[str, tuple[list[object], list[object]]]) -> st.SearchStrategy[dict[str, object]]:
    return st.fixed_dictionaries(
        {}, optional={name: st.sampled_from(good) for name, (good, _) in options.items()}
    )


def check_answer(body: dict[str, object], response: httpx.Response) -> None:
    assert response.status_code == 200, response.text
    if body.get("stream"):
        *events, done, _ = response.text.split("\n\n")
        assert done == "data: [DONE]"
        chunks = [json.loads(event.removeprefix("data: ")) for event in events]
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
    else:
        choices = response.json()["choices"]
    prompts = body.get("prompt")
    several = isinstance(prompts, list) and not isinstance(prompts[0], int)
    num_choices = int(str(body.get("n", 1))) * (len(prompts) if several else 1)
    ends = [(choice["index"], choice["finish_reason"]) for choice in choices if choice["finish_reason"]]
    assert sorted(index for index, _ in ends) == list(range(num_choices))
    assert {reason for _, reason in ends} <= {"stop", "length"}


gently = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.mark.parametrize(("path", "defaults", "options"), [TEXT, CHAT], ids=["text", "chat"])
@gently
@given(data=st.data())
def test_options_that_are_served_are_served_together(
    server_url: str,
    path: str,
    defaults: dict[str, object],
    options: dict[str, tuple[list[object], list[object]]],
    data: st.DataObject,
) -> None:
    body = defaults | data.draw(served(options))
    check_answer(body, httpx.post(f"{server_url}{path}", json=body, timeout=30))


@pytest.mark.parametrize(("path", "defaults", "options"), [TEXT, CHAT], ids=["text", "chat"])
def test_one_option_that_is_not_is_named(
    server_url: str,
    path: str,
    defaults: dict[str, object],
    options: dict[str, tuple[list[object], list[object]]],
) -> None:
    for name, (_, refused) in options.items():
        for value in refused:
            response = httpx.post(f"{server_url}{path}", json=defaults | {name: value})
            error = response.json()["error"]
            assert response.status_code == (404 if name == "model" else 400), (name, value)
            assert error["param"].startswith(name)
            assert "0x" not in error["message"]


def test_all_memory_is_back_after_it(server_url: str) -> None:
    text = httpx.get(f"{server_url}/metrics").text
    for name in ("adapterd_kv_blocks_held", "adapterd_adapter_held_bytes", "vllm:num_requests_running"):
        assert f'{name}{{model_name="tiny"}} 0.0' in text
    assert httpx.get(f"{server_url}/livez").status_code == 200
