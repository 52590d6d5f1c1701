"""64 streams at once over the shipped adapters and the base: nothing lost, every count exact, all memory back."""

import asyncio
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from adapterd.render import Renderer
from tests.serving import served

ROOT = Path(__file__).resolve().parent.parent
MODELS = ["mini", "mini:support", "mini:moderation", "mini:medical"]
NUM_STREAMS = 64


@dataclass
class Stream:
    """What one client saw."""

    num_prompt_tokens: int
    max_tokens: int
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    usage: dict[str, int] = field(default_factory=dict)
    done: bool = False


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served("--adapters", str(ROOT / "adapters"), "--max-num-seqs", "48") as address:
        yield address


async def stream(client: httpx.AsyncClient, url: str, number: int, renderer: Renderer) -> Stream:
    """Clients that ask for different lengths of different adapters, with different prompts."""
    messages = [
        {"role": "user", "content": f"Order {1000 + 37 * number} has not arrived. " * (1 + number % 5)}
    ]
    seen = Stream(len(renderer.render(messages)), max_tokens=8 + number % 23)
    body = {
        "model": MODELS[number % len(MODELS)],
        "messages": messages,
        "max_tokens": seen.max_tokens,
        "ignore_eos": True,
        "temperature": number % 3 / 2,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            data = line.removeprefix("data: ")
            if data == "[DONE]":
                seen.done = True
            elif data:
                read_chunk(seen, json.loads(data))
    return seen


def read_chunk(seen: Stream, chunk: dict) -> None:  # type: ignore[type-arg]
    seen.usage = chunk.get("usage") or seen.usage
    for choice in chunk["choices"]:
        assert seen.finish_reason is None, "something came after the end"
        seen.token_ids += choice.get("token_ids") or []
        seen.text += choice["delta"].get("content") or ""
        seen.finish_reason = choice["finish_reason"]


async def run_streams(url: str, renderer: Renderer) -> list[Stream]:
    limits = httpx.Limits(max_connections=NUM_STREAMS)
    async with httpx.AsyncClient(timeout=120, limits=limits) as client:
        return await asyncio.gather(*(stream(client, url, number, renderer) for number in range(NUM_STREAMS)))


def gauge(url: str, name: str) -> float:
    text = httpx.get(f"{url}/metrics").text
    found = re.search(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
    assert found, f"{name} is not in /metrics"
    return float(found[1])


async def until_zero(url: str, *names: str) -> None:
    for _ in range(50):
        if all(gauge(url, name) == 0 for name in names):
            return
        await asyncio.sleep(0.1)
    raise AssertionError(f"still held: { {name: gauge(url, name) for name in names} }")


HELD = (
    "adapterd_kv_blocks_held",
    "adapterd_adapter_held_bytes",
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
)


def test_64_streams_lose_nothing(url: str) -> None:
    renderer = Renderer.load(ROOT / "adapterd" / "mini")
    streams = asyncio.run(run_streams(url, renderer))
    assert len(streams) == NUM_STREAMS
    for seen in streams:
        assert seen.done
        assert seen.finish_reason == "length"
        assert len(seen.token_ids) == seen.max_tokens
        assert seen.usage["completion_tokens"] == seen.max_tokens
        assert seen.usage["prompt_tokens"] == seen.num_prompt_tokens
        assert seen.text == renderer.decode(seen.token_ids)
    asyncio.run(until_zero(url, *HELD))


def test_clients_that_go_away_free_their_sequences(url: str) -> None:
    async def leave_early(client: httpx.AsyncClient, number: int) -> None:
        body = {
            "model": MODELS[number % len(MODELS)],
            "messages": [{"role": "user", "content": f"Tell me about order {number}."}],
            "max_tokens": 900,
            "ignore_eos": True,
            "stream": number % 2 == 0,
        }
        try:
            async with asyncio.timeout(0.5 + number % 5 / 10):
                async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
                    async for _ in response.aiter_lines():
                        pass
        except TimeoutError:
            return
        raise AssertionError("the answer ended before its client left")

    async def run() -> None:
        limits = httpx.Limits(max_connections=24)
        async with httpx.AsyncClient(timeout=120, limits=limits) as client:
            await asyncio.gather(*(leave_early(client, number) for number in range(24)))
        await until_zero(url, *HELD)

    asyncio.run(run())
