"""What a registry knows again after a restart, from its database."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from adapterd.adapter import Adapter
from adapterd.database import Database
from adapterd.errors import AdapterRefused
from adapterd.registry import AdapterRegistry
from tests.adapters_on_disk import entry_of, until, value_of, write


def test_restart_knows_names_versions_aliases_and_pins_and_reads_nothing(
    root: Path, make: Callable[..., AdapterRegistry], tmp_path: Path
) -> None:
    for value in (1.0, 2.0):
        write(root / ".v" / str(value), value)
    write(root / "c", 7.0)
    (root / "a").symlink_to(root / ".v" / "1.0")
    registry = make(database=Database(tmp_path / "state"))
    (root / ".next").symlink_to(root / ".v" / "2.0")
    (root / ".next").rename(root / "a")
    until(lambda: registry.entry("a").number == 2)
    registry.alias("a", "stable", "1")
    registry.pin("a")
    registry.load("b", root / ".v" / "2.0", inplace=False)
    before = registry.list()
    registry.stop()

    again = make(database=Database(tmp_path / "state"))
    assert [replace(entry, in_host_memory=True) for entry in again.list()] == list(before)
    assert again.stats().num_reads == 0
    assert [value_of(again, m) for m in ("a", "a@stable", "a@2", "b", "c")] == [2.0, 1.0, 2.0, 2.0, 7.0]


def test_restart_sees_what_changed_meanwhile(
    root: Path, make: Callable[..., AdapterRegistry], tmp_path: Path
) -> None:
    for name in ("changed", "gone", "rolled-back", "unloaded"):
        write(root / name, 1.0)
    write(root / "nested" / "loaded", 1.0)
    registry = make(database=Database(tmp_path / "state"))
    write(root / "rolled-back", 2.0)
    until(lambda: registry.entry("rolled-back").number == 2)
    registry.rollback("rolled-back")
    registry.unload("unloaded")
    registry.load("loaded", "nested/loaded", inplace=False)
    registry.stop()
    write(root / "changed", 3.0)
    write(root / "nested" / "loaded", 4.0)
    shutil.rmtree(root / "gone")

    again = make(database=Database(tmp_path / "state"))
    until(lambda: again.entry("changed").number == again.entry("loaded").number == 2)
    assert (value_of(again, "changed"), value_of(again, "loaded")) == (3.0, 4.0)
    until(lambda: entry_of(again, "gone") is None)
    assert entry_of(again, "unloaded") is None
    # What it was rolled back to was overwritten, and is not taken for what lies there now.
    assert again.entry("rolled-back").number == 1
    with pytest.raises(AdapterRefused, match="version 1 of 'rolled-back' is gone"):
        again.resolve_waiting("rolled-back", 10)


def test_restart_with_other_directories_forgets_what_was_below_the_old_ones(
    root: Path, make: Callable[..., AdapterRegistry], tmp_path: Path
) -> None:
    write(root / "a", 1.0)
    make(database=Database(tmp_path / "state")).stop()
    other = tmp_path / "other"
    write(other / "b", 2.0)
    again = make(other, database=Database(tmp_path / "state"))
    assert [entry.name for entry in again.list()] == ["b"]


def test_refused_folder_is_looked_at_again_after_a_restart(
    root: Path, make: Callable[..., AdapterRegistry], tmp_path: Path
) -> None:
    """The reason may have been a setting that is another one by now."""

    def too_large(adapter: Adapter) -> None:
        raise AdapterRefused("more memory than there is")

    write(root / "a", 1.0)
    refusing = make(check=too_large, database=Database(tmp_path / "state"))
    assert refusing.entry("a").state == "FAILED"
    refusing.stop()
    assert value_of(make(database=Database(tmp_path / "state")), "a") == 1.0
