"""A server that speaks the streamed completions of the OpenAI API and answers without a model.

python -m tests.bench.fake_openai PORT     # as a process of its own, for what starts its servers itself
"""

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN_SECONDS = 0.005


class _Handler(BaseHTTPRequestHandler):
    """Answers as asked for, unless the model's name says how to misbehave: broken, cut, pairs, short, no-ids."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(200, "application/json", [b"{}"])

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        seen: list[dict[str, Any]] = self.server.seen  # type: ignore[attr-defined]
        seen.append({"path": self.path, **body})
        if body["model"] == "broken" or (body["model"] == "no-ids" and isinstance(body.get("prompt"), list)):
            self._answer(400, "application/json", [b'{"error": {"message": "no"}}'])
        else:
            self._answer(200, "text/event-stream", self._events(body))

    def _events(self, body: dict[str, Any]) -> Iterator[bytes]:
        count = body["max_tokens"] - (1 if body["model"] == "short" else 0)
        per_chunk = 2 if body["model"] == "pairs" else 1
        for _ in range(count // per_chunk):
            time.sleep(TOKEN_SECONDS * per_chunk)
            yield _event({"choices": [{"index": 0, "text": " word" * per_chunk, "finish_reason": None}]})
        if body["model"] == "cut":
            return
        yield _event({"choices": [{"index": 0, "text": "", "finish_reason": "length"}]})
        usage = {"prompt_tokens": _num_prompt_tokens(body), "completion_tokens": count}
        yield _event({"choices": [], "usage": usage})
        yield b"data: [DONE]\n\n"

    def _answer(self, status: int, content_type: str, parts: Any) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for part in parts:
            self.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
            self.wfile.flush()
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""


def _event(data: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(data)}\n\n".encode()


def _num_prompt_tokens(body: dict[str, Any]) -> int:
    """A token a word; a chat's template adds five."""
    if "messages" in body:
        return 5 + sum(len(message["content"].split()) for message in body["messages"])
    prompt = body["prompt"]
    return len(prompt if isinstance(prompt, list) else prompt.split())


def _server(port: int) -> ThreadingHTTPServer:
    server = ThreadingHTTPServer(("127.0.0.1", port), _Handler)
    server.daemon_threads = True
    server.seen = []  # type: ignore[attr-defined]
    return server


@contextmanager
def fake_openai() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Its url, and the bodies it has been sent, each with its path."""
    server = _server(0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.seen  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


if __name__ == "__main__":
    _server(int(sys.argv[1])).serve_forever()
