"""Rolling replacement of daemons under load: does any client see a failed or a cut answer?

    python -m bench.drains --drains 50
    python -m bench.drains --drains 3 --proxy /usr/sbin/haproxy --json bench/results/drains.json

Three daemons (`adapterd serve` on the embedded base, as a person starts them) stand behind haproxy, which asks each
for /readyz five times a second and retries nothing. Clients stream answers of a known length, one after the other,
half of them over connections they keep. One daemon after the other gets SIGTERM, drains, leaves, and a new one takes
its place once it is ready. Every answer must have all its tokens, its finish reason and its [DONE]; every daemon must
leave with status 0.

A drain in which this whole bench was stopped (a suspended machine, a job scheduler's SIGSTOP) says nothing: every
timeout of clients and proxy has passed at once. It is noticed by this process's own clock, made again, and reported
apart. The last line of stdout is JSON; `--json` has the same after each drain.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from bench.daemon import free_port

ROOT = Path(__file__).resolve().parent.parent
_MODELS = ("mini", "mini:support", "mini:moderation", "mini:medical")
_NUM_DAEMONS = 3
_DRAIN_DELAY_SECONDS = 5.0
"""As deploy/base has it: room for checks that come late on a machine that does much else."""

_START_SECONDS = 600.0
"""Only a daemon that hangs takes so long, even on a machine that does much else; one that fails is noticed at once."""
_TICK_SECONDS = 0.2
_STOPPED_SECONDS = 5.0
"""Far more than the loop of this process ever waits for its turn, and less than any timeout of clients and proxy."""

_HAPROXY = """
defaults
  mode http
  retries 0
  timeout connect 10s
  timeout check 10s
  timeout client 120s
  timeout server 120s
  option httpchk GET /readyz
frontend clients
  bind 127.0.0.1:{port}
  default_backend daemons
backend daemons
  balance roundrobin
  default-server check inter 200ms fall 1 rise 1
{servers}
"""


@dataclass
class Clients:
    """Streams against one url until told to stop. `failures` says what each bad answer looked like."""

    url: str
    models: tuple[str, ...]
    num_clients: int = 12
    pause_seconds: float = 0.0
    """Between an answer and the next question of the same client, on average."""
    num_answers: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    is_stopping: bool = False

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(self.num_clients):
                group.create_task(self._client(number))

    async def _client(self, number: int) -> None:
        keeps = number % 2 == 0
        limits = httpx.Limits(max_keepalive_connections=1 if keeps else 0)
        async with httpx.AsyncClient(timeout=120, limits=limits) as client:
            turn = number
            while not self.is_stopping:
                turn += 1
                await asyncio.sleep(random.uniform(0, 2 * self.pause_seconds))
                try:
                    problem = await self._ask(client, self.models[turn % len(self.models)], 8 + turn % 40)
                except httpx.HTTPError as error:
                    problem = type(error).__name__
                self.num_answers += 1
                if problem is not None:
                    self.failures[problem] += 1

    async def _ask(self, client: httpx.AsyncClient, model: str, num_tokens: int) -> str | None:
        """What was wrong with one streamed answer."""
        body = {
            "model": model,
            "messages": [{"role": "user", "content": "My parcel has not arrived."}],
            "max_tokens": num_tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        lines = []
        async with client.stream("POST", f"{self.url}/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                by = "daemon" if "json" in response.headers.get("content-type", "") else "proxy"
                return f"status {response.status_code} by the {by}"
            async for line in response.aiter_lines():
                lines += [line.removeprefix("data: ")] if line else []
        if not lines or lines[-1] != "[DONE]":
            return "cut"
        chunks = [json.loads(line) for line in lines[:-1]]
        counted = [chunk["usage"]["completion_tokens"] for chunk in chunks if chunk.get("usage")]
        reasons = [c["finish_reason"] for chunk in chunks for c in chunk["choices"] if c["finish_reason"]]
        return None if (counted, reasons) == ([num_tokens], ["length"]) else f"{counted} tokens, {reasons}"


class Stops:
    """How often this process stood still."""

    def __init__(self) -> None:
        self.count = 0

    async def watch(self) -> None:
        """Until cancelled."""
        before = time.monotonic()
        while True:
            await asyncio.sleep(_TICK_SECONDS)
            now = time.monotonic()
            self.count += now - before > _STOPPED_SECONDS
            before = now


class Daemon:
    """One `adapterd serve` on a port that its successor will have too."""

    def __init__(self, port: int, log: Path) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._log = log
        command = [sys.executable, "-m", "adapterd", "serve", "--adapters", "adapters", "--port", str(port)]
        memory = ["--kv-memory", "64MiB", "--adapter-memory", "32MiB", "--host-memory", "64MiB"]
        drain = ["--drain-delay", str(_DRAIN_DELAY_SECONDS), "--drain-timeout", "60"]
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [*command, *memory, *drain], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT
            )

    async def wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        async with httpx.AsyncClient() as client:
            while time.monotonic() < deadline and self.process.poll() is None:
                with contextlib.suppress(httpx.HTTPError):
                    if (await client.get(f"{self.url}/readyz")).status_code == 200:
                        return
                await asyncio.sleep(0.1)
        raise SystemExit(f"a daemon on {self.url} did not get ready:\n{self._log.read_text()[-2000:]}")

    async def drain(self) -> tuple[int, float]:
        """Its exit status, and how long it took to leave."""
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        status = await asyncio.to_thread(self.process.wait, 120)
        return status, time.monotonic() - began


def kill(daemons: list[Daemon]) -> None:
    for daemon in daemons:
        daemon.process.kill()


@contextlib.contextmanager
def haproxy(binary: str, daemons: list[Daemon], folder: Path) -> Iterator[str]:
    port = free_port()
    servers = "\n".join(
        f"  server d{number} {daemon.url.removeprefix('http://')}" for number, daemon in enumerate(daemons)
    )
    config = folder / "haproxy.cfg"
    config.write_text(_HAPROXY.format(port=port, servers=servers))
    process = subprocess.Popen([binary, "-f", str(config), "-db"], stderr=subprocess.DEVNULL)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


@dataclass
class Outcome:
    """Of the drains so far."""

    num_clients: int
    pause_seconds: float
    drains: int = 0
    answers: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    longest_drain_seconds: float = 0.0
    stopped: int = 0
    """Drains in which this bench was stopped, and which count nowhere else."""

    def json(self) -> dict[str, object]:
        return {
            "drains": self.drains,
            "daemons": _NUM_DAEMONS,
            "clients": self.num_clients,
            "pause_seconds": self.pause_seconds,
            "drain_delay_seconds": _DRAIN_DELAY_SECONDS,
            "answers": self.answers,
            "failures": dict(self.failures),
            "exit_statuses": {str(status): count for status, count in self.statuses.items()},
            "longest_drain_seconds": round(self.longest_drain_seconds, 2),
            "stopped_and_made_again": self.stopped,
        }


async def campaign(
    num_drains: int, num_clients: int, pause_seconds: float, binary: str, file: Path | None
) -> Outcome:
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as ending:
        log = Path(folder) / "daemons.log"
        daemons = [Daemon(free_port(), log) for _ in range(_NUM_DAEMONS)]
        ending.callback(kill, daemons)
        await asyncio.gather(*(daemon.wait_until_ready() for daemon in daemons))
        url = ending.enter_context(haproxy(binary, daemons, Path(folder)))
        clients = Clients(url, _MODELS, num_clients, pause_seconds)
        await asyncio.sleep(1.0)
        stops = Stops()
        watching = asyncio.create_task(stops.watch())
        running = asyncio.create_task(clients.run())
        outcome, turn = Outcome(num_clients, pause_seconds), 0
        while outcome.drains < num_drains:
            stopped_before = stops.count
            clients.num_answers, clients.failures = 0, Counter()
            await asyncio.sleep(0.5)
            index, turn = turn % _NUM_DAEMONS, turn + 1
            status, took = await daemons[index].drain()
            daemons[index] = Daemon(int(daemons[index].url.rpartition(":")[2]), log)
            await daemons[index].wait_until_ready()
            await asyncio.sleep(0.5)  # the proxy sees it
            if stops.count > stopped_before:
                outcome.stopped += 1
                print(
                    f"stopped in drain {outcome.drains + 1}: {dict(clients.failures)}; once more", flush=True
                )
                continue
            outcome.drains += 1
            outcome.answers += clients.num_answers
            outcome.failures += clients.failures
            outcome.statuses[status] += 1
            outcome.longest_drain_seconds = max(outcome.longest_drain_seconds, took)
            if file is not None:
                file.write_text(json.dumps(outcome.json(), indent=2) + "\n")
            print(
                f"drain {outcome.drains}: {took:.1f} s, status {status};"
                f" {outcome.answers} answers, failures {dict(outcome.failures)}",
                flush=True,
            )
        clients.is_stopping = True
        await running
        watching.cancel()
        return outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--drains", type=int, default=3)
    parser.add_argument("--proxy", default=shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/sbin"))
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument(
        "--pause", type=float, default=0.0, metavar="SECONDS", help="of a client after an answer, on average"
    )
    parser.add_argument("--json", type=Path, help="write the result to this file as well")
    arguments = parser.parse_args()
    if arguments.proxy is None:
        raise SystemExit("haproxy is not installed; name another with --proxy PATH")
    outcome = asyncio.run(
        campaign(arguments.drains, arguments.clients, arguments.pause, arguments.proxy, arguments.json)
    )
    print(json.dumps(outcome.json()))
    return 0 if not outcome.failures and set(outcome.statuses) == {0} else 1


if __name__ == "__main__":
    sys.exit(main())
