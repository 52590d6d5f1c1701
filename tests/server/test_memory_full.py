"""Adapter memory full of pinned adapters, on a real socket: a 429 that says when to come back, and nobody else hurt."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from adapterd.config import ServeSettings
from adapterd.daemon import Daemon
from adapterd.model.base import load_base
from adapterd.model.lora import PageGeometry
from adapterd.server.app import create_app
from adapterd.server.state import ServerState
from tests.server.conftest import listening

RANKS = {"support": (4, "q_proj"), "medical": (8, "down_proj")}


@pytest.fixture(scope="module")
def client(tiny_base: Path) -> Iterator[httpx.Client]:
    """A daemon whose adapter memory holds either adapter, and not both."""
    spec = load_base(str(tiny_base), dtype="float32", device="cpu", kernels="torch").spec
    geometry = PageGeometry.choose(spec.lora_targets)
    num_pages = max(
        geometry.num_pages((path, rank) for path in spec.lora_targets if path.endswith(name))
        for rank, name in RANKS.values()
    )
    settings = ServeSettings(
        base=str(tiny_base),
        adapters=(tiny_base.parent / "adapters",),
        dtype="float32",
        kv_memory=2**22,
        adapter_memory=num_pages * geometry.page_elements * 4,
    )
    daemon = Daemon.build(settings)
    app = create_app(ServerState(daemon), allow_runtime_adapters=True)
    with listening(app) as url, httpx.Client(base_url=url, timeout=60) as client:
        assert daemon.registry.wait_loaded(30)
        yield client


def ask(client: httpx.Client, name: str, *, stream: bool = False) -> httpx.Response:
    body = {"model": f"tiny:{name}", "prompt": [1, 2, 3], "max_tokens": 4, "stream": stream}
    return client.post("/v1/completions", json=body)


def assert_no_room(response: httpx.Response, name: str) -> None:
    assert response.status_code == 429, response.text
    assert int(response.headers["retry-after"]) >= 1
    error = response.json()["error"]
    assert error["code"] == "overloaded"
    assert f"no adapter memory for '{name}'" in error["message"]
    assert "pinned adapters take" in error["message"]


def test_all_pinned_and_full_is_a_429_and_not_a_hang(client: httpx.Client) -> None:
    assert ask(client, "medical").status_code == ask(client, "support").status_code == 200
    client.post("/v1/adapters/support/pin", json={}).raise_for_status()
    try:
        assert_no_room(ask(client, "medical"), "medical")
        assert_no_room(ask(client, "medical", stream=True), "medical")
        assert_no_room(client.post("/v1/adapters/medical/pin", json={}), "medical")
        assert client.get("/v1/adapters/medical").json()["pinned"] is False
        assert ask(client, "support").status_code == 200
        base = {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 4}
        assert client.post("/v1/completions", json=base).status_code == 200
    finally:
        client.post("/v1/adapters/support/unpin", json={}).raise_for_status()
    assert ask(client, "medical").status_code == 200


def test_a_load_whose_pin_finds_no_room_changes_nothing(client: httpx.Client) -> None:
    def load(name: str) -> httpx.Response:
        body = {"name": name, "source": "medical", "replace": True, "pinned": True}
        return client.post("/v1/adapters", json=body)

    client.post("/v1/adapters/support/pin", json={}).raise_for_status()
    try:
        assert_no_room(load("new"), "new")
        assert client.get("/v1/adapters/new").status_code == 404
        sglang = {"lora_name": "new", "lora_path": "medical", "pinned": True}
        assert client.post("/load_lora_adapter", json=sglang).json()["success"] is False
        assert client.get("/v1/adapters/new").status_code == 404
        old = client.post("/v1/adapters", json={"name": "old", "source": "support"}).json()
        assert_no_room(load("old"), "old")
        card = client.get("/v1/adapters/old").json()
        assert (card["digest"], card["version"], card["pinned"]) == (old["digest"], 1, False)
    finally:
        client.post("/v1/adapters/support/unpin", json={}).raise_for_status()
    assert (load("old").json()["version"], load("new").status_code) == (3, 201)
    for name in ("old", "new"):
        client.delete(f"/v1/adapters/{name}").raise_for_status()
