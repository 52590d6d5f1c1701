"""The text formats, against the parsers of prometheus-client."""

import math

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from adapterd.exposition import Family, accepted_format, render


def lines(*families: Family) -> list[str]:
    return [line for line in render(families, "plain").decode().splitlines() if not line.startswith("#")]


def test_a_histogram_is_what_prometheus_client_makes_of_the_same_observations() -> None:
    buckets = (0.1, 1.0, 2.5)
    registry = CollectorRegistry()
    theirs = Histogram("h", "H.", ("who",), buckets=buckets, registry=registry)
    ours = Family("h", "H.", "histogram", ("who",), buckets)
    for value in (0.05, 0.1, 0.100001, 2.5, 7, 7):
        theirs.labels("a").observe(value)
        ours.observe(("a",), value)

    def read(text: str) -> set[tuple[str, frozenset[tuple[str, str]], float]]:
        samples = [sample for family in parse(text) for sample in family.samples]
        return {(s.name, frozenset(s.labels.items()), s.value) for s in samples if s.name != "h_created"}

    assert read(render([ours], "plain").decode()) == read(generate_latest(registry).decode())


@pytest.mark.parametrize("text", ['a"b', "a\\b", "a\nb", "a,b}", "", "\\n"])
def test_any_text_can_be_a_label(text: str) -> None:
    family = Family("g", "G.", "gauge", ("x",))
    family.set((text,), 1)
    (plain,) = parse(render([family], "plain").decode())
    (open,) = openmetrics.text_string_to_metric_families(render([family], "openmetrics").decode())
    assert plain.samples[0].labels == open.samples[0].labels == {"x": text}


@pytest.mark.parametrize(
    ("value", "text"), [(3, "3.0"), (True, "1.0"), (0.5, "0.5"), (math.inf, "+Inf"), (-math.inf, "-Inf")]
)
def test_numbers(value: float, text: str) -> None:
    family = Family("g", "G.", "gauge")
    family.set((), value)
    assert lines(family) == [f"g {text}"]


def test_only_what_is_among_the_new_readings_stays() -> None:
    family = Family("g", "G.", "gauge", ("x",))
    family.replace({("a",): 1, ("b",): 2})
    assert lines(family) == ['g{x="a"} 1.0', 'g{x="b"} 2.0']
    family.replace({("b",): 3, ("c",): 0})
    assert lines(family) == ['g{x="b"} 3.0', 'g{x="c"} 0.0']


def test_series_of_a_label_that_is_dropped_start_anew() -> None:
    family = Family("c_total", "C.", "counter", ("adapter", "tier"))
    family.add(("a", "disk"), 5)
    family.add(("b", "disk"), 7)
    family.drop("a")
    assert lines(family) == ['c_total{adapter="b",tier="disk"} 7.0']
    family.add(("a", "disk"), 1)
    assert lines(family) == ['c_total{adapter="b",tier="disk"} 7.0', 'c_total{adapter="a",tier="disk"} 1.0']


@pytest.mark.parametrize(
    ("accept", "format"),
    [
        ("", "plain"),
        ("*/*", "plain"),
        ("text/plain;version=0.0.4", "plain"),
        ("application/vnd.google.protobuf", "plain"),
        ("application/openmetrics-text;version=1.0.0;q=0.5,text/plain;q=0.2", "openmetrics"),
    ],
)
def test_openmetrics_is_given_to_who_asks_for_it(accept: str, format: str) -> None:
    assert accepted_format(accept) == format
