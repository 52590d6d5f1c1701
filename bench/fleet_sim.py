"""A fleet of pods in simulated time: the picker's rules as they are, pods by their measured costs.

    python -m bench.fleet_sim --costs bench/results/fleet.json --pods 100 --adapters 10000

What a pod does here: sequences run together, each a token a step, and a step takes `step_seconds` and a little more
for each sequence in it; a prompt counts as the tokens its prefill takes the time of. An adapter that is not resident
is uploaded first, and read first where the host has not kept it; one at a time, beside the steps. Device and host
keep the adapters that were used last. What it leaves out: preemption, prefix reuse, failures, the network.

The last line of stdout is JSON.
"""

import argparse
import heapq
import itertools
import json
import random
import sys
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.fleet_picker import KSERVE, NO_LORA_SCORER, SCRAPE_SECONDS, Signals, Weights, choose, zipf_shares
from bench.report import emit, machine, percentile


@dataclass(frozen=True)
class Costs:
    """Of one pod. `device_adapters` and `host_adapters` are how many fit. Each has one name here: adapterd lists two,
    bare and with the base, but its capacity counts both, so that comes to the same.
    """

    step_seconds: float
    step_seconds_per_sequence: float
    prefill_seconds: float
    upload_seconds: float
    read_seconds: float
    max_running: int
    device_adapters: int
    host_adapters: int
    adapter_bytes: int


@dataclass(frozen=True)
class Traffic:
    num_adapters: int
    alpha: float
    requests_per_second: float
    num_requests: int
    output_tokens: int
    seed: int = 0
    warmup_fraction: float = 0.3


@dataclass
class Request:
    adapter: int
    arrival: float
    pod: int = -1
    was_resident: bool = False
    first_token: float = 0.0


@dataclass
class Pod:
    """`progress` is how many tokens each running sequence has made since the beginning of time; it grows faster the
    fewer run. A request that begins at progress p has its first token at p + prefill and its last at the end."""

    costs: Costs
    progress: float = 0.0
    since: float = 0.0
    running: list[tuple[float, int, Request, bool]] = field(default_factory=list)
    num_running: int = 0
    queue: list[Request] = field(default_factory=list)
    device: OrderedDict[int, int] = field(default_factory=OrderedDict)
    host: OrderedDict[int, None] = field(default_factory=OrderedDict)
    loading: dict[int, list[Request]] = field(default_factory=dict)
    loader_free: float = 0.0
    version: int = 0
    num_uploads: int = 0
    num_reads: int = 0

    @property
    def seconds_per_token(self) -> float:
        return self.costs.step_seconds + self.costs.step_seconds_per_sequence * max(1, self.num_running)

    def advance(self, now: float) -> None:
        if self.num_running:
            self.progress += (now - self.since) / self.seconds_per_token
        self.since = now

    def signals(self) -> Signals:
        waiting = len(self.queue) + sum(len(requests) for requests in self.loading.values())
        return Signals(
            num_waiting=waiting,
            kv_usage=self.num_running / self.costs.max_running,
            max_lora=self.costs.device_adapters,
            resident=frozenset(map(str, self.device)),
            waiting=frozenset(map(str, self.loading)),
        )


class Fleet:
    """Events in order of time. `weights` None is round-robin."""

    def __init__(self, num_pods: int, costs: Costs, traffic: Traffic, weights: Weights | None) -> None:
        self.costs, self.traffic, self.weights = costs, traffic, weights
        self.pods = [Pod(costs) for _ in range(num_pods)]
        self.requests: list[Request] = []
        self._draw = random.Random(traffic.seed)
        self._signals = [pod.signals() for pod in self.pods]
        self._events: list[tuple[float, int, str, Any]] = []
        self._numbers = itertools.count()
        self._num_active = [0] * num_pods
        self._turn = 0

    def run(self) -> dict[str, Any]:
        self._arrivals()
        self._at(0.0, "scrape", None)
        num_left = self.traffic.num_requests
        warm = int(self.traffic.warmup_fraction * num_left)
        uploads_at_warm = reads_at_warm = 0
        while self._events and num_left:
            now, _, kind, what = heapq.heappop(self._events)
            if kind == "arrive":
                if what == warm:
                    uploads_at_warm, reads_at_warm = self._moved()
                self._arrive(now, self.requests[what])
            elif kind == "loaded":
                self._loaded(now, *what)
            elif kind == "pod":
                num_left -= self._step(now, *what)
            elif self.weights is not None:
                self._signals = [pod.signals() for pod in self.pods]
                self._at(now + SCRAPE_SECONDS, "scrape", None)
        uploads, reads = self._moved()
        return self._figures(self.requests[warm:], uploads - uploads_at_warm, reads - reads_at_warm)

    def _arrivals(self) -> None:
        shares = zipf_shares(self.traffic.num_adapters, self.traffic.alpha)
        chosen = self._draw.choices(range(self.traffic.num_adapters), shares, k=self.traffic.num_requests)
        now = 0.0
        for index, adapter in enumerate(chosen):
            now += self._draw.expovariate(self.traffic.requests_per_second)
            self.requests.append(Request(adapter, now))
            self._at(now, "arrive", index)

    def _arrive(self, now: float, request: Request) -> None:
        if self.weights is None:
            request.pod = self._turn % len(self.pods)
            self._turn += 1
        else:
            request.pod = choose(
                str(request.adapter), self._signals, self._num_active, self.weights, self._draw
            )
        self._num_active[request.pod] += 1
        pod = self.pods[request.pod]
        pod.advance(now)
        request.was_resident = request.adapter in pod.device
        if request.was_resident:
            self._admit(now, request)
        elif request.adapter in pod.loading:
            pod.loading[request.adapter].append(request)
        else:
            pod.loading[request.adapter] = [request]
            self._load(now, request.pod, request.adapter)

    def _load(self, now: float, index: int, adapter: int) -> None:
        pod = self.pods[index]
        seconds = self.costs.upload_seconds
        if adapter not in pod.host:
            seconds += self.costs.read_seconds
            pod.num_reads += 1
        pod.host[adapter] = None
        pod.host.move_to_end(adapter)
        while len(pod.host) > self.costs.host_adapters:
            pod.host.popitem(last=False)
        pod.loader_free = max(now, pod.loader_free) + seconds
        self._at(pod.loader_free, "loaded", (index, adapter))

    def _loaded(self, now: float, index: int, adapter: int) -> None:
        pod = self.pods[index]
        pod.advance(now)
        if len(pod.device) >= self.costs.device_adapters:
            idle = next((name for name, users in pod.device.items() if users == 0), None)
            if idle is None:  # all in use: look again when a step may have ended something
                self._at(now + pod.seconds_per_token, "loaded", (index, adapter))
                return
            del pod.device[idle]
        pod.device[adapter] = 0
        pod.num_uploads += 1
        for request in pod.loading.pop(adapter):
            self._admit(now, request)

    def _admit(self, now: float, request: Request) -> None:
        """Resident: run it, or let it wait for a place. It holds its adapter either way."""
        pod = self.pods[request.pod]
        pod.device[request.adapter] += 1
        pod.device.move_to_end(request.adapter)
        pod.queue.append(request)
        self._start(now, request.pod)

    def _start(self, now: float, index: int) -> None:
        pod = self.pods[index]
        while pod.queue and pod.num_running < self.costs.max_running:
            request = pod.queue.pop(0)
            pod.num_running += 1
            prefill = self.costs.prefill_seconds / (
                self.costs.step_seconds + self.costs.step_seconds_per_sequence
            )
            heapq.heappush(pod.running, (pod.progress + prefill + 1, next(self._numbers), request, False))
            last = pod.progress + prefill + self.traffic.output_tokens
            heapq.heappush(pod.running, (last, next(self._numbers), request, True))
        self._schedule(now, index)

    def _schedule(self, now: float, index: int) -> None:
        pod = self.pods[index]
        pod.version += 1
        if pod.running:
            seconds = max(0.0, pod.running[0][0] - pod.progress) * pod.seconds_per_token
            self._at(now + seconds, "pod", (index, pod.version))

    def _step(self, now: float, index: int, version: int) -> int:
        """Deliver what is due; returns how many requests ended."""
        pod = self.pods[index]
        if version != pod.version:
            return 0
        pod.advance(now)
        num_ended = 0
        while pod.running and pod.running[0][0] <= pod.progress + 1e-9:
            _, _, request, is_last = heapq.heappop(pod.running)
            if is_last:
                pod.num_running -= 1
                pod.device[request.adapter] -= 1
                self._num_active[index] -= 1
                num_ended += 1
            else:
                request.first_token = now
        self._start(now, index)
        return num_ended

    def _at(self, when: float, kind: str, what: Any) -> None:
        heapq.heappush(self._events, (when, next(self._numbers), kind, what))

    def _moved(self) -> tuple[int, int]:
        return sum(pod.num_uploads for pod in self.pods), sum(pod.num_reads for pod in self.pods)

    def _figures(self, requests: Sequence[Request], uploads: int, reads: int) -> dict[str, Any]:
        done = [request for request in requests if request.first_token]
        waits = [request.first_token - request.arrival for request in done]
        by_pod = [0] * len(self.pods)
        for request in requests:
            by_pod[request.pod] += 1
        return {
            "num_requests": len(requests),
            "num_unanswered": len(requests) - len(done),
            "hit_rate": sum(request.was_resident for request in requests) / len(requests),
            "ttft_seconds": {f"p{p}": percentile(waits, p) for p in (50, 95, 99)},
            "uploads_per_1000_requests": 1000 * uploads / len(requests),
            "reads_per_1000_requests": 1000 * reads / len(requests),
            "read_bytes_per_second": reads
            * self.costs.adapter_bytes
            / (requests[-1].arrival - requests[0].arrival),
            "busiest_pod_share": max(by_pod) * len(self.pods) / len(requests),
        }


POLICIES: dict[str, Weights | None] = {
    "round-robin": None,
    "queue and KV only": NO_LORA_SCORER,
    "affinity 4, queue 2, KV 2": KSERVE,
    "affinity 4, active 4, KV 2": Weights(),
}
"""In turn: a plain Service, llm-d's default, KServe's, and deploy/'s own."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.fleet_sim",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--costs",
        type=Path,
        required=True,
        metavar="FILE",
        help="JSON with the fields of Costs under 'costs'",
    )
    add("--pods", type=int, default=100)
    add("--adapters", type=int, default=10_000)
    add("--alpha", type=float, default=1.0, help="the exponent of Zipf's law")
    add("--load", type=float, default=0.6, help="part of what the pods could answer, all adapters resident")
    add("--requests", type=int, default=100_000)
    add("--output-tokens", type=int, default=64)
    add("--seed", type=int, default=0)
    add("--out", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    try:
        costs = Costs(**json.loads(arguments.costs.read_text())["costs"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        print(f"bench.fleet_sim: {arguments.costs}: {error}", file=sys.stderr)
        return 1
    traffic = Traffic(
        arguments.adapters,
        arguments.alpha,
        arguments.load * arguments.pods * capacity(costs, arguments.output_tokens),
        arguments.requests,
        arguments.output_tokens,
        arguments.seed,
    )
    result: dict[str, Any] = {
        "bench": "fleet_sim",
        "machine": machine(),
        "pods": arguments.pods,
        "costs": asdict(costs),
        "traffic": asdict(traffic),
        "policies": {},
    }
    for name, weights in POLICIES.items():
        figures = Fleet(arguments.pods, costs, traffic, weights).run()
        result["policies"][name] = figures
        print(f"{name:>26}  {line(figures)}", flush=True)
    emit(result, arguments.out)
    return 0


def capacity(costs: Costs, output_tokens: int) -> float:
    """Requests a second that one pod answers with all its places taken and every adapter resident."""
    tokens = output_tokens + costs.prefill_seconds / (costs.step_seconds + costs.step_seconds_per_sequence)
    step = costs.step_seconds + costs.step_seconds_per_sequence * costs.max_running
    return costs.max_running / (tokens * step)


def line(figures: dict[str, Any]) -> str:
    ttft = figures["ttft_seconds"]
    return (
        f"hits {figures['hit_rate']:.1%}, first token p50 {ttft['p50']:.3f} p95 {ttft['p95']:.3f}"
        f" p99 {ttft['p99']:.3f} s, moved per 1000 {figures['uploads_per_1000_requests']:.0f}"
        f" (read {figures['reads_per_1000_requests']:.0f}), busiest pod {figures['busiest_pod_share']:.1f}x"
    )


if __name__ == "__main__":
    sys.exit(main())
