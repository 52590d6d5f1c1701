"""A few threads beside the event loop for what is slow and pure: templates and tokenising. Bounded."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, ParamSpec, TypeVar

from adapterd.errors import Overloaded, Unavailable

P = ParamSpec("P")
T = TypeVar("T")

RENDER_SECONDS = 60.0
"""A long prompt takes one; the rest is for those before it."""


class RenderPool:
    """`max_waiting` calls run or wait at most; one more is refused at once rather than queued without end.

    No thread can be stopped, and an adapter's template may loop for as long as it likes. It keeps its thread; but
    no request waits longer than `seconds`, and the process does not wait at its end.
    """

    def __init__(
        self, *, num_threads: int = 2, max_waiting: int = 1024, seconds: float = RENDER_SECONDS
    ) -> None:
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._places = threading.BoundedSemaphore(max_waiting)
        self._seconds = seconds
        self._num_threads = num_threads
        for number in range(num_threads):
            # Not an executor's: the interpreter waits for those.
            threading.Thread(target=self._work, name=f"render-{number}", daemon=True).start()

    async def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Raises Overloaded when full, Unavailable if it takes too long.

        A caller that is cancelled or waits no longer leaves its place when the call has ended.
        """
        if not self._places.acquire(blocking=False):
            raise Overloaded("too many prompts are waiting to be tokenised")
        future: Future[T] = Future()
        future.add_done_callback(lambda _: self._places.release())
        self._calls.put((future, partial(call, *args, **kwargs)))
        try:
            async with asyncio.timeout(self._seconds):
                return await asyncio.wrap_future(future)
        except TimeoutError:
            raise Unavailable(
                f"the prompt was not rendered within {self._seconds:g} s: there are too many before it, or a chat"
                " template does not come to an end",
                retry_after_seconds=5,
            ) from None

    def close(self) -> None:
        """Nothing begins any more. What runs is not waited for."""
        try:
            while True:
                if (waiting := self._calls.get_nowait()) is not None:
                    waiting[0].cancel()
        except Empty:
            pass
        for _ in range(self._num_threads):
            self._calls.put(None)

    def _work(self) -> None:
        while (waiting := self._calls.get()) is not None:
            _fulfil(*waiting)
            del waiting  # or what the call was given would live until the next one


def _fulfil(future: Future[Any], call: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(call())
    except BaseException as error:
        future.set_exception(error)
