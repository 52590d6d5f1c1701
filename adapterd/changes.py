"""Changes of names: those of one name take turns, and each is on disk before anyone sees it."""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

from adapterd.adapter import Adapter
from adapterd.catalog import Catalog
from adapterd.errors import AdapterdError
from adapterd.names import NameRecord, Owner
from adapterd.reading import Files
from adapterd.sources.source import Source, hashes_text

_logger = logging.getLogger(__name__)


class NameChanges:
    """Whoever changes a name does so `of` it, with the record that holds until the block is left."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        # One of a fixed number of locks per name: a flood of names costs nothing.
        self._locks = tuple(threading.Lock() for _ in range(64))

    @contextlib.contextmanager
    def of(self, name: str) -> Iterator[NameRecord]:
        with self._locks[hash(name) % len(self._locks)]:
            yield self._catalog.record(name)

    @contextlib.contextmanager
    def undone_on_error(self, before: NameRecord) -> Iterator[None]:
        """In the turn of a name: after an error it means what it meant before. Numbers that were given stay given."""
        try:
            yield
        except AdapterdError:
            now = self._catalog.record(before.name)
            if now != before:
                self._catalog.put(replace(before, next_number=now.next_number))
            raise

    def publish(self, record: NameRecord, adapter: Adapter, *, source: str | None = None) -> None:
        """Make `adapter` what the name points to. `source`: where it was downloaded from."""
        record = record.with_version(adapter, now=time.time(), source=source)
        self._catalog.put(record, adapter)
        _logger.info("adapter %s: version %d, %s", record.name, record.current, adapter.id.digest[:12])

    def settle(self, record: NameRecord, result: Adapter | str, *, source: str | None = None) -> None:
        """End a reading in the background: serve what it gave, or keep the reason why it gave nothing."""
        if isinstance(result, str):
            _logger.warning("%s%s", result, " (the version before serves on)" if record.current else "")
            self._catalog.put(replace(record, error=result, is_loading=False))
        else:
            self.publish(record, result, source=source)

    def give_up(self, name: str, owner: Owner | None, error: Exception) -> None:
        """End a reading in the background that could not even be settled, while `name` is still `owner`s: say why.

        In memory alone, since the disk may be what failed. The version before, if there is one, serves on.
        """
        with self.of(name) as record:
            if record.owner == owner:
                reason = f"adapter {name!r} could not be taken over: {type(error).__name__}: {error}"
                self._catalog.put(replace(record, error=reason, is_loading=False), save=False)


def located(record: NameRecord, files: Files, source: Source) -> NameRecord:
    """The same as loaded from `files`, which is what `source` asked for."""
    return replace(
        record,
        path=files.path,
        root=files.root,
        signature=files.signature,
        source=str(files.path if source.is_local else source),
        sha256=hashes_text(files.hashes),
    )
