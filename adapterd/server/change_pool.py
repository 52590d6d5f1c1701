"""Threads for what operators ask of adapters: they wait for disks and networks, and step back for whoever waits for
tokens. Reading, hashing and proving an adapter takes a core for a moment, and a decode step needs them all.
"""

import asyncio
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

_NUM_THREADS = 16
"""More changes than this at once wait; most of one is waiting, for a disk, a network, or room on the device."""

NICENESS = 10
"""A tenth of a core that others want as well, all of one that is idle. Not the least: the interpreter's lock is held
now and then by a thread that has to run to give it back."""


class ChangePool:
    """What requests wait for (a render, weights that have to be read) is done elsewhere, at the usual priority."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(
            _NUM_THREADS, thread_name_prefix="adapter-change", initializer=_step_back
        )

    async def run(self, call: Callable[[], T]) -> T:
        """What `call` gives or raises."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, call)

    def close(self) -> None:
        """Wait for the changes that have begun."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def _step_back() -> None:
    if sys.platform == "linux":  # elsewhere priorities are those of whole processes
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
