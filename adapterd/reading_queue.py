"""Weights on their way back into host memory: each version is read once for all who wait for it, first asked first.

A reading begins when there is room for it beside what requests hold, so that a long queue of requests for many
adapters does not take more memory than was set. Nothing here waits; reading is done in a pool.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field

from adapterd.adapter import Adapter
from adapterd.core import AdapterId
from adapterd.errors import Unavailable
from adapterd.names import Version


@dataclass
class _Reading:
    version: Version
    done: "Future[object]" = field(default_factory=Future)
    has_begun: bool = False


class ReadingQueue:
    """Every method may be called from any thread.

    `read` brings a version into memory, in the pool that `pool_of` chooses; `reserve` sets bytes aside for it or says
    that there is no room, `release` gives them back when it has ended.
    """

    def __init__(
        self,
        pool_of: Callable[[Version], Executor],
        read: Callable[[Version], Adapter],
        reserve: Callable[[int], bool],
        release: Callable[[int], None],
    ) -> None:
        self._pool_of = pool_of
        self._read = read
        self._reserve = reserve
        self._release = release
        self._lock = threading.Lock()
        self._readings: dict[AdapterId, _Reading] = {}  # first asked first
        self._is_closed = False

    def of(self, version: Version) -> "Future[object]":
        """The reading of a version, one that is under way or a new one. Raises Unavailable once closed."""
        with self._lock:
            if self._is_closed:
                raise Unavailable("the server is shutting down")
            reading = self._readings.get(version.id)
            if reading is None:
                reading = self._readings[version.id] = _Reading(version)
        self.begin()
        return reading.done

    def begin(self) -> None:
        """Begin what there is room for. To be called whenever memory may have become free."""
        while self._begin_next():
            pass

    def close(self) -> None:
        """No more readings; who waits for one that has not begun is told so."""
        with self._lock:
            self._is_closed = True
            waiting = [reading for reading in self._readings.values() if not reading.has_begun]
        for reading in waiting:
            self._end(reading, Unavailable("the server is shutting down"))

    def _begin_next(self) -> bool:
        with self._lock:
            reading = next((r for r in self._readings.values() if not r.has_begun), None)
            # Nobody overtakes: a large adapter would wait for as long as small ones are asked for.
            if reading is None or not self._reserve(reading.version.num_bytes):
                return False
            reading.has_begun = True
        try:
            task = self._pool_of(reading.version).submit(self._run, reading)
        except RuntimeError:  # the pool is shut down
            self._end(reading, Unavailable("the server is shutting down"))
            return False
        task.add_done_callback(lambda task: self._cancelled(reading) if task.cancelled() else None)
        return True

    def _run(self, reading: _Reading) -> None:
        result: Adapter | Exception
        try:
            result = self._read(reading.version)
        except Exception as error:  # for whoever waits
            result = error
        self._release(reading.version.num_bytes)
        self._end(reading, result)
        self.begin()

    def _cancelled(self, reading: _Reading) -> None:
        """The pool was shut down before its turn came."""
        self._release(reading.version.num_bytes)
        self._end(reading, Unavailable("the server is shutting down"))

    def _end(self, reading: _Reading, result: Adapter | Exception) -> None:
        with self._lock:
            self._readings.pop(reading.version.id, None)
        if isinstance(result, Exception):
            reading.done.set_exception(result)
        else:
            reading.done.set_result(result)
