"""Requests that are hardly HTTP: answered or closed at once, and never kept."""

import socket

import pytest

from adapterd.server.app import create_app
from adapterd.server.state import ServerState
from tests.server.conftest import listening

BODY = b'{"model":"tiny","prompt":"x"}'
POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
CHUNKS = b"1\r\n \r\n" * 65_536 + b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)


def answer_to(url: str, request: bytes) -> bytes:
    """The status line, or nothing if the server has closed the connection."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        try:
            connection.sendall(request)
            return connection.recv(1000).split(b"\r\n")[0]
        except ConnectionError:
            return b""


@pytest.mark.parametrize(
    ("request_bytes", "answers"),
    [
        (
            b"GET /livez HTTP/1.1\r\nHost: x\r\nA: " + b"x" * 2**25 + b"\r\n\r\n",
            (b"", b"HTTP/1.1 400 Bad Request"),
        ),
        (b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n", (b"HTTP/1.1 400 Bad Request",)),
        (POST + b"Content-Length: x\r\n\r\n", (b"HTTP/1.1 400 Bad Request",)),
        (POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello", (b"HTTP/1.1 400 Bad Request",)),
        (
            POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            (b"HTTP/1.1 400 Bad Request",),
        ),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n" + CHUNKS, (b"HTTP/1.1 200 OK",)),
        (POST + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY, (b"HTTP/1.1 200 OK",)),
    ],
    ids=[
        "endless header",
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
        assert answer_to(url, b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n") == b"HTTP/1.1 200 OK"
