"""Probes: alive, ready, and what turns them red."""

import time
from dataclasses import replace

import httpx
import pytest

import adapterd
from adapterd.server.state import ServerState
from tests.server.fakes import STATS, FakeDaemon, FakeEntry

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/health"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_green(client: httpx.AsyncClient, path: str, method: str) -> None:
    response = await client.request(method, path)
    assert response.status_code == 200
    assert response.text == ('{"status":"ok"}' if method == "GET" else "")


async def test_a_failed_engine_is_neither_live_nor_ready(
    client: httpx.AsyncClient, daemon: FakeDaemon
) -> None:
    daemon.engine.fail("KernelError")
    for path in ("/livez", "/readyz"):
        assert (await client.get(path)).status_code == 503


async def test_an_engine_without_a_heartbeat_is_not_live(
    client: httpx.AsyncClient, daemon: FakeDaemon
) -> None:
    stale = replace(STATS, heartbeat_seconds=time.monotonic() - 1000)
    daemon.engine.stats = lambda: stale
    assert (await client.get("/livez")).json()["reason"] == "the engine hangs"


async def test_not_ready_until_the_first_adapters_are_read_and_from_then_on_whatever_loads(
    client: httpx.AsyncClient, daemon: FakeDaemon
) -> None:
    loading = FakeEntry("slow", state="LOADING", id=None)
    daemon.registry.entries["slow"] = loading
    assert (await client.get("/readyz")).status_code == 503
    assert (await client.get("/livez")).status_code == 200
    daemon.registry.entries["slow"] = replace(loading, state="FAILED")
    assert (await client.get("/readyz")).status_code == 200
    daemon.registry.entries["slow"] = loading
    assert (await client.get("/readyz")).status_code == 200


async def test_not_ready_while_draining(client: httpx.AsyncClient, state: ServerState) -> None:
    state.drain.begin()
    assert (await client.get("/readyz")).status_code == 503
    assert (await client.get("/livez")).status_code == 200


async def test_version(client: httpx.AsyncClient) -> None:
    assert (await client.get("/version")).json() == {"version": adapterd.__version__}


@pytest.mark.parametrize("accept", ["", "*/*", "application/vnd.google.protobuf;proto=x;encoding=delimited"])
async def test_metrics_are_plain_text_by_default(client: httpx.AsyncClient, accept: str) -> None:
    response = await client.get("/metrics", headers={"accept": accept})
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert 'vllm:num_requests_waiting{model_name="tiny"} 3.0' in response.text


async def test_openmetrics_on_request(client: httpx.AsyncClient) -> None:
    response = await client.get("/metrics", headers={"accept": "application/openmetrics-text;version=1.0.0"})
    assert response.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert response.text.endswith("# EOF\n")


@pytest.mark.parametrize(("page", "least_bytes"), [("/metrics", 5000), ("/metrics/router", 1000)])
async def test_metrics_answer_head(client: httpx.AsyncClient, page: str, least_bytes: int) -> None:
    response = await client.head(page)
    assert (response.status_code, response.text) == (200, "")
    assert int(response.headers["content-length"]) > least_bytes


async def test_routers_find_all_that_they_read_on_a_page_of_its_own(client: httpx.AsyncClient) -> None:
    everything, routers = await client.get("/metrics"), await client.get("/metrics/router")
    assert routers.headers["content-type"] == everything.headers["content-type"]
    lines = everything.text.splitlines()
    assert routers.text.splitlines() == [line for line in lines if "vllm:" in line.partition("{")[0]]
    assert "adapterd_" not in routers.text
