"""How llm-d's endpoint picker reads /metrics and scores pods, written anew from its rules.

Source: llm-d/llm-d-router, its core-metrics-extractor (specs of the built-in engine "vllm"), lora-affinity-scorer
and lora-load-state-scorer as of autumn 2026. A family that must be there and is not is an error on every poll.
"""

from dataclasses import dataclass, field

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample


class Unreadable(Exception):
    """What the picker would count as an extract error."""


@dataclass
class Pod:
    """What the picker knows of a pod after a poll."""

    num_waiting: int
    num_running: int
    kv_usage: float
    block_size: int
    num_blocks: int
    active: set[str] = field(default_factory=set)
    waiting: set[str] = field(default_factory=set)
    max_active: int = 0
    loaded: dict[str, tuple[str, bool]] = field(default_factory=dict)
    num_on_gpu: int = 0
    base: str = ""
    load_seconds: float = 0.0
    activate_seconds: float = 0.0


def read(text: str) -> Pod:
    families = {family.name: family for family in text_string_to_metric_families(text)}
    cache = first(families, "vllm:cache_config_info").labels
    pod = Pod(
        num_waiting=int(first(families, "vllm:num_requests_waiting").value),
        num_running=int(first(families, "vllm:num_requests_running").value),
        kv_usage=first(families, "vllm:kv_cache_usage_perc").value,
        block_size=int(cache["block_size"]),
        num_blocks=int(cache["num_gpu_blocks"]),
    )
    _read_lora(pod, families)
    _read_residency(pod, families)
    return pod


def first(families: dict[str, Metric], name: str) -> Sample:
    """The series with the largest timestamp; without timestamps, the first there is."""
    samples = families[name].samples if name in families else []
    if not samples:
        raise Unreadable(f"no series of {name}")
    return max(samples, key=lambda sample: sample.timestamp or 0)


def _read_lora(pod: Pod, families: dict[str, Metric]) -> None:
    """Of several series the one of the largest value, which is the time it was made."""
    if "vllm:lora_requests_info" in families:
        labels = max(families["vllm:lora_requests_info"].samples, key=lambda sample: sample.value).labels
        pod.active = _csv(labels["running_lora_adapters"])
        pod.waiting = _csv(labels["waiting_lora_adapters"])
        pod.max_active = int(labels["max_lora"])
    for sample in _samples(families, "vllm:max_gpu_lora_adapters"):
        pod.max_active = max(pod.max_active, int(sample.value))


def _read_residency(pod: Pod, families: dict[str, Metric]) -> None:
    for sample in _samples(families, "vllm:lora_adapter_loaded"):
        name, level = sample.labels["adapter_name"], sample.labels["level"]
        if name and sample.value and pod.loaded.get(name, ("cpu",))[0] != "gpu":
            pod.loaded[name] = (level, sample.labels["pinned"] == "true")
    for sample in _samples(families, "vllm:num_gpu_loaded_lora_adapters"):
        pod.num_on_gpu = max(pod.num_on_gpu, int(sample.value))
        pod.base = sample.labels["model_name"]
    pod.load_seconds = _mean(families, "load")
    pod.activate_seconds = _mean(families, "activate")


def _mean(families: dict[str, Metric], transition: str) -> float:
    samples = _samples(families, "vllm:lora_adapter_load_seconds")
    values = {s.name[-5:]: s.value for s in samples if s.labels["transition"] == transition}
    return values["s_sum"] / values["count"] if values.get("count") else 0.0


def _samples(families: dict[str, Metric], name: str) -> list[Sample]:
    return list(families[name].samples) if name in families else []


def _csv(text: str) -> set[str]:
    return {name.strip() for name in text.split(",")} - {""}


def lora_affinity(pod: Pod, model: str) -> float:
    """`model` is the request's, as it stands in its body."""
    if model in pod.active:
        return 1.0
    if len(pod.active) + len(pod.waiting) < pod.max_active:
        return 0.8
    return 0.6 if model in pod.waiting else 0.0


def lora_load_state(pod: Pod, model: str) -> float:
    """The tiers, without what only orders pods within one."""
    if model == pod.base:
        return max(pod.max_active - pod.num_on_gpu, 0) / pod.max_active if pod.max_active else 1.0
    if model in pod.loaded:
        return 1.0 if pod.loaded[model][0] == "gpu" else 0.7
    if pod.num_on_gpu < pod.max_active:
        return 0.6
    idle = [
        name
        for name, (level, is_pinned) in pod.loaded.items()
        if level == "gpu" and not is_pinned and name not in pod.active
    ]
    return 0.3 if idle else 0.0
