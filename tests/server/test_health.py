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
