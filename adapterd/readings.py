"""Weights that a request needs and that are not in memory: read once, however many wait for them."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from adapterd.adapter import Adapter
from adapterd.catalog import Catalog
from adapterd.core import AdapterId
from adapterd.errors import AdapterRefused, Unavailable
from adapterd.names import NameRecord, Version
from adapterd.reading import AdapterReader
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
        self._lock = threading.Lock()
        self._under_way: dict[AdapterId, Future[object]] = {}

    def begin(self, version: Version) -> "Future[object]":
        """The reading of a version that is under way, or a new one. Raises Unavailable at shutdown."""
        with self._lock:
            done = self._under_way.get(version.id)
            if done is None:
                pool = self._fetchers if self._reader.needs_download(version) else self._pool
                done = self._under_way[version.id] = submit(pool, lambda: self._read(version))
            return done

    def _read(self, version: Version) -> Adapter:
        try:
            return self.weights_of(version)
        finally:
            with self._lock:
                self._under_way.pop(version.id, None)

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
