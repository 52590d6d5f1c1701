"""What /metrics costs: one scrape of a daemon with many adapters in traffic, and twenty scrapes a second beside it.

    python -m bench.metrics_scrape
    python -m bench.metrics_scrape --adapters 500 --turns 40 --json bench/results/metrics_scrape.json

Makes random rank-4 adapters for the embedded base, serves them with `adapterd serve`, and asks each at least once, so
that a hundred have series of their own and every one is resident. Then it measures, over one kept connection, for each
of the two pages, the whole and the routers':

- the time of a scrape with nothing else to do, and while clients stream, and the processor time the daemon spends on
  it beyond what it spends unasked;
- output tokens a second of these clients without scrapes and with 20 a second (the default of llm-d's endpoint
  picker, each replica of it), in turns of equal length, so that the machine's moods meet all alike.

`/version` is asked the same way, for what an answer costs that says nothing. The last line of stdout is JSON: medians
and the 99th percentile of a scrape's time, in milliseconds; the rates as least, median and greatest of the
turns, and `over_unscraped` as the median of each turn over the one without scrapes before it.
"""

import argparse
import asyncio
import http.client
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import httpx
import psutil

from adapterd.model.find import find_base
from bench.daemon import adapterd
from bench.target import running

_RATE = 20.0
_NUM_CLIENTS = 8
_OUTPUT_TOKENS = 64
_NOTHING = "-"
_PAGES = ("/metrics", "/metrics/router")
_QUIET_TURNS = 8
"""Times `--seconds` for each page: processor time is counted in hundredths of a second."""


def make_adapters(folder: Path, count: int) -> list[str]:
    """Random adapters of rank 4 on every linear, all different."""
    import torch  # here, since whoever only scrapes needs none of it

    from adapterd.adapter_writer import base_fingerprint, write_adapter
    from adapterd.model.base import load_base

    base = load_base("mini")
    fingerprint = base_fingerprint(find_base("mini"))
    targets = dict(base.spec.lora_targets)
    last_names = sorted({path.rpartition(".")[2] for path in targets})
    names = []
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        tensors = {
            path: (
                0.01 * torch.randn(4, d_in, generator=generator),
                0.01 * torch.randn(d_out, 4, generator=generator),
            )
            for path, (d_out, d_in) in targets.items()
        }
        names.append(f"adapter-{number:04d}")
        write_adapter(
            folder / names[-1],
            tensors,
            r=4,
            lora_alpha=8,
            target_modules=last_names,
            base_name="mini",
            base_fingerprint=fingerprint,
        )
    return names


class Clients:
    """Streams in a closed loop; counts the tokens that came."""

    def __init__(self, url: str, names: list[str]) -> None:
        self._url = url
        self._names = names
        self.num_tokens = 0

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            for number in range(_NUM_CLIENTS):
                group.create_task(self._client(number))

    async def _client(self, number: int) -> None:
        async with httpx.AsyncClient(timeout=60) as client:
            turn = number
            while True:
                turn += _NUM_CLIENTS
                await self.ask(client, self._names[turn % len(self._names)], _OUTPUT_TOKENS)

    async def ask(self, client: httpx.AsyncClient, name: str, num_tokens: int) -> None:
        body = {
            "model": f"base:{name}",
            "prompt": "My parcel has",
            "max_tokens": num_tokens,
            "ignore_eos": True,
            "stream": True,
        }
        async with client.stream("POST", f"{self._url}/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                self.num_tokens += line.startswith("data: {")


def gets(url: str, path: str, seconds: float, rate: float) -> list[float]:
    """Milliseconds of each GET over one connection, `rate` a second; _NOTHING asks for nothing, as often."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"))
    took: list[float] = []
    began = time.perf_counter()
    while (now := time.perf_counter()) < began + seconds:
        if path != _NOTHING:
            connection.request("GET", path)
            response = connection.getresponse()
            response.read()
            took.append(1000 * (time.perf_counter() - now))
            assert response.status == 200
        time.sleep(max(0.0, now + 1 / rate - time.perf_counter()))
    return took


async def scrape(url: str, path: str, seconds: float) -> list[float]:
    """The same from a process of its own, as whoever scrapes is."""
    command = [sys.executable, "-m", "bench.metrics_scrape", "--gets", url, path, str(seconds)]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    took: list[float] = json.loads(output)
    return took


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


async def measure(
    url: str, process: psutil.Process, names: list[str], seconds: float, turns: int
) -> dict[str, object]:
    clients = Clients(url, names)
    async with httpx.AsyncClient(timeout=60) as client:
        for first in range(0, len(names), 32):  # everyone once
            await asyncio.gather(*(clients.ask(client, name, 2) for name in names[first : first + 32]))
        texts = {page: (await client.get(url + page)).text for page in _PAGES}
    quiet: dict[str, list[float]] = {}
    cpu_ms: dict[str, float] = {}
    unasked_seconds = 0.0
    for page in (_NOTHING, *_PAGES, "/version"):
        before = cpu_seconds(process)
        quiet[page] = await scrape(url, page, _QUIET_TURNS * seconds)
        spent = cpu_seconds(process) - before
        if page == _NOTHING:
            unasked_seconds = spent
        else:
            cpu_ms[page] = round(1000 * (spent - unasked_seconds) / len(quiet[page]), 2)
    rates: dict[str, list[float]] = {page: [] for page in (_NOTHING, *_PAGES)}
    loaded: dict[str, list[float]] = {page: [] for page in rates}
    running = asyncio.create_task(clients.run())
    await asyncio.sleep(2.0)
    for turn in range(len(rates) * turns):
        page = tuple(rates)[turn % len(rates)]
        num_before, began = clients.num_tokens, time.perf_counter()
        # The process that scrapes takes its share of the machine, so it runs in every turn.
        loaded[page] += await scrape(url, page, seconds)
        rates[page].append((clients.num_tokens - num_before) / (time.perf_counter() - began))
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    return {
        "version_quiet_ms": round(statistics.median(quiet["/version"]), 3),
        "version_cpu_ms": cpu_ms["/version"],
        "tokens_per_second_unscraped": _spread(rates[_NOTHING]),
        "pages": {
            page: {
                "series": sum(not line.startswith("#") for line in texts[page].splitlines()),
                "bytes": len(texts[page]),
                "quiet_ms": round(statistics.median(quiet[page]), 3),
                "cpu_ms": cpu_ms[page],
                "quiet_p99_ms": round(statistics.quantiles(quiet[page], n=100)[98], 3),
                "loaded_ms": round(statistics.median(loaded[page]), 3),
                "tokens_per_second": _spread(rates[page]),
                "over_unscraped": round(
                    statistics.median(w / wo for wo, w in zip(rates[_NOTHING], rates[page], strict=True)), 3
                ),
            }
            for page in _PAGES
        },
    }


def _spread(values: list[float]) -> list[float]:
    """Least, median and greatest."""
    return [round(value, 1) for value in (min(values), statistics.median(values), max(values))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--adapters", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each turn")
    parser.add_argument(
        "--turns", type=int, default=20, help="with scrapes of each page, and as many without"
    )
    parser.add_argument("--json", type=Path, help="write the result to this file as well")
    parser.add_argument("--gets", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.gets is not None:
        url, path, seconds = arguments.gets
        print(json.dumps(gets(url, path, float(seconds), _RATE)))
        return
    with tempfile.TemporaryDirectory() as folder:
        names = make_adapters(Path(folder), arguments.adapters)
        flags = ("--adapter-memory=512MiB", "--kv-memory=64MiB", "--log-level=warning")
        target = adapterd(find_base("mini"), Path(folder), *flags)
        with running(target, timeout_seconds=120) as server:
            process = psutil.Process(server.pid)
            result = asyncio.run(measure(target.url, process, names, arguments.seconds, arguments.turns))
    result = {"adapters": arguments.adapters, **result}
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
