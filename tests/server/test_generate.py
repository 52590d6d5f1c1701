"""The way through the rooms when it does not go well: everything is given back, and the client is told why."""

import asyncio
import json
import socket

import httpx
import pytest

from adapterd.errors import ContextLengthExceeded, Overloaded
from adapterd.server.app import create_app
from adapterd.server.state import ServerState
from tests.server.conftest import eventually, listening
from tests.server.fakes import FakeDaemon

BODY = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}


async def post(client: httpx.AsyncClient, **fields: object) -> httpx.Response:
    return await client.post("/v1/chat/completions", json={**BODY, **fields})


def counted(state: ServerState) -> set[str]:
    """The samples of requests and errors."""
    lines = state.metrics.render().decode().splitlines()
    return {line for line in lines if line.startswith(("adapterd_requests_total{", "adapterd_errors_total{"))}


@pytest.mark.anyio
async def test_an_unknown_model_is_404_in_openais_envelope(client: httpx.AsyncClient) -> None:
    response = await post(client, model="nobody")
    assert response.status_code == 404
    assert response.json() == {
        "error": {
            "message": "The model 'nobody' does not exist.",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }
    }


@pytest.mark.anyio
@pytest.mark.parametrize("stream", [False, True])
async def test_a_refusal_by_the_engine_keeps_its_status(
    client: httpx.AsyncClient, state: ServerState, daemon: FakeDaemon, stream: bool
) -> None:
    daemon.engine.refusal = Overloaded("the queue is full", retry_after_seconds=3)
    response = await post(client, stream=stream)
    assert (response.status_code, response.headers["retry-after"]) == (429, "3")
    daemon.engine.refusal = ContextLengthExceeded("too long")
    response = await post(client, stream=stream)
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert daemon.registry.leases == []
    assert counted(state) == {
        'adapterd_requests_total{adapter="base",outcome="failed"} 1.0',
        'adapterd_errors_total{code="overloaded"} 1.0',
        'adapterd_errors_total{code="context_length_exceeded"} 1.0',
    }


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"max_tokens": 500}, "max_tokens", "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": "x" * 300}]}, "messages", "context_length_exceeded"),
        ({"max_tokens": 3, "min_tokens": 4}, "min_tokens", "invalid_value"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "invalid_value"),
    ],
)
async def test_what_cannot_be_done_is_400_and_reaches_no_engine(
    client: httpx.AsyncClient, daemon: FakeDaemon, fields: dict[str, object], param: str, code: str
) -> None:
    response = await post(client, **fields)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, param, code)
    assert daemon.engine.requests == []
    assert daemon.registry.leases == []


@pytest.mark.anyio
async def test_the_engine_is_told_what_the_client_calls_its_prompt(
    client: httpx.AsyncClient, daemon: FakeDaemon
) -> None:
    await post(client)
    await client.post("/v1/completions", json={"model": "tiny", "prompt": "Hi"})
    assert [request.prompt_field for request in daemon.engine.requests] == ["messages", "prompt"]


@pytest.mark.anyio
async def test_a_sequence_that_fails_is_an_error_event_once_the_stream_has_begun(
    client: httpx.AsyncClient, state: ServerState, daemon: FakeDaemon
) -> None:
    daemon.engine.step_seconds = 0.01
    daemon.engine.breaks_at = 3
    response = await post(client, stream=True)
    *_, last, rest = response.text.split("\n\n")
    assert rest == ""
    assert json.loads(last.removeprefix("data: "))["error"]["message"] == "out of luck"
    daemon.engine.breaks_at = 0
    response = await post(client, stream=True)
    assert (response.status_code, response.json()["error"]["code"]) == (500, "generation_failed")
    assert counted(state) == {
        'adapterd_requests_total{adapter="base",outcome="failed"} 2.0',
        'adapterd_errors_total{code="generation_failed"} 2.0',
    }


@pytest.mark.anyio
async def test_one_failed_answer_of_several_ends_them_all(
    client: httpx.AsyncClient, daemon: FakeDaemon
) -> None:
    daemon.engine.breaks_at = 2
    response = await post(client, n=3)
    assert response.status_code == 500
    assert daemon.engine.running == {}


@pytest.mark.anyio
async def test_a_bug_of_ours_shows_nothing_of_itself(
    client: httpx.AsyncClient, state: ServerState, daemon: FakeDaemon
) -> None:
    daemon.engine.refusal = RuntimeError("secret at 0x7fd3a2")
    response = await post(client)
    assert response.status_code == 500
    assert "secret" not in response.text
    assert response.json()["error"]["code"] == "internal_error"
    assert daemon.registry.leases == []
    assert counted(state) == {
        'adapterd_requests_total{adapter="base",outcome="failed"} 1.0',
        'adapterd_errors_total{code="internal_error"} 1.0',
    }


@pytest.mark.anyio
async def test_requests_of_one_client_id_are_apart(client: httpx.AsyncClient, daemon: FakeDaemon) -> None:
    headers = {"x-request-id": "mine"}
    answers = await asyncio.gather(
        *(client.post("/v1/chat/completions", json=BODY, headers=headers) for _ in range(5))
    )
    assert {answer.headers["x-request-id"] for answer in answers} == {"mine"}
    assert len({request.id for request in daemon.engine.requests}) == 5


@pytest.mark.anyio
async def test_no_new_work_while_draining(client: httpx.AsyncClient, state: ServerState) -> None:
    state.drain.begin()
    response = await post(client)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "unavailable")
    assert state.drain.is_complete


class RawClient:
    """A client that can go away at any moment, as browsers do."""

    def __init__(self, url: str, **fields: object) -> None:
        host, port = url.removeprefix("http://").split(":")
        body = json.dumps({**BODY, **fields}).encode()
        self.socket = socket.create_connection((host, int(port)), timeout=5)
        self.socket.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            + f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )

    def close(self) -> None:
        self.socket.close()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("answer", ["x" * 150, ""], ids=["in the middle", "before the first token"])
def test_a_client_that_goes_away_frees_its_sequences(
    state: ServerState,
    daemon: FakeDaemon,
    caplog: pytest.LogCaptureFixture,
    stream: bool,
    answer: str,
) -> None:
    daemon.engine.answer = answer.encode()
    daemon.engine.step_seconds = 0.02
    daemon.engine.is_held = not answer
    with listening(create_app(state)) as url:
        client = RawClient(url, stream=stream, n=2)
        eventually(lambda: len(daemon.engine.running) == 2)
        client.close()
        eventually(lambda: not daemon.engine.running)
        eventually(lambda: not daemon.registry.leases and len(state.streams) == 0)
        assert state.drain.num_running == 0
        assert b'adapterd_requests_total{adapter="base",outcome="cancelled"} 1.0' in state.metrics.render()
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []
