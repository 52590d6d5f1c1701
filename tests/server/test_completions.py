"""/v1/completions: four shapes of prompt, echo, and log probabilities as parallel lists."""

import json
from typing import Any

import httpx
import pytest
from pydantic import TypeAdapter

from adapterd.server.responses import Completion
from tests.server.fakes import ANSWER, FakeDaemon

pytestmark = pytest.mark.anyio

ANSWER_BYTES = ANSWER.encode()


async def ask(client: httpx.AsyncClient, **fields: object) -> dict[str, Any]:
    response = await client.post("/v1/completions", json={"model": "tiny", **fields})
    assert response.status_code == 200, response.text
    return TypeAdapter(Completion).validate_python(response.json())


async def stream(client: httpx.AsyncClient, **fields: object) -> list[dict[str, Any]]:
    response = await client.post("/v1/completions", json={"model": "tiny", "stream": True, **fields})
    assert response.status_code == 200, response.text
    *events, done, _ = response.text.split("\n\n")
    assert done == "data: [DONE]"
    return [TypeAdapter(Completion).validate_python(json.loads(e.removeprefix("data: "))) for e in events]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [b"ab"]),
        (["ab", "c"], [b"ab", b"c"]),
        ([97, 98], [b"ab"]),
        ([[97], [98, 99]], [b"a", b"bc"]),
    ],
)
async def test_prompt_as_text_texts_ids_or_lists_of_ids(
    client: httpx.AsyncClient, daemon: FakeDaemon, prompt: object, expected: list[bytes]
) -> None:
    answer = await ask(client, prompt=prompt)
    assert [bytes(request.prompt_token_ids) for request in daemon.engine.requests] == expected
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(expected)))
    assert answer["usage"]["prompt_tokens"] == sum(len(ids) for ids in expected)


async def test_choices_of_several_prompts_are_numbered_prompt_by_prompt(client: httpx.AsyncClient) -> None:
    answer = await ask(client, prompt=["a", "b"], n=2, echo=True)
    assert [(choice["index"], choice["text"][0]) for choice in answer["choices"]] == [
        (0, "a"),
        (1, "a"),
        (2, "b"),
        (3, "b"),
    ]
    assert answer["usage"]["completion_tokens"] == 4 * len(ANSWER_BYTES)
    chunks = await stream(client, prompt=["a", "b"], n=2, echo=True)
    texts: dict[int, str] = {}
    for chunk in chunks:
        choice = chunk["choices"][0]
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    assert texts == {0: "a" + ANSWER, 1: "a" + ANSWER, 2: "b" + ANSWER, 3: "b" + ANSWER}


async def test_sixteen_tokens_by_default(client: httpx.AsyncClient, daemon: FakeDaemon) -> None:
    await ask(client, prompt="a")
    await ask(client, prompt="a" * 190)
    assert [request.params.max_tokens for request in daemon.engine.requests] == [16, 10]


async def test_a_stream_says_the_same_as_the_whole_answer(client: httpx.AsyncClient) -> None:
    whole = (await ask(client, prompt="ab", echo=True, logprobs=1))["choices"][0]
    *chunks, last = await stream(
        client, prompt="ab", echo=True, logprobs=1, stream_options={"include_usage": True}
    )
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(choice["text"] for choice in choices) == whole["text"] == "ab" + ANSWER
    for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [item for choice in choices for item in choice["logprobs"][key]] == whole["logprobs"][key]
    assert [choice["finish_reason"] for choice in choices][-1] == "stop"
    assert last["usage"]["completion_tokens"] == len(ANSWER_BYTES)


async def test_echo_without_an_answer_scores_the_prompt(client: httpx.AsyncClient) -> None:
    answer = await ask(client, prompt="ab", echo=True, max_tokens=0, logprobs=0)
    assert answer["choices"][0] == {
        "index": 0,
        "text": "ab",
        "logprobs": {
            "text_offset": [0, 1],
            "token_logprobs": [None, -0.5],
            "tokens": ["a", "b"],
            "top_logprobs": [None, {"b": -0.5}],
        },
        "finish_reason": "length",
        "stop_reason": None,
    }
    assert answer["usage"]["completion_tokens"] == 0


async def test_a_part_of_a_character_is_named_by_its_bytes_and_takes_no_room(
    client: httpx.AsyncClient,
) -> None:
    logprobs = (await ask(client, prompt="a", logprobs=0))["choices"][0]["logprobs"]
    assert logprobs["tokens"][:5] == ["G", "r", "bytes:\\xc3", "bytes:\\xbc", "bytes:\\xc3"]
    assert logprobs["text_offset"][:5] == [0, 1, 2, 2, 3]


async def test_token_ids_are_beside_each_choice(client: httpx.AsyncClient) -> None:
    choice = (await ask(client, prompt="ab", return_token_ids=True))["choices"][0]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([97, 98], list(ANSWER_BYTES))
