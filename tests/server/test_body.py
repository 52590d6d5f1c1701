"""Bodies that are no plain JSON object are refused quickly, with the right status, before anything reads them."""

import asyncio
import json
import time

import httpx
import pytest
from starlette.requests import Request
from starlette.types import Message

from adapterd.errors import InvalidRequest
from adapterd.server.body import MAX_BODY_BYTES, BodyTooSlow, parse_json, read_json
from adapterd.server.protocol import CompletionRequest
from adapterd.server.validation import validate

JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "EOF"),
        (b"[]", "object"),
        (b"3", "object"),
        (b'{"a": 1', "EOF"),
        (b'{"a": 1} x', "trailing"),
        (b'{"a": NaN}', "expected value"),
        (b'{"a": -Infinity}', "invalid number"),
        (b'{"a": 1, "a": 2}', "occurs twice"),
        (b'{"a": {"b": 1, "b": 2}}', "occurs twice"),
        (b'{"a": "\xff"}', "unicode"),
        (b"\xef\xbb\xbf{}", "expected value"),
        (b'{"a": "\\ud800"}', "escape"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "recursion"),
        (b'{"a": ' + b"9" * 5000 + b"}", "out of range"),
    ],
)
def test_refused(body: bytes, reason: str) -> None:
    began = time.thread_time()
    with pytest.raises(InvalidRequest, match=reason) as raised:
        parse_json(body)
    assert time.thread_time() - began < 0.05
    assert raised.value.code == "invalid_json"
    json.dumps(raised.value.message, ensure_ascii=False).encode()


def test_a_surrogate_pair_is_one_character() -> None:
    assert parse_json(b'{"a": "\\ud83d\\ude00"}') == {"a": "😀"}


def test_a_huge_exponent_is_refused_by_the_field_not_served_as_infinity() -> None:
    body = parse_json(b'{"model": "m", "prompt": "x", "temperature": 1e999}')
    with pytest.raises(InvalidRequest, match="temperature"):
        validate(CompletionRequest, body)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({"content-type": "text/plain"}, 415, "unsupported_media_type"),
        ({"content-type": ""}, 415, "unsupported_media_type"),
        ({**JSON, "content-encoding": "gzip"}, 415, "unsupported_media_type"),
        ({**JSON, "content-length": str(MAX_BODY_BYTES + 1)}, 413, "request_too_large"),
        ({**JSON, "content-length": "9" * 400}, 413, "request_too_large"),
    ],
)
async def test_headers_decide_before_the_body_is_read(
    client: httpx.AsyncClient, headers: dict[str, str], status: int, code: str
) -> None:
    response = await client.post("/v1/completions", content=b"{}", headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)


@pytest.mark.anyio
async def test_a_body_without_a_length_is_cut_at_the_limit(client: httpx.AsyncClient) -> None:
    async def chunks():
        for _ in range(5):
            yield b" " * 2**20

    response = await client.post("/v1/completions", content=chunks(), headers=JSON)
    assert response.status_code == 413


@pytest.mark.anyio
async def test_a_large_body_within_the_limit_is_read(client: httpx.AsyncClient) -> None:
    body = {"model": "tiny", "prompt": [1] * 200_000}
    response = await client.post("/v1/completions", json=body)
    assert response.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.anyio
async def test_a_body_that_does_not_come_is_given_up() -> None:
    async def receive() -> Message:
        await asyncio.sleep(0.01)
        return {"type": "http.request", "body": b" ", "more_body": True}

    headers = [(b"content-type", b"application/json")]
    request = Request({"type": "http", "headers": headers}, receive)
    with pytest.raises(BodyTooSlow, match=r"within 0\.05 seconds"):
        await read_json(request, timeout_seconds=0.05)
