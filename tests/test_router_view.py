"""What routers are told of adapters in memory."""

from collections.abc import Collection, Sequence
from dataclasses import replace

import pytest

from adapterd.core import AdapterDigest, AdapterId, LoadedName, RegistryStats, ServerStats
from adapterd.router_view import MAX_HOST_ENTRIES, RouterView, RouterViewCache
from tests.server.fakes import REGISTRY_STATS, STATS

A, B, C = (AdapterId(AdapterDigest(digit * 64), digit) for digit in "abc")
IDLE = replace(
    STATS, resident=(), resident_bytes=(), waiting=(), adapter_bytes_total=1000, adapter_bytes_resident=0
)
SERVING = ServerStats((), is_ready=True, is_draining=False)


class Names:
    def __init__(self, *names: LoadedName) -> None:
        self.names = names

    def stats(self) -> RegistryStats:
        return REGISTRY_STATS

    def loaded(self, on_device: Collection[AdapterId]) -> Sequence[LoadedName]:
        return self.names


@pytest.fixture
def cache() -> RouterViewCache:
    ticks = iter(range(1, 100))
    return RouterViewCache("base", unix_time=lambda: next(ticks))


def look(cache: RouterViewCache, names: Names, *, num_changes: int = 0, **engine: object) -> RouterView:
    registry = replace(REGISTRY_STATS, num_changes=num_changes, median_bytes=250)
    return cache.view(names, replace(IDLE, **engine), registry, SERVING)


def test_an_idle_resident_adapter_is_listed_under_both_spellings(cache: RouterViewCache) -> None:
    names = Names(LoadedName("a", A, 8, False), LoadedName("b", B, 16, True))
    view = look(cache, names, resident=(A,), resident_bytes=(100,), adapter_bytes_resident=100)
    assert view.on_device == (("base", "base:a", "gpu", "false", "8"), ("base", "a", "gpu", "false", "8"))
    assert view.on_host == (("base", "base:b", "cpu", "true", "16"), ("base", "b", "cpu", "true", "16"))


def test_limits_are_counted_in_entries_at_the_median_size(cache: RouterViewCache) -> None:
    names = Names(*(LoadedName(i.name, i, 8, False) for i in (A, B, C)))
    sizes = {"resident": (A, B, C), "resident_bytes": (100, 200, 300), "adapter_bytes_resident": 600}
    assert look(cache, names, **sizes).max_entries == 6 + 2 * (400 // 200)
    assert look(cache, names, **sizes, adapter_bytes_total=700).max_entries == 6


def test_before_anything_is_resident_the_known_adapters_tell_how_many_would_fit(
    cache: RouterViewCache,
) -> None:
    assert look(cache, Names()).max_entries == 2 * (1000 // 250)


def test_what_waits_and_is_not_resident_is_waiting(cache: RouterViewCache) -> None:
    names = Names(*(LoadedName(i.name, i, 8, False) for i in (A, B)))
    waiting = (((), 5), (((A, 1.0),), 1), (((A, 0.5), (B, 0.5)), 2))
    view = look(cache, names, resident=(A,), resident_bytes=(10,), waiting=waiting)
    assert view.waiting == ("base:b", "b")
    reading = replace(SERVING, reading=(("c", 1),))
    view = cache.view(names, replace(IDLE, waiting=waiting), REGISTRY_STATS, reading)
    assert view.waiting == ("base:a", "a", "base:b", "b", "base:c", "c")


def test_an_old_version_that_no_name_means_is_not_listed(cache: RouterViewCache) -> None:
    view = look(cache, Names(LoadedName("a", B, 8, False)), resident=(A,), resident_bytes=(10,))
    assert view.on_device == ()
    assert [entry.adapter_name for entry in view.on_host] == ["base:a", "a"]


def test_the_time_moves_only_when_something_changes(cache: RouterViewCache) -> None:
    names = Names(LoadedName("a", A, 8, False))
    first = look(cache, names, resident=(A,), resident_bytes=(10,))
    assert look(cache, names, resident=(A,), resident_bytes=(10,), num_changes=5) == first
    assert look(cache, names).changed_unix > first.changed_unix


def test_one_spelling_may_be_all_there_is() -> None:
    cache = RouterViewCache("base", spellings=("bare",))
    view = look(cache, Names(LoadedName("a@stable", A, 8, False)), resident=(A,), resident_bytes=(10,))
    assert [entry.adapter_name for entry in view.on_device] == ["a@stable"]
    assert view.max_entries == 1 + 1000 // 10


def test_an_adapter_may_have_more_spellings() -> None:
    cache = RouterViewCache("base", spellings=("bare",), more_spellings={"publishers/x/models/a": "a"})
    view = look(cache, Names(LoadedName("a", A, 8, False)), resident=(A,), resident_bytes=(10,))
    assert [entry.adapter_name for entry in view.on_device] == ["a", "publishers/x/models/a"]


def test_host_entries_are_bounded_and_device_entries_are_not(cache: RouterViewCache) -> None:
    names = Names(*(LoadedName(f"n{number}", A, 8, False) for number in range(MAX_HOST_ENTRIES)))
    assert len(look(cache, names).on_host) == MAX_HOST_ENTRIES
    assert len(look(cache, names, resident=(A,), resident_bytes=(1,)).on_device) == 2 * MAX_HOST_ENTRIES
