"""What the manifest says, made true: at the start, and whenever the file changes. A failure is tried again.

Polling, as for folders: it works alike for a file that is edited and for the link swaps of a Kubernetes ConfigMap.
A manifest that cannot be read changes nothing; the one before holds.
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from adapterd.adapter import Adapter
from adapterd.catalog import Catalog
from adapterd.changes import NameChanges, located
from adapterd.errors import ConfigError
from adapterd.manifest import Declared, Manifest, ManifestAdapter, read_manifest
from adapterd.names import NameRecord
from adapterd.polling import Poller
from adapterd.reading import AdapterReader, Files
from adapterd.retries import Retries
from adapterd.watch import signature_of

_logger = logging.getLogger(__name__)

_Contents = tuple[tuple[Adapter, Files], Mapping[str, tuple[Adapter, Files]]]
"""Of one name: the current one, and by alias those that have their own."""


@dataclass(frozen=True)
class ManifestStatus:
    """`sha256` is that of the file that holds now; `error` says why a newer one does not."""

    path: Path
    sha256: str
    error: str | None


class ManifestOwner:
    """Owns the names that the file at `path` lists. Polls in a thread of its own, from `start` on."""

    def __init__(
        self,
        path: Path,
        base_name: str,
        catalog: Catalog,
        changes: NameChanges,
        reader: AdapterReader,
        pool: ThreadPoolExecutor,
        *,
        poll_seconds: float,
    ) -> None:
        """Raises ConfigError if the manifest cannot be read now."""
        self.path = path
        self._base_name = base_name
        self._catalog = catalog
        self._changes = changes
        self._reader = reader
        self._pool = pool
        self._stamp = _stamp(path)
        self._manifest = read_manifest(path)
        self._error: str | None = None
        self._seen: dict[str, object] = {}
        self._in_flight: set[str] = set()
        self._retries = Retries.between_polls(poll_seconds)
        self._lock = threading.Lock()
        self._poller = Poller(self._poll, poll_seconds, name="manifest-watch")

    def status(self) -> ManifestStatus:
        return ManifestStatus(self.path, self._manifest.sha256, self._error)

    def start(self) -> None:
        """Claim every name, begin with what is not as it should be, and keep watching."""
        self._converge(first=True)
        self._poller.start()

    def stop(self) -> None:
        """Harmless if never started."""
        self._poller.stop()

    def _poll(self) -> None:
        self._read_if_changed()
        self._converge(first=False)

    def _read_if_changed(self) -> None:
        """Read the file again if it has changed, or could not be read."""
        stamp = _stamp(self.path)
        if stamp == self._stamp and self._error is None:
            return
        try:
            manifest = read_manifest(self.path)
        except ConfigError as error:
            if error.message != self._error:
                _logger.error("%s; the manifest before holds", error.message)
            self._error = error.message
            return
        if manifest.sha256 != self._manifest.sha256:
            _logger.info(
                "the manifest has changed: %d adapters, %s", len(manifest.adapters), manifest.sha256[:12]
            )
            self._retries.forget_all()
        self._manifest, self._error, self._stamp = manifest, None, stamp

    def _converge(self, *, first: bool) -> None:
        manifest = self._manifest
        for record in self._catalog.records():
            if record.owner == "manifest" and record.name not in manifest.adapters:
                self._drop(record.name, manifest)
        for adapter in manifest.adapters.values():
            if self._is_due(adapter, first=first):
                with self._lock:
                    self._in_flight.add(adapter.name)
                self._catalog.update(adapter.name, _claimed)
                with contextlib.suppress(RuntimeError):  # the pool is shut down
                    self._pool.submit(self._attempt, adapter)

    def _is_due(self, adapter: ManifestAdapter, *, first: bool) -> bool:
        """Whether an entry has yet to be acted upon: it is new or has changed, or its folder has and is at rest."""
        record = self._catalog.record(adapter.name)
        with self._lock:
            if adapter.name in self._in_flight:
                return False
        if self._retries.is_resting(adapter.name):
            return False
        if record.owner != "manifest" or record.declared != adapter.text:
            return True
        if self._retries.num_failures(adapter.name):
            return True
        if record.current is None or record.signature is None:
            return True
        if record.source is None or not adapter.current.source.is_local or record.path is None:
            return False
        signature = signature_of(record.path)
        settled = first or (signature and signature.sealed) or self._seen.get(adapter.name) == signature
        self._seen[adapter.name] = signature
        return signature is not None and signature != record.signature and bool(settled)

    def _attempt(self, adapter: ManifestAdapter) -> None:
        try:
            if self._declare(adapter) is None:
                self._retries.forget(adapter.name)
            else:
                self._retries.failed(adapter.name)
        except Exception as error:
            self._retries.failed(adapter.name)
            _logger.exception("adapter %s: what the manifest says could not be done", adapter.name)
            self._changes.give_up(adapter.name, "manifest", error)
        finally:  # who sees that it is no more in flight sees how it ended
            with self._lock:
                self._in_flight.discard(adapter.name)

    def _declare(self, wanted: ManifestAdapter) -> str | None:
        """Make one name what its entry says; why that is not possible."""
        result = self._read_all(wanted)
        with self._changes.of(wanted.name) as record:
            if self._manifest.adapters.get(wanted.name) != wanted:
                return None  # another entry holds by now, and is due
            record = replace(record, owner="manifest", declared=wanted.text)
            if isinstance(result, str):
                record = replace(record, source=str(wanted.current.source))
                self._changes.settle(record, result)
                return result
            (adapter, files), others = result
            record = located(record, files, wanted.current.source)
            now = time.time()
            record, number = record.knowing(adapter, now=now, source=files.source)
            aliases = {alias: number for alias, what in wanted.aliases.items() if what is None}
            for alias, (other, other_files) in others.items():
                record, aliases[alias] = record.knowing(other, now=now, source=other_files.source)
            record = replace(record.with_aliases(aliases), is_pinned=wanted.is_pinned)
            self._changes.publish(record, adapter, source=files.source)
        return None

    def _read_all(self, wanted: ManifestAdapter) -> _Contents | str:
        """All that an entry names, or why one of it cannot be had."""

        def read(declared: Declared) -> tuple[Adapter, Files]:
            files = self._reader.obtain(declared.source, declared.hashes)
            return self._reader.read_files(wanted.name, files), files

        if wanted.name == self._base_name:
            return (
                f"adapter {wanted.name!r}: that is the base's own name; call it something else in {self.path}"
            )

        def read_all() -> _Contents:
            others = {alias: read(what) for alias, what in wanted.aliases.items() if what is not None}
            return read(wanted.current), others

        return self._reader.try_read(wanted.name, read_all)

    def _drop(self, name: str, manifest: Manifest) -> None:
        with self._changes.of(name) as record:
            if record.owner == "manifest" and name not in manifest.adapters:
                _logger.info("adapter %s: the manifest names it no more", name)
                self._catalog.put(record.absent().ownerless())
        self._retries.forget(name)


def _claimed(record: NameRecord) -> NameRecord:
    """In memory alone: the name is the manifest's from now on, and on its way if it means nothing yet."""
    is_loading = record.is_loading or record.state == "ABSENT"
    return replace(record, owner="manifest", is_loading=is_loading)


def _stamp(path: Path) -> object:
    """Changes whenever the file does, also where it is a link to a link that is swapped."""
    try:
        status = path.stat()
        return os.path.realpath(path), status.st_ino, status.st_size, status.st_mtime_ns
    except OSError:
        return None
