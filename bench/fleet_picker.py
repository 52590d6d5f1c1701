"""Which pod answers a request: llm-d's endpoint picker, its rules written anew, and round-robin to compare with.

Read from its sources (plugins core-metrics-extractor, lora-affinity-scorer, queue-scorer, kv-cache-utilization-scorer,
active-request-scorer, max-score-picker). What is left out: the prefix scorer, since every prompt of these benches is
new and it would score nothing. The proxy of bench.fleet and bench.fleet_sim both choose with `choose`.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

SCRAPE_SECONDS = 0.2
"""As deploy/components/inference-pool sets it; llm-d's own default is 0.05."""

_SAMPLE = re.compile(r"^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? ([^ \n]+)(?: [0-9]+)?$", re.MULTILINE)
_LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True)
class Signals:
    """What a picker knows of a pod: as old as its last scrape."""

    num_waiting: int = 0
    kv_usage: float = 0.0
    max_lora: int = 0
    resident: frozenset[str] = frozenset()
    waiting: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Weights:
    """Of the scorers in a scheduling profile; the defaults are those of deploy/components/inference-pool."""

    lora_affinity: float = 4
    queue: float = 0
    kv_cache: float = 2
    active_requests: float = 4


NO_LORA_SCORER = Weights(0, 2, 2, 0)
"""llm-d's default profile, as far as these prompts go."""

KSERVE = Weights(4, 2, 2, 0)
"""What KServe injects: adapters are scored, and load by scraped queues."""


def read_signals(exposition: str) -> Signals:
    """A pod's /metrics. The first series of a gauge counts; of the LoRA series, the one with the largest value.

    Raises KeyError naming a gauge that is missing: the picker reports that at every poll.
    """
    first: dict[str, float] = {}
    lora: tuple[float, dict[str, str]] | None = None
    for name, labels, value in _SAMPLE.findall(exposition):
        if not name.startswith("vllm:"):
            continue
        first.setdefault(name, float(value))
        if name == "vllm:lora_requests_info" and (lora is None or float(value) > lora[0]):
            lora = float(value), dict(_LABEL.findall(labels))
    info = lora[1] if lora else {}
    return Signals(
        num_waiting=int(first["vllm:num_requests_waiting"]),
        kv_usage=first["vllm:kv_cache_usage_perc"],
        max_lora=int(info.get("max_lora", 0)),
        resident=_names(info.get("running_lora_adapters", "")),
        waiting=_names(info.get("waiting_lora_adapters", "")),
    )


def _names(csv: str) -> frozenset[str]:
    return frozenset(name.strip() for name in csv.split(",") if name.strip())


def lora_affinity(model: str, pod: Signals) -> float:
    """1 where the adapter is resident, 0.8 where there is room, 0.6 where it is being loaded, else 0."""
    if model in pod.resident:
        return 1.0
    if len(pod.resident) + len(pod.waiting) < pod.max_lora:
        return 0.8
    return 0.6 if model in pod.waiting else 0.0


def scores(model: str, pods: Sequence[Signals], active: Sequence[int], weights: Weights) -> list[float]:
    """The sum that the picker takes the largest of.

    active: how many requests it has itself sent to each pod and not yet seen the end of; unlike the signals never old.
    Queues count from the shortest (1) to the longest (0), active requests from none (1) to the most (0).
    """
    queues = [pod.num_waiting for pod in pods]
    shortest, longest = min(queues), max(queues)
    span = longest - shortest
    most_active = max(active)
    return [
        (weights.lora_affinity * lora_affinity(model, pod) if weights.lora_affinity else 0.0)
        + weights.queue * ((longest - pod.num_waiting) / span if span else 1.0)
        + weights.kv_cache * (1.0 - pod.kv_usage)
        + weights.active_requests * ((most_active - num_active) / most_active if most_active else 1.0)
        for pod, num_active in zip(pods, active, strict=True)
    ]


def choose(
    model: str, pods: Sequence[Signals], active: Sequence[int], weights: Weights, draw: random.Random
) -> int:
    """Index of the pod with the highest score; one of them by chance where several have it."""
    found = scores(model, pods, active, weights)
    best = max(found)
    ties = [index for index, score in enumerate(found) if score == best]
    return ties[0] if len(ties) == 1 else draw.choice(ties)


def zipf_shares(num_adapters: int, alpha: float) -> list[float]:
    """Share of the traffic of each adapter: the i-th is asked for in proportion to i ** -alpha (Zipf's law)."""
    weights = [(index + 1) ** -alpha for index in range(num_adapters)]
    total = sum(weights)
    return [weight / total for weight in weights]
