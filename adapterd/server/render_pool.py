"""A few threads beside the event loop for what is slow and pure: templates and tokenising. Bounded."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from adapterd.errors import Overloaded

P = ParamSpec("P")
T = TypeVar("T")


class RenderPool:
    """`max_waiting` calls run or wait at most; one more is refused at once rather than queued without end."""

    def __init__(self, *, num_threads: int = 2, max_waiting: int = 1024) -> None:
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix="render")
        self._places = threading.BoundedSemaphore(max_waiting)

    async def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Raises Overloaded when full. A caller that is cancelled leaves its place when the call has ended."""
        if not self._places.acquire(blocking=False):
            raise Overloaded("too many prompts are waiting to be tokenised")
        try:
            future = self._executor.submit(call, *args, **kwargs)
        except RuntimeError:
            self._places.release()
            raise
        future.add_done_callback(lambda _: self._places.release())
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)
