"""Names as people give them: the record, or the error that says what exists and who owns it."""

from pathlib import Path

from adapterd.catalog import Catalog
from adapterd.errors import AdapterdError, AdapterRefused, Conflict, ModelNotFound, Unavailable
from adapterd.model_name import nearest_names, shown
from adapterd.names import NameRecord, Version


class Lookup:
    """`manifest` is the file that owns names, if there is one. Reads memory alone."""

    def __init__(self, catalog: Catalog, base_name: str, manifest: Path | None) -> None:
        self._catalog = catalog
        self.base_name = base_name
        self._manifest = manifest

    def known(self, name: str) -> NameRecord:
        """A name that is there, if only as one that was refused. Raises ModelNotFound."""
        record = self._catalog.record(name)
        if record.state == "ABSENT":
            raise self.not_found(name, near=name, param="name")
        return record

    def served(self, name: str) -> tuple[NameRecord, Version]:
        """Raises ModelNotFound, or why the name means no version."""
        record = self.known(name)
        if record.current_version is None:
            raise why_not_served(record, param="name")
        return record, record.current_version

    def changeable(self, name: str) -> tuple[NameRecord, Version]:
        """The same, for who means to change it. Raises Conflict for what the manifest owns."""
        if self.known(name).owner == "manifest":
            raise self.owned_by_manifest(name)
        return self.served(name)

    def owned_by_manifest(self, name: str) -> Conflict:
        return Conflict(
            f"the adapter {name!r} is owned by the manifest {self._manifest}; change it there",
            param="name",
            code="owned_by_manifest",
        )

    def not_found(self, wanted: str, *, near: str, param: str = "model") -> ModelNotFound:
        known = [record.name for record in self._catalog.records() if record.state != "ABSENT"]
        names = nearest_names(near, known)
        exists = f"its adapters are {', '.join(names)}" if names else "no adapter is loaded"
        if len(names) < len(known):
            exists += f" and {len(known) - len(names)} more"
        return ModelNotFound(
            f"the model {shown(wanted)} does not exist: the base is {self.base_name!r}, and {exists}",
            param=param,
        )


def why_not_served(record: NameRecord, *, param: str = "model") -> AdapterdError:
    """Of a name that is there and means no version."""
    if record.error is not None:
        return AdapterRefused(record.error, param=param)
    return Unavailable(f"the adapter {record.name!r} is still loading; try again in a moment")


def version_of(record: NameRecord, selector: str) -> Version:
    """The version that NAME@selector means. Raises ModelNotFound, naming those there are."""
    version = record.find(selector)
    if version is None or record.current is None:
        current = record.versions[record.current].id.digest[:12] if record.current is not None else None
        known = [str(number) for number in sorted(record.versions)] + sorted(record.aliases)
        raise ModelNotFound(
            f"the adapter {record.name!r} has no version {selector!r} here; its current version is"
            f" {current!r}, number {record.current}, and it has {', '.join(known)}",
            param="model",
        )
    return version
