"""The first forwards: readiness waits for them, and only the base can spoil it."""

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from adapterd.errors import AdapterRefused
from adapterd.server.state import ServerState
from tests.server.fakes import FakeDaemon

pytestmark = pytest.mark.anyio


async def eventually(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def test_ready_once_the_base_and_the_pinned_adapters_have_run(daemon: FakeDaemon) -> None:
    daemon.registry.pin("support")
    daemon.engine.is_held = True
    state = ServerState(daemon, warms_up=True)
    assert state.readiness.why_unready() == "warming up"
    async with state.running():
        await eventually(lambda: daemon.engine.requests)
        assert state.readiness.why_unready() == "warming up"
        daemon.engine.release()
        await eventually(lambda: state.readiness.why_unready() is None)
    assert [len(request.mix) for request in daemon.engine.requests] == [0, 1]
    assert (daemon.engine.running, daemon.registry.leases) == ({}, [])


async def test_a_pinned_adapter_that_does_not_run_is_logged_and_spoils_nothing(
    daemon: FakeDaemon, caplog: pytest.LogCaptureFixture
) -> None:
    daemon.registry.pin("support")

    def refuse(model: str) -> object:
        if model == "support":
            raise AdapterRefused("it does not fit")
        return resolve(model)

    resolve, daemon.registry.resolve = daemon.registry.resolve, refuse
    state = ServerState(daemon, warms_up=True)
    async with state.running():
        await eventually(lambda: state.readiness.why_unready() is None)
    assert "pinned adapter support does not run: it does not fit" in caplog.text


async def test_a_base_that_cannot_run_is_never_ready_and_says_why(daemon: FakeDaemon) -> None:
    daemon.engine.breaks_at = 0
    state = ServerState(daemon, warms_up=True)
    async with state.running():
        await eventually(lambda: state.readiness.failure)
        assert state.readiness.why_unready() == "the warm-up failed: out of luck"
        assert state.readiness.why_dead() is None


async def test_what_is_still_loading_comes_first(daemon: FakeDaemon) -> None:
    support = daemon.registry.entries["support"]
    daemon.registry.entries["support"] = replace(support, state="LOADING", id=None)
    state = ServerState(daemon, warms_up=True)
    async with state.running():
        assert state.readiness.why_unready() == "loading adapters"
        assert daemon.engine.requests == []
        daemon.registry.entries["support"] = support
        await eventually(lambda: state.readiness.why_unready() is None)
