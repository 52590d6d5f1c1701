"""What keeps the series of `series.py`: counters fed as things happen, and readings taken at each scrape.

A scrape never waits for the engine's thread: it reads the copy of the counters that each step leaves behind.
"""

import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType

from prometheus_client import ProcessCollector

from adapterd.busiest import Busiest
from adapterd.core import EngineStats, Request, ServerStats, Tier
from adapterd.exposition import Family, Format, render
from adapterd.request_record import RequestRecord
from adapterd.router_view import LoadedNames, RouterViewCache, Spelling
from adapterd.series import SERIES, Series, Snapshot

MAX_ADAPTER_LABELS = 100
RENDER_SECONDS = 0.02
"""What a scrape gets may be this old, or, where there is so much that rendering takes long, twenty times as old
as that takes: no more than a twentieth of one core is ever spent on it."""

_ROUTER_PREFIX = "vllm:"
_PROCESS_SECONDS = 1.0
_NOT_SERVING = ServerStats(reading=(), is_ready=False, is_draining=False)
_TRANSITIONS: dict[Tier, str] = {"host": "load", "device": "activate"}


class Metrics:
    """The series of one daemon. Every method may be called from any thread."""

    def __init__(
        self,
        base_name: str,
        engine_stats: Callable[[], EngineStats],
        registry: Callable[[], LoadedNames],
        *,
        spellings: Collection[Spelling] = ("prefixed", "bare"),
        more_spellings: Mapping[str, str] = MappingProxyType({}),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`more_spellings`: what else clients may call an adapter -> its name. `engine_stats` and `registry` are
        asked at scrapes alone: they may come to be after this."""
        self.clock = clock
        self.server_stats: Callable[[], ServerStats] = lambda: _NOT_SERVING
        """Set by whoever serves."""
        self._base_name = base_name
        self._engine_stats = engine_stats
        self._registry = registry
        self._router_views = RouterViewCache(base_name, spellings=spellings, more_spellings=more_spellings)
        self._process = _Process(clock)
        self._lock = threading.Lock()  # guards all below
        self._families = {s.name: Family(s.name, s.help, s.kind, s.labels, s.buckets) for s in SERIES}
        self._by_adapter = [
            self._families[s.name] for s in SERIES if s.rows is None and s.labels[:1] == ("adapter",)
        ]
        self._busiest = Busiest(MAX_ADAPTER_LABELS, clock=clock)
        self._made_of: dict[str, object] = {}
        self._rendered: dict[tuple[Format, bool], bytes] = {}
        self._fresh_until_seconds: dict[tuple[Format, bool], float] = {}

    def render(self, format: Format = "plain", *, for_router: bool = False) -> bytes:
        """The text, a fraction of a second old at most; `for_router`: of those series alone that routers read."""
        page = format, for_router
        with self._lock:
            began = self.clock()
            if began >= self._fresh_until_seconds.get(page, began):
                series = [s for s in SERIES if not for_router or s.name.startswith(_ROUTER_PREFIX)]
                self._read(series)
                self._rendered[page] = render([self._families[s.name] for s in series], format)
                now = self.clock()
                self._fresh_until_seconds[page] = now + max(RENDER_SECONDS, 20 * (now - began))
            return self._rendered[page]

    # Counting

    def count(self, name: str, *labels: str, by: float = 1) -> None:
        with self._lock:
            self._families[name].add(labels, by)

    def time(self, name: str, seconds: float) -> None:
        with self._lock:
            self._families[name].observe((self._base_name,), seconds)

    def record(self, adapter_names: Sequence[str], requests: Sequence[Request]) -> RequestRecord:
        """Start the clock of one response. `adapter_names` are the registry's, none for the base."""
        return RequestRecord(self, self._asked_for(adapter_names), requests)

    def failed_early(self, adapter_names: Sequence[str]) -> None:
        """A request that failed before it had a record, and not by its own fault."""
        self.count_for(self._asked_for(adapter_names), "adapterd_requests_total", "failed")

    def _asked_for(self, adapter_names: Sequence[str]) -> str:
        """One more request for these; the name under which it is counted."""
        name = "+".join(adapter_names) or "base"
        with self._lock:
            for lost in self._busiest.count(name):
                for family in self._by_adapter:
                    family.drop(lost)
        return name

    def count_for(self, adapter: str, name: str, *labels: str, by: float = 1) -> None:
        """Add to one of an adapter's counters, under its own label or the one that others share."""
        with self._lock:
            self._families[name].add((self._busiest.label(adapter), *labels), by)

    def time_for(self, adapter: str, name: str, seconds: float) -> None:
        with self._lock:
            self._families[name].observe((self._busiest.label(adapter),), seconds)

    # What the engine and the registry tell: core.AdapterEvents

    def adapter_wanted(self, name: str, *, is_resident: bool) -> None:
        self.count_for(name, f"adapterd_adapter_{'hits' if is_resident else 'misses'}_total")

    def adapter_loaded(self, name: str, tier: Tier, seconds: float) -> None:
        self.count_for(name, "adapterd_adapter_loads_total", tier)
        self.count_for(name, "adapterd_adapter_load_seconds_total", tier, by=seconds)
        if tier in _TRANSITIONS:
            labels = (self._base_name, _TRANSITIONS[tier])
            with self._lock:
                self._families["vllm:lora_adapter_load_seconds"].observe(labels, seconds)

    def adapter_evicted(self, name: str, tier: Tier) -> None:
        self.count_for(name, "adapterd_adapter_evictions_total", tier)

    # Called with the lock held

    def _read(self, wanted: Sequence[Series]) -> None:
        """Bring what is read rather than fed up to date."""
        snapshot = self._snapshot()
        for series in wanted:
            if series.rows is None:
                continue
            if series.made_of is not None:
                made_of = series.made_of(snapshot)
                if self._made_of.get(series.name) == made_of:
                    continue
                self._made_of[series.name] = made_of
            self._families[series.name].replace(series.rows(snapshot))

    def _snapshot(self) -> Snapshot:
        names = self._registry()
        engine, registry, server = self._engine_stats(), names.stats(), self.server_stats()
        return Snapshot(
            base_name=self._base_name,
            engine=engine,
            registry=registry,
            server=server,
            router=self._router_views.view(names, engine, registry, server),
            process=self._process.values,
            now_seconds=self.clock(),
            labelled=self._busiest.chosen,
        )


class _Process:
    """What the system says of this process, asked once a second at most: it is read from files."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._collector = ProcessCollector(registry=None)
        self._values: dict[str, float] = {}
        self._fresh_until_seconds = clock()

    def values(self) -> dict[str, float]:
        now = self._clock()
        if now >= self._fresh_until_seconds:
            self._fresh_until_seconds = now + _PROCESS_SECONDS
            samples = [sample for family in self._collector.collect() for sample in family.samples]
            self._values = {sample.name: sample.value for sample in samples}
        return self._values
