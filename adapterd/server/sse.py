"""Server-sent events as OpenAI sends them, and the end of work that nobody waits for any more."""

import asyncio
import json
from collections.abc import Coroutine, Iterable, Mapping
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Send

T = TypeVar("T")


class EventStream:
    """One streamed response. `start` is sent with the first events, so that earlier errors keep their status."""

    def __init__(self, send: Send, headers: Mapping[str, str]) -> None:
        self._send = send
        self._headers = headers
        self.is_started = False

    async def events(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Send `events`, in one write."""
        body = b"".join(b"data: " + _encode(event) + b"\n\n" for event in events)
        if body:
            await self._write(body)

    async def done(self) -> None:
        await self._write(b"data: [DONE]\n\n", more=False)

    async def error(self, event: Mapping[str, Any]) -> None:
        """End the stream with an error and without [DONE]: it is not complete."""
        await self._write(b"data: " + _encode(event) + b"\n\n", more=False)

    async def _write(self, body: bytes, *, more: bool = True) -> None:
        if not self.is_started:
            await self._start()
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def _start(self) -> None:
        self.is_started = True
        headers = {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache",
            "x-accel-buffering": "no",
            **self._headers,
        }
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": 200, "headers": raw})


def _encode(event: Mapping[str, Any]) -> bytes:
    return json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode()


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns or raises; if the client goes away first, `work` is cancelled.

    The request's body must have been read. Raises ClientDisconnect after the cancelled work has cleaned up.
    """
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
