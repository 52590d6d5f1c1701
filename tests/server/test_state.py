"""Resolving a model whose weights are not in memory."""

import asyncio
from concurrent.futures import Future

import pytest

from adapterd.errors import AdapterRefused, Overloaded
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


async def test_weights_that_do_not_come_in_time_are_a_429_that_says_when_to_come_back(
    daemon: FakeDaemon,
) -> None:
    state = ServerState(daemon, reading_seconds=0.02)
    daemon.registry.readings.append(Future())
    with pytest.raises(Overloaded, match=r"'support' needs did not come to memory within 0\.02 s") as found:
        await state.resolve("support")
    assert found.value.retry_after_seconds == 5


async def test_only_so_many_may_wait_for_a_reading(daemon: FakeDaemon) -> None:
    state = ServerState(daemon, max_queue=2)
    reading: Future[object] = Future()
    daemon.registry.readings += [reading] * 3
    waiting = [asyncio.create_task(state.resolve("support")) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="2 requests wait for weights to be read"):
        await state.resolve("support")
    reading.set_result("weights")
    assert len(await asyncio.gather(*waiting)) == 2
    assert (await state.resolve("support")).mix == ((SUPPORT, 1.0),)
