"""What the device does in a step: the CUDA graphs that are replayed, and the kernels by time.

Neither asks the engine how it is built: graphs are seen where torch replays them, kernels by torch's profiler.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

_NAME_LENGTH = 64


@contextmanager
def noted_replays() -> Iterator[list[Any]]:
    """The CUDA graphs that are replayed inside, in order."""
    replay = torch.cuda.CUDAGraph.replay
    noted: list[Any] = []

    def note_and_replay(graph: Any) -> None:
        noted.append(graph)
        replay(graph)

    torch.cuda.CUDAGraph.replay = note_and_replay  # type: ignore[method-assign, assignment]
    try:
        yield noted
    finally:
        torch.cuda.CUDAGraph.replay = replay  # type: ignore[method-assign]


@dataclass(frozen=True)
class KernelTime:
    """One kernel, or copy, of a step: how often, and microseconds each and together."""

    name: str
    count: float
    us_each: float
    us: float


@dataclass(frozen=True)
class Trace:
    """Of one step on the device, the mean of several. `idle_us`: between its first and last kernel, in graphs too.

    `order` is (microseconds since the step's first kernel, microseconds, name) of the last step's.
    """

    kernels: list[KernelTime]
    busy_us: float
    span_us: float
    order: list[tuple[float, float, str]]

    def as_dict(self, num_in_order: int = 400) -> dict[str, Any]:
        return {
            "busy_us": self.busy_us,
            "span_us": self.span_us,
            "kernels": [asdict(kernel) for kernel in self.kernels],
            "order": self.order[:num_in_order],
        }

    def table(self, num_kernels: int = 25) -> str:
        lines = [
            f"  {'per step':>8} {'us each':>8} {'us':>9}  kernel"
            f"   (busy {self.busy_us:.0f} us of {self.span_us:.0f} us a step)"
        ]
        lines += [
            f"  {kernel.count:8.1f} {kernel.us_each:8.2f} {kernel.us:9.1f}  {kernel.name}"
            for kernel in self.kernels[:num_kernels]
        ]
        rest = self.kernels[num_kernels:]
        if rest:
            count, us = sum(kernel.count for kernel in rest), sum(kernel.us for kernel in rest)
            lines.append(f"  {count:8.1f} {'':8} {us:9.1f}  {len(rest)} others")
        return "\n".join(lines)


def trace_steps(step: Callable[[], Any], num_steps: int) -> Trace:
    """Kernels of `num_steps` steps. The span is from the first kernel's start to the last one's end, by step."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(num_steps):
            step()
        torch.cuda.synchronize()
    events = sorted(
        (
            (event.time_range.start, event.time_range.end, short_name(event.name))
            for event in profile.events()
            if event.device_type == torch.autograd.DeviceType.CUDA  # type: ignore[attr-defined]
            and not event.is_user_annotation
        ),
    )
    return trace_of(events, num_steps)


def trace_of(events: list[tuple[float, float, str]], num_steps: int) -> Trace:
    """events: (start, end, name) in microseconds, sorted."""
    times: dict[str, list[float]] = defaultdict(list)
    for start, end, name in events:
        times[name].append(end - start)
    kernels = [
        KernelTime(name, len(taken) / num_steps, sum(taken) / len(taken), sum(taken) / num_steps)
        for name, taken in times.items()
    ]
    kernels.sort(key=lambda kernel: -kernel.us)
    last = events[-(len(events) // num_steps) :] if events else []
    return Trace(
        kernels=kernels,
        busy_us=sum(kernel.us for kernel in kernels),
        span_us=(max(end for _, end, _ in events) - events[0][0]) / num_steps if events else 0.0,
        order=[(round(start - last[0][0], 1), round(end - start, 1), name) for start, end, name in last],
    )


def short_name(name: str) -> str:
    """A kernel's name without its return type, namespaces and most of its template arguments."""
    name = re.sub(r"^(void|float|int) ", "", name)
    name = re.sub(r"\((anonymous namespace|lambda[^)]*)\)::", "", name)
    name = re.sub(r"\b(at|native|cuda|cutlass|cublasLt|internal|detail)::", "", name)
    return name if len(name) <= _NAME_LENGTH else f"{name[: _NAME_LENGTH - 14]}..{name[-12:]}"
