"""Files come over real connections; only an object store stands for itself, as fsspec's own in memory."""

import hashlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from adapterd.errors import AdapterRefused, Forbidden, SourceFailed, SourceMissing
from adapterd.sources.allow import AllowList
from adapterd.sources.download import Downloader
from adapterd.sources.hub import Hub
from adapterd.sources.source import Source, parse_source
from adapterd.sources.store import Store
from tests.sources.servers import COMMIT, Asked, Reply, hub_server, web_server

FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights" * 1000}
HASHES = {name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()}


@pytest.fixture
def web() -> Iterator[Asked]:
    with web_server() as asked:
        asked.put("a", FILES)
        yield asked


@pytest.fixture
def into(tmp_path: Path) -> Path:
    return tmp_path


def source(text: str) -> Source:
    return parse_source(text)[0]


def downloader(*patterns: str, **options: object) -> Downloader:
    return Downloader(AllowList(patterns), **options)  # type: ignore[arg-type]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_folder_of_the_web_is_fetched_file_by_file(web: Asked, into: Path) -> None:
    web.put("a", {"chat_template.jinja": b"{{ x }}", "README.md": b"not an adapter's"})
    fetcher = downloader(f"http://{web.host}/*")
    held = fetcher.look(source(f"{web.url}/a"))
    hashes = fetcher.fetch(held, into)
    assert contents(into) == {**FILES, "chat_template.jinja": b"{{ x }}"}
    assert hashes == {name: hashlib.sha256(data).hexdigest() for name, data in contents(into).items()}
    assert fetcher.look(source(f"{web.url}/a")).state == held.state
    web.put("a", {"adapter_config.json": b"{ }"})
    assert fetcher.look(source(f"{web.url}/a")).state != held.state


def test_files_that_were_declared_are_fetched_and_no_others(web: Asked, into: Path) -> None:
    web.put("a", {"chat_template.jinja": b"{{ not declared }}"})
    fetcher = downloader(f"http://{web.host}/*")
    fetcher.fetch(fetcher.look(source(f"{web.url}/a")), into, HASHES)
    assert contents(into) == FILES


def test_a_redirect_is_followed_only_to_what_is_allowed(web: Asked, into: Path) -> None:
    with web_server() as other:
        other.put("elsewhere", FILES)
        name = "adapter_model.safetensors"
        web.replies[f"/a/{name}"] = Reply(status=302, headers={"location": f"{other.url}/elsewhere/{name}"})
        with pytest.raises(Forbidden, match=f"redirects to {other.url}, which is not allowed"):
            downloader(f"http://{web.host}/*").look(source(f"{web.url}/a"))
        assert other.paths == []
        fetcher = downloader(f"http://{web.host}/*", f"http://{other.host}/elsewhere/*")
        fetcher.fetch(fetcher.look(source(f"{web.url}/a")), into)
        assert contents(into) == FILES


@pytest.mark.parametrize(
    "location", ["file:///etc/passwd", "/a/../../x", "//evil.test/x", "ftp://x/y", "", "/b"]
)
def test_a_redirect_to_anything_else_is_refused(web: Asked, location: str) -> None:
    web.replies["/a/adapter_config.json"] = Reply(status=307, headers={"location": location})
    with pytest.raises((Forbidden, SourceFailed)):
        downloader(f"http://{web.host}/a").look(source(f"{web.url}/a"))


def test_a_loop_of_redirects_ends(web: Asked) -> None:
    location = {"location": "/a/adapter_config.json"}
    web.replies["/a/adapter_config.json"] = Reply(status=302, headers=location)
    with pytest.raises(SourceFailed, match="redirected more than"):
        downloader(f"http://{web.host}/*").look(source(f"{web.url}/a"))


def test_an_error_is_not_taken_for_an_absent_file(web: Asked) -> None:
    web.replies["/a/chat_template.jinja"] = Reply(status=403)
    with pytest.raises(SourceFailed, match=r"chat_template\.jinja was answered 403"):
        downloader(f"http://{web.host}/*").look(source(f"{web.url}/a"))


def test_a_folder_without_an_adapter_is_missing(web: Asked) -> None:
    fetcher = downloader(f"http://{web.host}/*")
    with pytest.raises(SourceMissing, match=r"holds no adapter_config\.json"):
        fetcher.look(source(f"{web.url}/nowhere"))
    web.put("a", {"adapter_model.bin": b"pickle"})
    with pytest.raises(AdapterRefused, match="pickle"):
        fetcher.look(source(f"{web.url}/a"))


def test_a_file_that_is_cut_off_or_another_is_refused(web: Asked, into: Path) -> None:
    fetcher = downloader(f"http://{web.host}/*")
    held = fetcher.look(source(f"{web.url}/a"))
    data = FILES["adapter_model.safetensors"]
    web.replies["/a/adapter_model.safetensors"] = Reply(data, cut_at=100)
    (into / "cut").mkdir()
    with pytest.raises(SourceFailed, match="could not be read"):
        fetcher.fetch(held, into / "cut")
    web.replies["/a/adapter_model.safetensors"] = Reply(data[::-1])
    (into / "other").mkdir()
    with pytest.raises(AdapterRefused, match="has sha256") as refusal:
        fetcher.fetch(held, into / "other", HASHES)
    assert refusal.value.code == "sha256_mismatch"
    web.replies["/a/adapter_model.safetensors"] = Reply(data + b"more")
    (into / "longer").mkdir()
    with pytest.raises(SourceFailed, match="instead of"):
        fetcher.fetch(held, into / "longer")


def test_size_and_time_are_bounded(web: Asked, into: Path) -> None:
    address = source(f"{web.url}/a")
    with pytest.raises(SourceFailed, match="7002 bytes, and 5000 are allowed"):
        downloader(f"http://{web.host}/*", max_bytes=5000).look(address)
    late = downloader(f"http://{web.host}/*", timeout_seconds=-1)
    with pytest.raises(SourceFailed, match="took too long"):
        late.fetch(late.look(address), into)


def test_nobody_listening_is_a_failure(tmp_path: Path) -> None:
    with web_server() as asked:
        gone = asked.host
    with pytest.raises(SourceFailed, match="ConnectError"):
        downloader("http://*/*").look(source(f"http://{gone}/a"))


def test_what_is_not_allowed_is_not_asked(web: Asked) -> None:
    with pytest.raises(Forbidden):
        downloader("https://models.example.com/*").look(source(f"{web.url}/a"))
    assert web.paths == []


def test_a_hub_revision_is_looked_up_once_and_its_commit_fetched(into: Path) -> None:
    folder = {f"lora/{name}": data for name, data in FILES.items()}
    with hub_server("acme/support", {**folder, "lora/more/x": b"", "README.md": b"#"}) as hub:
        fetcher = downloader("hf://acme/*", places={"hf": lambda: Hub(hub.url)})
        held = fetcher.look(source("hf://acme/support@main/lora"))
        assert str(held.source) == f"hf://acme/support@{COMMIT}/lora"
        assert held.source.is_pinned
        assert fetcher.fetch(held, into) == HASHES
        assert contents(into) == FILES
        with pytest.raises(SourceMissing, match="no such revision"):
            fetcher.look(source("hf://acme/support@nowhere"))
        with pytest.raises(SourceMissing, match="no such repository"):
            fetcher.look(source("hf://acme/other"))


def test_a_file_of_the_hub_that_trickles_is_given_up_in_time(into: Path) -> None:
    with hub_server("acme/support", FILES, pause_seconds=0.01) as hub:
        fetcher = downloader("hf://acme/*", timeout_seconds=0.5, places={"hf": lambda: Hub(hub.url)})
        held = fetcher.look(source("hf://acme/support"))
        began = time.monotonic()
        with pytest.raises(SourceFailed, match="took too long"):
            fetcher.fetch(held, into)
        # The whole file would take more than a minute.
        assert time.monotonic() - began < 20


def test_a_file_of_the_hub_is_written_where_it_is_wanted_and_nowhere_else(
    into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(into / "nowhere"))
    with hub_server("acme/support", FILES) as hub:
        fetcher = downloader("hf://acme/*", places={"hf": lambda: Hub(hub.url)})
        assert fetcher.fetch(fetcher.look(source("hf://acme/support")), into) == HASHES


def test_an_object_stores_prefix_is_fetched(into: Path) -> None:
    memory = fsspec.filesystem("memory")
    for name, data in {**FILES, "README.md": b"#", "deeper/adapter_config.json": b"no"}.items():
        memory.pipe_file(f"/models/support/v8/{name}", data)
    fetcher = downloader("s3://models/*", places={"s3": lambda: Store("memory")})
    held = fetcher.look(source("s3://models/support/v8"))
    assert fetcher.fetch(held, into) == HASHES
    with pytest.raises(SourceMissing, match="does not exist"):
        fetcher.look(source("s3://models/support/v9"))


def test_a_store_whose_library_is_absent_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    with pytest.raises(SourceFailed, match=r"pip install 'adapterd\[s3\]'"):
        downloader("s3://a/*").look(source("s3://a/b"))
