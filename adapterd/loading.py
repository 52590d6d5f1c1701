"""Loading what somebody asks for by name: at run time, at its first use, and again after a restart.

Every method waits for disk and network in the caller's thread.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from adapterd.adapter import Adapter
from adapterd.catalog import Catalog
from adapterd.changes import NameChanges, located
from adapterd.core import AdapterId
from adapterd.errors import Conflict, InvalidRequest, ModelNotFound, OtherContent
from adapterd.lookup import Lookup, why_not_served
from adapterd.model_name import BASE_ALIAS, is_adapter_name, shown
from adapterd.names import NameRecord, Owner
from adapterd.reading import AdapterReader, Files
from adapterd.readings import has_moved
from adapterd.sources.source import Source, hashes_from, parse_declared, parse_source

_logger = logging.getLogger(__name__)


class Loader:
    def __init__(self, catalog: Catalog, changes: NameChanges, reader: AdapterReader, lookup: Lookup) -> None:
        self._catalog = catalog
        self._changes = changes
        self._reader = reader
        self._lookup = lookup

    def load(
        self,
        name: str,
        source: Path | str,
        *,
        inplace: bool,
        sha256: object = None,
        then: Callable[[str], None] | None = None,
    ) -> AdapterId:
        """Read `source` in this thread and make it `name`'s current version; requests from now on use it.

        The same content again changes nothing. Without `inplace` other content under a name that is served is
        OtherContent. `then` is called in the name's turn; an error of its own undoes the load. A relative path is
        looked for below each adapter directory; one that is not below any of them is an InvalidRequest.

        Raises AdapterRefused for an adapter that cannot be applied, or whose files are not those `sha256` declares,
        and Forbidden, SourceMissing or SourceFailed for one that cannot be had; then the version before serves on.
        Errors speak of the fields `name` and `source`, whatever the caller's own are called.
        """
        if not is_adapter_name(name):
            raise InvalidRequest(
                f"{shown(name)} is no adapter name: letters, digits, '.', '_' and '-', at most 128",
                param="name",
            )
        if name in (self._lookup.base_name, BASE_ALIAS):
            raise Conflict(f"{name!r} is the base's own name", param="name")
        parsed, hashes = parse_declared(str(source), sha256)
        record = self._catalog.record(name)
        if record.owner == "manifest" and not parsed.is_local and record.source != str(parsed):
            raise self._lookup.owned_by_manifest(name)
        files = self._reader.obtain(parsed, hashes)
        with self._changes.of(name) as record, self._changes.undone_on_error(record):
            adapter_id = self._take(record, parsed, files, inplace=inplace)
            if then is not None:
                then(name)
        return adapter_id

    def _take(self, record: NameRecord, source: Source, files: Files, *, inplace: bool) -> AdapterId:
        """Read `files`, which `source` asked for, and publish them unless the name serves them already."""
        name = record.name
        if record.owner == "manifest" and record.path != files.path:
            raise self._lookup.owned_by_manifest(name)
        adapter = self._reader.read_files(name, files)
        served = record.current_version
        if served is not None and served.id != adapter.id and not inplace:
            raise OtherContent(f"the adapter {name!r} is already loaded with other content", param="name")
        if served is not None and (not inplace or (record.owner == "manifest" and served.id == adapter.id)):
            return served.id
        if record.owner == "manifest":
            raise self._lookup.owned_by_manifest(name)
        is_watched = files.path == self._reader.watched(name)
        owner: Owner = "folder" if is_watched else "runtime"
        record = replace(located(record, files, source), owner=owner)
        if is_watched:
            # Whoever may write the folder may change it: what was declared holds for this load.
            record = replace(record, source=None, sha256=None)
        self._changes.publish(record, adapter, source=files.source)
        return adapter.id

    def update(self, name: str, source: str | None, *, sha256: object) -> None:
        """Read a name's source again, or from now on another one; requests use it once this returns.

        Also of a name that was refused. Raises what `load` raises.
        """
        record = self._lookup.known(name)
        if source is None and record.path is None:  # the manifest's, which tries again by itself
            raise why_not_served(record, param="name")
        if source is None and sha256 is None:
            self._read_source_again(record)
        else:
            asked = record.source or str(record.path) if source is None else source
            self.load(name, asked, inplace=True, sha256=sha256)

    def _read_source_again(self, record: NameRecord) -> None:
        files = self._files_of(record)
        with self._changes.of(record.name) as now:
            if now.owner != record.owner or now.source != record.source:
                raise Conflict(f"the adapter {record.name!r} was just given another source", param="name")
            adapter = self._reader.read_files(now.name, files)
            self._changes.publish(replace(now, signature=files.signature), adapter, source=files.source)

    def load_first(self, name: str, source: Source) -> Adapter:
        """Make a name that means nothing mean `source`, for a request that asks for it.

        Raises ModelNotFound, reading nothing, for the name of a watched folder that was unloaded: it stays out.
        """
        if name == BASE_ALIAS:
            raise ModelNotFound(f"{name!r} is the base's own name")
        _refuse_unloaded(self._catalog.record(name))
        files = self._reader.obtain(source, hashes_from(None))
        with self._changes.of(name) as record:
            _refuse_unloaded(record)
            adapter = self._reader.read_files(name, files)
            if record.state == "ABSENT":
                record = replace(located(record, files, source), owner="resolver")
                self._changes.publish(record, adapter, source=files.source)
        return adapter

    def reload(self, name: str) -> None:
        """Read again what was loaded before the restart, since its files are others now, or the base is.

        Raises nothing: called in a pool, where nobody would hear of it.
        """
        record = self._catalog.record(name)
        try:
            self._reload(record)
        except Exception as error:  # a full disk, say
            _logger.exception("adapter %s: what its source holds now could not be taken over", name)
            self._changes.give_up(name, record.owner, error)

    def _reload(self, record: NameRecord) -> None:
        name = record.name
        files: list[Files] = []

        def read() -> Adapter:
            files.append(self._files_of(record))
            return self._reader.read_files(name, files[0])

        result = self._reader.try_read(name, read)
        with self._changes.of(name) as now:
            if now.owner == record.owner and now.source == record.source:
                found = files[0] if files else None
                signature = now.signature if found is None else found.signature
                source = None if found is None else found.source
                self._changes.settle(replace(now, signature=signature), result, source=source)

    def _files_of(self, record: NameRecord) -> Files:
        """The files that a name's source holds now."""
        source, _ = parse_source(record.source or str(record.path))
        return self._reader.obtain(source, hashes_from(record.sha256))


def _refuse_unloaded(record: NameRecord) -> None:
    if record.state == "ABSENT" and record.owner not in (None, "resolver"):
        raise ModelNotFound(
            f"the adapter {record.name!r} was unloaded; it is served again once its folder changes",
            param="model",
        )


def is_stale(record: NameRecord) -> bool:
    """Whether a name's folder has changed, or it has to be read again for another base."""
    return record.signature is None if is_remote(record) else has_moved(record)


def is_remote(record: NameRecord) -> bool:
    return record.source is not None and not parse_source(record.source)[0].is_local
