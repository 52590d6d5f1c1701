"""What the `model` of a request names now. Reads memory alone: weights that must be read or fetched first are begun."""

from dataclasses import dataclass
from pathlib import Path

from adapterd.adapter import Adapter
from adapterd.catalog import Catalog
from adapterd.composition import (
    ResolvedModel,
    add_up,
    canonical_model,
    compose,
    mix_digest,
    resolve_base,
)
from adapterd.core import BASE_ADAPTER, BaseSpec
from adapterd.errors import BeingRead
from adapterd.first_use import FirstUse
from adapterd.lookup import Lookup, version_of, why_not_served
from adapterd.model_name import Part, parse_model_name
from adapterd.names import Version
from adapterd.readings import Readings


@dataclass(frozen=True)
class ModelDescription:
    """What a `model` string names, without the weights. `path` and `loaded_at` (Unix time) are of one adapter: None
    for the base, and for what is composed of several."""

    model: str
    digest: str
    path: Path | None = None
    loaded_at: float | None = None


class ModelResolver:
    def __init__(
        self, spec: BaseSpec, catalog: Catalog, lookup: Lookup, readings: Readings, first_use: FirstUse
    ) -> None:
        self._spec = spec
        self._catalog = catalog
        self._lookup = lookup
        self._readings = readings
        self._first_use = first_use

    def resolve(self, model: str) -> ResolvedModel:
        """Raises ModelNotFound, Unavailable (loading), BeingRead, AdapterRefused, InvalidRequest."""
        parts = parse_model_name(model, base_name=self._spec.name)
        if not parts:
            return resolve_base(self._spec)
        return compose(self._spec, parts, [self._find(part, model) for part in parts])

    def describe(self, model: str) -> ModelDescription:
        """The same by name alone: nothing is read, fetched or searched for, and nothing counts as used."""
        parts = parse_model_name(model, base_name=self._spec.name)
        if not parts:
            return ModelDescription(self._spec.name, BASE_ADAPTER.digest)
        versions = [self._version(part, model) for part in parts]
        name = canonical_model(self._spec.name, parts)
        digest = mix_digest(add_up(parts, [version.id for version in versions]))
        if len(parts) > 1:
            return ModelDescription(name, digest)
        (part,), (version,) = parts, versions
        if part.version is not None:
            return ModelDescription(name, digest, version.path, version.first_loaded_at)
        record = self._catalog.record(part.name)
        return ModelDescription(name, digest, record.path, record.loaded_at)

    def resolve_waiting(self, model: str, timeout: float) -> ResolvedModel:
        """The same, waiting for weights that have to be read first, at most `timeout` seconds for each."""
        kept: list[object] = []  # until it is resolved: memory may be too small to keep it for nobody
        while True:
            try:
                return self.resolve(model)
            except BeingRead as reading:
                kept.append(reading.done.result(timeout))

    def _find(self, part: Part, model: str) -> Adapter:
        if self._catalog.record(part.name).state == "ABSENT":
            search = self._first_use.begin(part.name)
            if search is not None:
                raise BeingRead(
                    f"the adapter {part.name!r} is being fetched; try again in a moment",
                    name=part.name,
                    done=search,
                )
        version = self._version(part, model)
        adapter = self._catalog.in_memory(version.id)
        if adapter is None:
            raise BeingRead(
                f"the weights of {part.name!r} are being read; try again in a moment",
                name=part.name,
                done=self._readings.begin(version),
            )
        return adapter

    def _version(self, part: Part, model: str) -> Version:
        record = self._catalog.record(part.name)
        if record.state == "ABSENT":
            raise self._lookup.not_found(model, near=part.name)
        if record.current_version is None:
            raise why_not_served(record)
        return record.current_version if part.version is None else version_of(record, part.version)
