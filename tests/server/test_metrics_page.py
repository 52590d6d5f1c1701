"""Both pages of metrics as HTTP gives them."""

import httpx
import pytest

from adapterd.server.app import create_app
from adapterd.server.metrics_page import PATHS
from adapterd.server.state import ServerState
from tests.server.conftest import listening

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("accept", ["", "*/*", "application/vnd.google.protobuf;proto=x;encoding=delimited"])
async def test_they_are_plain_text_by_default_and_never_compressed(
    client: httpx.AsyncClient, accept: str
) -> None:
    response = await client.get("/metrics", headers={"accept": accept, "accept-encoding": "gzip"})
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert "content-encoding" not in response.headers
    assert 'vllm:num_requests_waiting{model_name="tiny"} 3.0' in response.text


async def test_openmetrics_on_request(client: httpx.AsyncClient) -> None:
    response = await client.get("/metrics", headers={"accept": "application/openmetrics-text;version=1.0.0"})
    assert response.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert response.text.endswith("# EOF\n")


@pytest.mark.parametrize(("page", "least_bytes"), [("/metrics", 5000), ("/metrics/router", 1000)])
async def test_they_answer_head(client: httpx.AsyncClient, page: str, least_bytes: int) -> None:
    response = await client.head(page)
    assert (response.status_code, response.text) == (200, "")
    assert int(response.headers["content-length"]) > least_bytes


def test_over_a_socket_the_answer_to_head_has_no_body_and_the_connection_is_kept(state: ServerState) -> None:
    with listening(create_app(state)) as url, httpx.Client(base_url=url) as client:
        for page in sorted(PATHS):
            assert client.head(page).content == b""
            response = client.get(page)
            assert len(response.content) == int(response.headers["content-length"]) > 1000
            assert response.headers.get("connection") != "close"


@pytest.mark.parametrize("page", sorted(PATHS))
async def test_nothing_can_be_posted_to_them(client: httpx.AsyncClient, page: str) -> None:
    response = await client.post(page, content=b"x")
    assert response.status_code == 405
    assert response.json()["error"]["code"] == "method_not_allowed"


async def test_they_are_answered_while_draining_and_close_the_connection(
    client: httpx.AsyncClient, state: ServerState
) -> None:
    state.drain.begin()
    for page in sorted(PATHS):
        response = await client.get(page)
        assert (response.status_code, response.headers["connection"]) == (200, "close")


async def test_routers_find_all_that_they_read_on_a_page_of_its_own(client: httpx.AsyncClient) -> None:
    everything, routers = await client.get("/metrics"), await client.get("/metrics/router")
    assert routers.headers["content-type"] == everything.headers["content-type"]
    lines = everything.text.splitlines()
    assert routers.text.splitlines() == [line for line in lines if "vllm:" in line.partition("{")[0]]
    assert "adapterd_" not in routers.text
