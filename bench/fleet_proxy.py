"""A reverse proxy on loopback that sends each request to the pod its policy chooses, and streams the answer back.

    python -m bench.fleet_proxy --pods http://127.0.0.1:8101,http://127.0.0.1:8102 --policy affinity

It scrapes each pod's /metrics as llm-d's endpoint picker does and chooses by the same rules (bench.fleet_picker);
`--policy round-robin` takes the pods in turn. One TCP connection a request on both sides: answers are passed on byte
by byte, as they come. The first line of stdout says where it listens. Ends at SIGTERM.
"""

import argparse
import asyncio
import json
import random
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from urllib.parse import urlsplit

from bench.fleet_picker import SCRAPE_SECONDS, Signals, Weights, choose, read_signals

Address = tuple[str, int]
_MAX_HEAD = 65_536


class Picker:
    """The signals of each pod, and the choice among them."""

    def __init__(self, pods: Sequence[Address], weights: Weights | None, seed: int = 0) -> None:
        self.pods = list(pods)
        self.num_chosen = [0] * len(pods)
        self._num_active = [0] * len(pods)
        self._weights = weights
        self._signals = [Signals()] * len(pods)
        self._draw = random.Random(seed)
        self._turn = 0

    @contextmanager
    def chosen(self, model: str) -> Iterator[Address]:
        """The pod for a request, which counts as active there until the end of the block."""
        if self._weights is None:
            index = self._turn % len(self.pods)
            self._turn += 1
        else:
            index = choose(model, self._signals, self._num_active, self._weights, self._draw)
        self.num_chosen[index] += 1
        self._num_active[index] += 1
        try:
            yield self.pods[index]
        finally:
            self._num_active[index] -= 1

    async def keep_scraping(self) -> None:
        """Until cancelled. A pod that does not answer keeps its last signals."""
        while self._weights is not None:
            await asyncio.gather(*(self._scrape(index) for index in range(len(self.pods))))
            await asyncio.sleep(SCRAPE_SECONDS)

    async def _scrape(self, index: int) -> None:
        try:
            _, body = await fetch(self.pods[index], "/metrics")
            self._signals[index] = read_signals(body.decode())
        except OSError as error:
            print(f"fleet_proxy: {self.pods[index]}: {error}", file=sys.stderr)


async def fetch(pod: Address, path: str) -> tuple[bytes, bytes]:
    """Head and body of a GET."""
    reader, writer = await asyncio.open_connection(*pod)
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: pod\r\nConnection: close\r\n\r\n".encode())
        await writer.drain()
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        return head, body
    finally:
        writer.close()


async def handle(picker: Picker, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One request: read whole, sent to a pod, its answer passed on until the pod closes."""
    upstream: asyncio.StreamWriter | None = None
    try:
        head = await reader.readuntil(b"\r\n\r\n")
        body = await reader.readexactly(_content_length(head))
        model = str(json.loads(body).get("model", "")) if body else ""
        with picker.chosen(model) as pod:
            from_pod, upstream = await asyncio.open_connection(*pod)
            upstream.write(_closing(head) + body)
            await upstream.drain()
            while data := await from_pod.read(_MAX_HEAD):
                writer.write(data)
                await writer.drain()
    except (OSError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
        writer.write(b"HTTP/1.1 502 Bad Gateway\r\nConnection: close\r\n\r\n" + str(error).encode())
    finally:
        for each in (upstream, writer):
            if each is not None:
                each.close()


def _content_length(head: bytes) -> int:
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-length":
            return int(value)
    return 0


def _closing(head: bytes) -> bytes:
    """The same head, asking the pod to close: its answer then ends where the connection does."""
    lines = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
    kept = [line for line in lines if not line.lower().startswith(b"connection:")]
    return b"\r\n".join([*kept, b"Connection: close", b"", b""])


async def serve(picker: Picker, port: int, on_listening: Callable[[int], None]) -> None:
    """Until SIGTERM or SIGINT."""
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    server = await asyncio.start_server(lambda r, w: handle(picker, r, w), "127.0.0.1", port, limit=_MAX_HEAD)
    scraping = asyncio.create_task(picker.keep_scraping())
    on_listening(server.sockets[0].getsockname()[1])
    async with server:
        await stopped.wait()
    scraping.cancel()


def weights_of(policy: str) -> Weights | None:
    """`round-robin`, or `affinity` with the scorers' weights: affinity:LORA,QUEUE,KV,ACTIVE. Raises ValueError."""
    name, _, numbers = policy.partition(":")
    if name == "round-robin" and not numbers:
        return None
    if name == "affinity":
        given = [float(number) for number in numbers.split(",")] if numbers else []
        if len(given) in (0, 4):
            return Weights(*given)
    raise ValueError(f"policy {policy!r}: allowed are round-robin and affinity[:LORA,QUEUE,KV,ACTIVE]")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.fleet_proxy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--pods", required=True, help="their urls, with commas")
    parser.add_argument("--policy", default="affinity", help="round-robin or affinity[:LORA,QUEUE,KV,ACTIVE]")
    parser.add_argument("--port", type=int, default=0)
    arguments = parser.parse_args(argv)
    urls = [urlsplit(url) for url in arguments.pods.split(",")]
    try:
        pods = [(url.hostname or "127.0.0.1", url.port or 80) for url in urls]
        picker = Picker(pods, weights_of(arguments.policy))
    except (TypeError, ValueError) as error:
        print(f"bench.fleet_proxy: {error}", file=sys.stderr)
        return 2
    asyncio.run(serve(picker, arguments.port, lambda port: print(f"http://127.0.0.1:{port}", flush=True)))
    print(json.dumps({"num_chosen": picker.num_chosen}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
