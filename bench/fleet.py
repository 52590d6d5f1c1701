"""A fleet on one machine: daemons on loopback behind a real proxy, by adapter affinity and by round-robin.

    python -m bench.fleet --work /var/tmp/adapterd-fleet --out bench/results/fleet.json

Makes a base of the embedded one's shape with random weights and a few hundred adapters for it, starts `--pods` daemons
whose device memory holds a handful of them each, puts bench.fleet_proxy in front, and sends open-loop traffic whose
adapters follow Zipf's law. For each policy the daemons are started anew, and the first third of the requests is not
counted. Hits and moves are the daemons' own counters; times are the client's.

First it measures what one daemon's work costs, alone: a step, a prompt, an upload, a read. With these costs the same
fleet is put through bench.fleet_sim, with the same traffic: the difference says how far the simulation can be trusted.
All daemons share the machine's processors, so keep `--rate` well below what they can do together.

The last line of stdout is JSON.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from bench.client import LoadRequest, Record, run_closed, run_open
from bench.daemon import adapterd
from bench.fleet_picker import zipf_shares
from bench.fleet_proxy import weights_of
from bench.fleet_sim import Costs, Fleet, Traffic
from bench.models import SHAPES, lora_linears, make_adapter, make_base
from bench.report import emit, machine, percentile
from bench.target import Target, running
from bench.workload import arrival_seconds, token_prompt

MODEL = "base"
_COUNTERS = (
    "adapterd_adapter_hits_total",
    "adapterd_adapter_misses_total",
    'adapterd_adapter_loads_total{tier="device"}',
    'adapterd_adapter_loads_total{tier="host"}',
)


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is run. Sizes of memory are in adapters, since all are equally large."""

    work: Path
    num_pods: int
    num_adapters: int
    rank: int
    alpha: float
    rate: float
    num_requests: int
    prompt_tokens: int
    output_tokens: int
    device_adapters: int
    host_adapters: int
    seed: int = 0

    @property
    def adapters(self) -> Path:
        return self.work / f"adapters-{self.rank}"


def make_models(setup: Setup) -> int:
    """Base and adapters, unless they are there; returns the bytes of one adapter."""
    config = SHAPES["mini"]()
    linears = lora_linears(config)
    if not (setup.work / MODEL / "model.safetensors").exists():
        make_base(config, setup.work / MODEL)
    for index in range(setup.num_adapters):
        directory = setup.adapters / name_of(index)
        if not (directory / "adapter_config.json").exists():
            make_adapter(linears, directory, setup.rank, seed=index)
    return (setup.adapters / name_of(0) / "adapter_model.safetensors").stat().st_size


def name_of(adapter: int) -> str:
    return f"a{adapter:04}"


def pod_target(setup: Setup, index: int, adapter_bytes: int) -> Target:
    # A little more than so many adapters: memory is handed out in pages.
    device, host = (int((n + 0.5) * adapter_bytes) for n in (setup.device_adapters, setup.host_adapters))
    target = adapterd(
        setup.work / MODEL,
        setup.adapters,
        "--dtype=float32",
        f"--adapter-memory={2 * device}",
        f"--host-memory={2 * host}",
        "--kv-memory=64MiB",
        "--max-num-seqs=16",
        f"--state={setup.work / f'state-{index}'}",
        "--log-level=warning",
    )
    # One thread each: there are more daemons than processors.
    return dataclasses.replace(target, name=f"pod {index}", env={"OMP_NUM_THREADS": "1"})


@contextlib.contextmanager
def fleet(setup: Setup, num_pods: int, adapter_bytes: int) -> Iterator[list[str]]:
    """The urls of so many daemons that serve."""
    with contextlib.ExitStack() as stack:
        targets = [pod_target(setup, index, adapter_bytes) for index in range(num_pods)]
        for target in targets:
            stack.enter_context(running(target, 120.0))
        yield [target.url for target in targets]


@contextlib.contextmanager
def proxy(urls: Sequence[str], policy: str) -> Iterator[str]:
    """The url of a proxy in front of the pods."""
    command = [sys.executable, "-m", "bench.fleet_proxy", "--pods", ",".join(urls), "--policy", policy]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait(10)
        process.stdout.close()


def requests_of(setup: Setup) -> list[LoadRequest]:
    """The same for every policy."""
    shares = zipf_shares(setup.num_adapters, setup.alpha)
    chosen = random.Random(setup.seed).choices(range(setup.num_adapters), shares, k=setup.num_requests)
    arrivals = arrival_seconds(setup.num_requests, setup.rate, 1.0, setup.seed)
    return [
        request_for(setup, adapter, f"{setup.seed}/{index}", arrival)
        for index, (adapter, arrival) in enumerate(zip(chosen, arrivals, strict=True))
    ]


def request_for(setup: Setup, adapter: int, seed: str, arrival: float = 0.0) -> LoadRequest:
    body = {
        "model": f"{MODEL}:{name_of(adapter)}",
        "prompt": token_prompt(setup.prompt_tokens, range(300, 2000), seed),
        "max_tokens": setup.output_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    return LoadRequest("/v1/completions", body, setup.prompt_tokens, setup.output_tokens, arrival)


def counters(urls: Sequence[str]) -> dict[str, float]:
    """Sums over all pods and adapters."""
    sums = dict.fromkeys(_COUNTERS, 0.0)
    for url in urls:
        for line in httpx.get(f"{url}/metrics").text.splitlines():
            series, _, value = line.rpartition(" ")
            for name in _COUNTERS:
                base, _, label = name.partition("{")
                if series.partition("{")[0] == base and label.rstrip("}") in series:
                    sums[name] += float(value)
    return sums


def measure(setup: Setup, policy: str, adapter_bytes: int) -> dict[str, Any]:
    """One policy: daemons, proxy, traffic, figures."""
    requests = requests_of(setup)
    warm = len(requests) // 3
    with fleet(setup, setup.num_pods, adapter_bytes) as urls, proxy(urls, policy) as url:
        before: dict[str, float] = {}

        async def run() -> list[Record]:
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
            async with httpx.AsyncClient(base_url=url, limits=limits, timeout=120.0) as client:

                async def look() -> None:
                    await asyncio.sleep(requests[warm].arrival_seconds)
                    before.update(await asyncio.to_thread(counters, urls))

                looking = asyncio.create_task(look())
                records = await run_open(client, requests)
                await looking
                return records

        records = asyncio.run(run())[warm:]
        after = counters(urls)
    hits, misses, uploads, reads = (after[name] - before[name] for name in _COUNTERS)
    whole = [record for record in records if record.error is None]
    return {
        "num_requests": len(records),
        "num_errors": len(records) - len(whole),
        "errors": sorted({record.error for record in records if record.error is not None}),
        "hit_rate": hits / (hits + misses),
        "ttft_seconds": {f"p{p}": percentile([record.ttft for record in whole], p) for p in (50, 95, 99)},
        "uploads_per_1000_requests": 1000 * uploads / len(records),
        "reads_per_1000_requests": 1000 * reads / len(records),
    }


def calibrate(setup: Setup, adapter_bytes: int) -> Costs:
    """What one daemon's work takes, with nothing else running."""
    with fleet(setup, 1, adapter_bytes) as (url,):

        async def run(adapters: Sequence[int], concurrency: int, seed: str) -> list[Record]:
            requests = [request_for(setup, adapter, f"{seed}/{i}") for i, adapter in enumerate(adapters)]
            async with httpx.AsyncClient(base_url=url, timeout=120.0) as client:
                records = await run_closed(client, requests, concurrency)
            if failed := [record.error for record in records if record.error is not None]:
                raise RuntimeError(failed[0])
            return records

        def ttft(records: Sequence[Record]) -> float:
            return percentile([record.ttft for record in records], 50)

        def tpot(records: Sequence[Record]) -> float:
            return percentile([record.tpot for record in records], 50)

        asyncio.run(run([0] * 4, 1, "warm-up"))
        resident = asyncio.run(run([0] * 20, 1, "resident"))
        together = asyncio.run(run([0] * 64, 8, "together"))
        # More than fit on the device, fewer than fit on the host, in turn: each is uploaded, none is read.
        kept = list(range(1, setup.device_adapters + 2))
        asyncio.run(run(kept, 1, "keep"))
        uploaded = asyncio.run(run(kept, 1, "uploaded"))
        # Each once: read, checked and uploaded.
        first = setup.device_adapters + 2
        read = asyncio.run(run(range(first, first + 20), 1, "read"))
    step, step_of_8 = tpot(resident), tpot(together)
    more = max(0.0, (step_of_8 - step) / 7)
    return Costs(
        step_seconds=step - more,
        step_seconds_per_sequence=more,
        prefill_seconds=max(0.0, ttft(resident) - step),
        upload_seconds=max(0.0, ttft(uploaded) - ttft(resident)),
        read_seconds=max(0.0, ttft(read) - ttft(uploaded)),
        max_running=16,
        device_adapters=setup.device_adapters,
        host_adapters=setup.host_adapters,
        adapter_bytes=adapter_bytes,
    )


def simulate(setup: Setup, costs: Costs, policy: str) -> dict[str, Any]:
    traffic = Traffic(
        setup.num_adapters,
        setup.alpha,
        setup.rate,
        setup.num_requests,
        setup.output_tokens,
        setup.seed,
        warmup_fraction=1 / 3,
    )
    return Fleet(setup.num_pods, costs, traffic, weights_of(policy)).run()


def line(figures: dict[str, Any]) -> str:
    ttft = figures["ttft_seconds"]
    return (
        f"hits {figures['hit_rate']:.1%}, first token p50 {1000 * ttft['p50']:.0f} p95 {1000 * ttft['p95']:.0f} ms,"
        f" moved per 1000 {figures['uploads_per_1000_requests']:.0f}"
        f" (read {figures['reads_per_1000_requests']:.0f})"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.fleet",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--work", type=Path, required=True, metavar="DIRECTORY", help="for the base and the adapters")
    add("--pods", type=int, default=4)
    add("--adapters", type=int, default=300)
    add("--rank", type=int, default=64)
    add("--alpha", type=float, default=1.0, help="the exponent of Zipf's law")
    add("--rate", type=float, default=8.0, help="requests a second")
    add("--requests", type=int, default=480)
    add("--prompt-tokens", type=int, default=64)
    add("--output-tokens", type=int, default=16)
    add("--device-adapters", type=int, default=12, help="how many fit on the device of a pod")
    add("--host-adapters", type=int, default=24, help="and in its host memory")
    add(
        "--policies",
        default="round-robin,affinity",
        metavar="NAMES",
        help="with commas; see bench.fleet_proxy",
    )
    add("--make-only", action="store_true", help="make base and adapters, and end")
    add("--out", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    setup = Setup(
        arguments.work,
        arguments.pods,
        arguments.adapters,
        arguments.rank,
        arguments.alpha,
        arguments.rate,
        arguments.requests,
        arguments.prompt_tokens,
        arguments.output_tokens,
        arguments.device_adapters,
        arguments.host_adapters,
    )
    adapter_bytes = make_models(setup)
    if arguments.make_only:
        return 0
    described = {k: v for k, v in dataclasses.asdict(setup).items() if k != "work"}
    result: dict[str, Any] = {"bench": "fleet", "machine": machine(), "setup": described, "policies": {}}
    began = time.perf_counter()
    costs = calibrate(setup, adapter_bytes)
    result["costs"] = dataclasses.asdict(costs)
    print(f"costs of one pod: {json.dumps(result['costs'])}", flush=True)
    for policy in arguments.policies.split(","):
        measured, simulated = measure(setup, policy, adapter_bytes), simulate(setup, costs, policy)
        result["policies"][policy] = {"measured": measured, "simulated": simulated}
        print(f"{policy:>12}  measured   {line(measured)}, {measured['num_errors']} errors")
        print(f"{'':>12}  simulated  {line(simulated)}", flush=True)
    result["wall_seconds"] = time.perf_counter() - began
    emit(result, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
