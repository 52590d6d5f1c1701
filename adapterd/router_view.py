"""What routers are told of adapters in memory: the entries, as clients spell them, and how many more would fit.

llm-d's router compares the `model` string of a request with these entries as they are, so each adapter has an
entry for every spelling, and limits are counted in entries too. An adapter that is resident and idle is listed:
it is what its next request should be sent to.
"""

import statistics
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from types import MappingProxyType
from typing import Literal, NamedTuple, Protocol

from adapterd.core import AdapterId, EngineStats, LoadedName, RegistryStats, ServerStats

Spelling = Literal["prefixed", "bare"]
"""`BASE:ADAPTER`, or `ADAPTER` alone."""

PREFIXED: tuple[Spelling, ...] = ("prefixed",)

MAX_HOST_ENTRIES = 1000
"""Entries of adapters in host memory; those on the device, which nobody may miss, are all listed."""


class LoadedNames(Protocol):
    """What of the registry is needed; `registry.AdapterRegistry` is the real thing."""

    def stats(self) -> RegistryStats: ...
    def loaded(self, on_device: Collection[AdapterId]) -> Sequence[LoadedName]: ...


class Entry(NamedTuple):
    """One spelling of one adapter in memory, as the labels of its series say it.

    A tuple, since hundreds are made whenever one adapter moves.
    """

    model_name: str
    adapter_name: str
    level: Literal["gpu", "cpu"]
    pinned: Literal["true", "false"]
    rank: str


@dataclass(frozen=True)
class RouterView:
    """`max_entries` is what is resident and what would still fit, were it as large as the median."""

    on_device: tuple[Entry, ...]
    on_host: tuple[Entry, ...]
    waiting: tuple[str, ...]
    max_entries: int
    changed_unix: float


class RouterViewCache:
    """Keeps the view, and makes it anew when something of it may have changed."""

    def __init__(
        self,
        base_name: str,
        *,
        spellings: Collection[Spelling] = ("prefixed", "bare"),
        more_spellings: Mapping[str, str] = MappingProxyType({}),
        unix_time: Callable[[], float] = time.time,
    ) -> None:
        self._base_name = base_name
        self._spellings = frozenset(spellings)
        self._more_spellings: dict[str, list[str]] = {}
        for spelling, name in more_spellings.items():
            self._more_spellings.setdefault(name, []).append(spelling)
        self._unix_time = unix_time
        self._key: object = None
        self._view = RouterView((), (), (), 0, unix_time())

    def view(
        self, names: LoadedNames, engine: EngineStats, registry: RegistryStats, server: ServerStats
    ) -> RouterView:
        reading = tuple(name for name, _ in server.reading)
        key = (engine.resident, engine.waiting, engine.adapter_bytes_total, registry.num_changes, reading)
        if key != self._key:
            self._key = key
            self._view = self._look(names, engine, registry, reading)
        return self._view

    def _look(
        self, names: LoadedNames, engine: EngineStats, registry: RegistryStats, reading: Iterable[str]
    ) -> RouterView:
        device = frozenset(engine.resident)
        loaded = names.loaded(device)
        on_device: list[LoadedName] = []
        on_host: list[LoadedName] = []
        for name in loaded:
            (on_device if name.id in device else on_host).append(name)
        wanted = {adapter_id for mix, _ in engine.waiting for adapter_id, _ in mix}
        waiting = {name.spelling for name in on_host if name.id in wanted}.union(reading)
        entries = tuple(self._entries(on_device, "gpu"))
        view = RouterView(
            on_device=entries,
            on_host=tuple(islice(self._entries(on_host, "cpu"), MAX_HOST_ENTRIES)),
            waiting=tuple(entry for name in sorted(waiting) for entry in self._spelled(name)),
            max_entries=len(entries) + len(self._spellings) * _num_fitting(engine, registry),
            changed_unix=self._view.changed_unix,
        )
        if view == self._view:
            return view
        return RouterView(view.on_device, view.on_host, view.waiting, view.max_entries, self._unix_time())

    def _entries(self, names: Iterable[LoadedName], level: Literal["gpu", "cpu"]) -> Iterator[Entry]:
        return (
            Entry(self._base_name, spelled, level, "true" if name.is_pinned else "false", str(name.rank))
            for name in sorted(names, key=lambda name: name.spelling)
            for spelled in self._spelled(name.spelling)
        )

    def _spelled(self, name: str) -> list[str]:
        return [*spelled(self._base_name, name, self._spellings), *self._more_spellings.get(name, ())]


def spelled(base_name: str, name: str, spellings: Collection[Spelling]) -> list[str]:
    """An adapter as clients may call it."""
    prefixed = [f"{base_name}:{name}"] if "prefixed" in spellings else []
    return [*prefixed, name] if "bare" in spellings else prefixed


def _num_fitting(engine: EngineStats, registry: RegistryStats) -> int:
    """Adapters of the median size that memory has room for beside those that are resident."""
    median = statistics.median_low(engine.resident_bytes) if engine.resident_bytes else registry.median_bytes
    free = engine.adapter_bytes_total - engine.adapter_bytes_resident
    return free // median if median else int(free > 0)
