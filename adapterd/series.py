"""Every Prometheus series, declared in one table.

The `vllm:` names are those that routers and the usual dashboards read; of those that stand for the process there
is one series each, because llm-d's router takes the first it finds. What vLLM lacks is called `adapterd_`.

`python -m adapterd.series` prints the table as docs/metrics.md has it.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import adapterd
from adapterd.busiest import OTHER
from adapterd.core import EngineStats, RegistryStats, ServerStats
from adapterd.exposition import Kind
from adapterd.router_view import Entry, RouterView

# Each bucket of the first two is a hundred lines in every scrape.
_FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKEN = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
_REQUEST = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_LOAD = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)

Labels = tuple[str, ...]


@dataclass(frozen=True)
class Snapshot:
    """All that a scrape is made of, beside what requests and adapters have been counted for.

    `process` asks the system, which takes a while, so it is called by those alone who need it.
    """

    base_name: str
    engine: EngineStats
    registry: RegistryStats
    server: ServerStats
    router: RouterView
    process: Callable[[], Mapping[str, float]]
    now_seconds: float
    labelled: frozenset[str]

    def by_adapter(self, values: Collection[tuple[str, float]]) -> dict[Labels, float]:
        """Sums by label, a 0 for each label that has nothing."""
        sums: dict[Labels, float] = {(name,): 0 for name in sorted(self.labelled)}
        for name, value in values:
            label = (name if name in self.labelled else OTHER,)
            sums[label] = sums.get(label, 0) + value
        return sums


Rows = Callable[[Snapshot], Mapping[Labels, float]]


@dataclass(frozen=True)
class Series:
    """`rows` reads a snapshot; a series without it is fed, as things happen. `buckets` make a histogram.

    `made_of` is what of a snapshot many rows depend on: while it stays the same, they are not made again.
    """

    name: str
    help: str
    kind: Kind
    labels: Labels = ()
    buckets: tuple[float, ...] = ()
    rows: Rows | None = None
    made_of: Callable[[Snapshot], object] | None = None


def _gauge(name: str, help: str, value: Callable[[Snapshot], float]) -> Series:
    return Series(name, help, "gauge", ("model_name",), rows=lambda s: {(s.base_name,): value(s)})


def _counter(name: str, help: str, value: Callable[[Snapshot], float]) -> Series:
    return Series(name, help, "counter", ("model_name",), rows=lambda s: {(s.base_name,): value(s)})


def _process(kind: Kind, name: str, help: str) -> Series:
    def rows(s: Snapshot) -> Mapping[Labels, float]:
        values = s.process()
        return {(): values[name]} if name in values else {}

    return Series(name, help, kind, rows=rows)


def _by_adapter(name: str, help: str, *buckets: float, more: Labels = ()) -> Series:
    return Series(name, help, "histogram" if buckets else "counter", ("adapter", *more), buckets)


def _num_waiting(s: Snapshot) -> float:
    return s.engine.num_waiting + sum(count for _, count in s.server.reading)


def _kv_usage(s: Snapshot) -> float:
    return s.engine.kv_blocks_held / s.engine.kv_blocks_total if s.engine.kv_blocks_total else 0.0


def _cache_config(s: Snapshot) -> Mapping[Labels, float]:
    return {(s.base_name, str(s.engine.kv_block_size), str(s.engine.kv_blocks_total)): 1}


def _lora_requests_info(s: Snapshot) -> Mapping[Labels, float]:
    resident = ",".join(entry.adapter_name for entry in s.router.on_device)
    return {(str(s.router.max_entries), resident, ",".join(s.router.waiting)): s.router.changed_unix}


def _lora_adapter_loaded(s: Snapshot) -> Mapping[Labels, float]:
    return dict.fromkeys((*s.router.on_device, *s.router.on_host), 1)


def _adapter_queue(s: Snapshot) -> Mapping[Labels, float]:
    waiting = [("+".join(i.name for i, _ in mix) or "base", count) for mix, count in s.engine.waiting]
    return s.by_adapter([*waiting, *s.server.reading])


def _adapter_bank_bytes(s: Snapshot) -> Mapping[Labels, float]:
    pairs = zip(s.engine.resident, s.engine.resident_bytes, strict=True)
    return s.by_adapter([(adapter_id.name, num_bytes) for adapter_id, num_bytes in pairs])


def _info(s: Snapshot) -> Mapping[Labels, float]:
    return {(s.base_name, adapterd.__version__): 1}


# fmt: off
SERIES: tuple[Series, ...] = (
    # What routers read. Entries are adapters as clients spell them, so one adapter has two: see router_view.py.
    _gauge("vllm:num_requests_waiting", "Sequences that wait to run.", _num_waiting),
    _gauge("vllm:num_requests_running", "Sequences that run.", lambda s: s.engine.num_running),
    _gauge("vllm:kv_cache_usage_perc", "Part of the KV memory in use, 0 to 1.", _kv_usage),
    Series("vllm:cache_config_info", "Size of the KV memory.", "gauge",
           ("model_name", "block_size", "num_gpu_blocks"), rows=_cache_config),
    Series("vllm:lora_requests_info", "Entries resident on the device, idle ones too, and entries waiting to be;"
           " the value is when that last changed.", "gauge",
           ("max_lora", "running_lora_adapters", "waiting_lora_adapters"), rows=_lora_requests_info,
           made_of=lambda s: s.router),
    Series("vllm:lora_adapter_loaded", "1 for each entry in memory: on the device (gpu) or on the host (cpu).",
           "gauge", Entry._fields, rows=_lora_adapter_loaded, made_of=lambda s: s.router),
    _gauge("vllm:num_gpu_loaded_lora_adapters", "Entries on the device.", lambda s: len(s.router.on_device)),
    _gauge("vllm:num_cpu_loaded_lora_adapters", "Entries on the host alone.", lambda s: len(s.router.on_host)),
    _gauge("vllm:max_gpu_lora_adapters", "Entries on the device and those that would still fit.",
           lambda s: s.router.max_entries),
    Series("vllm:lora_adapter_load_seconds", "Time to read an adapter to the host (load) or to move it to the"
           " device (activate).", "histogram", ("model_name", "transition"), _LOAD),
    # The process.
    Series("adapterd_info", "What runs here.", "gauge", ("model_name", "version"), rows=_info),
    _gauge("adapterd_ready", "1 while /readyz is green.", lambda s: s.server.is_ready),
    _gauge("adapterd_draining", "1 from SIGTERM on.", lambda s: s.server.is_draining),
    _gauge("adapterd_engine_silent_seconds", "Since the engine's thread last showed a sign of life.",
           lambda s: max(0.0, s.now_seconds - s.engine.heartbeat_seconds)),
    # The engine.
    _gauge("adapterd_queue_requests", "Sequences that wait to run, for autoscalers.", _num_waiting),
    _gauge("adapterd_kv_blocks", "KV blocks.", lambda s: s.engine.kv_blocks_total),
    _gauge("adapterd_kv_blocks_held", "KV blocks of running sequences.", lambda s: s.engine.kv_blocks_held),
    _gauge("adapterd_kv_blocks_cached", "Free KV blocks with a prefix to reuse.", lambda s: s.engine.kv_blocks_cached),
    _counter("adapterd_steps_total", "Steps of the engine.", lambda s: s.engine.num_steps),
    _counter("adapterd_steps_with_edits_total", "Steps on the general path: adapters that change more than linears.",
             lambda s: s.engine.num_steps_with_edits),
    _counter("adapterd_computed_tokens_total", "Tokens computed.", lambda s: s.engine.num_tokens_computed),
    _counter("adapterd_preemptions_total", "Sequences set back for memory.", lambda s: s.engine.num_preemptions),
    _counter("adapterd_prefix_query_tokens_total", "Prefix cache: tokens sought.",
             lambda s: s.engine.num_prefix_query_tokens),
    _counter("adapterd_prefix_hit_tokens_total", "Prefix cache: tokens found.",
             lambda s: s.engine.num_prefix_hit_tokens),
    # Memory for adapters.
    _gauge("adapterd_adapter_memory_bytes", "Device memory for adapters.", lambda s: s.engine.adapter_bytes_total),
    _gauge("adapterd_adapter_resident_bytes", "Device memory adapters occupy.",
           lambda s: s.engine.adapter_bytes_resident),
    _gauge("adapterd_adapter_held_bytes", "Device memory of adapters in use.", lambda s: s.engine.adapter_bytes_held),
    _gauge("adapterd_resident_adapters", "Adapter versions in device memory.", lambda s: len(s.engine.resident)),
    _gauge("adapterd_adapters", "Adapters that can be asked for.", lambda s: s.registry.num_ready),
    _gauge("adapterd_failed_adapters", "Adapters that were refused and cannot be asked for.",
           lambda s: s.registry.num_failed),
    _gauge("adapterd_behind_adapters", "Adapters whose newer version was refused, while the one before serves on.",
           lambda s: s.registry.num_behind),
    _gauge("adapterd_manifest_failed", "1 while the manifest cannot be read, so that the one before holds.",
           lambda s: s.registry.manifest_failed),
    _gauge("adapterd_host_adapter_bytes", "Adapter weights in host memory.", lambda s: s.registry.host_bytes),
    _counter("adapterd_host_adapter_hits_total", "Requests whose weights were in host memory.",
             lambda s: s.registry.num_host_hits),
    _counter("adapterd_host_adapter_misses_total", "Requests whose weights had to be read first.",
             lambda s: s.registry.num_host_misses),
    _counter("adapterd_host_adapter_evictions_total", "Adapters that left host memory.",
             lambda s: s.registry.num_host_evictions),
    # By adapter: the hundred busiest of late, the bare base as `base`, all others together as `other`.
    _by_adapter("adapterd_requests_total", "Requests that ended; failed are also those turned away for want of room.",
                more=("outcome",)),
    _by_adapter("adapterd_prompt_tokens_total", "Tokens of prompts."),
    _by_adapter("adapterd_output_tokens_total", "Tokens of answers."),
    _by_adapter("adapterd_time_to_first_token_seconds", "From arrival to the first token.", *_FIRST_TOKEN),
    _by_adapter("adapterd_inter_token_seconds", "Between two tokens of a sequence.", *_TOKEN),
    Series("adapterd_adapter_queue_requests", "Sequences that wait to run.", "gauge", ("adapter",),
           rows=_adapter_queue, made_of=lambda s: (s.engine.waiting, s.server.reading, s.labelled)),
    Series("adapterd_adapter_bank_bytes", "Device memory it occupies, all versions together.", "gauge", ("adapter",),
           rows=_adapter_bank_bytes, made_of=lambda s: (s.engine.resident, s.engine.resident_bytes, s.labelled)),
    _by_adapter("adapterd_adapter_hits_total", "Sequences admitted whose adapter was on the device."),
    _by_adapter("adapterd_adapter_misses_total", "Sequences admitted whose adapter had to be moved there."),
    _by_adapter("adapterd_adapter_loads_total", "Loads into a tier: device, host or disk.", more=("tier",)),
    _by_adapter("adapterd_adapter_load_seconds_total", "Time that loads into a tier took.", more=("tier",)),
    _by_adapter("adapterd_adapter_evictions_total", "Times it left a tier to make room.", more=("tier",)),
    # Requests as a whole, errors, and the process as Prometheus' own clients describe one.
    Series("adapterd_request_seconds", "From arrival to the end.", "histogram", ("model_name",), _REQUEST),
    Series("adapterd_errors_total", "Error answers, those in mid-stream too, by OpenAI code.", "counter", ("code",)),
    _process("gauge", "process_resident_memory_bytes", "Resident memory."),
    _process("gauge", "process_virtual_memory_bytes", "Virtual memory."),
    _process("gauge", "process_open_fds", "Open file descriptors."),
    _process("gauge", "process_max_fds", "Limit of open file descriptors."),
    _process("gauge", "process_start_time_seconds", "Start of the process, in Unix time."),
    _process("counter", "process_cpu_seconds_total", "Time on all cores, user and system."),
)
# fmt: on


def markdown(table: Sequence[Series] = SERIES) -> str:
    """The table for people."""
    lines = ["| series | kind | labels | what it says |", "|---|---|---|---|"]
    for series in table:
        labels = ", ".join(f"`{label}`" for label in series.labels)
        lines.append(f"| `{series.name}` | {series.kind} | {labels} | {series.help} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
