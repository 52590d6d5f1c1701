"""Names that nobody registered, found when they are first asked for."""

import hashlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from adapterd.errors import (
    AdapterRefused,
    BeingRead,
    ConfigError,
    ModelNotFound,
    SourceFailed,
    SourceMissing,
    Unavailable,
)
from adapterd.first_use import (
    FAILED_SECONDS,
    MAX_REMEMBERED,
    MAX_UNDER_WAY,
    MISSING_SECONDS,
    FirstUse,
    allowed_by,
)
from adapterd.reading import AdaptedBase
from adapterd.registry import AdapterRegistry
from adapterd.sources.allow import AllowList
from adapterd.sources.cache import SourceCache
from adapterd.sources.download import Downloader, Held
from adapterd.sources.hub import Hub
from adapterd.sources.places import AdapterPlaces
from adapterd.sources.source import Source
from adapterd.sources.web import Web
from tests.adapters_on_disk import NO_TOKENIZER, SPEC, files, serves, until, value_of, write
from tests.sources.servers import hub_server, web_server


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


class Shelf:
    """Loads what it has; `asked` is what it was asked for."""

    def __init__(self, **sources: object) -> None:
        self.sources = sources
        self.asked: list[str] = []

    def __call__(self, name: str, source: Source) -> object:
        self.asked.append(str(source))
        found = self.sources.get(name, SourceMissing("nothing there"))
        if isinstance(found, Exception):
            raise found
        return found


def test_without_a_pattern_nothing_is_looked_for(pool: ThreadPoolExecutor) -> None:
    shelf = Shelf(a="A")
    assert FirstUse((), shelf, pool).begin("a") is None
    assert shelf.asked == []


def test_patterns_are_tried_in_their_order(pool: ThreadPoolExecutor) -> None:
    class Second(Shelf):
        def __call__(self, name: str, source: Source) -> object:
            super().__call__(name, source) if source.scheme == "hf" else self.asked.append(str(source))
            return "found"

    shelf = Second()
    search = FirstUse(("hf://acme/*@main", "s3://models/lora-*/v1"), shelf, pool).begin("a")
    assert search is not None
    assert search.result(5) == "found"
    assert shelf.asked == ["hf://acme/a@main", "s3://models/lora-a/v1"]


def test_many_requests_for_one_name_are_one_search(pool: ThreadPoolExecutor) -> None:
    go = threading.Event()
    first = FirstUse(("hf://acme/*",), lambda name, source: go.wait(5), pool)
    searches = {id(first.begin("a")) for _ in range(10)}
    go.set()
    assert len(searches) == 1


@pytest.mark.parametrize(
    ("failure", "seconds", "raised"),
    [
        (SourceMissing("gone"), MISSING_SECONDS, None),
        (AdapterRefused("uses DoRA"), MISSING_SECONDS, AdapterRefused),
        (SourceFailed("no network"), FAILED_SECONDS, Unavailable),
    ],
)
def test_a_failure_is_remembered_for_a_while(
    failure: Exception, seconds: float, raised: type[Exception] | None, pool: ThreadPoolExecutor
) -> None:
    clock, shelf = Clock(), Shelf(a=failure)
    first = FirstUse(("hf://acme/*",), shelf, pool, clock=clock)
    search = first.begin("a")
    assert search is not None
    with pytest.raises(raised or ModelNotFound):
        search.result(5)
    clock.now += seconds - 1
    if raised is None:
        assert first.begin("a") is None
    else:
        with pytest.raises(raised):
            first.begin("a")
    assert len(shelf.asked) == 1
    clock.now += 2
    again = first.begin("a")
    assert again is not None
    with pytest.raises(raised or ModelNotFound):
        again.result(5)
    assert len(shelf.asked) == 2


def test_what_is_remembered_and_what_is_under_way_is_bounded(pool: ThreadPoolExecutor) -> None:
    first = FirstUse(("hf://acme/*",), Shelf(), pool, clock=Clock())
    for number in range(MAX_REMEMBERED + 10):
        search = first.begin(f"a{number}")
        assert search is not None
        search.exception(5)
    assert len(first._failures) == MAX_REMEMBERED
    go = threading.Event()
    first = FirstUse(("hf://acme/*",), lambda name, source: go.wait(5), pool)
    for number in range(MAX_UNDER_WAY):
        first.begin(f"a{number}")
    with pytest.raises(Unavailable, match="are being looked for"):
        first.begin("one more")
    go.set()


@pytest.mark.parametrize(
    ("pattern", "allowed"),
    [
        ("hf://my-org/*", "hf://my-org/*"),
        ("hf://my-org/lora-*@v1/peft", "hf://my-org/lora-*/peft"),
        ("s3://models/*/v1", "s3://models/*/v1"),
        ("/mnt/models/*", "/mnt/models/*"),
    ],
)
def test_a_pattern_allows_what_it_would_fetch(pattern: str, allowed: str) -> None:
    assert allowed_by([pattern]) == [allowed]
    AllowList([allowed])


@pytest.mark.parametrize(
    "pattern", ["hf://my-org/support", "hf://*/*", "http://host/*", "ftp://x/*", "hf://my-org"]
)
def test_what_can_be_no_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(ConfigError, match="--resolve"):
        allowed_by([pattern])


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., AdapterRegistry]]:
    made: list[AdapterRegistry] = []

    def call(endpoint: str, *directories: Path) -> AdapterRegistry:
        allow = AllowList(allowed_by(["hf://acme/*"]))
        downloader = Downloader(allow, places={"hf": lambda: Hub(endpoint)})
        cache = SourceCache(tmp_path / "cache", downloader)
        places = AdapterPlaces(directories, allow=allow, cache=cache, resolve=["hf://acme/*"])
        registry = AdapterRegistry(AdaptedBase(SPEC, NO_TOKENIZER), places)
        made.append(registry)
        registry.start()
        return registry

    yield call
    for registry in made:
        registry.stop()


def test_an_adapter_of_the_hub_is_served_at_its_first_request(
    tmp_path: Path, make: Callable[..., AdapterRegistry]
) -> None:
    with hub_server("acme/support", files(write(tmp_path / "support", 3.0))) as hub:
        registry = make(hub.url)
        assert registry.list() == ()
        with pytest.raises(BeingRead):
            registry.resolve("mini:support")
        assert value_of(registry, "mini:support") == 3.0
        entry = registry.entry("support")
        assert (entry.owner, entry.source) == ("resolver", "hf://acme/support")
        assert (entry.versions[0].source or "").startswith("hf://acme/support@4f1c")
        for _ in range(3):
            with pytest.raises(ModelNotFound):
                registry.resolve_waiting("mini:nobody", 5)
        assert len([path for path in hub.paths if "nobody" in path]) == 1
        with pytest.raises(ModelNotFound):
            registry.resolve_waiting("mini:../etc", 5)


def test_a_folder_that_was_unloaded_is_not_looked_for(
    tmp_path: Path, make: Callable[..., AdapterRegistry]
) -> None:
    """Regression: it was fetched and read again and again, and kept from the name, until the request gave up."""
    write(tmp_path / "adapters" / "support", 3.0)
    with hub_server("acme/support", files(write(tmp_path / "support", 5.0))) as hub:
        registry = make(hub.url, tmp_path / "adapters")
        assert registry.wait_loaded(10)
        registry.unload("support")
        with pytest.raises(BeingRead) as search:
            registry.resolve("mini:support")
        with pytest.raises(ModelNotFound, match="was unloaded"):
            search.value.done.result(5)
        with pytest.raises(ModelNotFound):
            registry.resolve("mini:support")
        assert hub.paths == []
        assert registry.stats().num_reads == 1


class Slow(Hub):
    """A Hub that says nothing until it may."""

    def __init__(self, may: threading.Event) -> None:
        self._may = may

    def look(self, source: Source) -> Held:
        self._may.wait(60)
        raise SourceMissing("nothing there")


def test_searches_for_whatever_clients_ask_keep_no_manifest_waiting(tmp_path: Path) -> None:
    may, manifest = threading.Event(), tmp_path / "adapters.yaml"
    manifest.write_text("version: 1\nadapters: {}\n")
    with web_server() as web:
        adapter = files(write(tmp_path / "support", 3.0))
        web.put("support", adapter)
        allow = AllowList([*allowed_by(["hf://acme/*"]), "http://127.0.0.1:*/*"])
        downloader = Downloader(allow, places={"hf": lambda: Slow(may), "http": lambda: Web(allow)})
        cache = SourceCache(tmp_path / "cache", downloader)
        places = AdapterPlaces(allow=allow, cache=cache, resolve=["hf://acme/*"], manifest=manifest)
        registry = AdapterRegistry(AdaptedBase(SPEC, NO_TOKENIZER), places, poll_seconds=0.01)
        registry.start()
        try:
            for number in range(MAX_UNDER_WAY):
                with pytest.raises(BeingRead):
                    registry.resolve(f"mini:nobody{number}")
            sha256 = hashlib.sha256(adapter["adapter_model.safetensors"]).hexdigest()
            entry = f"support: {{source: '{web.url}/support', sha256: {sha256}}}"
            manifest.write_text(f"version: 1\nadapters:\n  {entry}\n")
            until(lambda: serves(registry, "support", 3.0))
        finally:
            may.set()
            registry.stop()
