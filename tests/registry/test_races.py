"""Many threads at once."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from adapterd.core import AdapterId
from adapterd.errors import ModelNotFound
from adapterd.registry import AdapterRegistry
from tests.adapters_on_disk import until, value_of, write


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
