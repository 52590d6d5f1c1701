"""Every series, and what a request adds to them."""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from adapterd.core import (
    AdapterId,
    EngineStats,
    LoadedName,
    Output,
    RegistryStats,
    Request,
    RequestId,
    SamplingParams,
    ServerStats,
)
from adapterd.metrics import MAX_ADAPTER_LABELS, Metrics
from adapterd.series import SERIES, markdown
from tests.server.fakes import REGISTRY_STATS, STATS, SUPPORT

REQUEST = Request(RequestId("a"), (1, 2, 3), SamplingParams(max_tokens=5), (), frozenset(), 0.0, 2)


def output(index: int, *, finish: str | None = None) -> Output:
    return Output(RequestId("a"), index, (7,), "x", (), 3, 0, 1, finish)


def samples(metrics: Metrics) -> dict[tuple[str, tuple[str, ...]], float]:
    families = text_string_to_metric_families(metrics.render().decode())
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in families
        for sample in family.samples
    }


class Names:
    """A registry where each adapter that is anywhere in memory has one name."""

    def __init__(self, *loaded: LoadedName) -> None:
        self.names = loaded

    def stats(self) -> RegistryStats:
        return REGISTRY_STATS

    def loaded(self, on_device: Collection[AdapterId]) -> Sequence[LoadedName]:
        return self.names


def make(
    stats: Callable[[], EngineStats] = lambda: STATS, clock: Callable[[], float] | None = None
) -> Metrics:
    names = Names(LoadedName("support", SUPPORT, 8, False))
    return Metrics("tiny", stats, lambda: names, clock=clock or time.monotonic)


@pytest.fixture
def metrics() -> Metrics:
    return make()


def test_every_declared_series_is_there_from_the_first_scrape(metrics: Metrics) -> None:
    text = metrics.render().decode()
    for series in SERIES:
        assert f"# TYPE {series.name} {series.kind}\n" in text


@pytest.mark.parametrize(
    "name", ["vllm:num_requests_waiting", "vllm:num_requests_running", "vllm:kv_cache_usage_perc"]
)
def test_what_routers_take_the_first_of_is_one_series(metrics: Metrics, name: str) -> None:
    metrics.record(("a",), [REQUEST]).close()
    assert [labels for seen, labels in samples(metrics) if seen == name] == [("tiny",)]


def test_readings_of_engine_and_registry(metrics: Metrics) -> None:
    seen = samples(metrics)
    assert seen["vllm:num_requests_waiting", ("tiny",)] == seen["adapterd_queue_requests", ("tiny",)] == 3
    assert seen["vllm:kv_cache_usage_perc", ("tiny",)] == 0.4
    assert seen["vllm:cache_config_info", ("tiny", "16", "10")] == 1
    assert seen["adapterd_host_adapter_misses_total", ("tiny",)] == 1
    assert seen["adapterd_behind_adapters", ("tiny",)] == 3
    assert seen["adapterd_manifest_failed", ("tiny",)] == 1
    assert seen["process_resident_memory_bytes", ()] > 2**20


def test_requests_that_wait_for_weights_count_as_waiting(metrics: Metrics) -> None:
    metrics.server_stats = lambda: ServerStats((("support", 2),), is_ready=True, is_draining=False)
    metrics.record(("support",), [REQUEST]).close()
    seen = samples(metrics)
    assert seen["vllm:num_requests_waiting", ("tiny",)] == 5
    assert seen["adapterd_adapter_queue_requests", ("support",)] == 2
    assert seen["adapterd_ready", ("tiny",)] == 1


def test_the_two_formats_say_the_same() -> None:
    metrics = make(clock=lambda: 5.0)
    metrics.record(("support",), [REQUEST]).close()
    metrics.adapter_loaded("support", "host", 0.3)
    families = openmetrics.text_string_to_metric_families(metrics.render("openmetrics").decode())
    again = {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in families
        for sample in family.samples
    }
    assert again == samples(metrics)


def test_what_becomes_of_adapters_is_counted_by_adapter_and_tier(metrics: Metrics) -> None:
    metrics.record(("support",), [REQUEST])
    metrics.adapter_wanted("support", is_resident=False)
    metrics.adapter_wanted("support", is_resident=True)
    metrics.adapter_wanted("support", is_resident=True)
    metrics.adapter_loaded("support", "host", 0.25)
    metrics.adapter_loaded("support", "device", 0.5)
    metrics.adapter_evicted("support", "device")
    seen = samples(metrics)
    assert seen["adapterd_adapter_hits_total", ("support",)] == 2
    assert seen["adapterd_adapter_misses_total", ("support",)] == 1
    assert seen["adapterd_adapter_loads_total", ("support", "host")] == 1
    assert seen["adapterd_adapter_load_seconds_total", ("support", "device")] == 0.5
    assert seen["adapterd_adapter_evictions_total", ("support", "device")] == 1
    assert seen["adapterd_adapter_bank_bytes", ("support",)] == 100
    assert seen["vllm:lora_adapter_load_seconds_sum", ("tiny", "load")] == 0.25
    assert seen["vllm:lora_adapter_load_seconds_sum", ("tiny", "activate")] == 0.5


@pytest.mark.parametrize(
    ("outputs", "outcome"),
    [
        ([output(0, finish="stop"), output(1, finish="length")], "finished"),
        ([output(0, finish="stop"), output(1)], "cancelled"),
        ([output(0, finish="error"), output(1, finish="stop")], "failed"),
        ([], "cancelled"),
    ],
)
def test_a_request_counts_once_by_how_it_ended(metrics: Metrics, outputs: list[Output], outcome: str) -> None:
    record = metrics.record(("support",), [REQUEST])
    for item in outputs:
        record.observe(item)
    record.close()
    seen = samples(metrics)
    assert seen["adapterd_requests_total", ("support", outcome)] == 1
    assert seen["adapterd_prompt_tokens_total", ("support",)] == 3
    assert seen.get(("adapterd_output_tokens_total", ("support",)), 0) == len(outputs)
    assert seen["adapterd_request_seconds_count", ("tiny",)] == 1


def test_first_token_and_gaps_are_timed() -> None:
    now = 10.0
    metrics = make(clock=lambda: now)
    record = metrics.record((), [replace(REQUEST, arrival_seconds=9.0)])
    record.observe(output(0))
    now = 10.5
    record.observe(output(1))
    record.observe(output(0))
    seen = samples(metrics)
    assert seen["adapterd_time_to_first_token_seconds_sum", ("base",)] == 1.0
    assert seen["adapterd_time_to_first_token_seconds_count", ("base",)] == 1
    assert seen["adapterd_inter_token_seconds_sum", ("base",)] == 0.5


def test_names_of_adapters_are_bounded(metrics: Metrics) -> None:
    for number in range(2 * MAX_ADAPTER_LABELS):
        metrics.record((f"adapter-{number}",), [REQUEST]).close()
    seen = samples(metrics)
    for name in {series.name for series in SERIES if series.labels[:1] == ("adapter",)}:
        labels = {labels[0] for sample, labels in seen if sample.startswith(name) and labels}
        assert len(labels) <= MAX_ADAPTER_LABELS + 1, name
    assert seen["adapterd_requests_total", ("other", "cancelled")] == MAX_ADAPTER_LABELS
    assert seen["adapterd_requests_total", ("adapter-0", "cancelled")] == 1


def test_an_adapter_that_becomes_busy_takes_the_label_of_one_that_is_not() -> None:
    now = 0.0
    metrics = make(clock=lambda: now)
    records = [metrics.record((f"adapter-{number}",), [REQUEST]) for number in range(MAX_ADAPTER_LABELS)]
    late = [metrics.record(("late",), [REQUEST]) for _ in range(5)]
    now = 11.0
    late.append(metrics.record(("late",), [REQUEST]))
    for record in (*records, *late):
        record.close()
    seen = samples(metrics)
    assert seen["adapterd_requests_total", ("late", "cancelled")] == 6
    assert seen["adapterd_requests_total", ("other", "cancelled")] == 1
    ended = [labels for name, labels in seen if name == "adapterd_requests_total"]
    assert len(ended) == MAX_ADAPTER_LABELS + 1


def test_a_scrape_soon_after_another_costs_nothing_and_a_later_one_sees_what_changed() -> None:
    stats, now, num_read = STATS, 0.0, 0

    def counted() -> EngineStats:
        nonlocal num_read
        num_read += 1
        return stats

    metrics = make(counted, clock=lambda: now)
    assert metrics.render() is metrics.render()
    assert num_read == 1
    stats, now = replace(STATS, num_running=7), 0.03
    assert samples(metrics)["vllm:num_requests_running", ("tiny",)] == 7


def test_the_documented_table_is_the_one_that_is_served() -> None:
    """`python -m adapterd.series` prints it anew."""
    assert markdown() in (Path(__file__).parent.parent / "docs" / "metrics.md").read_text()
