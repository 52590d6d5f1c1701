"""What is kept, for how long, and that nothing half or damaged is ever taken for whole."""

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from adapterd.errors import AdapterRefused, ConfigError, SourceFailed, SourceMissing
from adapterd.sources.allow import AllowList
from adapterd.sources.cache import SourceCache
from adapterd.sources.download import Downloader
from adapterd.sources.hub import Hub
from adapterd.sources.source import Source, parse_source
from tests.sources.servers import Asked, Reply, hub_server, web_server


def files(weights: bytes = b"weights") -> Mapping[str, bytes]:
    return {"adapter_config.json": b"{}", "adapter_model.safetensors": weights}


def hashes(weights: bytes = b"weights") -> Mapping[str, str]:
    return {"adapter_model.safetensors": hashlib.sha256(weights).hexdigest()}


@pytest.fixture
def web() -> Iterator[Asked]:
    with web_server() as asked:
        asked.put("a", files())
        yield asked


def cache(directory: Path, **options: int) -> SourceCache:
    return SourceCache(directory, Downloader(AllowList(["http://*/*"])), **options)


def at(web: Asked, folder: str) -> Source:
    return parse_source(f"{web.url}/{folder}")[0]


def test_what_has_not_changed_is_not_fetched_again(web: Asked, tmp_path: Path) -> None:
    kept = cache(tmp_path)
    first = kept.fetch(at(web, "a"))
    assert {path.name: path.read_bytes() for path in first.directory.iterdir()} == files()
    web.paths.clear()
    assert cache(tmp_path).fetch(at(web, "a")) == first
    assert web.gets() == []
    web.put("a", files(b"other"))
    second = kept.fetch(at(web, "a"))
    assert second.directory != first.directory
    assert (first.directory / "adapter_model.safetensors").read_bytes() == b"weights"


def test_what_is_pinned_by_a_hash_is_not_asked_again(web: Asked, tmp_path: Path) -> None:
    first = cache(tmp_path).fetch(at(web, "a"), hashes())
    web.paths.clear()
    assert cache(tmp_path).fetch(at(web, "a"), hashes()) == first
    assert web.paths == []
    with pytest.raises(AdapterRefused, match="was declared"):
        cache(tmp_path).fetch(at(web, "a"), hashes(b"other"))


def test_a_commit_of_the_hub_is_not_asked_again(tmp_path: Path) -> None:
    with hub_server("acme/support", files()) as hub:
        downloader = Downloader(AllowList(["hf://acme/*"]), places={"hf": lambda: Hub(hub.url)})
        kept = SourceCache(tmp_path, downloader)
        moving = kept.fetch(parse_source("hf://acme/support")[0])
        hub.paths.clear()
        assert kept.fetch(moving.source) == moving
        assert hub.paths == []


def test_the_same_content_is_kept_once(web: Asked, tmp_path: Path) -> None:
    web.put("b", files())
    kept = cache(tmp_path)
    assert kept.fetch(at(web, "a")).directory == kept.fetch(at(web, "b")).directory


def test_a_damaged_object_is_fetched_again(web: Asked, tmp_path: Path) -> None:
    first = cache(tmp_path).fetch(at(web, "a"), hashes())
    (first.directory / "adapter_config.json").write_bytes(b"damaged")
    again = cache(tmp_path).fetch(at(web, "a"), hashes())
    assert (again.directory / "adapter_config.json").read_bytes() == b"{}"


def test_a_download_that_fails_leaves_nothing(web: Asked, tmp_path: Path) -> None:
    web.replies["/a/adapter_model.safetensors"] = Reply(b"weights", cut_at=3)
    kept = cache(tmp_path)
    with pytest.raises(SourceFailed):
        kept.fetch(at(web, "a"))
    with pytest.raises(SourceMissing):
        kept.fetch(at(web, "nowhere"))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_the_longest_unused_leaves_first(web: Asked, tmp_path: Path) -> None:
    for name in "bcd":
        web.put(name, files(name.encode() * 1000))
    kept = cache(tmp_path, max_bytes=2500)
    b, c = kept.fetch(at(web, "b")), kept.fetch(at(web, "c"))
    for seconds, cached in ((100, c), (50, b)):
        os.utime(cached.directory, (time.time() - seconds,) * 2)
    d = kept.fetch(at(web, "d"))
    assert set(kept.objects.iterdir()) == {b.directory, d.directory}
    assert kept.fetch(at(web, "c")).directory.is_dir()


def test_many_at_once_agree(web: Asked, tmp_path: Path) -> None:
    caches = [cache(tmp_path), cache(tmp_path)]
    with ThreadPoolExecutor(6) as pool:
        got = set(pool.map(lambda number: caches[number % 2].fetch(at(web, "a")).directory, range(6)))
    assert len(got) == 1
    assert {path.name for path in got.pop().iterdir()} == set(files())


_DOWNLOAD = """
import sys, time
from pathlib import Path
from adapterd.sources.partial import partial_directory
with partial_directory(Path(sys.argv[1]) / "partial") as files:
    (files / "adapter_config.json").write_text("half of")
    print("begun", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _DOWNLOAD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == "begun\n"
        (partial,) = (tmp_path / "partial").iterdir()
        os.utime(partial, (0, 0))
        cache(tmp_path)
        assert partial.is_dir()  # it is still being written
        process.kill()
        process.wait()
    os.utime(partial, (0, 0))
    cache(tmp_path)
    assert not partial.exists()


def test_a_directory_that_cannot_be_used_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be used"):
        cache(tmp_path / "file")
