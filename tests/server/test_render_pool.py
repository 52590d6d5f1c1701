"""Tokenising beside the event loop, bounded."""

import asyncio
import subprocess
import sys
import threading

import pytest

from adapterd.errors import InvalidRequest, Overloaded, Unavailable
from adapterd.server.render_pool import RenderPool

pytestmark = pytest.mark.anyio


async def test_one_more_than_it_holds_is_refused_at_once_and_places_come_back() -> None:
    pool = RenderPool(num_threads=1, max_waiting=2)
    gate = threading.Event()
    waiting = [asyncio.create_task(pool.run(gate.wait)) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await pool.run(gate.wait)
    gate.set()
    assert await asyncio.gather(*waiting) == [True, True]
    assert await pool.run(lambda: 3) == 3
    pool.close()


async def test_a_caller_that_leaves_keeps_its_place_until_the_call_has_ended() -> None:
    pool = RenderPool(num_threads=1, max_waiting=1)
    gate = threading.Event()
    left = asyncio.create_task(pool.run(gate.wait))
    await asyncio.sleep(0.01)
    left.cancel()
    with pytest.raises(asyncio.CancelledError):
        await left
    with pytest.raises(Overloaded):
        await pool.run(gate.wait)
    gate.set()
    pool.close()


async def test_errors_come_back() -> None:
    def refuse() -> None:
        raise InvalidRequest("no such role")

    pool = RenderPool()
    with pytest.raises(InvalidRequest, match="no such role"):
        await pool.run(refuse)
    pool.close()


async def test_nobody_waits_for_a_call_that_does_not_end() -> None:
    pool = RenderPool(num_threads=1, seconds=0.05)
    gate = threading.Event()
    for call in (gate.wait, lambda: 3):
        with pytest.raises(Unavailable, match=r"within 0\.05 s"):
            await pool.run(call)
    pool.close()
    gate.set()


async def test_what_waits_at_the_end_is_cancelled() -> None:
    pool = RenderPool(num_threads=1)
    gate = threading.Event()
    running, waiting = (asyncio.create_task(pool.run(gate.wait)) for _ in range(2))
    await asyncio.sleep(0.05)
    pool.close()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    gate.set()
    assert await running


ENDLESS = """
import asyncio, time
from adapterd.server.render_pool import RenderPool

async def main():
    pool = RenderPool(seconds=0.1)
    try:
        await pool.run(time.sleep, 600)
    finally:
        pool.close()

asyncio.run(main())
"""


def test_the_process_ends_all_the_same() -> None:
    ended = subprocess.run([sys.executable, "-c", ENDLESS], capture_output=True, text=True, timeout=60)
    assert "Unavailable" in ended.stderr
