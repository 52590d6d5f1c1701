"""What watched folders mean for names: a folder's name is the adapter's, unless somebody else owns that name."""

from dataclasses import replace
from pathlib import Path

from adapterd.catalog import Catalog
from adapterd.changes import NameChanges
from adapterd.names import NameRecord
from adapterd.reading import AdapterReader
from adapterd.watch import Found, signature_of


class FolderOwner:
    """`folders.FolderNames`, as the watcher knows it."""

    def __init__(self, catalog: Catalog, changes: NameChanges, reader: AdapterReader) -> None:
        self._catalog = catalog
        self._changes = changes
        self._reader = reader

    def wants(self, found: Found) -> bool:
        def expect(record: NameRecord) -> NameRecord:
            if record.owner not in (None, "folder"):
                return record
            known = record.owner == "folder" and record.path == found.path
            if known and record.signature == found.signature:
                return record
            is_loading = record.is_loading or record.state == "ABSENT"
            return replace(record, owner="folder", path=found.path, root=found.root, is_loading=is_loading)

        return self._catalog.update(found.name, expect)

    def take(self, found: Found) -> None:
        """Files that moved under the reader are left for the next poll."""
        with self._changes.of(found.name):
            result = self._reader.try_read(
                found.name, lambda: self._reader.read(found.name, found.signature.real_path, found.root)
            )
            record = self._catalog.record(found.name)
            if record.owner == "folder" and signature_of(found.path) == found.signature:
                self._changes.settle(replace(record, signature=found.signature), result)

    def give_up(self, name: str, error: Exception) -> None:
        self._changes.give_up(name, "folder", error)

    def folder_names(self) -> dict[str, Path]:
        return {
            record.name: record.root
            for record in self._catalog.records()
            if record.owner == "folder" and record.root is not None
        }

    def folder_gone(self, name: str) -> None:
        with self._changes.of(name) as record:
            if record.owner == "folder":
                self._catalog.put(record.absent().ownerless())
