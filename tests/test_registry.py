"""Directories are really written, swapped and removed; the only fakes are the base's shape and the clock's pace."""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch

from adapterd.adapter import Adapter
from adapterd.adapter_writer import write_adapter
from adapterd.core import AdapterId, BaseSpec
from adapterd.database import Database
from adapterd.entries import AdapterEntry
from adapterd.errors import (
    AdapterdError,
    AdapterRefused,
    BeingRead,
    ConfigError,
    Conflict,
    InvalidRequest,
    ModelNotFound,
    Unavailable,
)
from adapterd.file_names import CONFIG_FILE
from adapterd.reading import AdaptedBase
from adapterd.registry import AdapterRegistry
from adapterd.sources.places import AdapterPlaces
from adapterd.token_table import TokenizerIdentity

MODULE = "model.layers.0.self_attn.q_proj"
SPEC = BaseSpec("mini", "mini", "LlamaForCausalLM", "float32", 400, 256, {MODULE: (8, 8)}, frozenset({2}))
NO_TOKENIZER = TokenizerIdentity(frozenset(), {})


def write(directory: Path, value: float, *, sealed: bool = True) -> Path:
    """An adapter whose every number is `value`, so that one look tells which version it is."""
    tensors = {MODULE: (torch.full((2, 8), value), torch.full((8, 2), value))}
    targets = ["q_proj"]
    write_adapter(
        directory, tensors, r=2, lora_alpha=2, target_modules=targets, base_name="mini", base_fingerprint=None
    )
    if not sealed:
        (directory / "adapterd.json").unlink()
    return directory


def value_of(registry: AdapterRegistry, model: str) -> float:
    resolved = registry.resolve_waiting(model, 10)
    lease = registry.lease(resolved.mix)
    ((adapter_id, _),) = resolved.mix
    matrices = registry.weights(adapter_id).modules[0]
    lease.release()
    values = {*matrices.a.unique().tolist(), *matrices.b.unique().tolist()}
    assert len(values) == 1, f"a mix of two versions: {values}"
    return float(values.pop())


def until(condition: Callable[[], bool], *, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.005)


def entry_of(registry: AdapterRegistry, name: str) -> AdapterEntry | None:
    return next((entry for entry in registry.list() if entry.name == name), None)


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
    assert value_of(registry, "a") == 1.0
    assert dropped == []
    (root / "a" / CONFIG_FILE).write_text(json.dumps(config))
    until(lambda: registry.list()[0].error is None)


def test_leased_version_stays_until_its_last_lease_drops(
    root: Path, make: Callable[..., AdapterRegistry], dropped: list[AdapterId]
) -> None:
    write(root / "a", 1.0)
    registry = make()
    old = registry.resolve("a")
    leases = [registry.lease(old.mix), registry.lease(old.mix)]
    write(root / "a", 2.0)
    until(lambda: value_of(registry, "a") == 2.0)
    old_id = old.mix[0][0]
    assert registry.weights(old_id).modules[0].a[0, 0] == 1.0
    assert registry.resolve(f"mini:a@{old_id.digest[:8]}").mix == old.mix
    leases[0].release()
    leases[0].release()
    assert dropped == []
    leases[1].release()
    assert dropped == [old_id]
    with pytest.raises(KeyError):
        registry.weights(old_id)


def test_resolved_version_can_still_be_leased_after_its_name_moved_on(
    root: Path, make: Callable[..., AdapterRegistry]
) -> None:
    write(root / "a", 1.0)
    registry = make()
    resolved = registry.resolve("a")
    registry.unload("a")
    lease = registry.lease(resolved.mix)
    assert registry.weights(resolved.mix[0][0]).modules[0].a[0, 0] == 1.0
    lease.release()
    mix = resolved.mix
    del resolved
    with pytest.raises(Unavailable, match="just replaced"):
        registry.lease(mix)


def test_unknown_version_and_unknown_name_say_what_exists(
    root: Path, make: Callable[..., AdapterRegistry]
) -> None:
    for name in ("support", "moderation"):
        write(root / name, 1.0)
    registry = make()
    with pytest.raises(ModelNotFound, match=r"'mini:suport' does not exist.*support, moderation") as refusal:
        registry.resolve("mini:suport")
    assert refusal.value.param == "model"
    with pytest.raises(
        ModelNotFound, match=r"no version 'aaaaaaaa' here; its current version is '[0-9a-f]{12}'"
    ):
        registry.resolve("support@aaaaaaaa")


def test_composition_resolves_to_a_mix(root: Path, make: Callable[..., AdapterRegistry]) -> None:
    write(root / "a", 1.0)
    write(root / "b", 2.0)
    registry = make()
    resolved = registry.resolve("mini:a*0.7+b*0.3")
    by_name = {adapter_id.name: weight for adapter_id, weight in resolved.mix}
    assert by_name == {"a": 0.7, "b": 0.3}
    lease = registry.lease(resolved.mix)
    assert [registry.weights(adapter_id).id for adapter_id, _ in resolved.mix] == [i for i, _ in resolved.mix]
    lease.release()


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


def test_load_serves_from_its_return_on(root: Path, make: Callable[..., AdapterRegistry]) -> None:
    registry = make()
    directory = write(root / "nested" / "v1", 1.0)
    assert registry.load("a", directory, inplace=False).name == "a"
    assert value_of(registry, "a") == 1.0
    registry.load("a", directory, inplace=False)
    write(directory, 5.0)
    with pytest.raises(Conflict, match="load_inplace"):
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


def test_numbers_aliases_and_digests_name_versions(root: Path, make: Callable[..., AdapterRegistry]) -> None:
    registry = make()
    for value in (1.0, 2.0, 3.0):
        registry.load("a", write(root / "v" / str(value), value), inplace=True)
    registry.alias("a", "stable", "1")
    registry.alias("a", "canary")
    assert [value_of(registry, f"mini:a@{v}") for v in ("1", "2", "3", "stable", "canary")] == [1, 2, 3, 1, 3]
    digest = registry.resolve("a@2").digest
    assert value_of(registry, f"a@{digest[:6]}") == 2.0
    registry.alias("a", "stable", "2")
    assert value_of(registry, "mini:a@stable") == 2.0
    registry.unalias("a", "canary")
    for model in ("a@canary", "a@4", "a@ffffff"):
        with pytest.raises(ModelNotFound, match=r"has no version .* number 3, and it has 1, 2, 3, stable"):
            registry.resolve(model)
    for refused in ("a@canary", "canary"):
        with pytest.raises(AdapterdError):
            registry.unalias("a", refused)


def test_rollback_returns_to_the_version_before_and_forth(
    root: Path, make: Callable[..., AdapterRegistry]
) -> None:
    registry = make()
    for value in (1.0, 2.0, 3.0):
        registry.load("a", write(root / "v" / str(value), value), inplace=True)
    assert registry.rollback("a").number == 2
    assert value_of(registry, "a") == 2.0
    assert registry.rollback("a").number == 3
    assert registry.rollback("a", "1").number == 1
    assert value_of(registry, "a") == 1.0
    with pytest.raises(ModelNotFound, match="no version '9'"):
        registry.rollback("a", "9")
    with pytest.raises(ModelNotFound, match="does not exist"):
        registry.rollback("b")


def test_rollback_without_a_version_before_is_a_conflict(
    root: Path, make: Callable[..., AdapterRegistry]
) -> None:
    write(root / "a", 1.0)
    registry = make()
    with pytest.raises(Conflict, match="no version before 1"):
        registry.rollback("a")


def test_rolled_back_folder_takes_effect_again_when_it_changes(
    root: Path, make: Callable[..., AdapterRegistry]
) -> None:
    write(root / "a", 1.0)
    registry = make()
    write(root / "a", 2.0)
    until(lambda: value_of(registry, "a") == 2.0)
    registry.rollback("a")
    time.sleep(0.1)
    assert value_of(registry, "a") == 1.0
    write(root / "a", 3.0)
    until(lambda: value_of(registry, "a") == 3.0)


def test_alias_is_never_between_two_versions(root: Path, make: Callable[..., AdapterRegistry]) -> None:
    registry = make()
    for value in (1.0, 2.0):
        registry.load("a", write(root / "v" / str(value), value), inplace=True)
    registry.alias("a", "stable", "1")
    done = threading.Event()

    def move() -> None:
        for turn in range(300):
            registry.alias("a", "stable", str(1 + turn % 2))
        done.set()

    thread = threading.Thread(target=move)
    thread.start()
    seen = {value_of(registry, "a@stable")}
    while not done.is_set():
        seen.add(value_of(registry, "a@stable"))
    thread.join()
    assert seen <= {1.0, 2.0}
    registry.check_integrity()


def test_aliased_version_is_not_dropped(
    root: Path, make: Callable[..., AdapterRegistry], dropped: list[AdapterId]
) -> None:
    registry = make()
    first = registry.load("a", write(root / "v" / "1", 1.0), inplace=True)
    registry.alias("a", "stable")
    registry.load("a", write(root / "v" / "2", 2.0), inplace=True)
    assert dropped == []
    registry.alias("a", "stable")
    assert dropped == [first]


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


def test_thirty_two_loads_of_one_name_at_once(
    root: Path, make: Callable[..., AdapterRegistry], dropped: list[AdapterId]
) -> None:
    registry = make(start=False)
    directory = write(root / "a", 1.0)
    with ThreadPoolExecutor(32) as pool:
        ids = list(pool.map(lambda _: registry.load("a", directory, inplace=True), range(32)))
    assert len(set(ids)) == 1
    assert value_of(registry, "a") == 1.0
    registry.unload("a")
    assert dropped == [ids[0]]


def test_storm_of_loads_unloads_and_requests_leaks_nothing(
    root: Path, make: Callable[..., AdapterRegistry], dropped: list[AdapterId]
) -> None:
    for value in range(3):
        write(root / ".v" / str(value), float(value + 1))
    registry = make()
    failures: list[BaseException] = []

    def storm(worker: int) -> None:
        try:
            for turn in range(40):
                name = f"n{(worker + turn) % 4}"
                if turn % 4 == 0:
                    with_name = registry.load(name, root / ".v" / str(turn % 3), inplace=True)
                    assert with_name.digest
                try:
                    if turn % 7 == 0:
                        registry.unload(name)
                    resolved = registry.resolve(name)
                except ModelNotFound:
                    continue
                # What was resolved stays for as long as it is looked at, whatever the others do meanwhile.
                registry.lease(resolved.mix).release()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=storm, args=(worker,)) for worker in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    for entry in registry.list():
        registry.unload(entry.name)
    registry.check_integrity()
    assert registry.stats().host_bytes == 0
    assert dropped


def test_rename_race_gives_one_whole_version_or_the_other(
    root: Path, make: Callable[..., AdapterRegistry]
) -> None:
    for value in (1, 2):
        write(root / ".v" / str(value), float(value))
    (root / "a").symlink_to(root / ".v" / "1")
    registry = make(poll_seconds=0.001)
    seen = set()
    for turn in range(200):
        (root / ".next").symlink_to(root / ".v" / str(turn % 2 + 1))
        (root / ".next").rename(root / "a")
        seen.add(value_of(registry, "a"))
    until(lambda: value_of(registry, "a") == 2.0)
    assert seen <= {1.0, 2.0}


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


def test_resolving_one_of_two_thousand_names_is_as_fast_as_one_of_two(
    root: Path, make: Callable[..., AdapterRegistry]
) -> None:
    directory = write(root / ".v", 1.0)
    registry = make(start=False)

    def seconds(calls: int = 2000) -> float:
        began = time.perf_counter()
        for _ in range(calls):
            registry.resolve("mini:n1")
        return time.perf_counter() - began

    for i in range(2):
        registry.load(f"n{i}", directory, inplace=False)
    few = min(seconds() for _ in range(3))
    for i in range(2, 2000):
        registry.load(f"n{i}", directory, inplace=False)
    many = min(seconds() for _ in range(3))
    assert many < 3 * few + 0.01
