"""Weights are found and measured once for all who hold them at a time."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from adapterd.adapter import Adapter
from adapterd.core import AdapterDigest, AdapterId
from adapterd.engine.weights import WeightsInUse

A, B = (AdapterId(AdapterDigest(letter * 64), letter) for letter in "ab")


@dataclass
class Host:
    """`found` and `measured` say in which order."""

    found: list[str]
    measured: list[str]

    def find(self, adapter_id: AdapterId) -> Adapter:
        self.found.append(adapter_id.name)
        return Adapter(adapter_id, Path(), (), 0, 0, None, None, None, {})

    def pages_of(self, adapter: Adapter) -> int:
        self.measured.append(adapter.id.name)
        return {"a": 2, "b": 3}[adapter.id.name]


def test_weights_are_measured_when_they_are_first_held_and_forgotten_with_their_last_holder() -> None:
    host = Host([], [])
    weights = WeightsInUse(host.find, host.pages_of)
    weights.hold(((A, 1.0), (B, 0.5)))
    weights.hold(((A, 1.0),))
    for _ in range(2):
        assert (weights.num_pages(A), weights.num_pages(B)) == (2, 3)
    assert host.found == host.measured == ["a", "b"]
    weights.release(((A, 1.0), (B, 0.5)))
    assert weights.get(A).id == A
    assert weights.num_pages(A) == 2
    for ask in (weights.get, weights.num_pages):
        with pytest.raises(KeyError):
            ask(B)
    weights.release(((A, 1.0),))
    with pytest.raises(KeyError):
        weights.num_pages(A)
    weights.hold(((A, 1.0),))
    assert host.found == host.measured == ["a", "b", "a"]


def test_weights_that_are_not_found_are_not_held() -> None:
    def find(adapter_id: AdapterId) -> Adapter:
        raise KeyError(adapter_id)

    weights = WeightsInUse(find, lambda adapter: 1)
    with pytest.raises(KeyError):
        weights.hold(((A, 1.0),))
    with pytest.raises(KeyError):
        weights.get(A)
