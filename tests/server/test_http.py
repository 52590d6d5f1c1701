"""Requests that are hardly HTTP, and clients that stand still: answered, closed or cut, and never kept.

And clients that only are slow, which are served.
"""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from adapterd.server.app import create_app
from adapterd.server.http import BoundedHttp
from adapterd.server.sse import EventStream, unless_disconnected
from adapterd.server.state import ServerState
from tests.server.conftest import eventually, listening
from tests.server.fakes import FakeDaemon

BODY = b'{"model":"tiny","prompt":"x"}'
GET = b"GET /livez HTTP/1.1\r\nHost: x\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"
CHUNKS = b"1\r\n \r\n" * 65_536 + b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
BIG = 2**25
"""More bytes than sockets take ahead of a reader."""


class Impatient(BoundedHttp):
    request_seconds = 1.0
    send_seconds = 1.0
    look_seconds = 0.05


@contextmanager
def connected(url: str) -> Iterator[socket.socket]:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        yield connection


def answer_to(url: str, request: bytes) -> bytes:
    """The status line, or nothing if the server has closed the connection."""
    with connected(url) as connection:
        try:
            connection.sendall(request)
            return connection.recv(1000).split(b"\r\n")[0]
        except ConnectionError:
            return b""


def read_to_the_end(connection: socket.socket) -> bytes:
    """What comes until the server closes. Raises TimeoutError if it does not."""
    data = bytearray()
    try:
        while piece := connection.recv(2**16):
            data += piece
    except ConnectionError:
        pass
    return bytes(data)


@pytest.mark.parametrize(
    ("request_bytes", "answers"),
    [
        (GET + b"A: " + b"x" * 2**25 + b"\r\n\r\n", (b"", b"HTTP/1.1 400 Bad Request")),
        (GET + b"a:\r\n" * 10_000 + b"\r\n", (b"HTTP/1.1 400 Bad Request",)),
        (GET + b"A: " + b"x" * 60_000 + b"\r\n\r\n", (b"HTTP/1.1 200 OK",)),
        (b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n", (b"HTTP/1.1 400 Bad Request",)),
        (POST + b"Content-Length: x\r\n\r\n", (b"HTTP/1.1 400 Bad Request",)),
        (POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello", (b"HTTP/1.1 400 Bad Request",)),
        (POST + b"Content-Length: 5\r\n" + CHUNKED + b"0\r\n\r\n", (b"HTTP/1.1 400 Bad Request",)),
        (POST + CHUNKED + CHUNKS, (b"HTTP/1.1 200 OK",)),
        (POST + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY, (b"HTTP/1.1 200 OK",)),
    ],
    ids=[
        "endless header",
        "many tiny headers",
        "large header",
        "long url",
        "no length",
        "two lengths",
        "length and chunks",
        "many chunks",
        "plain",
    ],
)
def test_odd_requests(state: ServerState, request_bytes: bytes, answers: tuple[bytes, ...]) -> None:
    with listening(create_app(state)) as url:
        assert answer_to(url, request_bytes) in answers
        assert answer_to(url, GET + b"\r\n") == b"HTTP/1.1 200 OK"


@pytest.mark.parametrize(
    "flood",
    [b"0\r\n" + b"a: b\r\n" * 200_000, b"0\r\na: " + b"x" * 2**20, b"1;" + b"x" * 2**20],
    ids=["many trailers", "a long trailer", "a long extension"],
)
def test_what_stands_around_chunks_has_an_end(state: ServerState, flood: bytes) -> None:
    with listening(create_app(state)) as url, connected(url) as connection:
        connection.sendall(GET + CHUNKED)
        try:
            connection.sendall(flood)
        except ConnectionError:
            return
        read_to_the_end(connection)


@pytest.mark.parametrize(
    ("begins", "goes_on"),
    [
        (b"", b""),
        (b"", b"\r\n"),
        (GET + b"\r\n", b"\r\n"),
        (GET + b"A: ", b"x"),
        (GET + CHUNKED + b"0\r\n", b"a: b\r\n"),
        (b"POST /nowhere HTTP/1.1\r\nHost: x\r\n" + CHUNKED, b"1\r\nx\r\n"),
    ],
    ids=["nothing", "empty lines", "empty lines after a request", "a head", "trailers", "an unwanted body"],
)
def test_a_client_that_does_not_come_to_the_point_is_cut(
    state: ServerState, begins: bytes, goes_on: bytes
) -> None:
    with listening(create_app(state), http=Impatient) as url, connected(url) as connection:
        connection.sendall(begins)
        connection.settimeout(0.1)

        def is_closed() -> bool:
            try:
                connection.sendall(goes_on)
                return not connection.recv(2**16)
            except TimeoutError:
                return False
            except ConnectionError:
                return True

        eventually(is_closed)


def test_a_client_that_is_only_slow_is_served(state: ServerState, daemon: FakeDaemon) -> None:
    """One connection: it is idle for a while, then a body comes in pieces, then a token now and then."""
    daemon.engine.answer, daemon.engine.step_seconds = b"abc", 1.5
    streamed = BODY[:-1] + b',"stream":true}'
    with listening(create_app(state), http=Impatient) as url, connected(url) as connection:
        for _ in range(3):
            connection.sendall(GET + b"\r\n")
            answer = b""
            while not answer.endswith(b'{"status":"ok"}'):
                piece = connection.recv(1000)
                assert piece, "the idle connection was cut"
                answer += piece
            time.sleep(0.5)
        connection.sendall(POST + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(streamed))
        for byte in range(0, len(streamed), 10):
            connection.sendall(streamed[byte : byte + 10])
            time.sleep(0.4)
        answer = read_to_the_end(connection)
        assert answer.startswith(b"HTTP/1.1 200 OK")
        assert answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


async def _big(request: Request) -> Response:
    return PlainTextResponse(b"x" * BIG)


def test_a_reader_that_takes_nothing_of_a_whole_answer_is_cut() -> None:
    lost = threading.Event()

    class Watched(Impatient):
        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            lost.set()

    with listening(Starlette(routes=[Route("/", _big)]), http=Watched) as url, connected(url) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert lost.wait(20)


def test_a_reader_that_takes_nothing_of_a_stream_ends_it(caplog: pytest.LogCaptureFixture) -> None:
    ended = threading.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def stream() -> None:
            events = EventStream(send, {})
            while True:
                await events.events([{"text": "x" * 2**16}])
                await asyncio.sleep(0)  # nothing else does once the client has gone

        assert scope["type"] == "http"
        try:
            await unless_disconnected(receive, stream())
        except ClientDisconnect:
            ended.set()

    with listening(app, http=Impatient) as url, connected(url) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert ended.wait(20)
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def test_a_reader_that_takes_a_little_at_a_time_gets_all_of_it() -> None:
    with listening(Starlette(routes=[Route("/", _big)]), http=Impatient) as url, connected(url) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        num_bytes = 0
        while num_bytes < BIG:
            piece = connection.recv(2**20)
            assert piece, f"cut after {num_bytes} bytes"
            num_bytes += len(piece)
            time.sleep(len(piece) / 2**23)


def test_a_second_request_before_the_answer_is_not_read(state: ServerState) -> None:
    with listening(create_app(state)) as url, connected(url) as connection:
        connection.sendall(2 * (POST + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY))
        answer = read_to_the_end(connection)
        assert answer.count(b"HTTP/1.1 ") == answer.count(b"HTTP/1.1 200 OK") == 1
        assert b"connection: close\r\n" in answer


@pytest.mark.parametrize("num_requests", [1, 2])
def test_a_client_that_leaves_is_noticed_whatever_else_it_sent(
    state: ServerState, daemon: FakeDaemon, num_requests: int
) -> None:
    daemon.engine.is_held = True
    with listening(create_app(state)) as url:
        with connected(url) as connection:
            connection.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY)
            eventually(lambda: daemon.engine.running)
            for _ in range(num_requests - 1):
                connection.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY)
        try:
            eventually(lambda: not daemon.engine.running)
        finally:
            daemon.engine.release()  # or a daemon that has not noticed would never end
        assert len(daemon.engine.requests) == 1
