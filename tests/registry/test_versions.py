"""What a name means now: versions that are leased, aliased, rolled back and composed."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from adapterd.core import AdapterId
from adapterd.errors import AdapterdError, Conflict, ModelNotFound, Unavailable
from adapterd.registry import AdapterRegistry
from tests.adapters_on_disk import until, value_of, write


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
