"""Names and what they mean now: resolving a model, holding its weights, moving names from version to version.

What is known and what is in memory lies in the catalog (`catalog.py`). Who may change a name is one of four: a
watched folder (`folder_names.py`), the manifest (`manifest_owner.py`), a request for what nobody registered
(`first_use.py`), or a caller of the methods below (`loading.py`). Changes of one name take turns; requests never
wait for them.
"""

import logging
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from adapterd.adapter import Adapter
from adapterd.catalog import Catalog, VersionUse
from adapterd.changes import NameChanges
from adapterd.composition import ResolvedModel
from adapterd.core import AdapterEvents, AdapterId, AdapterMix, LoadedName, RegistryStats
from adapterd.database import Database
from adapterd.device_pins import DevicePins
from adapterd.entries import AdapterEntry
from adapterd.errors import Conflict, ModelNotFound
from adapterd.first_use import FirstUse
from adapterd.folder_names import FolderOwner
from adapterd.folders import FolderWatcher
from adapterd.loading import Loader, is_remote, is_stale
from adapterd.lookup import Lookup, version_of, why_not_served
from adapterd.manifest_owner import ManifestOwner, ManifestStatus
from adapterd.model_name import shown
from adapterd.names import NameRecord
from adapterd.reading import AdaptedBase, AdapterReader
from adapterd.readings import Readings
from adapterd.resolving import ModelDescription, ModelResolver
from adapterd.sources.places import AdapterPlaces
from adapterd.versions import Lease

_logger = logging.getLogger(__name__)

PIN_SECONDS = 30.0
"""How long a pin waits for the engine's word; weights may have to be read first."""

_NUM_LOADERS = 4
_NUM_FETCHERS = 8
_NUM_SEARCHERS = 8


class AdapterRegistry:
    """All adapters of one base. Every method may be called from any thread; those that say so wait for a disk."""

    def __init__(
        self,
        base: AdaptedBase,
        places: AdapterPlaces,
        *,
        poll_seconds: float = 1.0,
        on_drop: Callable[[AdapterId], None] = lambda adapter_id: None,
        check: Callable[[Adapter], None] = lambda adapter: None,
        database: Database | None = None,
        host_bytes: int | None = None,
        events: AdapterEvents | None = None,
        pins: DevicePins | None = None,
    ) -> None:
        """`check` raises AdapterRefused for an adapter that can never fit; `on_drop` hears of versions that left.

        Without a `database` nothing is kept over a restart, without `host_bytes` all that is read stays in
        memory, without `pins` a pin is one of host memory alone. Raises ConfigError if a watched place is no
        directory, or if the manifest or a pattern of `resolve` cannot be understood.
        """
        places, spec = places.found(), base.spec
        self._reader = AdapterReader(base, places, check=check, events=events)
        self._pins = pins
        self._database = Database(None) if database is None else database
        self._catalog = Catalog(
            self._database,
            host_bytes=host_bytes,
            on_drop=on_drop,
            on_room=lambda: self._readings.use_room(),
            on_pins=self._follow_pins,
            events=events,
        )
        self._changes = NameChanges(self._catalog)
        self._lookup = Lookup(self._catalog, spec.name, places.manifest)
        rooms = (self._catalog, self._changes, self._reader)
        self._loader = Loader(*rooms, self._lookup)
        self._pool = ThreadPoolExecutor(_NUM_LOADERS, thread_name_prefix="adapter-load")
        self._fetchers = ThreadPoolExecutor(_NUM_FETCHERS, thread_name_prefix="adapter-fetch")
        # Apart from those: whatever names clients ask for, the manifest and weights that are known get through.
        self._searchers = ThreadPoolExecutor(_NUM_SEARCHERS, thread_name_prefix="adapter-search")
        self._readings = Readings(self._catalog, self._reader, self._pool, self._fetchers)
        self._watcher = FolderWatcher(
            places.directories,
            FolderOwner(*rooms),
            self._pool,
            poll_seconds=poll_seconds,
            named=places.named,
        )
        first_use = FirstUse(places.resolve, self._loader.load_first, self._searchers)
        self._resolver = ModelResolver(spec, self._catalog, self._lookup, self._readings, first_use)
        self._manifest = None
        if places.manifest is not None:
            self._manifest = ManifestOwner(
                places.manifest, spec.name, *rooms, self._fetchers, poll_seconds=poll_seconds
            )
        for record in self._database.load():
            self._catalog.put(self._restored(record), save=False)

    def start(self) -> None:
        """Look at manifest and directories once, load what is new there in the background, and keep watching."""
        if self._pins is not None:
            self._pins.start()
            self._pins.follow()
        for record in self._catalog.records():
            if record.owner in ("runtime", "resolver") and is_stale(record):
                pool = self._fetchers if is_remote(record) else self._pool
                pool.submit(self._loader.reload, record.name)
        if self._manifest is not None:
            self._manifest.start()
        self._watcher.start()

    def stop(self) -> None:
        """Stop watching and loading; what is loaded stays. Harmless if never started."""
        self._watcher.stop()
        if self._manifest is not None:
            self._manifest.stop()
        self._readings.close()
        for pool in (self._pool, self._fetchers, self._searchers):
            pool.shutdown(wait=True, cancel_futures=True)
        if self._pins is not None:
            self._pins.stop()
        self._database.close()

    def wait_loaded(self, timeout: float) -> bool:
        """Wait until no name is LOADING, at most `timeout` seconds; whether that came about."""
        return self._catalog.wait_for_names(
            lambda records: all(record.state != "LOADING" for record in records), timeout
        )

    # What a request asks

    def resolve(self, model: str) -> ResolvedModel:
        """What `model` names now. Touches no disk.

        Raises ModelNotFound, Unavailable (loading), BeingRead, AdapterRefused, InvalidRequest.
        """
        return self._resolver.resolve(model)

    def resolve_waiting(self, model: str, timeout: float) -> ResolvedModel:
        """The same, waiting for weights that have to be read first, at most `timeout` seconds for each."""
        return self._resolver.resolve_waiting(model, timeout)

    def describe(self, model: str) -> ModelDescription:
        """What `model` names now, without its weights: reads, fetches and searches for nothing.

        Raises ModelNotFound, Unavailable (loading), AdapterRefused, InvalidRequest.
        """
        return self._resolver.describe(model)

    def lease(self, mix: AdapterMix) -> Lease:
        """Hold the versions of a mix that `resolve` gave, for as long as its result is alive or another holds them."""
        return self._catalog.lease(mix)

    def weights(self, adapter_id: AdapterId) -> Adapter:
        """A leased version's matrices. Touches no disk. KeyError if nobody holds it, which is our own bug."""
        return self._catalog.held(adapter_id)

    # What an operator asks

    def load(
        self,
        name: str,
        source: Path | str,
        *,
        inplace: bool,
        sha256: object = None,
        pinned: bool = False,
    ) -> AdapterId:
        """Read a source and make it what `name` means, once this returns, and pin it. Raises what `Loader.load` and
        `pin` raise; then nothing is changed."""
        then = self._keep if pinned else None
        return self._loader.load(name, source, inplace=inplace, sha256=sha256, then=then)

    def update(self, name: str, source: str | None = None, *, sha256: object = None) -> AdapterEntry:
        """Read a name's source again, or from now on another one; requests use it once this returns."""
        self._loader.update(name, source, sha256=sha256)
        return self.entry(name)

    def unload(self, name: str) -> None:
        """Stop serving a name, or naming it as refused. Running requests keep their weights; a watched folder stays
        out until it changes."""
        with self._changes.of(name):
            record = self._lookup.known(name)
            if record.owner == "manifest":
                raise self._lookup.owned_by_manifest(name)
            if record.state == "LOADING":  # it would be there again when it has been read
                raise why_not_served(record, param="name")
            if record.owner != "folder":
                record = record.ownerless()
            self._catalog.put(record.absent())

    def forget(self, name: str) -> None:
        """Unload a name if it is served, and forget its versions, its aliases, and why it was refused."""
        with self._changes.of(name) as record:
            if not record.versions and record.state == "ABSENT":
                raise self._lookup.not_found(name, near=name, param="name")
            if record.owner == "manifest":
                raise self._lookup.owned_by_manifest(name)
            if record.owner != "folder":
                record = record.ownerless()
            self._catalog.put(record.absent().forgotten())

    def rollback(self, name: str, version: str | None = None) -> AdapterEntry:
        """Point a name to the version that was current before, or to `version`. May wait for a disk.

        A watched folder that holds the other version takes effect again when it changes.
        """
        with self._changes.of(name):
            record, _ = self._lookup.changeable(name)
            if version is not None:
                target = version_of(record, version)
            elif record.previous is not None:
                target = record.versions[record.previous]
            else:
                raise Conflict(
                    f"the adapter {name!r} has no version before {record.current} to return to", param="name"
                )
            moved = replace(record.pointed_to(target.number), loaded_at=time.time(), error=None)
            self._catalog.put(moved, self._readings.weights_of(target))
            _logger.info("adapter %s: back to version %d, %s", name, target.number, target.id.digest[:12])
        return self.entry(name)

    def alias(self, name: str, alias: str, version: str | None = None) -> AdapterEntry:
        """Make NAME@alias mean `version`, or the current one; requests see one or the other. May wait for a disk."""
        with self._changes.of(name):
            record, current = self._lookup.changeable(name)
            target = current if version is None else version_of(record, version)
            moved = record.with_alias(alias, target.number)
            self._catalog.put(moved, self._readings.weights_of(target))
        return self.entry(name)

    def unalias(self, name: str, alias: str) -> AdapterEntry:
        with self._changes.of(name):
            record, _ = self._lookup.changeable(name)
            if alias not in record.aliases:
                raise ModelNotFound(f"the adapter {name!r} has no alias {shown(alias)}", param="alias")
            self._catalog.put(record.without_alias(alias))
        return self.entry(name)

    def pin(self, name: str, *, pinned: bool = True) -> AdapterEntry:
        """Keep a name's current version in memory, whatever it will be; or no longer. May wait for a disk.

        Raises Overloaded where device memory has no room beside what is pinned; then nothing is changed.
        """
        with self._changes.of(name) as record, self._changes.undone_on_error(record):
            if pinned:
                self._keep(name)
            else:
                self._catalog.put(replace(self._lookup.changeable(name)[0], is_pinned=False))
        return self.entry(name)

    def _keep(self, name: str) -> None:
        """Pin a name in its turn."""
        record, current = self._lookup.changeable(name)
        self._catalog.put(replace(record, is_pinned=True), self._readings.weights_of(current))
        if self._pins is not None:
            self._pins.wait(current.id, PIN_SECONDS)

    def prefetch(self, name: str) -> AdapterEntry:
        """Have a name's current weights in host memory once this returns, and ask for them on the device: they come
        if the next step finds room there that nobody waits for, else with a request. May wait for a disk."""
        _, current = self._lookup.served(name)
        self._readings.weights_of(current)
        if self._pins is not None:
            self._pins.prefetch(current.id)
        return self.entry(name)

    def pinned(self) -> frozenset[AdapterId]:
        """The versions that pinned names mean now."""
        return self._catalog.pinned()

    def read(self, adapter_id: AdapterId) -> Adapter:
        """A version's weights, read if they are not in memory. Waits for a disk, or a network."""
        record = self._catalog.record(adapter_id.name)
        version = next((version for version in record.versions.values() if version.id == adapter_id), None)
        if version is None:
            raise ModelNotFound(f"this version of {adapter_id.name!r} is remembered no more")
        return self._readings.weights_of(version)

    def _follow_pins(self) -> None:
        if self._pins is not None:
            self._pins.follow()

    def use_of(self, adapter_id: AdapterId) -> VersionUse:
        """What memory a version takes, who holds it, and what it has done since the start."""
        return self._catalog.use_of(adapter_id)

    def is_on_disk(self, name: str, number: int) -> bool:
        """Whether a version that has left memory is read from here, rather than downloaded again."""
        version = self._catalog.record(name).versions.get(number)
        return version is not None and not self._reader.needs_download(version)

    def entry(self, name: str) -> AdapterEntry:
        """One name. Raises ModelNotFound."""
        return self._as_seen(self._lookup.known(name))

    def version_ids(self, name: str) -> tuple[AdapterId, ...]:
        """Every version that is remembered of a name, served or not."""
        return tuple(version.id for version in self._catalog.record(name).versions.values())

    def manifest(self) -> ManifestStatus | None:
        """Which manifest holds; None without one."""
        return None if self._manifest is None else self._manifest.status()

    def list(self) -> tuple[AdapterEntry, ...]:
        """Every name with its state, in alphabetical order."""
        records = sorted(self._catalog.records(), key=lambda record: record.name)
        return tuple(self._as_seen(record) for record in records if record.state != "ABSENT")

    def loaded(self, on_device: Collection[AdapterId]) -> tuple[LoadedName, ...]:
        """Every name and NAME@ALIAS that now means a version in host memory or one of these."""
        return self._catalog.loaded(on_device)

    def stats(self) -> RegistryStats:
        states, host, manifest = self._catalog.num_by_state(), self._catalog.host_memory(), self.manifest()
        return RegistryStats(
            num_ready=states["READY"],
            num_failed=states["FAILED"],
            num_behind=self._catalog.num_behind(),
            num_loading=states["LOADING"],
            host_bytes_total=host.max_bytes,
            host_bytes=host.num_bytes,
            num_host_hits=host.num_hits,
            num_host_misses=host.num_misses,
            num_host_evictions=host.num_evictions,
            num_reads=self._reader.num_reads,
            median_bytes=host.median_bytes,
            num_changes=host.num_changes,
            manifest_failed=manifest is not None and manifest.error is not None,
        )

    def check_integrity(self) -> None:
        """Books balance. Only while nothing is being loaded."""
        self._catalog.check_integrity()

    def _as_seen(self, record: NameRecord) -> AdapterEntry:
        version = record.current_version
        in_host_memory = version is not None and self._catalog.is_in_memory(version.id)
        return AdapterEntry.of(record, in_host_memory=in_host_memory)

    # Starting with what was known before

    def _restored(self, record: NameRecord) -> NameRecord:
        """A record of the database as this process may use it."""
        is_owned_by_none = record.owner == "manifest" and self._manifest is None
        remote = record.source if is_remote(record) else None
        may_be_read = record.root is None or self._reader.may_read(record.root, remote)
        if is_owned_by_none or not may_be_read:
            return record.absent().ownerless()
        if record.error is not None:
            # Perhaps what stood against it was a setting: look again.
            return replace(record, signature=None, error=None, is_loading=record.current is None)
        return record
