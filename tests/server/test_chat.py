"""/v1/chat/completions: shapes and counts as OpenAI sends them."""

import json
from typing import Any

import httpx
import pytest
from pydantic import TypeAdapter

from adapterd.server.responses import ChatCompletion, ChatCompletionChunk
from tests.server.fakes import ANSWER, SUPPORT, FakeDaemon

pytestmark = pytest.mark.anyio

MESSAGES = [{"role": "user", "content": "Hi"}]
PROMPT = b"user:Hi\n"
ANSWER_BYTES = ANSWER.encode()


async def ask(client: httpx.AsyncClient, **fields: object) -> dict[str, Any]:
    body = {"model": "tiny", "messages": MESSAGES, **fields}
    response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return TypeAdapter(ChatCompletion).validate_python(response.json())


async def stream(client: httpx.AsyncClient, **fields: object) -> list[dict[str, Any]]:
    body = {"model": "tiny", "messages": MESSAGES, "stream": True, **fields}
    response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [
        TypeAdapter(ChatCompletionChunk).validate_python(json.loads(e.removeprefix("data: "))) for e in events
    ]


async def test_a_whole_answer(client: httpx.AsyncClient) -> None:
    answer = await ask(client)
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["model"] == "tiny"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": ANSWER, "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    assert answer["usage"] == {
        "prompt_tokens": len(PROMPT),
        "completion_tokens": len(ANSWER_BYTES),
        "total_tokens": len(PROMPT) + len(ANSWER_BYTES),
        "prompt_tokens_details": {"cached_tokens": 4},
    }


async def test_a_stream_is_role_then_content_then_reason(client: httpx.AsyncClient) -> None:
    chunks = await stream(client)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(choice["delta"].get("content", "") for choice in choices) == ANSWER
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
    assert choices[-1]["delta"] == {}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)


async def test_usage_comes_in_a_last_chunk_without_choices(client: httpx.AsyncClient) -> None:
    *chunks, last = await stream(client, stream_options={"include_usage": True})
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"] == (await ask(client))["usage"]


async def test_n_answers_are_numbered_and_each_opens_with_its_role(client: httpx.AsyncClient) -> None:
    answer = await ask(client, n=3)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert answer["usage"]["completion_tokens"] == 3 * len(ANSWER_BYTES)
    assert answer["usage"]["prompt_tokens"] == len(PROMPT)
    chunks = await stream(client, n=3)
    roles = [chunk["choices"][0]["index"] for chunk in chunks if "role" in chunk["choices"][0]["delta"]]
    assert sorted(roles) == [0, 1, 2]


async def test_streamed_or_not_never_depends_on_the_accept_header(client: httpx.AsyncClient) -> None:
    response = await client.post(
        "/v1/chat/completions",
        json={"model": "tiny", "messages": MESSAGES},
        headers={"accept": "text/event-stream"},
    )
    assert response.headers["content-type"] == "application/json"


async def test_logprobs_of_each_token_with_its_bytes(client: httpx.AsyncClient) -> None:
    answer = await ask(client, logprobs=True, top_logprobs=2)
    content = answer["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(item["bytes"]) for item in content) == ANSWER_BYTES
    assert content[0] == {
        "token": "G",
        "logprob": -0.25,
        "bytes": [ord("G")],
        "top_logprobs": [
            {"token": "G", "logprob": -0.25, "bytes": [ord("G")]},
            {"token": "\x00", "logprob": -9999.0, "bytes": [0]},
        ],
    }
    chunks = await stream(client, logprobs=True, top_logprobs=2)
    streamed = [
        item for c in chunks if c["choices"][0]["logprobs"] for item in c["choices"][0]["logprobs"]["content"]
    ]
    assert streamed == content


async def test_token_ids_where_vllm_has_them(client: httpx.AsyncClient) -> None:
    answer = await ask(client, return_token_ids=True)
    assert answer["prompt_token_ids"] == list(PROMPT)
    assert answer["choices"][0]["token_ids"] == list(ANSWER_BYTES)
    first, *others = await stream(client, return_token_ids=True)
    assert first["prompt_token_ids"] == list(PROMPT)
    assert all("prompt_token_ids" not in chunk for chunk in others)
    streamed = [token for chunk in others for token in chunk["choices"][0].get("token_ids", ())]
    assert streamed == list(ANSWER_BYTES)


async def test_the_answer_takes_the_rest_of_the_context_by_default(
    client: httpx.AsyncClient, daemon: FakeDaemon
) -> None:
    await ask(client)
    assert daemon.engine.requests[0].params.max_tokens == 200 - len(PROMPT)
    await ask(client, max_completion_tokens=3)
    assert daemon.engine.requests[1].params.max_tokens == 3


async def test_an_adapter_is_named_in_answer_and_header_and_brings_its_defaults(
    client: httpx.AsyncClient, daemon: FakeDaemon
) -> None:
    response = await client.post(
        "/v1/chat/completions", json={"model": "support", "messages": MESSAGES, "top_k": 3}
    )
    assert response.json()["model"] == "tiny:support"
    assert response.headers["x-adapterd-digest"] == SUPPORT.digest
    request = daemon.engine.requests[0]
    assert request.mix == ((SUPPORT, 1.0),)
    assert (request.params.temperature, request.params.top_k) == (0.5, 3)


async def test_messages_reach_the_renderer_as_text(client: httpx.AsyncClient, daemon: FakeDaemon) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "c", "tool_calls": None, "refusal": None},
    ]
    await ask(client, messages=messages)
    prompt = bytes(daemon.engine.requests[0].prompt_token_ids)
    assert prompt == b"system:Be brief.\nuser:a\nb\nassistant:c\n"
