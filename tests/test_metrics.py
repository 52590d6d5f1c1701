"""Every series, and what a request adds to them."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from adapterd.core import EngineStats, Output, Request, RequestId, SamplingParams
from adapterd.metrics import MAX_ADAPTER_LABELS, SERIES, Metrics
from tests.server.fakes import REGISTRY_STATS, STATS

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


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("tiny", lambda: STATS, lambda: REGISTRY_STATS)


def test_every_declared_series_is_there_from_the_first_scrape(metrics: Metrics) -> None:
    text = metrics.render().decode()
    for series in SERIES:
        name = series.name.removesuffix("_total") if series.kind == "counter" else series.name
        assert f"# TYPE {name}" in text


def test_the_three_gauges_of_the_endpoint_picker_are_one_series_each(metrics: Metrics) -> None:
    text = metrics.render().decode()
    for name, value in (
        ("num_requests_waiting", "3.0"),
        ("num_requests_running", "2.0"),
        ("kv_cache_usage_perc", "0.4"),
    ):
        lines = [line for line in text.splitlines() if line.startswith(f"vllm:{name}")]
        assert lines == [f'vllm:{name}{{model_name="tiny"}} {value}']


def test_the_registrys_counters_are_there(metrics: Metrics) -> None:
    seen = samples(metrics)
    assert seen["adapterd_host_adapter_bytes", ("tiny",)] == 100
    assert seen["adapterd_host_adapter_misses_total", ("tiny",)] == 1
    assert seen["adapterd_adapter_read_seconds_total", ("tiny",)] == 0.25


def test_residency_is_one_series_under_both_spellings_and_moves_when_it_changes() -> None:
    stats, now = STATS, 0.0
    metrics = Metrics("tiny", lambda: stats, lambda: REGISTRY_STATS, clock=lambda: now)
    labels = ("20", "tiny:support,support", "")
    first = samples(metrics)["vllm:lora_requests_info", labels]
    stats = replace(STATS, resident=(), adapter_bytes_resident=0)
    now = 1.0
    later = {key: value for key, value in samples(metrics).items() if key[0] == "vllm:lora_requests_info"}
    ((_, changed_labels), changed) = next(iter(later.items()))
    assert (len(later), changed_labels) == (1, ("2", "", ""))
    assert changed >= first


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
    assert seen["adapterd_request_seconds_count", ("support",)] == 1


def test_first_token_and_gaps_are_timed() -> None:
    now = 10.0
    metrics = Metrics("tiny", lambda: STATS, lambda: REGISTRY_STATS, clock=lambda: now)
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
    labels = {metrics.adapter_label((f"adapter-{number}",)) for number in range(2 * MAX_ADAPTER_LABELS)}
    assert len(labels) == MAX_ADAPTER_LABELS + 1
    assert "other" in labels
    assert metrics.adapter_label(("adapter-0",)) == "adapter-0"


def test_a_scrape_soon_after_another_costs_nothing() -> None:
    calls: list[None] = []

    def counted() -> EngineStats:
        calls.append(None)
        return STATS

    stats: Callable[[], EngineStats] = counted
    metrics = Metrics("tiny", stats, lambda: REGISTRY_STATS)
    before = len(calls)
    assert metrics.render() is metrics.render()
    assert len(calls) == before + 1
