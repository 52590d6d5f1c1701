"""A new adapter from host memory to its first token while others decode, and what the others notice of it.

Some sequences decode without end. Every so often a short request comes: for an adapter that the device has never
seen, or, to compare, for one that is there already. The engine is turned as the daemon turns it, CUDA graphs and all.

    python -m bench.gpu_upload --out upload.json
    python -m bench.gpu_upload --device cpu --kernels torch --shape tiny --dtype float32 --others 2 --newcomers 3

Phases, in turn: `quiet` (nobody comes), `resident` (an adapter that is there), `new` (one that must be uploaded),
`prefetch` (uploads that no request waits for). Milliseconds. Of a newcomer: `use` is from its submission to the step
that first runs its adapter, `first token` to its token, `upload` the copy alone. Of the others: the gaps between
their tokens, and their ratio to those of the quiet phases. The last lines of stdout are the table.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from adapterd.adapter import Adapter
from adapterd.core import AdapterId, Batch, RequestId, Tier
from bench.floor import shape_of
from bench.gpu_arguments import engine_parser, report_of
from bench.models import config_of
from bench.offline import OfflineEngine, Sizes
from bench.random_models import adapter_of, random_base, random_matrices
from bench.report import percentile

PHASES = ("quiet", "resident", "new", "prefetch")
_NUM_MATRICES = 6
"""Different adapters in host memory, taken in turn: more bytes than a processor's cache holds."""

_MAX_CONTEXT = 4096
"""Of the others: more steps than a phase has."""

_STEPS_BEFORE = 4
_PATIENCE_SECONDS = 2.0


class UploadTimes:
    """AdapterEvents that keep how long each upload to the device took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def adapter_wanted(self, name: str, *, is_resident: bool) -> None: ...

    def adapter_loaded(self, name: str, tier: Tier, seconds: float) -> None:
        if tier == "device":
            self.seconds[name] = seconds

    def adapter_evicted(self, name: str, tier: Tier) -> None: ...


@dataclass
class Newcomer:
    """Moments of one short request, or of one prefetch."""

    adapter: Adapter
    submitted: float
    request_id: RequestId | None = None
    used: float | None = None
    first_token: float | None = None


@dataclass
class Phase:
    """What was seen while one kind of newcomers came."""

    newcomers: list[Newcomer] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)


class UploadBench:
    """An engine in which `others` sequences decode, over adapters that are there."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.device = torch.device(arguments.device)
        self.period_seconds: float = arguments.period_ms / 1000
        self.newcomer_tokens: int = arguments.newcomer_tokens
        dtype = getattr(torch, arguments.dtype)
        config = config_of(arguments.shape, arguments.layers)
        base = random_base(config, self.device, dtype, kernels=arguments.kernels)
        self._matrices = [
            base.lay_out(
                adapter_of("any", random_matrices(base.spec, arguments.rank, self.device, dtype))
            ).modules
            for _ in range(_NUM_MATRICES)
        ]
        self._num_adapters = 0
        self.uploads = UploadTimes()
        self.prompt_tokens: int = arguments.prompt_tokens
        context = min(config.max_position_embeddings, _MAX_CONTEXT)
        self.max_tokens = context - self.prompt_tokens
        num_others: int = arguments.others
        kv_bytes_per_token = shape_of(config).kv_elements_per_token * dtype.itemsize
        sizes = Sizes(
            max_num_seqs=num_others + 8,
            max_num_batched_tokens=2048,
            kv_memory=(num_others + 8) * context * kv_bytes_per_token,
            max_loras=num_others + 8,
            max_lora_rank=arguments.rank,
        )
        self.offline = OfflineEngine(base, sizes, events=self.uploads)
        self._first_use: dict[AdapterId, float] = {}
        self._watch_schedule()
        self.residents = [self._new_adapter() for _ in range(num_others)]

    def phase(self, kind: str, num_newcomers: int) -> Phase:
        """Newcomers of one kind, one each period, until the last has been answered; the others begin anew."""
        others = [
            self.offline.submit(
                self.prompt_tokens, self.max_tokens, adapter, f"other {self.offline.num_requests}"
            )
            for adapter in self.residents
        ]
        self.offline.prefill(others)
        for _ in range(_STEPS_BEFORE):
            self.offline.engine.step()
        found = self._let_come(kind, num_newcomers, others)
        self.offline.abandon(others)
        return found

    def _let_come(self, kind: str, num_newcomers: int, others: Sequence[RequestId]) -> Phase:
        found = Phase()
        began = time.perf_counter()
        coming = num_newcomers
        last_token = dict.fromkeys(others, began)
        patience_ends = began + self.period_seconds * num_newcomers + _PATIENCE_SECONDS
        while coming or any(self._is_expected(newcomer) for newcomer in found.newcomers):
            now = time.perf_counter()
            if now > patience_ends:  # a prefetch that found no room comes to nothing
                break
            if coming and now - began >= self.period_seconds * (num_newcomers - coming):
                coming -= 1
                if kind != "quiet":
                    found.newcomers.append(self._bring(kind, len(found.newcomers)))
            outputs = self.offline.engine.step()
            after = time.perf_counter()
            found.steps.append(after - now)
            for output in outputs:
                last = last_token.get(output.request_id)
                if last is not None:
                    found.gaps.append(after - last)
                    last_token[output.request_id] = after
                    assert output.finish_reason is None, "the others' answers are too short for this bench"
                    continue
                for newcomer in found.newcomers:
                    if newcomer.request_id == output.request_id and newcomer.first_token is None:
                        newcomer.first_token = after
                        newcomer.used = self._first_use.get(newcomer.adapter.id)
        return found

    def _bring(self, kind: str, number: int) -> Newcomer:
        # One of the others' adapters stands for all that are there: they are alike.
        adapter = self.residents[number % len(self.residents)] if kind == "resident" else self._new_adapter()
        self._first_use.pop(adapter.id, None)
        newcomer = Newcomer(adapter, time.perf_counter())
        if kind == "prefetch":
            self.offline.engine.prefetch(adapter.id)
        else:
            newcomer.request_id = self.offline.submit(
                self.newcomer_tokens, 1, adapter, f"{kind} {self.offline.num_requests}"
            )
        return newcomer

    def _is_expected(self, newcomer: Newcomer) -> bool:
        if newcomer.request_id is not None:
            return newcomer.first_token is None
        return newcomer.adapter.id.name not in self.uploads.seconds

    def _new_adapter(self) -> Adapter:
        number = self._num_adapters
        self._num_adapters += 1
        adapter = adapter_of(f"adapter-{number}", self._matrices[number % len(self._matrices)])
        self.offline.know(adapter)
        return adapter

    def _watch_schedule(self) -> None:
        """Note when a new adapter is first in a batch that is about to run."""
        scheduler = self.offline.engine._scheduler
        schedule: Callable[[], Batch | None] = scheduler.schedule

        def noted() -> Batch | None:
            batch = schedule()
            now = time.perf_counter()
            for item in batch.scheduled if batch is not None else ():
                for adapter_id, _ in item.sequence.mix:
                    if adapter_id not in self._first_use and item.start == 0:
                        self._first_use[adapter_id] = now
            return batch

        scheduler.schedule = noted  # type: ignore[method-assign]


def figures_of(phases: Sequence[Phase], uploads: UploadTimes) -> dict[str, Any]:
    """Of all phases of one kind, in milliseconds."""
    newcomers = [newcomer for phase in phases for newcomer in phase.newcomers]
    gaps = [gap for phase in phases for gap in phase.gaps]
    times = {
        "use": [n.used - n.submitted for n in newcomers if n.used is not None and n.request_id is not None],
        "first_token": [n.first_token - n.submitted for n in newcomers if n.first_token is not None],
        "upload": [
            uploads.seconds[n.adapter.id.name] for n in newcomers if n.adapter.id.name in uploads.seconds
        ],
        "gap": gaps,
        "step": [step for phase in phases for step in phase.steps],
    }
    return {
        "num_newcomers": len(newcomers),
        "num_gaps": len(gaps),
        **{
            f"{name}_ms": {p: 1000 * percentile(values, float(p[1:])) for p in ("p50", "p90", "p99")}
            for name, values in times.items()
            if values
        },
    }


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    report = report_of("gpu_upload", arguments)
    bench: UploadBench | None = None
    with report.part("model"):
        bench = UploadBench(arguments)
        report.keep("adapter_bytes", bench.residents[0].num_bytes)
        for kind in PHASES:  # kernels and staging memory are made once
            bench.phase(kind, min(arguments.newcomers, 5))
    if report.failed:
        return 1
    phases: dict[str, list[Phase]] = {kind: [] for kind in PHASES}
    for number in range(arguments.rounds):
        for kind in PHASES:
            with report.part(f"{kind}, round {number}"):
                phases[kind].append(bench.phase(kind, arguments.newcomers))
    with report.part("figures"):
        found = {kind: figures_of(phases[kind], bench.uploads) for kind in PHASES if phases[kind]}
        for of_kind in found.values():
            quiet, resident = found.get("quiet"), found.get("resident")
            if quiet:
                of_kind["gap_p99_over_quiet"] = of_kind["gap_ms"]["p99"] / quiet["gap_ms"]["p99"]
            if resident:
                of_kind["gap_p99_over_resident"] = of_kind["gap_ms"]["p99"] / resident["gap_ms"]["p99"]
        report.keep("phases", found)
    print(table(report.figures))
    return int(report.failed)


def table(figures: dict[str, Any]) -> str:
    """What a person wants to see of the kept figures; parts that failed are missing."""
    settings = figures["settings"]
    lines = [
        f"{figures['gpu']['name']}, {settings['shape']}, adapters of {figures.get('adapter_bytes', 0) / 1e6:.0f} MB,"
        f" {settings['others']} others, one newcomer each {settings['period_ms']} ms"
    ]
    kinds = ("use", "first_token", "upload", "gap")
    heads = "".join(f"{kind:>18}" for kind in kinds)
    lines.append(f"{'ms, p50 and p99':16}{heads}{'p99 / quiet':>14}{'p99 / resident':>16}")
    for name, found in figures.get("phases", {}).items():
        cells = ""
        for kind in kinds:
            times = found.get(f"{kind}_ms")
            cells += f"{times['p50']:9.2f}{times['p99']:9.2f}" if times else f"{'-':>18}"
        over = [found.get(f"gap_p99_over_{other}") for other in ("quiet", "resident")]
        quiet, resident = ("-" if ratio is None else f"{ratio:.2f}" for ratio in over)
        lines.append(f"{name:16}{cells}{quiet:>14}{resident:>16}")
    lines += [f"FAILED {part}: {error[:160]}" for part, error in figures["errors"].items()]
    return "\n".join(lines)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = engine_parser("gpu_upload", __doc__)
    add = parser.add_argument
    add("--others", type=int, default=16, help="sequences that decode all the time, each its own adapter")
    add("--prompt-tokens", type=int, default=128, help="of the others")
    add("--newcomers", type=int, default=40, help="in each phase")
    add("--newcomer-tokens", type=int, default=16, help="of a newcomer's prompt")
    add("--period-ms", type=float, default=50.0, help="from one newcomer to the next")
    add("--rounds", type=int, default=2, help="of all phases")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
