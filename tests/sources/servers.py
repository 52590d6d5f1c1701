"""Real servers on this machine's loopback: a web server that answers as told, and the part of the Hub that is asked."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "4f1c" * 10


@dataclass(frozen=True)
class Reply:
    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    cut_at: int | None = None
    """The connection ends after so many bytes of the body."""
    delay_seconds: float = 0.0
    """The body comes so much later, or once the server is told to stop."""
    pause_seconds: float = 0.0
    """The body comes byte by byte, each so much after the one before, until the server is told to stop."""


@dataclass
class Asked:
    """`replies` is by path; `paths` is what was asked so far, as "GET /x"."""

    url: str = ""
    replies: dict[str, Reply] = field(default_factory=dict)
    paths: list[str] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def host(self) -> str:
        return self.url.removeprefix("http://")

    def put(self, folder: str, files: Mapping[str, bytes]) -> None:
        for name, data in files.items():
            etag = f'"{hashlib.sha256(data).hexdigest()[:16]}"'
            self.replies[f"/{folder}/{name}"] = Reply(data, headers={"etag": etag})

    def gets(self) -> list[str]:
        return [path for path in self.paths if path.startswith("GET ")]


@contextmanager
def web_server() -> Iterator[Asked]:
    asked = Asked()
    with _listening(asked, lambda path: asked.replies.get(path, Reply(b"no such file", 404))) as url:
        asked.url = url
        yield asked


@contextmanager
def hub_server(
    repository: str,
    files: Mapping[str, bytes],
    *,
    revisions: tuple[str, ...] = ("main",),
    pause_seconds: float = 0.0,
) -> Iterator[Asked]:
    """What huggingface_hub asks for: the commit and files of a revision, and files of a commit, as slow as told."""
    asked = Asked()

    def answer(path: str) -> Reply:
        path = path.partition("?")[0]
        for revision in (*revisions, COMMIT):
            if path == f"/api/models/{repository}/revision/{revision}" or (
                path == f"/api/models/{repository}" and revision == "main"
            ):
                siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
                body = {
                    "id": repository,
                    "modelId": repository,
                    "sha": COMMIT,
                    "siblings": siblings,
                    "private": False,
                }
                return Reply(json.dumps({**body, "tags": [], "downloads": 0, "likes": 0}).encode())
        prefix = f"/{repository}/resolve/{COMMIT}/"
        name = path.removeprefix(prefix)
        if path.startswith(prefix) and name in files:
            etag = f'"{hashlib.sha256(files[name]).hexdigest()}"'
            headers = {"x-repo-commit": COMMIT, "etag": etag, "accept-ranges": "bytes"}
            return Reply(files[name], headers=headers, pause_seconds=pause_seconds)
        code = "EntryNotFound" if path.startswith(prefix) else "RepoNotFound"
        if path.startswith(f"/api/models/{repository}/revision/"):
            code = "RevisionNotFound"
        return Reply(b"{}", 404, {"x-error-code": code, "x-error-message": code})

    with _listening(asked, answer) as url:
        asked.url = url
        yield asked


@contextmanager
def _listening(asked: Asked, answer: Callable[[str], Reply]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            asked.paths.append(f"{self.command} {self.path}")
            reply = answer(self.path)
            self.send_response(reply.status)
            for name, value in {"content-type": "application/octet-stream", **reply.headers}.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(reply.body)))
            self.end_headers()
            if self.command == "GET":
                if reply.delay_seconds:
                    asked.stop.wait(reply.delay_seconds)
                body = reply.body[: reply.cut_at]
                with contextlib.suppress(ConnectionError):
                    while reply.pause_seconds and body and not asked.stop.wait(reply.pause_seconds):
                        self.wfile.write(body[:1])
                        body = body[1:]
                    self.wfile.write(body)
                if reply.cut_at is not None:
                    self.close_connection = True

        do_HEAD = do_GET

        def log_message(self, format: str, *arguments: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        asked.stop.set()
        server.shutdown()
        thread.join()
        server.server_close()
