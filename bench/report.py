"""From records to figures: percentiles, rates, goodput; and the machine they were taken on."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from bench.client import Record

Figures = dict[str, Any]

OBJECTIVES = ("ttft", "tpot", "itl", "e2e")
"""What an objective may bound, in seconds; `itl` is the p99 of the request's own gaps between tokens."""


_BUSY_CPUS_ALLOWED = 0.15


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest ranks, as numpy's default. Raises ValueError if there are no values."""
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {name: percentile(values, p) for name, p in (("p50", 50), ("p95", 95), ("p99", 99))}


def parse_objective(text: str) -> dict[str, float]:
    """ "ttft=2,itl=0.2" -> {"ttft": 2.0, "itl": 0.2}. Raises ValueError naming what is allowed."""
    bounds = {}
    for part in text.split(","):
        name, _, bound = part.partition("=")
        if name not in OBJECTIVES or not bound:
            raise ValueError(f"objective {part!r}: write NAME=SECONDS with NAME of {', '.join(OBJECTIVES)}")
        bounds[name] = float(bound)
    return bounds


def meets(record: Record, objective: Mapping[str, float]) -> bool:
    if record.error is not None:
        return False
    taken = {
        "ttft": record.ttft,
        "tpot": record.tpot,
        "itl": percentile(record.gaps, 99) if record.gaps else 0.0,
        "e2e": record.e2e,
    }
    return all(taken[name] <= bound for name, bound in objective.items())


def summarise(records: Sequence[Record], objective: Mapping[str, float]) -> Figures:
    """The figures of one run. Requests that failed count in `errors`, and their tokens nowhere."""
    whole = [record for record in records if record.error is None]
    seconds = max(record.end for record in records) - min(record.start for record in records)
    tokens = sum(record.completion_tokens for record in whole)
    chunks = sum(len(record.chunks) for record in whole)
    figures: Figures = {
        "num_requests": len(records),
        "num_errors": len(records) - len(whole),
        "errors": dict(Counter(record.error for record in records if record.error is not None)),
        "wall_seconds": seconds,
        "output_tokens": tokens,
        "prompt_tokens": sum(record.prompt_tokens for record in whole),
        "output_tokens_per_second": tokens / seconds,
        "requests_per_second": len(whole) / seconds,
        "ttft_seconds": spread([record.ttft for record in whole]),
        "itl_seconds": spread([gap for record in whole for gap in record.gaps]),
        "tpot_seconds": spread([record.tpot for record in whole]),
        "e2e_seconds": spread([record.e2e for record in whole]),
        # Below 1 the server sent several tokens at once and inter-token latency hides their distance.
        "chunks_per_token": chunks / tokens if tokens else None,
        "num_wrong_prompt_length": sum(r.prompt_tokens != r.request.prompt_tokens for r in whole),
        "num_wrong_output_length": sum(r.completion_tokens != r.request.output_tokens for r in whole),
    }
    if objective:
        met = sum(meets(record, objective) for record in records)
        figures["objective"] = dict(objective)
        figures["goodput_requests_per_second"] = met / seconds
        figures["objective_met"] = met / len(records)
    return figures


def median_of(runs: Sequence[Figures]) -> Figures:
    """Field by field: numbers by their median, tables recursively, the rest from the first run."""
    merged: Figures = {}
    for key, first in runs[0].items():
        values: list[Any] = [run.get(key) for run in runs]
        if key.startswith("num_"):
            merged[key] = sum(values)  # an error in any run must show
        elif key == "errors":
            merged[key] = dict(sum((Counter(value) for value in values), Counter()))
        elif isinstance(first, dict) and all(isinstance(value, dict) for value in values):
            merged[key] = median_of(values)
        elif all(isinstance(value, int | float) for value in values):
            merged[key] = statistics.median(values)
        else:
            merged[key] = first
    return merged


RATIOS = (
    ("output tokens/s", ("output_tokens_per_second",)),
    ("first token p50", ("ttft_seconds", "p50")),
    ("first token p99", ("ttft_seconds", "p99")),
    ("inter-token p50", ("itl_seconds", "p50")),
    ("inter-token p99", ("itl_seconds", "p99")),
    ("peak memory", ("peak_rss_bytes",)),
    ("start-up", ("startup_seconds",)),
)


def ratios(first: Sequence[Figures], second: Sequence[Figures]) -> dict[str, float]:
    """first / second: the median over rounds of each round's ratio, so that a drift of the machine cancels."""
    found = {}
    for name, keys in RATIOS:
        pairs = [(_at(a, keys), _at(b, keys)) for a, b in zip(first, second, strict=True)]
        known = [a / b for a, b in pairs if a is not None and b]
        if known:
            found[name] = statistics.median(known)
    return found


def _at(figures: Mapping[str, Any], keys: Iterable[str]) -> float | None:
    value: Any = figures
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return None if value is None else float(value)


def describe(figures: Figures) -> str:
    """A few lines for people."""
    lines = [
        f"{figures['output_tokens_per_second']:9.2f} output tokens/s   {figures['requests_per_second']:.3f} requests/s"
        f"   {figures['num_requests']} requests, {figures['num_errors']} errors, {figures['wall_seconds']:.1f} s"
    ]
    for name in ("ttft", "itl", "tpot", "e2e"):
        if values := figures[f"{name}_seconds"]:
            parts = "  ".join(f"{key} {1000 * value:9.1f}" for key, value in values.items())
            lines.append(f"{name:>9} ms  {parts}")
    if "objective" in figures:
        bounds = ", ".join(f"{name} <= {bound:g} s" for name, bound in figures["objective"].items())
        good = figures["goodput_requests_per_second"]
        lines.append(f"  goodput {good:.3f} requests/s, {figures['objective_met']:.1%} met {bounds}")
    if figures.get("peak_rss_bytes"):
        lines.append(f"     peak {figures['peak_rss_bytes'] / 1e6:.0f} MB resident")
    if figures.get("startup_seconds"):
        lines.append(f" start-up {figures['startup_seconds']:.1f} s")
    chunks = figures["chunks_per_token"]
    if chunks is not None and not 0.98 < chunks < 1.02:
        lines.append(f"  WARNING {chunks:.2f} chunks a token: inter-token latency is that of chunks")
    for what in ("prompt", "output"):
        if wrong := figures[f"num_wrong_{what}_length"]:
            lines.append(f"  WARNING {wrong} requests had another number of {what} tokens than asked for")
    for error, count in figures["errors"].items():
        lines.append(f"    ERROR {count} x {error}")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """What the figures are taken on and when, asked before the work: no path and no host name."""
    packages: dict[str, str | None] = {}
    for package in ("torch", "transformers", "peft"):
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            packages[package] = None
    return {
        "date": time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime()),
        "cpu": _cpu_name(),
        "cpu_flags": _cpu_flags(),
        "num_cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "busy_cpus": busy_cpus(),
        "python": platform.python_version(),
        "packages": packages,
        "commit": _commit(),
    }


def busy_cpus() -> float:
    """Processors that others keep busy, over half a second of sleep. Warns on stderr if figures will suffer."""
    busy: float = psutil.cpu_percent(interval=0.5) / 100 * (psutil.cpu_count() or 1)
    if busy > _BUSY_CPUS_ALLOWED:
        print(
            f"WARNING: others keep {busy:.1f} processors busy; figures will be worse than ours",
            file=sys.stderr,
        )
    return busy


def _cpuinfo(field: str) -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(field):
            return line.partition(":")[2].strip()
    return "unknown"


def _cpu_name() -> str:
    return f"{_cpuinfo('model name')} (family {_cpuinfo('cpu family')}, model {_cpuinfo('model')}" + (
        f", stepping {_cpuinfo('stepping')})"
    )


def _cpu_flags() -> list[str]:
    """Those that decide which kernels run."""
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8")
    present = set(_cpuinfo("flags").split())
    return [flag for flag in wanted if flag in present]


def _commit() -> str | None:
    """The repository's commit, with a plus if files differ from it."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        found = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:  # no git
        return None
    return found.stdout.strip() or None


def emit(result: Mapping[str, Any], out: Path | None) -> None:
    """The last line of stdout is the result as JSON; `out` gets it indented."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
