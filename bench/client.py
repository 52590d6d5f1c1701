"""One streamed request to an OpenAI-compatible server, timed; and a run of many, closed or open loop."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

Body = dict[str, Any]


@dataclass(frozen=True)
class LoadRequest:
    """`body` without the streaming fields; `path` below the server's url. `arrival_seconds` only in open loop."""

    path: str
    body: Body
    prompt_tokens: int
    output_tokens: int
    arrival_seconds: float = 0.0


@dataclass
class Record:
    """What happened to one request. Seconds since the run began.

    `start` is when it was sent, or in open loop when it was due: a client that lags must not flatter the server.
    `chunks` are the moments at which text came. `error` is None for a whole answer with usage.
    """

    request: LoadRequest
    start: float
    chunks: list[float] = field(default_factory=list)
    end: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None

    @property
    def ttft(self) -> float:
        return self.chunks[0] - self.start

    @property
    def e2e(self) -> float:
        return self.end - self.start

    @property
    def gaps(self) -> list[float]:
        """Inter-token latency: between chunks that carry text."""
        return [after - before for before, after in zip(self.chunks, self.chunks[1:], strict=False)]

    @property
    def tpot(self) -> float:
        """Time per output token after the first."""
        return (self.chunks[-1] - self.chunks[0]) / max(self.completion_tokens - 1, 1)


async def run_closed(
    client: httpx.AsyncClient, requests: Sequence[LoadRequest], concurrency: int
) -> list[Record]:
    """`concurrency` clients that each send their next request when the last is answered."""
    began = time.perf_counter()
    queue = iter(requests)
    records: list[Record] = []

    async def worker() -> None:
        for request in queue:
            records.append(await send(client, request, began, time.perf_counter() - began))

    await asyncio.gather(*(worker() for _ in range(concurrency)))
    return records


async def run_open(client: httpx.AsyncClient, requests: Sequence[LoadRequest]) -> list[Record]:
    """Each request at its own `arrival_seconds`, whatever has become of those before it."""
    began = time.perf_counter()

    async def at_its_time(request: LoadRequest) -> Record:
        await asyncio.sleep(max(began + request.arrival_seconds - time.perf_counter(), 0))
        return await send(client, request, began, request.arrival_seconds)

    return list(await asyncio.gather(*(at_its_time(request) for request in requests)))


async def send(client: httpx.AsyncClient, request: LoadRequest, began: float, start: float) -> Record:
    """One request to its end. What goes wrong is written into the record."""
    record = Record(request, start)
    body = {**request.body, "stream": True, "stream_options": {"include_usage": True}}
    try:
        async with client.stream("POST", request.path, json=body) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                record.error = f"HTTP {response.status_code}: {text[:200]}"
            else:
                record.error = await _read(response, record, began)
    except httpx.HTTPError as error:
        record.error = f"{type(error).__name__}: {error}"
    record.end = time.perf_counter() - began
    return record


async def _read(response: httpx.Response, record: Record, began: float) -> str | None:
    """Fill the record from the stream; what is wrong with it, or None."""
    finish = None
    async for data in _events(response):
        now = time.perf_counter() - began
        if data == "[DONE]":
            if record.completion_tokens == 0:
                return "the stream ended without usage"
            if not record.chunks:
                return "the stream ended without text"
            return None if finish else "the stream ended without a finish reason"
        event = json.loads(data)
        if "error" in event:
            return f"error in the stream: {json.dumps(event['error'])[:200]}"
        for choice in event.get("choices", ()):
            if choice.get("text") or choice.get("delta", {}).get("content"):
                record.chunks.append(now)
            finish = choice.get("finish_reason") or finish
        if usage := event.get("usage"):
            record.prompt_tokens = usage["prompt_tokens"]
            record.completion_tokens = usage["completion_tokens"]
    return "the stream was cut off"


async def _events(response: httpx.Response) -> AsyncIterator[str]:
    async for line in response.aiter_lines():
        if line.startswith("data:"):
            yield line[5:].strip()
