"""When the database takes nothing, names keep what they meant, say why, and are tried again after a rest."""

import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from adapterd.database import Database
from adapterd.names import NameRecord
from adapterd.reading import AdaptedBase
from adapterd.registry import AdapterRegistry
from adapterd.sources.places import AdapterPlaces
from tests.adapters_on_disk import NO_TOKENIZER, SPEC, entry_of, serves, until, value_of, write


class FullDisk(Database):
    """Takes nothing while `is_full`; `refused_at` says when it was asked then."""

    def __init__(self, directory: Path, *, is_full: bool) -> None:
        super().__init__(directory)
        self.is_full = is_full
        self.refused_at: list[float] = []

    def save(self, record: NameRecord) -> None:
        if self.is_full:
            self.refused_at.append(time.monotonic())
            raise sqlite3.OperationalError("database or disk is full")
        super().save(record)


def says_why(registry: AdapterRegistry, name: str) -> bool:
    entry = entry_of(registry, name)
    return entry is not None and "disk is full" in (entry.error or "")


def test_a_new_folder_is_said_to_have_failed_and_served_once_there_is_room(
    root: Path, make: Callable[..., AdapterRegistry], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(root / "a", 1.0)
    database = FullDisk(tmp_path / "state", is_full=True)
    registry = make(database=database)  # which waits until no name is LOADING
    assert registry.entry("a").state == "FAILED"
    assert says_why(registry, "a")
    assert "adapter a: its folder could not be taken over" in caplog.text
    until(lambda: len(database.refused_at) >= 4)
    database.is_full = False
    until(lambda: registry.entry("a").state == "READY")
    assert value_of(registry, "a") == 1.0
    assert registry.entry("a").error is None
    # Rests of 5, 10 and 20 polls, of 0.01 s each, lie between four tries.
    assert database.refused_at[3] - database.refused_at[0] >= 0.35
    registry.check_integrity()


def test_the_version_before_serves_on_until_a_later_one_can_be_kept(
    root: Path, make: Callable[..., AdapterRegistry], tmp_path: Path
) -> None:
    write(root / "a", 1.0)
    database = FullDisk(tmp_path / "state", is_full=False)
    registry = make(database=database)
    database.is_full = True
    write(root / "a", 2.0)
    until(lambda: says_why(registry, "a"))
    assert (registry.entry("a").state, registry.entry("a").number) == ("READY", 1)
    database.is_full = False
    until(lambda: serves(registry, "a", 2.0))
    assert registry.entry("a").error is None


def test_what_was_loaded_before_a_restart_says_why_it_is_not_what_its_folder_holds(
    root: Path, make: Callable[..., AdapterRegistry], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(root / ".held" / "one", 1.0)
    registry = make(database=Database(tmp_path / "state"))
    registry.load("a", ".held/one", inplace=False)
    registry.stop()
    write(root / ".held" / "one", 2.0)
    database = FullDisk(tmp_path / "state", is_full=True)
    again = make(database=database)
    until(lambda: says_why(again, "a"))
    assert again.entry("a").number == 1
    assert "adapter a: what its source holds now could not be taken over" in caplog.text
    database.is_full = False
    again.update("a")
    assert value_of(again, "a") == 2.0
    assert again.entry("a").error is None


def test_what_a_manifest_names_is_said_to_have_failed(root: Path, tmp_path: Path) -> None:
    write(root / ".held" / "one", 1.0)
    manifest = tmp_path / "adapters.yaml"
    manifest.write_text("version: 1\nadapters:\n  a: {source: .held/one}\n")
    database = FullDisk(tmp_path / "state", is_full=True)
    registry = AdapterRegistry(
        AdaptedBase(SPEC, NO_TOKENIZER),
        AdapterPlaces([root], manifest=manifest),
        poll_seconds=0.01,
        database=database,
    )
    registry.start()
    try:
        assert registry.wait_loaded(10)
        assert registry.entry("a").state == "FAILED"
        assert says_why(registry, "a")
        database.is_full = False
        until(lambda: registry.entry("a").state == "READY")
    finally:
        registry.stop()
