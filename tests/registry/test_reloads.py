"""A watched folder that is loaded by hand stays the folder's: what happens to it later is followed."""

from collections.abc import Callable
from pathlib import Path

import pytest

from adapterd.registry import AdapterRegistry
from tests.adapters_on_disk import serves, until, value_of, write


@pytest.mark.parametrize(
    "place", ["a folder of --lora-modules", "a root that is an adapter itself", "below a root"]
)
def test_a_folder_is_followed_after_it_was_loaded_again(
    place: str, root: Path, tmp_path: Path, make: Callable[..., AdapterRegistry]
) -> None:
    if place == "a folder of --lora-modules":
        folder = write(tmp_path / "elsewhere" / "v7", 1.0)
        registry = make(named={"sql": folder})
    elif place == "below a root":
        folder = write(root / "sql", 1.0)
        registry = make()
    else:
        folder = write(tmp_path / "sql", 1.0)
        registry = make(folder)
    write(folder, 2.0)
    registry.load("sql", folder, inplace=True)
    assert registry.entry("sql").owner == "folder"
    assert value_of(registry, "sql") == 2.0
    write(folder, 3.0)
    until(lambda: serves(registry, "sql", 3.0))


def test_what_nobody_watches_is_the_callers(
    root: Path, tmp_path: Path, make: Callable[..., AdapterRegistry]
) -> None:
    """A folder below an adapter, and one whose name is taken: a look at the roots would find neither."""
    support = write(tmp_path / "support", 1.0)
    write(root / "sql", 2.0)
    registry = make(root, support, named={"sql": write(tmp_path / "elsewhere" / "v7", 3.0)})
    assert value_of(registry, "sql") == 3.0
    registry.load("draft", write(support / "draft", 4.0), inplace=False)
    registry.load("sql", root / "sql", inplace=True)
    assert [registry.entry(name).owner for name in ("draft", "sql", "support")] == [
        "runtime",
        "runtime",
        "folder",
    ]
    assert [value_of(registry, name) for name in ("draft", "sql")] == [4.0, 2.0]
