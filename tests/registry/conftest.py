"""Directories are really written, swapped and removed; the only fakes are the base's shape and the clock's pace."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from adapterd.core import AdapterId
from adapterd.reading import AdaptedBase
from adapterd.registry import AdapterRegistry
from adapterd.sources.places import AdapterPlaces
from tests.adapters_on_disk import NO_TOKENIZER, SPEC


@pytest.fixture
def root(tmp_path: Path) -> Path:
    directory = tmp_path / "adapters"
    directory.mkdir()
    return directory


@pytest.fixture
def dropped() -> list[AdapterId]:
    return []


@pytest.fixture
def make(root: Path, dropped: list[AdapterId]) -> Iterator[Callable[..., AdapterRegistry]]:
    made: list[AdapterRegistry] = []

    def call(
        *directories: Path,
        named: Mapping[str, Path] = MappingProxyType({}),
        start: bool = True,
        poll_seconds: float = 0.01,
        **settings: Any,
    ) -> AdapterRegistry:
        base, places = AdaptedBase(SPEC, NO_TOKENIZER), AdapterPlaces(directories or [root], named)
        registry = AdapterRegistry(
            base, places, poll_seconds=poll_seconds, on_drop=dropped.append, **settings
        )
        made.append(registry)
        if start:
            registry.start()
            assert registry.wait_loaded(10)
        return registry

    yield call
    for registry in made:
        registry.stop()
