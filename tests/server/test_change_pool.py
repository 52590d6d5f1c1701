"""Changes run beside the event loop, and step back for it."""

import os
import sys
import threading

import pytest

from adapterd.errors import Conflict
from adapterd.server.change_pool import NICENESS, ChangePool

pytestmark = pytest.mark.anyio


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@pytest.mark.skipif(sys.platform != "linux", reason="priorities of threads are Linux's")
async def test_changes_step_back_and_nobody_else_does() -> None:
    before = niceness()
    pool = ChangePool()
    assert await pool.run(niceness) == max(NICENESS, before)
    assert niceness() == before
    pool.close()


async def test_what_a_change_gives_or_raises_comes_through() -> None:
    def refuse() -> None:
        raise Conflict("already loaded", param="name")

    pool = ChangePool()
    assert await pool.run(lambda: 7) == 7
    with pytest.raises(Conflict, match="already loaded"):
        await pool.run(refuse)
    pool.close()
