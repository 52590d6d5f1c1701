"""Resolving a model whose weights are not in memory."""

import asyncio
from concurrent.futures import Future

import pytest

from adapterd.errors import AdapterRefused
from adapterd.server.state import ServerState
from tests.server.fakes import SUPPORT, FakeDaemon

pytestmark = pytest.mark.anyio


async def test_what_is_in_memory_is_there_at_once(state: ServerState) -> None:
    assert (await state.resolve("support")).mix == ((SUPPORT, 1.0),)


async def test_an_adapter_may_have_other_spellings(daemon: FakeDaemon) -> None:
    state = ServerState(daemon, more_spellings={"publishers/ns/models/support": "support"})
    assert (await state.resolve("publishers/ns/models/support")).model == "tiny:support"


async def test_who_waits_for_weights_is_counted(state: ServerState, daemon: FakeDaemon) -> None:
    reading: Future[object] = Future()
    daemon.registry.readings += [reading, reading]
    asked = [asyncio.create_task(state.resolve("support")) for _ in range(2)]
    await asyncio.sleep(0)
    assert state.stats().reading == (("support", 2),)
    reading.set_result("weights")
    await asyncio.gather(*asked)
    assert state.stats().reading == ()


async def test_a_request_waits_for_weights_that_are_read(state: ServerState, daemon: FakeDaemon) -> None:
    reading: Future[object] = Future()
    daemon.registry.readings.append(reading)
    asked = asyncio.create_task(state.resolve("support"))
    await asyncio.sleep(0)
    assert not asked.done()
    reading.set_result("weights")
    assert (await asked).mix == ((SUPPORT, 1.0),)


async def test_a_reading_that_fails_is_the_requests_error(state: ServerState, daemon: FakeDaemon) -> None:
    reading: Future[object] = Future()
    reading.set_exception(AdapterRefused("its file is cut off"))
    daemon.registry.readings.append(reading)
    with pytest.raises(AdapterRefused, match="cut off"):
        await state.resolve("support")


async def test_one_that_goes_away_leaves_the_reading_to_the_others(
    state: ServerState, daemon: FakeDaemon
) -> None:
    reading: Future[object] = Future()
    daemon.registry.readings += [reading, reading]
    first, second = (asyncio.create_task(state.resolve("support")) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait([first])
    assert not reading.cancelled()
    reading.set_result("weights")
    assert (await second).mix == ((SUPPORT, 1.0),)
