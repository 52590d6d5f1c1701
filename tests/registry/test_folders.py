"""Directories of adapters that appear, change, are swapped and vanish under a registry that watches them."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from adapterd.adapter import Adapter
from adapterd.core import AdapterId
from adapterd.database import Database
from adapterd.errors import AdapterRefused, ConfigError, ModelNotFound, Unavailable
from adapterd.file_names import CONFIG_FILE
from adapterd.registry import AdapterRegistry
from tests.adapters_on_disk import entry_of, until, value_of, write


def test_adapters_there_at_the_start_are_served(root: Path, make: Callable[..., AdapterRegistry]) -> None:
    write(root / "one", 1.0)
    write(root / "two", 2.0, sealed=False)
    registry = make()
    assert [(entry.name, entry.state, entry.rank, entry.targets) for entry in registry.list()] == [
        ("one", "READY", 2, ("q_proj",)),
        ("two", "READY", 2, ("q_proj",)),
    ]
    assert value_of(registry, "mini:two") == 2.0
    assert value_of(registry, "one") == 1.0
    assert registry.resolve("mini").mix == ()
    assert registry.list()[0].loaded_at == pytest.approx(time.time(), abs=60)


def test_a_root_may_be_an_adapter_itself(root: Path, make: Callable[..., AdapterRegistry]) -> None:
    registry = make(write(root / "support", 3.0))
    assert value_of(registry, "mini:support") == 3.0


def test_new_changed_and_removed_folders_are_followed(
    root: Path, make: Callable[..., AdapterRegistry], dropped: list[AdapterId]
) -> None:
    registry = make()
    write(root / "a", 1.0, sealed=False)
    until(lambda: (entry := entry_of(registry, "a")) is not None and entry.state == "READY")
    first = registry.resolve("a").mix[0][0]
    write(root / "a", 2.0)
    until(lambda: value_of(registry, "a") == 2.0)
    until(lambda: dropped == [first])
    shutil.rmtree(root / "a")
    until(lambda: entry_of(registry, "a") is None)
    with pytest.raises(ModelNotFound):
        registry.resolve("a")


def test_swapped_link_is_a_new_version(root: Path, make: Callable[..., AdapterRegistry]) -> None:
    versions = root / ".versions" / "a"
    write(versions / "v1", 1.0)
    write(versions / "v2", 2.0)
    (root / "a").symlink_to(versions / "v1")
    registry = make()
    assert value_of(registry, "a") == 1.0
    (root / "a.new").symlink_to(versions / "v2")
    (root / "a.new").rename(root / "a")
    until(lambda: value_of(registry, "a") == 2.0)


def test_link_out_of_the_root_is_refused(
    root: Path, tmp_path: Path, make: Callable[..., AdapterRegistry]
) -> None:
    (root / "a").symlink_to(write(tmp_path / "outside", 1.0))
    registry = make()
    with pytest.raises(AdapterRefused, match="leads out of"):
        registry.resolve("a")


def test_half_written_folder_is_not_served_and_is_retried(
    root: Path, make: Callable[..., AdapterRegistry]
) -> None:
    whole = write(root / ".whole", 1.0, sealed=False)
    registry = make()
    (root / "a").mkdir()
    weights = (whole / "adapter_model.safetensors").read_bytes()
    (root / "a" / "adapter_model.safetensors").write_bytes(weights[:100])
    time.sleep(0.1)
    assert registry.list() == ()  # no adapter_config.json: not an adapter yet
    shutil.copy(whole / CONFIG_FILE, root / "a" / CONFIG_FILE)
    until(lambda: (entry := entry_of(registry, "a")) is not None and entry.state == "FAILED")
    with pytest.raises(AdapterRefused, match=r"cut off|take"):
        registry.resolve("a")
    (root / "a" / "adapter_model.safetensors").write_bytes(weights)
    until(lambda: (entry := entry_of(registry, "a")) is not None and entry.state == "READY")
    assert value_of(registry, "a") == 1.0


def test_folder_that_keeps_changing_waits(root: Path, make: Callable[..., AdapterRegistry]) -> None:
    registry = make(poll_seconds=0.03)
    directory = write(root / ".tmp", 1.0, sealed=False).rename(root / "a")
    for tick in range(60):
        os.utime(directory / CONFIG_FILE, ns=(tick, tick))
        time.sleep(0.005)
        entry = entry_of(registry, "a")
        assert entry is None or entry.state == "LOADING"
        if entry is not None:
            with pytest.raises(Unavailable, match="still loading"):
                registry.resolve("a")
    until(lambda: registry.list()[0].state == "READY")


def test_bad_new_version_leaves_the_old_one_serving(
    root: Path, make: Callable[..., AdapterRegistry], dropped: list[AdapterId]
) -> None:
    write(root / "a", 1.0)
    registry = make()
    config = json.loads((root / "a" / CONFIG_FILE).read_text())
    (root / "a" / "adapterd.json").unlink()
    (root / "a" / CONFIG_FILE).write_text(json.dumps({**config, "use_qalora": True}))
    until(lambda: registry.list()[0].error is not None)
    (entry,) = registry.list()
    assert entry.state == "READY"
    assert "use_qalora" in (entry.error or "")
    assert (registry.stats().num_failed, registry.stats().num_behind) == (0, 1)
    assert value_of(registry, "a") == 1.0
    assert dropped == []
    (root / "a" / CONFIG_FILE).write_text(json.dumps(config))
    until(lambda: registry.list()[0].error is None)
    assert registry.stats().num_behind == 0


def test_same_content_under_two_names_is_one_version(
    root: Path, make: Callable[..., AdapterRegistry], dropped: list[AdapterId]
) -> None:
    write(root / "a", 1.0)
    write(root / "b", 1.0)
    registry = make()
    assert registry.resolve("a").mix == registry.resolve("b").mix
    registry.unload("a")
    assert dropped == []
    assert value_of(registry, "b") == 1.0
    registry.unload("b")
    assert len(dropped) == 1


def test_unloaded_folder_stays_out_until_it_changes(root: Path, make: Callable[..., AdapterRegistry]) -> None:
    write(root / "a", 1.0)
    registry = make()
    registry.unload("a")
    with pytest.raises(ModelNotFound):
        registry.unload("a")
    time.sleep(0.1)
    assert registry.list() == ()
    write(root / "a", 2.0)
    until(lambda: entry_of(registry, "a") is not None and registry.list()[0].state == "READY")
    assert value_of(registry, "a") == 2.0


def test_refused_by_the_check_is_failed(root: Path, make: Callable[..., AdapterRegistry]) -> None:
    def too_large(adapter: Adapter) -> None:
        raise AdapterRefused(f"adapter {adapter.id.name!r} needs more memory than there is")

    write(root / "a", 1.0)
    registry = make(check=too_large)
    with pytest.raises(AdapterRefused, match="more memory"):
        registry.resolve("a")
    with pytest.raises(AdapterRefused, match="more memory"):
        registry.load("b", root / "a", inplace=False)
    assert [entry.state for entry in registry.list()] == ["FAILED"]


def test_missing_directory_is_a_config_error(root: Path, make: Callable[..., AdapterRegistry]) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        make(root / "nowhere")


def test_a_named_folder_may_be_given_from_where_the_daemon_was_started(
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[..., AdapterRegistry],
) -> None:
    """Its weights are read again once they have left memory; and it is known after a restart."""
    write(tmp_path / "elsewhere" / "v7", 7.0)
    monkeypatch.chdir(tmp_path)
    for num_reads_at_start in (1, 0):
        named = {"support": Path("elsewhere") / "v7"}
        registry = make(named=named, host_bytes=1, database=Database(tmp_path / "state"))
        assert registry.stats().num_reads == num_reads_at_start
        assert [value_of(registry, "support") for _ in range(2)] == [7.0, 7.0]
        registry.stop()


def test_what_lies_below_a_named_folder_is_watched_by_nobody(
    root: Path, tmp_path: Path, make: Callable[..., AdapterRegistry]
) -> None:
    support = write(tmp_path / "support", 1.0)
    registry = make(named={"support": support})
    registry.load("draft", write(support / "draft", 2.0), inplace=False)
    assert registry.entry("draft").owner == "runtime"


def test_vanished_root_unloads_nothing(root: Path, make: Callable[..., AdapterRegistry]) -> None:
    write(root / "a", 1.0)
    registry = make()
    root.rename(root.parent / "away")
    time.sleep(0.1)
    assert value_of(registry, "a") == 1.0
