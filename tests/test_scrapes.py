"""What is kept from one scrape to the next is what would be written anew: a page that was asked for after every
change says the same as one that nobody asked for before."""

from collections.abc import Collection, Sequence
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from adapterd.core import (
    AdapterDigest,
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
from adapterd.exposition import Family, Format, render
from adapterd.metrics import Metrics
from tests.server.fakes import REGISTRY_STATS, STATS

FORMATS: tuple[Format, ...] = ("plain", "openmetrics")
NAMES = ("a", "b", "c")
IDS = {name: AdapterId(AdapterDigest(name * 64), name) for name in NAMES}
REQUEST = Request(RequestId("r"), (1, 2), SamplingParams(max_tokens=5), (), frozenset(), 0.0, 1)

LABELS = st.tuples(st.sampled_from(NAMES))
VALUES = st.floats(0, 10)
CHANGES_OF_NUMBERS = st.lists(
    st.one_of(
        st.tuples(st.just("set"), LABELS, VALUES),
        st.tuples(st.just("add"), LABELS, VALUES),
        st.tuples(st.just("replace"), st.dictionaries(LABELS, VALUES)),
        st.tuples(st.just("drop"), st.sampled_from(NAMES)),
    )
)
CHANGES_OF_HISTOGRAMS = st.lists(
    st.one_of(
        st.tuples(st.just("observe"), LABELS, VALUES), st.tuples(st.just("drop"), st.sampled_from(NAMES))
    )
)


def number() -> Family:
    return Family("c_total", "C.", "counter", ("adapter",))


def histogram() -> Family:
    return Family("h", "H.", "histogram", ("adapter",), (1.0, 2.5))


@given(CHANGES_OF_NUMBERS, CHANGES_OF_HISTOGRAMS)
def test_series_scraped_after_every_change_are_those_written_once(
    of_numbers: list[tuple[str, ...]], of_histograms: list[tuple[str, ...]]
) -> None:
    for make, changes in ((number, of_numbers), (histogram, of_histograms)):
        scraped, unseen = make(), make()
        for name, *arguments in changes:
            getattr(scraped, name)(*arguments)
            getattr(unseen, name)(*arguments)
            for format in FORMATS:
                render([scraped], format)
        for format in FORMATS:
            assert render([scraped], format) == render([unseen], format)


class Names:
    """A registry with these adapters in memory."""

    def __init__(self) -> None:
        self.loaded_names: Sequence[LoadedName] = ()
        self.num_changes = 0

    def stats(self) -> RegistryStats:
        return replace(REGISTRY_STATS, num_changes=self.num_changes)

    def loaded(self, on_device: Collection[AdapterId]) -> Sequence[LoadedName]:
        return self.loaded_names


class Rooms:
    """An engine, a registry and a server to be read, and two that read them: `scraped` and `unseen`."""

    def __init__(self) -> None:
        self.engine: EngineStats = replace(STATS, resident=(), resident_bytes=(), waiting=())
        self.names = Names()
        self.now = 0.0
        self.scraped, self.unseen = (
            Metrics("tiny", lambda: self.engine, lambda: self.names, clock=lambda: self.now) for _ in range(2)
        )

    def do(self, change: str, name: str) -> None:
        if change == "step":
            self.engine = replace(
                self.engine, num_steps=self.engine.num_steps + 1, heartbeat_seconds=self.now
            )
        elif change == "wait":
            self.engine = replace(self.engine, waiting=((((IDS[name], 1.0),), 2),), num_waiting=2)
        elif change == "move":  # to the device, or away from it
            resident = tuple(sorted({*self.engine.resident} ^ {IDS[name]}))
            self.engine = replace(self.engine, resident=resident, resident_bytes=(100,) * len(resident))
        elif change == "read":
            self.names.loaded_names = tuple(
                LoadedName(name, IDS[name], 8, name == "a")
                for name in sorted({name} ^ {loaded.spelling for loaded in self.names.loaded_names})
            )
            self.names.num_changes += 1
        else:
            for metrics in (self.scraped, self.unseen):
                self.tell(metrics, change, name)

    def tell(self, metrics: Metrics, change: str, name: str) -> None:
        if change == "request":
            record = metrics.record((name,), [REQUEST])
            record.observe(Output(RequestId("r"), 0, (7,), "x", (), 3, 0, 1, "stop"))
            record.close()
        elif change == "load":
            metrics.adapter_loaded(name, "device", 0.5)
        elif change == "error":
            metrics.count("adapterd_errors_total", name)
        else:
            asking = ServerStats(((name, 1),), is_ready=True, is_draining=False)
            metrics.server_stats = lambda: asking


CHANGES = ("step", "wait", "move", "read", "request", "load", "error", "ask")


def lines(metrics: Metrics, format: Format, *, for_router: bool) -> list[str]:
    """Sorted, since series stand in the order in which they were first seen; without what the system says of the
    process, and without the time of the last change of residency, which is when somebody saw it."""
    text = metrics.render(format, for_router=for_router).decode()
    return sorted(
        line.rpartition(" ")[0] if line.startswith("vllm:lora_requests_info{") else line
        for line in text.splitlines()
        if not line.startswith("process_")
    )


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(CHANGES), st.sampled_from(NAMES)), max_size=30))
def test_pages_scraped_after_every_change_are_those_written_once(changes: list[tuple[str, str]]) -> None:
    rooms = Rooms()
    for change, name in changes:
        rooms.do(change, name)
        rooms.now += 60.0
        for format in FORMATS:
            for for_router in (False, True):
                rooms.scraped.render(format, for_router=for_router)
    for format in FORMATS:
        for for_router in (False, True):
            assert lines(rooms.scraped, format, for_router=for_router) == lines(
                rooms.unseen, format, for_router=for_router
            )
