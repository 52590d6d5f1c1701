"""GET /v1/models."""

from concurrent.futures import Future

import httpx
import pytest

from adapterd.router_view import Spelling
from adapterd.server.state import ServerState
from tests.server.conftest import asking
from tests.server.fakes import SUPPORT, FakeDaemon, FakeEntry

pytestmark = pytest.mark.anyio


async def test_the_base_comes_first_then_each_adapter_with_parent_and_root(client: httpx.AsyncClient) -> None:
    models = (await client.get("/v1/models")).json()
    assert models["object"] == "list"
    base, adapter = models["data"]
    assert (base["id"], base["root"], base["parent"]) == ("tiny", "models/tiny", None)
    assert base["max_model_len"] == 200
    assert adapter == {
        "id": "tiny:support",
        "object": "model",
        "created": 1700000000,
        "owned_by": "adapterd",
        "root": "adapters/support",
        "parent": "tiny",
        "max_model_len": 200,
        "digest": SUPPORT.digest,
    }


@pytest.mark.parametrize(
    ("spellings", "ids"),
    [
        (("prefixed",), ["tiny", "tiny:support"]),
        (("bare",), ["tiny", "support"]),
        (("prefixed", "bare"), ["tiny", "tiny:support", "support"]),
    ],
)
async def test_adapters_are_listed_as_asked_for(
    daemon: FakeDaemon, spellings: tuple[Spelling, ...], ids: list[str]
) -> None:
    async with asking(ServerState(daemon, spellings=spellings)) as client:
        cards = (await client.get("/v1/models")).json()["data"]
    assert [card["id"] for card in cards] == ids
    assert {card["parent"] for card in cards[1:]} == {"tiny"}


async def test_an_adapter_that_is_not_ready_is_not_listed(
    client: httpx.AsyncClient, daemon: FakeDaemon
) -> None:
    daemon.registry.entries["new"] = FakeEntry("new", state="LOADING", id=None)
    assert [card["id"] for card in (await client.get("/v1/models")).json()["data"]] == [
        "tiny",
        "tiny:support",
    ]


@pytest.mark.parametrize(
    ("model", "id"), [("tiny", "tiny"), ("support", "tiny:support"), ("tiny:support", "tiny:support")]
)
async def test_one_model_by_any_of_its_names_is_the_one_of_the_list(
    client: httpx.AsyncClient, daemon: FakeDaemon, model: str, id: str
) -> None:
    daemon.registry.readings.append(Future())  # weights that never come: nobody waits for them
    (listed,) = [card for card in (await client.get("/v1/models")).json()["data"] if card["id"] == id]
    assert (await client.get(f"/v1/models/{model}")).json() == listed
    assert len(daemon.registry.readings) == 1


async def test_an_unknown_model_is_404(client: httpx.AsyncClient) -> None:
    response = await client.get("/v1/models/nobody/here")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
