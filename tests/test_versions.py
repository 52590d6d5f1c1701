"""Host memory: what stays within the budget, what leaves, and what may not."""

from pathlib import Path

import pytest
import torch

from adapterd.adapter import Adapter
from adapterd.core import AdapterDigest, AdapterId
from adapterd.deltas import LoraMatrices
from adapterd.errors import Unavailable
from adapterd.versions import HostVersions

SIZE = 128


def adapter(name: str) -> Adapter:
    matrices = LoraMatrices("q_proj", torch.zeros(2, 8), torch.zeros(8, 2), 1.0)
    return Adapter(
        AdapterId(AdapterDigest(name), name), Path(name), (matrices,), 2, SIZE, None, None, None, {}
    )


def here(host: HostVersions, *names: str) -> list[str]:
    host.check_integrity()
    return [name for name in names if AdapterId(AdapterDigest(name), name) in host]


def test_longest_unused_leaves_first() -> None:
    host = HostVersions(3 * SIZE)
    a, b, c, d = (adapter(name) for name in "abcd")
    for some in (a, b, c):
        host.add(some)
    assert host.get(a.id) is a
    host.add(d)
    assert here(host, *"abcd") == ["a", "c", "d"]
    assert (host.num_bytes, host.num_evictions) == (3 * SIZE, 1)


def test_without_a_budget_all_stay() -> None:
    host = HostVersions()
    for number in range(50):
        host.add(adapter(f"n{number}"))
    assert len(host) == 50


def test_held_and_pinned_versions_stay_whatever_comes() -> None:
    host = HostVersions(2 * SIZE)
    held, pinned = adapter("held"), adapter("pinned")
    host.add(held)
    host.hold(held.id)
    host.add(pinned)
    host.pin([pinned.id])
    for number in range(10):
        host.add(adapter(f"n{number}"))
    assert here(host, "held", "pinned", "n8", "n9") == ["held", "pinned", "n9"]
    host.pin([])
    assert host.let_go(held.id)
    assert host.num_bytes <= 2 * SIZE


def test_what_was_just_read_stays_even_where_it_alone_is_too_much() -> None:
    host = HostVersions(1)
    host.add(adapter("a"))
    host.add(adapter("b"))
    assert here(host, "a", "b") == ["b"]


def test_discarded_version_leaves_with_its_last_holder() -> None:
    host = HostVersions()
    a = host.add(adapter("a"))
    host.hold(a.id)
    assert host.discard(a.id) == 0
    assert host[a.id] is a
    assert host.let_go(a.id)
    assert (len(host), host.num_bytes) == (0, 0)


def test_discarding_says_how_much_is_free() -> None:
    host = HostVersions()
    a = host.add(adapter("a"))
    assert host.discard(a.id) == SIZE
    assert host.discard(a.id) == 0


def test_evicted_version_can_be_held_while_someone_refers_to_it() -> None:
    host = HostVersions(SIZE)
    a = host.add(adapter("a"))
    a_id = a.id
    host.add(adapter("b"))
    host.hold(a_id)
    assert host[a_id] is a
    host.let_go(a_id)
    del a
    with pytest.raises(Unavailable, match="just replaced"):
        host.hold(a_id)


def test_one_content_is_in_memory_once() -> None:
    host = HostVersions()
    first = host.add(adapter("a"))
    assert host.add(adapter("a")) is first
    assert host.num_bytes == SIZE


def test_hits_and_misses_are_counted() -> None:
    host = HostVersions()
    a = host.add(adapter("a"))
    host.get(a.id)
    assert host.get(AdapterId(AdapterDigest("b"), "b")) is None
    assert (host.num_hits, host.num_misses) == (1, 1)


def test_room_is_set_aside_for_what_is_being_read_and_the_longest_unused_leave_for_it() -> None:
    host = HostVersions(3 * SIZE)
    for name in "abc":
        host.add(adapter(name))
    assert host.reserve(SIZE)
    assert here(host, *"abc") == ["b", "c"]
    host.unreserve(SIZE)
    host.add(adapter("d"))
    assert here(host, *"abcd") == ["b", "c", "d"]


def test_nothing_is_read_while_requests_hold_all_there_is() -> None:
    host = HostVersions(2 * SIZE)
    a = host.add(adapter("a"))
    host.hold(a.id)
    assert host.reserve(SIZE)
    assert not host.reserve(SIZE)
    host.unreserve(SIZE)
    b = host.add(adapter("b"))
    host.pin([b.id])
    assert not host.reserve(1)
    host.let_go(a.id)
    assert host.reserve(2 * SIZE)  # for someone alone, whatever it takes
