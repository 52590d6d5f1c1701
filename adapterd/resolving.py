"""What the `model` of a request names now. Reads memory alone: weights that must be read or fetched first are begun."""

from adapterd.adapter import Adapter
from adapterd.catalog import Catalog
from adapterd.composition import ResolvedModel, compose, resolve_base
from adapterd.core import BaseSpec
from adapterd.errors import BeingRead
from adapterd.first_use import FirstUse
from adapterd.lookup import Lookup, version_of, why_not_served
from adapterd.model_name import Part, parse_model_name
from adapterd.readings import Readings


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

    def resolve_waiting(self, model: str, timeout: float) -> ResolvedModel:
        """The same, waiting for weights that have to be read first, at most `timeout` seconds for each."""
        kept: list[object] = []  # until it is resolved: memory may be too small to keep it for nobody
        while True:
            try:
                return self.resolve(model)
            except BeingRead as reading:
                kept.append(reading.done.result(timeout))

    def _find(self, part: Part, model: str) -> Adapter:
        record = self._catalog.record(part.name)
        if record.state == "ABSENT":
            search = self._first_use.begin(part.name)
            if search is None:
                raise self._lookup.not_found(model, near=part.name)
            raise BeingRead(
                f"the adapter {part.name!r} is being fetched; try again in a moment",
                name=part.name,
                done=search,
            )
        version = record.current_version
        if version is None:
            raise why_not_served(record)
        if part.version is not None:
            version = version_of(record, part.version)
        adapter = self._catalog.in_memory(version.id)
        if adapter is None:
            raise BeingRead(
                f"the weights of {part.name!r} are being read; try again in a moment",
                name=part.name,
                done=self._readings.begin(version),
            )
        return adapter
