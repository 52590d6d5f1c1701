"""Every Prometheus series, declared in one list, and the clock of each request that feeds them.

The `vllm:` names are those that the Kubernetes endpoint picker and the usual dashboards read; one series each,
because the picker takes the first it finds. What vLLM lacks is called `adapterd_`. Nothing here touches the
engine's thread: its counters are read from the copy it leaves after each step.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from adapterd.core import EngineStats, Output, RegistryStats, Request

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MAX_ADAPTER_LABELS = 100
RENDER_SECONDS = 0.02
"""Endpoint pickers scrape twenty times a second each; what they get may be this old, or, where there are so
many series that rendering takes long, ten times as old as that takes."""

_LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)

Outcome = Literal["finished", "cancelled", "failed"]


@dataclass(frozen=True)
class Series:
    """`value` reads one of the engine's, `registry_value` one of the registry's; the others are fed by requests.

    `buckets` make a histogram.
    """

    name: str
    help: str
    kind: Literal["gauge", "counter", "histogram"]
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    value: Callable[[EngineStats], float] | None = None
    registry_value: Callable[[RegistryStats], float] | None = None

    @property
    def is_fed_by_requests(self) -> bool:
        return self.value is None and self.registry_value is None


def _gauge(name: str, help: str, value: Callable[[EngineStats], float]) -> Series:
    return Series(name, help, "gauge", ("model_name",), value=value)


def _counter(name: str, help: str, value: Callable[[EngineStats], float]) -> Series:
    return Series(name, help, "counter", ("model_name",), value=value)


def _registry(
    kind: Literal["gauge", "counter"], name: str, help: str, value: Callable[[RegistryStats], float]
) -> Series:
    return Series(name, help, kind, ("model_name",), registry_value=value)


def _by_adapter(name: str, help: str, *buckets: float, more: tuple[str, ...] = ()) -> Series:
    return Series(name, help, "histogram" if buckets else "counter", ("adapter", *more), buckets)


def _kv_usage(stats: EngineStats) -> float:
    return stats.kv_blocks_held / stats.kv_blocks_total if stats.kv_blocks_total else 0.0


# fmt: off
SERIES: tuple[Series, ...] = (
    # what the endpoint picker reads
    _gauge("vllm:num_requests_waiting", "Sequences waiting to run.", lambda s: s.num_waiting),
    _gauge("vllm:num_requests_running", "Sequences running.", lambda s: s.num_running),
    _gauge("vllm:kv_cache_usage_perc", "Part of the KV memory in use, 0 to 1.", _kv_usage),
    # the engine
    _gauge("adapterd_queue_requests", "Sequences waiting to run.", lambda s: s.num_waiting),
    _gauge("adapterd_kv_blocks", "KV blocks.", lambda s: s.kv_blocks_total),
    _gauge("adapterd_kv_blocks_held", "KV blocks of running sequences.", lambda s: s.kv_blocks_held),
    _gauge("adapterd_kv_blocks_cached", "Free KV blocks with a prefix to reuse.", lambda s: s.kv_blocks_cached),
    _gauge("adapterd_adapter_memory_bytes", "Memory for adapters.", lambda s: s.adapter_bytes_total),
    _gauge("adapterd_adapter_resident_bytes", "Memory adapters occupy.", lambda s: s.adapter_bytes_resident),
    _gauge("adapterd_adapter_held_bytes", "Memory of adapters in use.", lambda s: s.adapter_bytes_held),
    _gauge("adapterd_resident_adapters", "Adapters in device memory.", lambda s: len(s.resident)),
    _counter("adapterd_steps_total", "Steps of the engine.", lambda s: s.num_steps),
    _counter("adapterd_computed_tokens_total", "Tokens computed.", lambda s: s.num_tokens_computed),
    _counter("adapterd_preemptions_total", "Sequences set back for memory.", lambda s: s.num_preemptions),
    _counter("adapterd_prefix_query_tokens_total", "Prefix cache: tokens sought.", lambda s: s.num_prefix_query_tokens),
    _counter("adapterd_prefix_hit_tokens_total", "Prefix cache: tokens found.", lambda s: s.num_prefix_hit_tokens),
    _counter("adapterd_adapter_uploads_total", "Adapters moved to the device.", lambda s: s.num_uploads),
    _counter("adapterd_adapter_evictions_total", "Adapters that left the device.", lambda s: s.num_evictions),
    # names and the weights in host memory
    _registry("gauge", "adapterd_adapters", "Adapters that can be asked for.", lambda s: s.num_ready),
    _registry("gauge", "adapterd_failed_adapters", "Adapters that were refused.", lambda s: s.num_failed),
    _registry("gauge", "adapterd_host_adapter_bytes", "Adapter weights in host memory.", lambda s: s.host_bytes),
    _registry("counter", "adapterd_host_adapter_hits_total", "Found in host memory.", lambda s: s.num_host_hits),
    _registry("counter", "adapterd_host_adapter_misses_total", "Had to be read first.", lambda s: s.num_host_misses),
    _registry("counter", "adapterd_host_adapter_evictions_total", "Left host memory.", lambda s: s.num_host_evictions),
    _registry("counter", "adapterd_adapter_reads_total", "Adapters read from disk.", lambda s: s.num_reads),
    _registry("counter", "adapterd_adapter_read_seconds_total", "Time spent reading them.", lambda s: s.read_seconds),
    # requests
    _by_adapter("adapterd_requests_total", "Requests that ended.", more=("outcome",)),
    _by_adapter("adapterd_prompt_tokens_total", "Tokens of prompts."),
    _by_adapter("adapterd_output_tokens_total", "Tokens of answers."),
    _by_adapter("adapterd_time_to_first_token_seconds", "From arrival to the first token.", *_LATENCY),
    _by_adapter("adapterd_inter_token_seconds", "Between two tokens of a sequence.", *_TOKEN),
    _by_adapter("adapterd_request_seconds", "From arrival to the end.", *_LATENCY),
    Series("adapterd_errors_total", "Error answers.", "counter", ("code",)),
)
# fmt: on


class Metrics:
    """The series of one daemon, in a registry of their own."""

    def __init__(
        self,
        base_name: str,
        stats: Callable[[], EngineStats],
        registry_stats: Callable[[], RegistryStats],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock = clock
        self._registry = CollectorRegistry()
        self._registry.register(_StatsCollector(base_name, stats, registry_stats))
        own = {series.name: series for series in SERIES if series.is_fed_by_requests}
        self._counters = {
            name: Counter(name, series.help, series.labels, registry=self._registry)
            for name, series in own.items()
            if series.kind == "counter"
        }
        self._histograms = {
            name: Histogram(name, series.help, series.labels, buckets=series.buckets, registry=self._registry)
            for name, series in own.items()
            if series.kind == "histogram"
        }
        self._labels: set[str] = set()
        self._rendered = b""
        self._render_again_seconds = 0.0

    def render(self) -> bytes:
        """The text format, a fraction of a second old at most."""
        began = self.clock()
        if began >= self._render_again_seconds:
            self._rendered = generate_latest(self._registry)
            now = self.clock()
            self._render_again_seconds = now + max(RENDER_SECONDS, 10 * (now - began))
        return self._rendered

    def count(self, name: str, *labels: str, by: float = 1) -> None:
        self._counters[name].labels(*labels).inc(by)

    def time(self, name: str, label: str, seconds: float) -> None:
        self._histograms[name].labels(label).observe(seconds)

    def record(self, adapter_names: Sequence[str], requests: Sequence[Request]) -> "RequestRecord":
        """Start the clock of one response. `adapter_names` are the registry's, none for the base."""
        return RequestRecord(self, self.adapter_label(adapter_names), requests)

    def adapter_label(self, adapter_names: Sequence[str]) -> str:
        """Bounded: beyond MAX_ADAPTER_LABELS names, the label is "other"."""
        label = "+".join(adapter_names) or "base"
        if label not in self._labels:
            if len(self._labels) >= MAX_ADAPTER_LABELS:
                return "other"
            self._labels.add(label)
        return label


class RequestRecord:
    """What one response adds to the series; `close` it once, however it ended."""

    def __init__(self, metrics: Metrics, label: str, requests: Sequence[Request]) -> None:
        self._metrics = metrics
        self._label = label
        self._arrival_seconds = requests[0].arrival_seconds
        self._num_unfinished = sum(request.num_sequences for request in requests)
        self._num_prompt_tokens = sum(len(request.prompt_token_ids) for request in requests)
        self._last_token_seconds: dict[tuple[str, int], float] = {}
        self._has_failed = False

    def observe(self, output: Output) -> None:
        now = self._metrics.clock()
        key = (output.request_id, output.index)
        if output.token_ids:
            if key in self._last_token_seconds:
                gap = (now - self._last_token_seconds[key]) / len(output.token_ids)
                self._metrics.time("adapterd_inter_token_seconds", self._label, gap)
            elif not self._last_token_seconds:
                ttft = now - self._arrival_seconds
                self._metrics.time("adapterd_time_to_first_token_seconds", self._label, ttft)
            self._last_token_seconds[key] = now
            self._metrics.count("adapterd_output_tokens_total", self._label, by=len(output.token_ids))
        if output.finish_reason is not None:
            self._num_unfinished -= 1
            self._has_failed = self._has_failed or output.finish_reason in ("abort", "error")

    def close(self) -> None:
        outcome: Outcome = "finished"
        if self._has_failed:
            outcome = "failed"
        elif self._num_unfinished:
            outcome = "cancelled"
        self._metrics.count("adapterd_requests_total", self._label, outcome)
        self._metrics.count("adapterd_prompt_tokens_total", self._label, by=self._num_prompt_tokens)
        duration = self._metrics.clock() - self._arrival_seconds
        self._metrics.time("adapterd_request_seconds", self._label, duration)


class _StatsCollector(Collector):
    """The engine's and the registry's series, made from their last counters at each scrape."""

    def __init__(
        self,
        base_name: str,
        stats: Callable[[], EngineStats],
        registry_stats: Callable[[], RegistryStats],
    ) -> None:
        self._base_name = base_name
        self._stats = stats
        self._registry_stats = registry_stats
        self._resident: tuple[str, ...] = ()
        self._changed_unix = time.time()

    def collect(self) -> Iterator[Metric]:
        stats, registry = self._stats(), self._registry_stats()
        for series in SERIES:
            if series.value is not None:
                yield self._metric(series, series.value(stats))
            elif series.registry_value is not None:
                yield self._metric(series, series.registry_value(registry))
        yield self._cache_config(stats)
        yield self._lora_requests_info(stats)

    def _metric(self, series: Series, value: float) -> Metric:
        family = GaugeMetricFamily if series.kind == "gauge" else CounterMetricFamily
        metric = family(series.name, series.help, labels=series.labels)
        metric.add_metric((self._base_name,), value)
        return metric

    def _cache_config(self, stats: EngineStats) -> Metric:
        labels = ("block_size", "num_gpu_blocks")
        info = GaugeMetricFamily("vllm:cache_config_info", "Size of the KV memory.", labels=labels)
        info.add_metric((str(stats.kv_block_size), str(stats.kv_blocks_total)), 1)
        return info

    def _lora_requests_info(self, stats: EngineStats) -> Metric:
        """What is resident, under both spellings of a `model`; the value is when that last changed.

        `max_lora` is an estimate, since adapter memory is bytes and not slots: as many as would fit if all
        were as large as the resident ones, counted twice as the names are.
        """
        names = sorted({adapter.name for adapter in stats.resident})
        resident = tuple(spelling for name in names for spelling in (f"{self._base_name}:{name}", name))
        if resident != self._resident:
            self._resident, self._changed_unix = resident, time.time()
        mean_bytes = stats.adapter_bytes_resident / len(names) if names else 0
        slots = int(stats.adapter_bytes_total / mean_bytes) if mean_bytes else 1
        labels = ("max_lora", "running_lora_adapters", "waiting_lora_adapters")
        info = GaugeMetricFamily("vllm:lora_requests_info", "Adapters in device memory.", labels=labels)
        info.add_metric((str(2 * max(1, slots)), ",".join(resident), ""), self._changed_unix)
        return info
