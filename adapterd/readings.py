"""Weights that a request needs and that are not in memory: read once, however many wait, when there is room."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from adapterd.adapter import Adapter
from adapterd.catalog import Catalog
from adapterd.errors import AdapterRefused, Unavailable
from adapterd.names import NameRecord, Version
from adapterd.reading import AdapterReader
from adapterd.reading_queue import ReadingQueue
from adapterd.watch import signature_of


class Readings:
    """`pool` reads from disk, `fetchers` wait for the network: a slow download must not keep a disk from being read."""

    def __init__(
        self, catalog: Catalog, reader: AdapterReader, pool: ThreadPoolExecutor, fetchers: ThreadPoolExecutor
    ) -> None:
        self._catalog = catalog
        self._reader = reader
        self._pool = pool
        self._fetchers = fetchers
        self._queue = ReadingQueue(self._pool_for, self.weights_of, catalog.reserve, catalog.unreserve)

    def begin(self, version: Version) -> "Future[object]":
        """The reading of a version that is under way, or a new one. Raises Unavailable at shutdown."""
        return self._queue.of(version)

    def use_room(self) -> None:
        """Host memory may have become free: begin what waits for some."""
        self._queue.begin()

    def close(self) -> None:
        """Who waits for a reading that has not begun is told that the server is shutting down."""
        self._queue.close()

    def _pool_for(self, version: Version) -> ThreadPoolExecutor:
        return self._fetchers if self._reader.needs_download(version) else self._pool

    def weights_of(self, version: Version) -> Adapter:
        """A version's weights, read again in this thread if they have left memory."""
        adapter = self._catalog.in_memory(version.id)
        if adapter is not None:
            return adapter
        try:
            return self._catalog.keep(self._reader.read_version(version))
        except AdapterRefused:
            record = self._catalog.record(version.id.name)
            if record.owner == "folder" and record.current == version.number and has_moved(record):
                # The watcher has yet to see it, or to see that it has stopped changing.
                raise Unavailable(
                    f"the folder of {record.name!r} has just changed; try again in a moment"
                ) from None
            raise


def submit(pool: ThreadPoolExecutor, call: Callable[[], object]) -> "Future[object]":
    """Raises Unavailable once the pool is shut down."""
    try:
        return pool.submit(call)
    except RuntimeError as error:
        raise Unavailable("the server is shutting down") from error


def has_moved(record: NameRecord) -> bool:
    """Whether a name's folder looks otherwise than when it was last acted upon."""
    return record.path is not None and (
        record.signature is None or signature_of(record.path) != record.signature
    )
