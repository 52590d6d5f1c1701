"""Adapters loaded by whoever asks, from below the roots and under names that may be."""

from collections.abc import Callable
from pathlib import Path

import pytest

from adapterd.errors import AdapterdError, AdapterRefused, Conflict, InvalidRequest, OtherContent
from adapterd.file_names import CONFIG_FILE
from adapterd.registry import AdapterRegistry
from tests.adapters_on_disk import value_of, write


def test_load_serves_from_its_return_on(root: Path, make: Callable[..., AdapterRegistry]) -> None:
    registry = make()
    directory = write(root / "nested" / "v1", 1.0)
    assert registry.load("a", directory, inplace=False).name == "a"
    assert value_of(registry, "a") == 1.0
    registry.load("a", directory, inplace=False)
    write(directory, 5.0)
    with pytest.raises(OtherContent, match="'a' is already loaded with other content"):
        registry.load("a", directory, inplace=False)
    assert value_of(registry, "a") == 1.0
    for value in (2.0, 3.0, 4.0):
        write(directory, value)
        registry.load("a", "nested/v1", inplace=True)
        assert value_of(registry, "a") == value


@pytest.mark.parametrize(
    "path",
    ["/etc", "../outside", "nested/../../outside", "a\0b", "", "nowhere", "/proc/self/environ", "file"],
)
def test_load_stays_below_the_roots(path: str, root: Path, make: Callable[..., AdapterRegistry]) -> None:
    write(root.parent / "outside", 1.0)
    (root / "file").write_text("no folder")
    registry = make()
    with pytest.raises((InvalidRequest, AdapterRefused)):
        registry.load("a", path, inplace=False)
    assert registry.list() == ()


@pytest.mark.parametrize("name", ["../a", "", ".a", "a/b", "x" * 129, "a\0", "\u2024\u2024"])
def test_load_refuses_bad_names(name: str, root: Path, make: Callable[..., AdapterRegistry]) -> None:
    registry = make()
    with pytest.raises(InvalidRequest, match="is no adapter name"):
        registry.load(name, write(root / "a", 1.0), inplace=False)


@pytest.mark.parametrize("name", ["mini", "base"])
def test_load_refuses_the_bases_name(name: str, root: Path, make: Callable[..., AdapterRegistry]) -> None:
    with pytest.raises(Conflict, match="base's own name"):
        make(start=False).load(name, write(root / "x", 1.0), inplace=False)


def test_bad_loads_do_not_disturb_good_ones(root: Path, make: Callable[..., AdapterRegistry]) -> None:
    write(root / "good", 1.0)
    bad = write(root / ".bad", 1.0)
    (bad / CONFIG_FILE).write_text("{")
    registry = make()
    for turn in range(200):
        with pytest.raises(AdapterdError):
            registry.load(f"bad{turn}", bad, inplace=False)
        assert value_of(registry, "good") == 1.0
    assert [entry.name for entry in registry.list()] == ["good"]
