"""Weights that leave memory and come back, and pinned ones that stay."""

from collections.abc import Callable
from pathlib import Path

import pytest

from adapterd.errors import AdapterRefused, BeingRead, Unavailable
from adapterd.registry import AdapterRegistry
from tests.adapters_on_disk import until, value_of, write


def test_weights_that_left_memory_are_read_again(root: Path, make: Callable[..., AdapterRegistry]) -> None:
    for number in range(20):
        write(root / f"n{number}", float(number + 1))
    registry = make(host_bytes=3 * 128)
    assert registry.stats().host_bytes <= 3 * 128
    assert [value_of(registry, f"n{number}") for number in range(20)] == [float(n + 1) for n in range(20)]
    stats = registry.stats()
    assert (stats.num_ready, stats.host_bytes <= 3 * 128, stats.num_host_misses > 0) == (20, True, True)
    registry.check_integrity()


def test_what_has_to_be_read_first_says_so_and_does_not_wait(
    root: Path, make: Callable[..., AdapterRegistry]
) -> None:
    for name in ("a", "b"):
        write(root / name, 1.0 if name == "a" else 2.0)
    registry = make(host_bytes=1)
    gone = next(entry.name for entry in registry.list() if not entry.in_host_memory)
    with pytest.raises(BeingRead) as reading:
        registry.resolve(gone)
    assert reading.value.status == 503
    assert reading.value.done.result(10) is not None
    assert registry.resolve(gone).adapter_names == (gone,)


def test_a_description_reads_nothing_and_brings_nothing_to_memory(
    root: Path, make: Callable[..., AdapterRegistry]
) -> None:
    registry = make(host_bytes=1)
    for name, value in (("a", 1.0), ("b", 2.0)):
        registry.load(name, write(root / "v" / name, value), inplace=True)
    before = registry.stats()
    found = registry.describe("mini:a")
    assert (found.model, found.path) == ("mini:a", root / "v" / "a")
    assert registry.describe("base").path is None
    assert registry.stats() == before
    with pytest.raises(BeingRead):
        registry.resolve("mini:a")


def test_pinned_adapter_stays_in_memory_through_its_versions(
    root: Path, make: Callable[..., AdapterRegistry]
) -> None:
    write(root / "a", 1.0)
    registry = make(host_bytes=1)
    registry.pin("a")
    for number in range(5):
        write(root / f"n{number}", 2.0 + number)
    until(lambda: registry.stats().num_ready == 6)
    assert registry.entry("a").in_host_memory
    write(root / "a", 9.0)
    until(lambda: registry.entry("a").number == 2)
    registry.prefetch("n1")
    assert registry.entry("a").in_host_memory
    registry.pin("a", pinned=False)
    registry.prefetch("n2")
    assert not registry.entry("a").in_host_memory


def test_version_whose_folder_was_overwritten_is_never_taken_for_the_new_one(
    root: Path, make: Callable[..., AdapterRegistry]
) -> None:
    write(root / "a", 1.0)
    registry = make(host_bytes=1)
    write(root / "a", 2.0)
    until(lambda: registry.entry("a").number == 2)
    with pytest.raises(AdapterRefused, match="version 1 of 'a' is gone"):
        registry.resolve_waiting("a@1", 10)
    with pytest.raises(AdapterRefused, match="version 1 of 'a' is gone"):
        registry.rollback("a")
    assert value_of(registry, "a") == 2.0


def test_folder_that_changed_while_its_weights_were_away_is_on_its_way_not_wrong(
    root: Path, make: Callable[..., AdapterRegistry]
) -> None:
    write(root / "a", 1.0)
    registry = make(host_bytes=1, poll_seconds=0.2)
    registry.load("b", write(root / "nested" / "b", 5.0), inplace=False)
    assert not registry.entry("a").in_host_memory
    write(root / "a", 2.0)
    with pytest.raises(Unavailable, match="has just changed"):
        registry.resolve_waiting("a", 10)
    until(lambda: registry.entry("a").number == 2)
    assert value_of(registry, "a") == 2.0
