"""/v1/adapters over a real registry that reads real directories; only the engine is a fake."""

import asyncio
import hashlib
import shutil
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapterd.core import EngineStats
from adapterd.reading import AdaptedBase
from adapterd.registry import AdapterRegistry
from adapterd.server.state import ServerState
from adapterd.sources.allow import AllowList
from adapterd.sources.cache import SourceCache
from adapterd.sources.download import Downloader
from adapterd.sources.places import AdapterPlaces
from tests.adapters_on_disk import FINGERPRINT, NO_TOKENIZER, files, write
from tests.adapters_on_disk import SPEC as ADAPTER_SPEC
from tests.server.conftest import asking
from tests.server.fakes import SPEC, FakeDaemon, FakeEngine
from tests.sources.servers import Asked, web_server

pytestmark = pytest.mark.anyio


class DeviceMemory(FakeEngine):
    """Holds in device memory whatever was submitted, until it is retired."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.resident: dict[Any, int] = {}

    def submit(self, request: Any) -> None:
        self.resident |= {adapter_id: 4096 for adapter_id, _ in request.mix}
        super().submit(request)

    def retire(self, adapter_id: Any) -> None:
        self.resident.pop(adapter_id, None)

    def stats(self) -> EngineStats:
        held = tuple(self.resident.items())
        resident, sizes = tuple(held_id for held_id, _ in held), tuple(size for _, size in held)
        return replace(super().stats(), resident=resident, resident_bytes=sizes)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    directory = tmp_path / "adapters"
    write(directory / ".v" / "one", 1.0, base_fingerprint=FINGERPRINT)
    write(directory / ".v" / "two", 2.0)
    return directory


@pytest.fixture
def engine() -> DeviceMemory:
    return DeviceMemory()


@pytest.fixture
def registry(root: Path, engine: DeviceMemory, tmp_path: Path) -> AdapterRegistry:
    allow = AllowList(["http://127.0.0.1:*/*"])
    spec = replace(ADAPTER_SPEC, name=SPEC.name)
    return AdapterRegistry(
        AdaptedBase(spec, NO_TOKENIZER, FINGERPRINT),
        AdapterPlaces([root], allow=allow, cache=SourceCache(tmp_path / "cache", Downloader(allow))),
        on_drop=engine.retire,
    )


@pytest.fixture
async def client(
    registry: AdapterRegistry, engine: DeviceMemory, anyio_backend: str
) -> AsyncIterator[httpx.AsyncClient]:
    state = ServerState(FakeDaemon(engine=engine, registry=registry))  # type: ignore[arg-type]
    async with asking(state, allow_runtime_adapters=True) as client:
        yield client


@pytest.fixture
def web() -> Iterator[Asked]:
    with web_server() as asked:
        yield asked


async def load(client: httpx.AsyncClient, name: str, source: str, **more: object) -> dict[str, Any]:
    response = await client.post("/v1/adapters", json={"name": name, "source": source, **more})
    assert response.is_success, response.text
    card: dict[str, Any] = response.json()
    return card


def chat(model: str, **more: object) -> dict[str, Any]:
    return {"json": {"model": model, "messages": [{"role": "user", "content": "x"}], **more}}


async def post(client: httpx.AsyncClient, path: str, **body: object) -> httpx.Response:
    return await client.post(f"/v1/adapters/{path}", json=body)


def code(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


async def test_a_card_says_what_an_adapter_is_and_where_it_lies(
    client: httpx.AsyncClient, root: Path
) -> None:
    card = await load(client, "a", ".v/one", pinned=True)
    digest, proof = card["digest"], card["proof"]
    assert (proof["verdict"], proof["num_modules"], proof["has_effect"]) == ("exact", 1, True)
    assert proof["max_error"] < 1e-5
    assert card == {
        "id": "tiny:a",
        "object": "adapter",
        "name": "a",
        "state": "READY",
        "error": None,
        "owner": "runtime",
        "source": str(root / ".v" / "one"),
        "sha256": None,
        "digest": digest,
        "version": 1,
        "previous_version": None,
        "aliases": {},
        "pinned": True,
        "rank": 2,
        "targets": ["q_proj"],
        "bytes": 128,
        "tier": "host",
        "loaded_at": card["loaded_at"],
        "requests_served": 0,
        "last_used": None,
        "base": {"served": "tiny", "declared": "mini", "match": "fingerprint"},
        "proof": proof,
        "full_proof": None,
        "versions": [
            {
                "number": 1,
                "digest": digest,
                "is_current": True,
                "aliases": [],
                "rank": 2,
                "targets": ["q_proj"],
                "bytes": 128,
                "tier": "host",
                "source": str(root / ".v" / "one"),
                "first_loaded_at": card["versions"][0]["first_loaded_at"],
                "requests_served": 0,
                "requests_running": 0,
                "last_used": None,
                "proof": proof,
            }
        ],
    }
    answer = await client.post("/v1/chat/completions", **chat("tiny:a"))
    assert answer.headers["x-adapterd-digest"] == digest
    after = (await client.get("/v1/adapters/a")).json()
    assert (after["tier"], after["requests_served"]) == ("device", 1)
    assert after["last_used"] >= after["loaded_at"]
    listed = (await client.get("/v1/adapters")).json()
    assert (listed["object"], listed["data"], listed["manifest"]) == ("list", [after], None)
    assert code(await client.get("/v1/adapters/nobody")) == (404, "model_not_found")


async def test_an_update_answers_when_new_requests_use_it(client: httpx.AsyncClient, root: Path) -> None:
    first = await load(client, "a", ".v/one")
    assert (await post(client, "a/update", source=".v/two")).json()["version"] == 2
    answer = await client.post("/v1/chat/completions", **chat("tiny:a"))
    assert answer.headers["x-adapterd-digest"] != first["digest"]
    write(root / ".v" / "two", 3.0)
    card = (await post(client, "a/update")).json()
    assert (card["version"], card["previous_version"]) == (3, 2)
    assert code(await post(client, "nobody/update")) == (404, "model_not_found")
    assert code(await post(client, "a/update", source=".v/nowhere")) == (400, "invalid_value")
    assert (await client.get("/v1/adapters/a")).json()["version"] == 3


async def test_other_content_under_a_served_name_must_be_asked_for(client: httpx.AsyncClient) -> None:
    body = {"name": "a", "source": ".v/one"}
    assert (await client.post("/v1/adapters", json=body)).status_code == 201
    assert (await client.post("/v1/adapters", json=body)).status_code == 200
    body["source"] = ".v/two"
    refused = await client.post("/v1/adapters", json=body)
    assert code(refused) == (409, "other_content")
    assert "set 'replace' to true" in refused.json()["error"]["message"]
    assert refused.json()["error"]["param"] == "name"
    assert (await load(client, "a", ".v/two", replace=True))["version"] == 2


async def test_a_remote_source_is_fetched_and_says_so(
    client: httpx.AsyncClient, web: Asked, root: Path
) -> None:
    web.put("x", files(root / ".v" / "one"))
    sha256 = hashlib.sha256((root / ".v" / "one" / "adapter_model.safetensors").read_bytes()).hexdigest()
    card = await load(client, "a", f"{web.url}/x", sha256=sha256)
    assert (card["source"], card["owner"]) == (f"{web.url}/x", "runtime")
    assert sha256 in card["sha256"]
    wrong = {"name": "b", "source": f"{web.url}/x", "sha256": "0" * 64}
    assert code(await client.post("/v1/adapters", json=wrong)) == (400, "sha256_mismatch")
    other = {"name": "b", "source": "hf://acme/b"}
    assert code(await client.post("/v1/adapters", json=other)) == (403, "source_not_allowed")
    gone = {"name": "b", "source": f"{web.url}/y", "sha256": sha256}
    assert code(await client.post("/v1/adapters", json=gone)) == (404, "source_not_found")
    declared = {"name": "b", "source": ".v/one", "sha256": "0" * 64}
    assert code(await client.post("/v1/adapters", json=declared)) == (400, "sha256_mismatch")


async def test_versions_are_addressed_aliased_and_rolled_back(client: httpx.AsyncClient) -> None:
    first = await load(client, "a", ".v/one")
    second = await load(client, "a", ".v/two", replace=True)
    card = (await post(client, "a/alias", alias="stable", version=1)).json()
    assert card["aliases"] == {"stable": 1}
    assert [version["aliases"] for version in card["versions"]] == [["stable"], []]

    async def digest_of(model: str) -> str:
        return (await client.post("/v1/chat/completions", **chat(model))).headers["x-adapterd-digest"]

    assert await digest_of("tiny:a@stable") == first["digest"]
    assert await digest_of(f"a@{second['digest'][:8]}") == second["digest"]
    card = (await post(client, "a/rollback")).json()
    assert (card["version"], card["previous_version"]) == (1, 2)
    assert await digest_of("a") == first["digest"]
    assert (await post(client, "a/rollback", version="2")).json()["version"] == 2
    assert (await post(client, "a/alias", alias="stable")).json()["aliases"] == {"stable": 2}
    assert (await client.delete("/v1/adapters/a/aliases/stable")).json()["aliases"] == {}
    assert code(await client.delete("/v1/adapters/a/aliases/stable")) == (404, "model_not_found")
    assert code(await post(client, "a/alias", alias="abcdef")) == (400, "invalid_value")
    assert code(await post(client, "a/rollback", version=9)) == (404, "model_not_found")


async def test_the_model_of_a_version_is_that_versions(client: httpx.AsyncClient, root: Path) -> None:
    first = await load(client, "a", ".v/one")
    second = await load(client, "a", ".v/two", replace=True)

    async def model(name: str) -> dict[str, Any]:
        card: dict[str, Any] = (await client.get(f"/v1/models/{name}")).json()
        return card

    for name, card, folder in (("a@1", first, "one"), ("a@2", second, "two"), ("a", second, "two")):
        found = await model(name)
        assert (found["id"], found["parent"]) == (f"tiny:{name}", "tiny")
        assert (found["digest"], found["root"]) == (card["digest"], str(root / ".v" / folder))
        assert int(card["versions"][0]["first_loaded_at"]) <= found["created"] <= int(card["loaded_at"])
    composed = await model("a@1*0.5+a@2")
    assert composed["id"] == "tiny:a@1*0.5+a@2"
    assert {*composed["digest"].split("+")} == {f"{first['digest']}*0.5", second["digest"]}
    assert code(await client.get("/v1/models/a@3")) == (404, "model_not_found")


async def test_pins_and_prefetch(client: httpx.AsyncClient) -> None:
    await load(client, "a", ".v/one")
    assert (await client.post("/v1/adapters/a/pin", headers={"content-type": "application/json"})).json()[
        "pinned"
    ]
    assert not (await post(client, "a/unpin")).json()["pinned"]
    assert (await post(client, "a/prefetch")).json()["tier"] == "host"
    assert code(await post(client, "a/pin", hard=True)) == (400, "unknown_parameter")


async def test_unload_answers_when_the_memory_is_back(
    client: httpx.AsyncClient, engine: DeviceMemory
) -> None:
    card = await load(client, "a", ".v/one")
    await client.post("/v1/chat/completions", **chat("a"))
    assert engine.resident
    response = await post(client, "a/unload")
    assert (response.status_code, response.json()) == (
        200,
        {
            "object": "adapter.unloaded",
            "name": "a",
            "digests": [card["digest"]],
            "host_bytes": 128,
            "device_bytes": 4096,
            "requests_aborted": 0,
            "held": [],
        },
    )
    assert engine.resident == {}
    assert code(await client.post("/v1/chat/completions", **chat("a"))) == (404, "model_not_found")
    assert code(await post(client, "a/unload")) == (404, "model_not_found")


async def test_unload_says_who_holds_the_memory_and_can_end_them(
    client: httpx.AsyncClient, engine: DeviceMemory, registry: AdapterRegistry
) -> None:
    card = await load(client, "a", ".v/one")
    engine.is_held = True
    running = asyncio.create_task(client.post("/v1/chat/completions", **chat("a")))
    while not engine.requests:
        await asyncio.sleep(0.005)
    response = await post(client, "a/unload", deadline_seconds=0.05)
    held = {"digest": card["digest"], "requests": 1, "host_bytes": 128, "device_bytes": 4096}
    assert (response.status_code, response.json()["object"], response.json()["held"]) == (
        202,
        "adapter.unloading",
        [held],
    )
    # The name is gone at once all the same; loaded and unloaded again, now in earnest.
    assert code(await client.get("/v1/adapters/a")) == (404, "model_not_found")
    await load(client, "a", ".v/one")
    response = await post(client, "a/unload", deadline_seconds=0.05, abort=True)
    assert (response.status_code, response.json()["requests_aborted"]) == (200, 1)
    assert (response.json()["host_bytes"], response.json()["device_bytes"]) == (128, 4096)
    ended = await running
    assert code(ended) == (503, "unavailable")
    assert "was unloaded" in ended.json()["error"]["message"]
    registry.check_integrity()


async def test_unload_neither_waits_for_nor_ends_what_was_loaded_again_meanwhile(
    client: httpx.AsyncClient, engine: DeviceMemory
) -> None:
    await load(client, "a", ".v/one")
    engine.is_held = True
    running = asyncio.create_task(client.post("/v1/chat/completions", **chat("a")))
    while not engine.requests:
        await asyncio.sleep(0.005)
    unloading = asyncio.create_task(post(client, "a/unload", deadline_seconds=30, abort=True))
    while (await client.get("/v1/adapters/a")).status_code == 200:
        await asyncio.sleep(0.005)
    assert not unloading.done()
    await load(client, "a", ".v/one")
    response = await asyncio.wait_for(unloading, 10)
    assert (response.status_code, response.json()["object"]) == (200, "adapter.unloaded")
    assert (response.json()["digests"], response.json()["requests_aborted"]) == ([], 0)
    assert (response.json()["host_bytes"], response.json()["device_bytes"]) == (0, 0)
    # The unload had left it alone; another ends it, so that nothing is left running.
    assert not running.done()
    await post(client, "a/unload", deadline_seconds=0, abort=True)
    assert (await running).status_code == 503


async def test_what_another_name_means_as_well_stays(client: httpx.AsyncClient, engine: DeviceMemory) -> None:
    await load(client, "a", ".v/one")
    await load(client, "b", ".v/one")
    await client.post("/v1/chat/completions", **chat("b"))
    answer = (await post(client, "a/unload")).json()
    assert (answer["digests"], answer["host_bytes"], answer["device_bytes"]) == ([], 0, 0)
    assert (await client.post("/v1/chat/completions", **chat("b"))).status_code == 200


async def test_delete_forgets_versions_but_never_gives_a_number_twice(
    client: httpx.AsyncClient, root: Path
) -> None:
    await load(client, "a", ".v/one")
    await load(client, "a", ".v/two", replace=True)
    response = await client.delete("/v1/adapters/a?deadline_seconds=5")
    assert (response.status_code, len(response.json()["digests"])) == (200, 2)
    card = await load(client, "a", ".v/one")
    assert [version["number"] for version in card["versions"]] == [3]
    for query in ("deadline_seconds=x", "deadline_seconds=-1", "deadline_seconds=nan", "abort=yes"):
        assert code(await client.delete(f"/v1/adapters/a?{query}")) == (400, "invalid_value")


async def test_what_was_unloaded_can_be_forgotten(client: httpx.AsyncClient) -> None:
    await load(client, "a", ".v/one")
    assert (await post(client, "a/unload")).status_code == 200
    response = await client.delete("/v1/adapters/a")
    assert (response.status_code, response.json()["object"]) == (200, "adapter.unloaded")
    assert code(await client.delete("/v1/adapters/a")) == (404, "model_not_found")
    card = await load(client, "a", ".v/one")
    assert [version["number"] for version in card["versions"]] == [2]


async def test_a_name_that_was_refused_is_there(client: httpx.AsyncClient, root: Path) -> None:
    """It can be told to read its source again, or another one, and be unloaded; what it cannot do, it says why."""
    broken = write(root / ".v" / "broken", 3.0)
    (broken / "adapter_model.safetensors").write_bytes(b"cut off")
    for name in ("w", "x"):
        shutil.copytree(broken, root / ".v" / name).rename(root / name)
        while (await client.get(f"/v1/adapters/{name}")).json().get("state") != "FAILED":
            await asyncio.sleep(0.05)
    for action in ("update", "pin", "prefetch", "rollback"):
        assert code(await post(client, f"w/{action}")) == (400, "adapter_refused"), action
    assert (await post(client, "w/update", source=".v/one")).json()["state"] == "READY"
    assert (await post(client, "x/unload")).status_code == 200
    assert code(await post(client, "x/unload")) == (404, "model_not_found")


async def test_a_watched_folder_that_was_deleted_stays_out_until_it_changes(
    client: httpx.AsyncClient, root: Path, registry: AdapterRegistry
) -> None:
    write(root / "w", 4.0)
    while (await client.get("/v1/adapters/w")).status_code != 200:
        await asyncio.sleep(0.05)
    while (await client.get("/v1/adapters/w")).json()["state"] != "READY":
        await asyncio.sleep(0.05)
    assert (await client.delete("/v1/adapters/w")).status_code == 200
    assert code(await client.get("/v1/adapters/w")) == (404, "model_not_found")


async def test_nothing_can_be_changed_unless_that_is_allowed(
    registry: AdapterRegistry, engine: DeviceMemory, anyio_backend: str
) -> None:
    state = ServerState(FakeDaemon(engine=engine, registry=registry))  # type: ignore[arg-type]
    async with asking(state) as client:
        assert (await client.get("/v1/adapters")).status_code == 200
        for action in ("update", "unload", "rollback", "alias", "pin", "unpin", "prefetch"):
            assert code(await post(client, f"a/{action}")) == (404, "unknown_url")
        assert code(await client.post("/v1/adapters", json={})) == (405, "method_not_allowed")
        assert code(await client.delete("/v1/adapters/a")) == (405, "method_not_allowed")


@pytest.mark.parametrize("name", ["..", "a%2Fb", "%00", "base", "tiny"])
async def test_a_name_is_never_a_path(client: httpx.AsyncClient, name: str) -> None:
    body = {"name": name, "source": ".v/one"}
    assert (await client.post("/v1/adapters", json=body)).status_code in (400, 409)
    assert (await client.get(f"/v1/adapters/{name}")).status_code in (200, 404)
