"""Decoding and prefilling on a CUDA device at a real model's shape, against what its memory allows.

Through the daemon's own engine, CUDA graphs and all, without HTTP; weights are random and made on the device.
For each mix of adapters: the engine's step as the clock sees it, and the device's own time of the same step, which is
its graph replayed alone; the rest is Python and waiting. Popularities are Punica's (bench/workload.py).

    python -m bench.gpu_decode --out decode.json
    python -m bench.gpu_decode --profile                                  # kernels by time, and Python's functions
    python -m bench.gpu_decode --quantization int8 --cases 1:base,32:base
    TRITON_INTERPRET=1 python -m bench.gpu_decode --device cpu --shape tiny --cases 2:base,2:distinct --prefill 32

A floor is the bytes that a step must read (all weights but the embedding, each adapter once, keys and values) over
the bandwidth measured in the same run. The last lines of stdout are the table.
"""

import argparse
import cProfile
import io
import pstats
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adapterd.adapter import Adapter
from adapterd.core import RequestId
from bench.floor import shape_of
from bench.gpu_arguments import engine_parser, report_of
from bench.gpu_device import device_seconds, matrix_rates, memory_ways
from bench.gpu_figures import Measure, table
from bench.gpu_report import Report
from bench.gpu_trace import noted_replays, trace_steps
from bench.models import config_of
from bench.offline import OfflineEngine, Sizes, Steps
from bench.random_models import adapter_of, random_base, random_matrices
from bench.workload import requests_by_adapter

DEFAULT_CASES = "1:base,32:base,1:identical,32:distinct,32:uniform,32:zipf:1.5,32:identical"
_WARM_UP_TOKENS = 6
_STEPS_BEFORE_REPLAY = 4


@dataclass(frozen=True)
class Case:
    """`batch` sequences at once, their adapters by Punica's popularity; None is the base alone."""

    batch: int
    popularity: str | None

    @classmethod
    def parse(cls, text: str) -> "Case":
        """ "32:zipf:1.5" or "1:base"."""
        batch, _, popularity = text.partition(":")
        return cls(int(batch), None if popularity == "base" else popularity)

    @property
    def name(self) -> str:
        return f"{self.batch}:{self.popularity or 'base'}"

    @property
    def routes(self) -> list[int | None]:
        """The adapter of each sequence, by number."""
        if self.popularity is None:
            return [None] * self.batch
        counts = requests_by_adapter(self.batch, self.popularity)
        return [index for index, count in enumerate(counts) for _ in range(count)]

    @property
    def num_adapters(self) -> int:
        return len({route for route in self.routes if route is not None})


class DecodeBench:
    """One engine that holds adapters, and what is asked of it."""

    def __init__(self, arguments: argparse.Namespace, cases: Sequence[Case]) -> None:
        self.device = torch.device(arguments.device)
        self.prompt_tokens: int = arguments.prompt_tokens
        self.output_tokens: int = arguments.output_tokens
        self.rank: int = arguments.rank
        dtype = getattr(torch, arguments.dtype)
        config = config_of(arguments.shape, arguments.layers)
        self.shape = shape_of(config)
        began = time.perf_counter()
        base = random_base(
            config, self.device, dtype, kernels=arguments.kernels, quantization=arguments.quantization
        )
        self.model_seconds = time.perf_counter() - began
        count = max([1, *(case.num_adapters for case in cases)])
        matrices = [random_matrices(base.spec, self.rank, self.device, dtype) for _ in range(min(count, 4))]
        self.adapters = [adapter_of(f"adapter-{i}", matrices[i % len(matrices)]) for i in range(count)]
        longest = max([self.prompt_tokens + self.output_tokens, *arguments.prefill]) + 64
        batch = max(case.batch for case in cases)
        sizes = Sizes(
            max_num_seqs=batch,
            max_num_batched_tokens=arguments.max_num_batched_tokens,
            kv_memory=batch * longest * self.shape.kv_elements_per_token * dtype.itemsize,
            max_loras=count,
            max_lora_rank=self.rank,
        )
        began = time.perf_counter()
        self.offline = OfflineEngine(base, sizes, self.adapters)
        self.engine_seconds = time.perf_counter() - began

    def submit(self, case: Case, output_tokens: int, seed: str) -> list[RequestId]:
        return [
            self.offline.submit(self.prompt_tokens, output_tokens, self._adapter(route), f"{case.name}/{seed}/{i}")
            for i, route in enumerate(case.routes)
        ]  # fmt: skip

    def run(self, case: Case, output_tokens: int, seed: str) -> Steps:
        return self.offline.run(self.submit(case, output_tokens, seed))

    def prefill_seconds(self, num_tokens: int, adapter: Adapter | None, seed: str) -> float:
        request_id = self.offline.submit(num_tokens, 1, adapter, f"prefill/{num_tokens}/{seed}")
        return sum(self.offline.run([request_id]).prefill)

    def replay_seconds(self, case: Case) -> float | None:
        """The device's time of one decode step, its graphs replayed alone; None where nothing is replayed."""
        if self.device.type != "cuda":
            return None
        ids = self.submit(case, self.output_tokens, "replay")
        self.offline.prefill(ids)
        for _ in range(_STEPS_BEFORE_REPLAY):
            self.offline.engine.step()
        with noted_replays() as graphs:
            self.offline.engine.step()

        def replay() -> None:
            for graph in graphs:
                graph.replay()

        # Replayed again, a step writes the same keys to the same places.
        seconds = device_seconds(replay, self.device, calls=4) if graphs else None
        self.offline.abandon(ids)
        return seconds

    def profile(self, case: Case, num_steps: int = 10) -> dict[str, Any]:
        """Kernels and Python's own functions, of some decode steps each."""
        ids = self.submit(case, self.output_tokens + 4 * num_steps, "profile")
        self.offline.prefill(ids)
        for _ in range(_STEPS_BEFORE_REPLAY):
            self.offline.engine.step()
        found: dict[str, Any] = {}
        if self.device.type == "cuda":
            trace = trace_steps(self.offline.engine.step, num_steps)
            print(f"kernels of a decode step, {case.name}\n{trace.table()}", flush=True)
            found = trace.as_dict()
        python = cProfile.Profile()
        python.enable()
        for _ in range(num_steps):
            self.offline.engine.step()
        python.disable()
        found["python"] = _python_table(python)
        print(f"Python of {num_steps} decode steps, {case.name}\n{found['python']}", flush=True)
        self.offline.abandon(ids)
        return found

    def profile_prefill(self, num_tokens: int, adapter: Adapter | None) -> dict[str, Any]:
        def prefill() -> None:
            self.prefill_seconds(num_tokens, adapter, "profile")

        trace = trace_steps(prefill, 1)
        print(f"kernels of a prefill of {num_tokens} tokens\n{trace.table(20)}", flush=True)
        return trace.as_dict(100)

    def _adapter(self, route: int | None) -> Adapter | None:
        return None if route is None else self.adapters[route]


def _python_table(profile: cProfile.Profile) -> str:
    text = io.StringIO()
    pstats.Stats(profile, stream=text).strip_dirs().sort_stats("tottime").print_stats(18)
    lines = [line[:110] for line in text.getvalue().splitlines() if line.strip()]
    return "\n".join(lines)


def measure_device(
    device: torch.device, dtype: torch.dtype, arguments: argparse.Namespace, report: Report
) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes a second by way of moving them, operations a second by number of tokens."""
    speeds: dict[str, float] = {}
    for way, (work, num_bytes) in memory_ways(device, arguments.megabytes << 20).items():
        with report.part(f"bandwidth, {way}"):
            speeds[way] = num_bytes / device_seconds(work, device)
            report.keep("bytes_per_second", speeds)
    rates: dict[str, float] = {}
    with report.part("matrix rates"):
        linears = shape_of(config_of(arguments.shape)).linears
        rates = matrix_rates(linears, device, sorted({*arguments.prefill, 4096}), dtype)
        report.keep("flops_per_second", rates)
    return speeds, rates


def measure_decode(
    bench: DecodeBench, cases: Sequence[Case], num_rounds: int, report: Report, measure: Measure
) -> None:
    rounds: dict[Case, list[Steps]] = {case: [] for case in cases}
    for number in range(-1, num_rounds):
        # In turn, so that a drift of the clocks is every case's; the round before the first is not counted.
        output_tokens = _WARM_UP_TOKENS if number < 0 else bench.output_tokens
        for case in cases:
            with report.part(f"decode {case.name}, round {number}"):
                steps = bench.run(case, output_tokens, str(number))
                if number >= 0:
                    rounds[case].append(steps)
    decode: dict[str, dict[str, Any]] = {}
    for case in cases:
        if not rounds[case]:
            continue
        replay: float | None = None
        with report.part(f"replay {case.name}"):
            replay = bench.replay_seconds(case)
        with report.part(f"figures {case.name}"):
            decode[case.name] = measure.decode(
                case.batch, case.num_adapters, rounds[case], replay, bench.prompt_tokens, bench.output_tokens
            )
            measure.compare_with_base(decode)
            report.keep("decode", decode)


def measure_prefill(bench: DecodeBench, lengths: Sequence[int], report: Report, measure: Measure) -> None:
    prefill: dict[str, dict[str, Any]] = {}
    for num_tokens in lengths:
        for adapter in (None, bench.adapters[0]):
            name = f"{num_tokens} tokens{', 1 adapter' if adapter else ''}"
            with report.part(f"prefill {name}"):
                taken = [bench.prefill_seconds(num_tokens, adapter, f"{name}/{i}") for i in range(4)][1:]
                prefill[name] = measure.prefill(num_tokens, adapter is not None, statistics.median(taken))
                report.keep("prefill", prefill)


def measure_profiles(
    bench: DecodeBench, cases: Sequence[Case], lengths: Sequence[int], report: Report
) -> None:
    profiles: dict[str, Any] = {}
    for case in cases:
        with report.part(f"profile {case.name}"):
            profiles[case.name] = bench.profile(case)
            report.keep("profiles", profiles)
    for num_tokens in lengths[:1] if bench.device.type == "cuda" else ():
        with report.part(f"profile prefill {num_tokens}"):
            profiles[f"prefill {num_tokens}"] = bench.profile_prefill(num_tokens, None)
            report.keep("profiles", profiles)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    cases = [Case.parse(text) for text in arguments.cases.split(",")]
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    shape = shape_of(config_of(arguments.shape, arguments.layers))
    report = report_of("gpu_decode", arguments)
    speeds, rates = measure_device(device, dtype, arguments, report)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    measure = Measure(
        shape=shape,
        rank=arguments.rank,
        weight_bytes=1.0 if arguments.quantization == "int8" else dtype.itemsize,
        bandwidth=max((rate for way, rate in speeds.items() if way != "copy"), default=float("inf")),
        matrix_rate=max(rates.values(), default=float("inf")),
    )
    bench: DecodeBench | None = None
    with report.part("model"):
        bench = DecodeBench(arguments, cases)
        report.keep("model_seconds", bench.model_seconds)
        report.keep("engine_seconds", bench.engine_seconds)
        print(f"model {bench.model_seconds:.1f} s, engine with its graphs {bench.engine_seconds:.1f} s")
    if bench is not None:
        measure_decode(bench, cases, arguments.rounds, report, measure)
        measure_prefill(bench, arguments.prefill, report, measure)
        if arguments.profile:
            profiled = [Case.parse(text) for text in arguments.profile_cases.split(",")]
            measure_profiles(bench, profiled, arguments.prefill, report)
    print(table(report.figures))
    return int(report.failed)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = engine_parser("gpu_decode", __doc__)
    add = parser.add_argument
    add("--quantization", choices=("none", "int8"), default="none")
    add("--cases", default=DEFAULT_CASES, help="BATCH:POPULARITY, or BATCH:base, with commas")
    add("--prompt-tokens", type=int, default=128)
    add("--output-tokens", type=int, default=64)
    add("--rounds", type=int, default=3)
    add("--prefill", type=_numbers, default=(512, 2048), help="lengths of prompts; empty for none")
    add("--max-num-batched-tokens", type=int, default=4096)
    add("--megabytes", type=int, default=4096, help="read in one pass to measure the bandwidth")
    add("--profile", action="store_true", help="print kernels and Python's functions by time")
    add("--profile-cases", default="32:distinct,1:base")
    return parser.parse_args(argv)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number)


if __name__ == "__main__":
    sys.exit(main())
