"""Watching the adapter directories: which folders are new, changed or gone, and when one is fit to be read.

Looks and decides when; what to do about a name, and the reading itself, is `folder_names.py`'s.
"""

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from adapterd.polling import Poller
from adapterd.retries import Retries
from adapterd.watch import Found, Scan, Signature, scan

_logger = logging.getLogger(__name__)

# A folder that is replaced by two renames is missing for an instant.
_POLLS_UNTIL_GONE = 2


class FolderNames(Protocol):
    """What the watcher needs of the registry."""

    def wants(self, found: Found) -> bool:
        """Whether this folder, as it looks now, has yet to be acted upon."""
        ...

    def take(self, found: Found) -> None:
        """Read it and serve it, or record why not. Called in the pool."""
        ...

    def give_up(self, name: str, error: Exception) -> None:
        """`take` raised: have whoever asks for the name told why, until a later try has done better."""
        ...

    def folder_names(self) -> dict[str, Path]:
        """Name -> root of every name that a watched folder owns."""
        ...

    def folder_gone(self, name: str) -> None: ...


class FolderWatcher:
    """Polls `roots` and the folders of `named` in a thread of its own, from `start` on. `pool` does the reading."""

    def __init__(
        self,
        roots: Sequence[Path],
        names: FolderNames,
        pool: ThreadPoolExecutor,
        *,
        poll_seconds: float,
        named: Mapping[str, Path] = MappingProxyType({}),
    ) -> None:
        self._roots = tuple(roots)
        self._named = dict(named)
        self._names = names
        self._pool = pool
        self._seen: dict[str, Signature] = {}
        self._polls_missing: dict[str, int] = {}
        self._in_flight: set[str] = set()
        self._reported: set[str] = set()
        self._retries = Retries.between_polls(poll_seconds)
        self._poller = Poller(self._poll, poll_seconds, name="adapter-watch")

    def start(self) -> None:
        """Look once in this thread, so that every folder there is known, then keep watching."""
        self._poll(first=True)
        self._poller.start()

    def stop(self) -> None:
        """Harmless if never started."""
        self._poller.stop()

    def _poll(self, *, first: bool = False) -> None:
        result = scan(self._roots, self._named)
        for problem in set(result.problems) - self._reported:
            _logger.warning("%s", problem)
        self._reported = set(result.problems)
        for found in result.found.values():
            self._consider(found, first=first)
        self._miss(result)

    def _consider(self, found: Found, *, first: bool) -> None:
        """Have a folder read once it has stopped changing, or says itself that it is whole."""
        settled = first or found.signature.sealed or self._seen.get(found.name) == found.signature
        self._seen[found.name] = found.signature
        if found.name in self._in_flight or self._retries.is_resting(found.name):
            return
        if self._names.wants(found) and settled:
            self._in_flight.add(found.name)
            self._pool.submit(self._read, found)

    def _read(self, found: Found) -> None:
        try:
            self._names.take(found)
            self._retries.forget(found.name)
        except Exception as error:  # the disk of --state is full, say: a later try may do better
            seconds = self._retries.failed(found.name)
            _logger.exception(
                "adapter %s: its folder could not be taken over; the next try is in %g s", found.name, seconds
            )
            self._names.give_up(found.name, error)
        finally:
            self._in_flight.discard(found.name)

    def _miss(self, result: Scan) -> None:
        for name, root in self._names.folder_names().items():
            if root in result.unreadable or name in result.found:
                self._polls_missing.pop(name, None)
                continue
            missing = self._polls_missing.get(name, 0) + 1
            self._polls_missing[name] = missing
            if missing >= _POLLS_UNTIL_GONE:
                _logger.info("adapter %s: its folder is gone", name)
                self._polls_missing.pop(name)
                self._retries.forget(name)
                self._names.folder_gone(name)
