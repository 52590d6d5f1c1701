"""The daemon's registry converges to adapters.yaml: at the start, when the file changes, and after a restart."""

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from adapterd.database import Database
from adapterd.errors import AdapterRefused, ConfigError, Conflict, ModelNotFound
from adapterd.reading import AdaptedBase
from adapterd.registry import AdapterRegistry
from adapterd.sources.allow import AllowList
from adapterd.sources.cache import SourceCache
from adapterd.sources.download import Downloader
from adapterd.sources.places import AdapterPlaces
from tests.adapters_on_disk import NO_TOKENIZER, SPEC, entry_of, files, serves, until, value_of, write
from tests.sources.servers import Asked, Reply, web_server


@pytest.fixture
def root(tmp_path: Path) -> Path:
    directory = tmp_path / "adapters"
    directory.mkdir()
    return directory


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return tmp_path / "adapters.yaml"


@pytest.fixture
def make(root: Path, manifest: Path, tmp_path: Path) -> Iterator[Callable[..., AdapterRegistry]]:
    made: list[AdapterRegistry] = []

    def call(manifest: Path | None = manifest) -> AdapterRegistry:
        """Allowed is the loopback; the cache and the database are where they were before."""
        allow = AllowList(["http://127.0.0.1:*/*", str(tmp_path / "mounted")])
        cache = SourceCache(tmp_path / "cache", Downloader(allow))
        registry = AdapterRegistry(
            AdaptedBase(SPEC, NO_TOKENIZER),
            AdapterPlaces([root], allow=allow, cache=cache, manifest=manifest),
            poll_seconds=0.01,
            database=Database(tmp_path / "state"),
        )
        made.append(registry)
        registry.start()
        assert registry.wait_loaded(20)
        return registry

    yield call
    for registry in made:
        registry.stop()


@pytest.fixture
def web() -> Iterator[Asked]:
    with web_server() as asked:
        yield asked


def say(manifest: Path, **adapters: str) -> None:
    """Each entry as YAML's flow style; in place by one rename, as an editor does."""
    entries = "".join(f"  {name}: {{{entry}}}\n" for name, entry in adapters.items())
    fresh = manifest.with_name(".fresh")
    fresh.write_text(f"version: 1\nadapters:\n{entries}" if entries else "version: 1\nadapters: {}\n")
    fresh.replace(manifest)


def remote(web: Asked, folder: str, directory: Path) -> str:
    web.put(folder, files(directory))
    sha256 = hashlib.sha256((directory / "adapter_model.safetensors").read_bytes()).hexdigest()
    return f"source: '{web.url}/{folder}', sha256: {sha256}"


def test_what_the_manifest_names_is_served(
    root: Path, manifest: Path, make: Callable[..., AdapterRegistry]
) -> None:
    write(root / "one", 1.0)
    write(root / ".held" / "two", 2.0)
    say(
        manifest,
        support=f"source: {root}/one, pinned: true, aliases: {{stable: current, canary: {{source: .held/two}}}}",
    )
    registry = make()
    support = registry.entry("support")
    assert (support.owner, support.is_pinned, support.number, dict(support.aliases)) == (
        "manifest",
        True,
        1,
        {"stable": 1, "canary": 2},
    )
    assert [value_of(registry, f"support{version}") for version in ("", "@stable", "@canary")] == [
        1.0,
        1.0,
        2.0,
    ]
    # Folders that it does not name are served as before.
    assert registry.entry("one").owner == "folder"


def test_a_change_is_followed_by_every_name(
    root: Path, manifest: Path, make: Callable[..., AdapterRegistry]
) -> None:
    for name, value in (("one", 1.0), ("two", 2.0)):
        write(root / ".held" / name, value)
    say(manifest, a="source: .held/one", b="source: .held/two")
    registry = make()
    say(manifest, a="source: .held/two, aliases: {s: current}", c="source: .held/one")
    until(lambda: entry_of(registry, "b") is None and entry_of(registry, "c") is not None)
    until(lambda: serves(registry, "a", 2.0) and registry.entry("c").state == "READY")
    assert dict(registry.entry("a").aliases) == {"s": 2}
    with pytest.raises(ModelNotFound):
        registry.resolve("b")


def test_a_configmaps_link_swap_is_followed(
    root: Path, tmp_path: Path, make: Callable[..., AdapterRegistry]
) -> None:
    for name, value in (("one", 1.0), ("two", 2.0)):
        write(root / ".held" / name, value)
    mount = tmp_path / "configmap"
    mount.mkdir()

    def swap(stamp: str, source: str) -> None:
        """As the kubelet does it: a new directory, and ..data turned to it by one rename."""
        (mount / stamp).mkdir()
        say(mount / stamp / "adapters.yaml", a=f"source: {source}")
        (mount / "..data_tmp").symlink_to(stamp)
        os.replace(mount / "..data_tmp", mount / "..data")

    swap("..2026_1", ".held/one")
    (mount / "adapters.yaml").symlink_to("..data/adapters.yaml")
    registry = make(manifest=mount / "adapters.yaml")
    assert value_of(registry, "a") == 1.0
    swap("..2026_2", ".held/two")
    until(lambda: serves(registry, "a", 2.0))


def test_a_manifest_that_cannot_be_read_changes_nothing(
    root: Path, manifest: Path, make: Callable[..., AdapterRegistry]
) -> None:
    write(root / ".held" / "one", 1.0)
    say(manifest, a="source: .held/one")
    registry = make()
    before = registry.manifest()
    manifest.write_text("version: 1\nadapters: {a: {source: x, source: y}}")
    until(lambda: (status := registry.manifest()) is not None and status.error is not None)
    status = registry.manifest()
    assert status is not None
    assert before is not None
    assert "occurs twice" in (status.error or "")
    assert status.sha256 == before.sha256
    assert registry.stats().manifest_failed
    assert value_of(registry, "a") == 1.0
    manifest.unlink()
    say(manifest)
    until(lambda: entry_of(registry, "a") is None)
    assert registry.manifest().error is None  # type: ignore[union-attr]
    assert not registry.stats().manifest_failed


def test_a_manifest_that_cannot_be_read_at_the_start_is_an_error(
    manifest: Path, make: Callable[..., AdapterRegistry]
) -> None:
    with pytest.raises(ConfigError, match="cannot read the manifest"):
        make()


def test_what_the_manifest_owns_cannot_be_changed_at_run_time(
    root: Path, manifest: Path, make: Callable[..., AdapterRegistry]
) -> None:
    for name, value in (("one", 1.0), ("two", 2.0)):
        write(root / ".held" / name, value)
    say(manifest, a="source: .held/one, aliases: {s: current}")
    registry = make()
    for change in (
        lambda: registry.load("a", ".held/two", inplace=True),
        lambda: registry.update("a", ".held/two"),
        lambda: registry.unload("a"),
        lambda: registry.forget("a"),
        lambda: registry.pin("a"),
        lambda: registry.pin("a", pinned=False),
        lambda: registry.alias("a", "t"),
        lambda: registry.unalias("a", "s"),
        lambda: registry.rollback("a"),
    ):
        with pytest.raises(Conflict, match="owned by the manifest") as refusal:
            change()
        assert refusal.value.code == "owned_by_manifest"
    assert value_of(registry, "a@s") == 1.0
    # What changes nothing is no conflict: controllers load what is there already.
    registry.load("a", ".held/one", inplace=False)
    registry.prefetch("a")
    registry.load("b", ".held/two", inplace=False)
    assert registry.entry("b").owner == "runtime"


def test_the_manifest_takes_a_name_from_a_folder_and_gives_it_back(
    root: Path, manifest: Path, make: Callable[..., AdapterRegistry]
) -> None:
    write(root / "a", 1.0)
    write(root / ".held" / "two", 2.0)
    say(manifest)
    registry = make()
    assert registry.entry("a").owner == "folder"
    say(manifest, a="source: .held/two")
    until(lambda: serves(registry, "a", 2.0))
    say(manifest)
    until(lambda: serves(registry, "a", 1.0))
    assert registry.entry("a").owner == "folder"


def test_a_folder_that_the_manifest_names_is_followed(
    root: Path, manifest: Path, make: Callable[..., AdapterRegistry]
) -> None:
    write(root / ".held" / "one", 1.0)
    say(manifest, a="source: .held/one")
    registry = make()
    write(root / ".held" / "one", 3.0)
    until(lambda: serves(registry, "a", 3.0))


def test_a_refused_entry_leaves_the_version_before_and_is_tried_again(
    root: Path, manifest: Path, web: Asked, make: Callable[..., AdapterRegistry]
) -> None:
    write(root / ".held" / "one", 1.0)
    say(manifest, a="source: .held/one", b="source: .held/nowhere")
    registry = make()
    assert registry.entry("b").state == "FAILED"
    with pytest.raises(AdapterRefused, match="no folder below"):
        registry.resolve("b")
    declared = remote(web, "x", write(root / ".held" / "two", 2.0))
    reply = web.replies.pop("/x/adapter_model.safetensors")
    say(manifest, a=declared, b="source: .held/one")
    until(lambda: registry.entry("a").error is not None and registry.entry("b").state == "READY")
    assert value_of(registry, "a") == 1.0
    web.replies["/x/adapter_model.safetensors"] = reply
    until(lambda: serves(registry, "a", 2.0))
    assert registry.entry("a").error is None


def test_after_a_restart_nothing_is_read_or_asked_that_has_not_changed(
    root: Path, manifest: Path, web: Asked, make: Callable[..., AdapterRegistry]
) -> None:
    write(root / ".held" / "one", 1.0)
    say(manifest, near="source: .held/one", far=remote(web, "x", write(root / ".held" / "two", 2.0)))
    first = make()
    before = {entry.name: entry.id for entry in first.list()}
    first.stop()
    web.paths.clear()
    web.replies.clear()
    second = make()
    assert {entry.name: entry.id for entry in second.list()} == before
    assert (second.stats().num_reads, web.paths) == (0, [])
    assert (value_of(second, "near"), value_of(second, "far")) == (1.0, 2.0)


def test_a_restart_follows_what_changed_meanwhile(
    root: Path, manifest: Path, make: Callable[..., AdapterRegistry]
) -> None:
    for name, value in (("one", 1.0), ("two", 2.0)):
        write(root / ".held" / name, value)
    say(manifest, a="source: .held/one", b="source: .held/one")
    make().stop()
    say(manifest, a="source: .held/two")
    second = make()
    until(lambda: serves(second, "a", 2.0))
    assert [entry.name for entry in second.list()] == ["a"]
    second.stop()
    # Without a manifest its names are nobody's.
    assert make(manifest=None).list() == ()


def test_a_mounted_directory_is_read_where_it_is_allowed(
    manifest: Path, tmp_path: Path, make: Callable[..., AdapterRegistry]
) -> None:
    write(tmp_path / "mounted" / "support", 1.0)
    write(tmp_path / "elsewhere", 2.0)
    say(manifest, a=f"source: {tmp_path}/mounted/support", b=f"source: {tmp_path}/elsewhere")
    registry = make()
    assert value_of(registry, "a") == 1.0
    assert "--allow-source" in (registry.entry("b").error or "")


def test_the_bases_name_is_the_bases(
    root: Path, manifest: Path, make: Callable[..., AdapterRegistry]
) -> None:
    write(root / ".held" / "one", 1.0)
    say(manifest, mini="source: .held/one")
    registry = make()
    assert "base's own name" in (registry.entry("mini").error or "")
    assert registry.resolve("mini").mix == ()


def test_a_remote_error_is_an_adapters_and_not_the_servers(
    manifest: Path, web: Asked, tmp_path: Path, make: Callable[..., AdapterRegistry]
) -> None:
    web.put("x", files(write(tmp_path / "x", 1.0)))
    web.replies["/x/adapterd.json"] = Reply(status=500)
    say(manifest, a=f"source: '{web.url}/x', sha256: '{'0' * 64}'", b="source: hf://acme/b")
    registry = make()
    assert "answered 500" in (registry.entry("a").error or "")
    assert "is not allowed" in (registry.entry("b").error or "")
