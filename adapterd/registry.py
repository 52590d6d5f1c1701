"""Names and what they mean now: resolving a model, holding its weights, moving names from version to version.

What is known and what is in memory lies in the catalog (`catalog.py`); `folders.py` says which watched folder
is to be read when, `reading.py` reads it. Changes of one name take turns; requests never wait for them.
"""

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from adapterd.adapter import Adapter
from adapterd.catalog import Catalog
from adapterd.composition import ResolvedModel, compose, resolve_base
from adapterd.core import AdapterEvents, AdapterId, AdapterMix, BaseSpec, LoadedName, RegistryStats
from adapterd.database import Database
from adapterd.errors import (
    AdapterRefused,
    BeingRead,
    Conflict,
    InvalidRequest,
    ModelNotFound,
    Unavailable,
)
from adapterd.folders import FolderWatcher
from adapterd.model_name import BASE_ALIAS, Part, is_adapter_name, nearest_names, parse_model_name, shown
from adapterd.names import NameRecord, Owner, State, Version
from adapterd.reading import AdapterReader
from adapterd.token_table import TokenizerIdentity
from adapterd.versions import Lease
from adapterd.watch import Found, signature_of

_logger = logging.getLogger(__name__)

_NUM_LOADERS = 4


@dataclass(frozen=True)
class AdapterEntry:
    """One name as people see it. `error` beside READY: a newer version was refused and the old one serves."""

    name: str
    state: State
    id: AdapterId | None
    path: Path
    error: str | None
    loaded_at: float | None
    num_bytes: int
    rank: int
    targets: tuple[str, ...]
    owner: Owner | None
    number: int | None
    previous: int | None
    versions: tuple[Version, ...]
    aliases: tuple[tuple[str, int], ...]
    is_pinned: bool
    in_host_memory: bool


class AdapterRegistry:
    """All adapters of one base. Every method may be called from any thread; those that say so wait for a disk."""

    def __init__(
        self,
        spec: BaseSpec,
        directories: Sequence[Path],
        *,
        tokenizer: TokenizerIdentity,
        base_fingerprint: str | None = None,
        poll_seconds: float = 1.0,
        on_drop: Callable[[AdapterId], None] = lambda adapter_id: None,
        check: Callable[[Adapter], None] = lambda adapter: None,
        database: Database | None = None,
        host_bytes: int | None = None,
        events: AdapterEvents | None = None,
        named: Mapping[str, Path] = MappingProxyType({}),
    ) -> None:
        """`check` raises AdapterRefused for an adapter that can never fit; `on_drop` hears of versions that left;
        `named` are folders of one adapter each, beside the directories, and what they are called here.

        Without a `database` nothing is kept over a restart, without `host_bytes` all that is read stays in
        memory. Raises ConfigError if one of `directories` is none.
        """
        self._spec = spec
        self._reader = AdapterReader(
            spec,
            [*directories, *named.values()],
            tokenizer=tokenizer,
            base_fingerprint=base_fingerprint,
            check=check,
            events=events,
        )
        self._database = Database(None) if database is None else database
        self._catalog = Catalog(self._database, host_bytes=host_bytes, on_drop=on_drop, events=events)
        self._pool = ThreadPoolExecutor(_NUM_LOADERS, thread_name_prefix="adapter-load")
        self._watcher = FolderWatcher(
            self._reader.roots[: len(directories)], self, self._pool, poll_seconds=poll_seconds, named=named
        )
        # One of a fixed number of locks per name: changes of one name take turns, a flood of names costs nothing.
        self._name_locks = tuple(threading.Lock() for _ in range(64))
        self._readings_lock = threading.Lock()
        self._readings: dict[AdapterId, Future[object]] = {}
        for record in self._database.load():
            self._catalog.put(self._restored(record), save=False)

    def start(self) -> None:
        """Look at the directories once, load what is new there in the background, and keep watching."""
        for record in self._catalog.records():
            if record.owner == "runtime" and _has_moved(record):
                self._pool.submit(self._reload, record.name)
        self._watcher.start()

    def stop(self) -> None:
        """Stop watching and loading; what is loaded stays. Harmless if never started."""
        self._watcher.stop()
        self._pool.shutdown(wait=True, cancel_futures=True)
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
        parts = parse_model_name(model, base_name=self._spec.name)
        if not parts:
            return resolve_base(self._spec)
        return compose(self._spec, parts, [self._find(part, model) for part in parts])

    def resolve_waiting(self, model: str, timeout: float) -> ResolvedModel:
        """The same, waiting for weights that have to be read first."""
        while True:
            try:
                return self.resolve(model)
            except BeingRead as reading:
                # Held here until it is resolved: memory may be too small to keep it for nobody.
                kept = reading.done.result(timeout)
                assert kept is not None

    def lease(self, mix: AdapterMix) -> Lease:
        """Hold the versions of a mix that `resolve` gave, for as long as its result is alive or another holds them."""
        return self._catalog.lease(mix)

    def weights(self, adapter_id: AdapterId) -> Adapter:
        """A leased version's matrices. Touches no disk. KeyError if nobody holds it, which is our own bug."""
        return self._catalog.held(adapter_id)

    def wait_released(self, adapter_id: AdapterId, timeout: float) -> bool:
        """Wait until no lease holds a version, at most `timeout` seconds; whether that came about."""
        return self._catalog.wait_released(adapter_id, timeout)

    # What an operator asks

    def load(self, name: str, path: Path | str, *, inplace: bool) -> AdapterId:
        """Read `path` in this thread and make it `name`'s current version; requests from now on use it.

        The same content again changes nothing. Without `inplace` other content under a name that is served is
        a Conflict. A relative path is looked for below each adapter directory; one that is not below any of
        them is an InvalidRequest. Raises AdapterRefused for an adapter that cannot be applied; then the
        version before serves on.
        """
        if not is_adapter_name(name):
            raise InvalidRequest(
                f"{shown(name)} is no adapter name: letters, digits, '.', '_' and '-', at most 128",
                param="lora_name",
            )
        if name in (self._spec.name, BASE_ALIAS):
            raise Conflict(f"{name!r} is the base's own name", param="lora_name")
        directory, root = self._reader.locate(str(path))
        with self._name_lock(name):
            signature = signature_of(directory)
            adapter = self._reader.read(name, directory if signature is None else signature.real_path, root)
            record = self._catalog.record(name)
            served = record.current_version
            if served is not None and not inplace:
                if served.id != adapter.id:
                    raise Conflict(
                        f"the adapter {name!r} is already loaded with other content; set load_inplace to"
                        " replace it",
                        param="lora_name",
                    )
                return served.id
            is_watched = directory.parent in self._reader.roots and directory.name == name
            self._publish(
                replace(
                    record,
                    owner="folder" if is_watched else "runtime",
                    path=directory,
                    root=root,
                    signature=signature,
                ),
                adapter,
            )
        return adapter.id

    def unload(self, name: str) -> AdapterId:
        """Stop serving a name. Running requests keep their weights; a watched folder stays out until it changes."""
        with self._name_lock(name):
            record, version = self._served(name)
            if record.owner != "folder":
                record = record.ownerless()
            self._catalog.put(record.absent())
        return version.id

    def rollback(self, name: str, version: str | None = None) -> AdapterEntry:
        """Point a name to the version that was current before, or to `version`. May wait for a disk.

        A watched folder that holds the other version takes effect again when it changes.
        """
        with self._name_lock(name):
            record, _ = self._served(name)
            if version is not None:
                target = _version_of(record, version)
            elif record.previous is not None:
                target = record.versions[record.previous]
            else:
                raise Conflict(
                    f"the adapter {name!r} has no version before {record.current} to return to", param="name"
                )
            moved = replace(record.pointed_to(target.number), loaded_at=time.time(), error=None)
            self._catalog.put(moved, self._weights_of(target))
            _logger.info("adapter %s: back to version %d, %s", name, target.number, target.id.digest[:12])
        return self.entry(name)

    def alias(self, name: str, alias: str, version: str | None = None) -> AdapterEntry:
        """Make NAME@alias mean `version`, or the current one; requests see one or the other. May wait for a disk."""
        with self._name_lock(name):
            record, current = self._served(name)
            target = current if version is None else _version_of(record, version)
            moved = record.with_alias(alias, target.number)
            self._catalog.put(moved, self._weights_of(target))
        return self.entry(name)

    def unalias(self, name: str, alias: str) -> AdapterEntry:
        with self._name_lock(name):
            record, _ = self._served(name)
            if alias not in record.aliases:
                raise ModelNotFound(f"the adapter {name!r} has no alias {shown(alias)}", param="alias")
            self._catalog.put(record.without_alias(alias))
        return self.entry(name)

    def pin(self, name: str, *, pinned: bool = True) -> AdapterEntry:
        """Keep a name's current version in host memory, whatever it will be; or no longer. May wait for a disk."""
        with self._name_lock(name):
            record, current = self._served(name)
            self._catalog.put(
                replace(record, is_pinned=pinned), self._weights_of(current) if pinned else None
            )
        return self.entry(name)

    def prefetch(self, name: str) -> AdapterEntry:
        """Have a name's current weights in host memory once this returns, if there is room. May wait for a disk."""
        _, current = self._served(name)
        self._weights_of(current)
        return self.entry(name)

    def entry(self, name: str) -> AdapterEntry:
        """One name. Raises ModelNotFound."""
        record = self._catalog.record(name)
        if record.state == "ABSENT":
            raise self._not_found(name, near=name, param="name")
        return self._as_seen(record)

    def list(self) -> tuple[AdapterEntry, ...]:
        """Every name with its state, in alphabetical order."""
        records = sorted(self._catalog.records(), key=lambda record: record.name)
        return tuple(self._as_seen(record) for record in records if record.state != "ABSENT")

    def loaded(self, on_device: Collection[AdapterId]) -> tuple[LoadedName, ...]:
        """Every name and NAME@ALIAS that now means a version in host memory or one of these."""
        return self._catalog.loaded(on_device)

    def stats(self) -> RegistryStats:
        states, host = self._catalog.num_by_state(), self._catalog.host_memory()
        return RegistryStats(
            num_ready=states["READY"],
            num_failed=states["FAILED"],
            num_loading=states["LOADING"],
            host_bytes_total=host.max_bytes,
            host_bytes=host.num_bytes,
            num_host_hits=host.num_hits,
            num_host_misses=host.num_misses,
            num_host_evictions=host.num_evictions,
            num_reads=self._reader.num_reads,
            read_seconds=self._reader.seconds,
            median_bytes=host.median_bytes,
            num_changes=host.num_changes,
        )

    def check_integrity(self) -> None:
        """Books balance. Only while nothing is being loaded."""
        self._catalog.check_integrity()

    # What the watcher asks (see `folders.FolderNames`)

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
        with self._name_lock(found.name):
            result = self._reader.try_read(found.name, found.signature.real_path, found.root)
            record = self._catalog.record(found.name)
            if record.owner == "folder" and signature_of(found.path) == found.signature:
                self._settle(replace(record, signature=found.signature), result)

    def folder_names(self) -> dict[str, Path]:
        return {
            record.name: record.root
            for record in self._catalog.records()
            if record.owner == "folder" and record.root is not None
        }

    def folder_gone(self, name: str) -> None:
        with self._name_lock(name):
            record = self._catalog.record(name)
            if record.owner == "folder":
                self._catalog.put(record.absent().ownerless())

    # Finding

    def _find(self, part: Part, model: str) -> Adapter:
        record = self._catalog.record(part.name)
        if record.state == "ABSENT":
            raise self._not_found(model, near=part.name)
        version = record.current_version
        if version is None:
            if record.error is not None:
                raise AdapterRefused(record.error, param="model")
            raise Unavailable(f"the adapter {part.name!r} is still loading; try again in a moment")
        if part.version is not None:
            version = _version_of(record, part.version)
        adapter = self._catalog.in_memory(version.id)
        if adapter is None:
            raise BeingRead(
                f"the weights of {part.name!r} are being read; try again in a moment",
                name=part.name,
                done=self._reading(version),
            )
        return adapter

    def _reading(self, version: Version) -> "Future[object]":
        """The reading of a version that is under way, or a new one."""
        with self._readings_lock:
            done = self._readings.get(version.id)
            if done is None:
                try:
                    done = self._readings[version.id] = self._pool.submit(self._read_again, version)
                except RuntimeError as error:  # the pool is shut down
                    raise Unavailable("the server is shutting down") from error
            return done

    def _read_again(self, version: Version) -> Adapter:
        try:
            return self._weights_of(version)
        finally:
            with self._readings_lock:
                self._readings.pop(version.id, None)

    def _weights_of(self, version: Version) -> Adapter:
        """A version's weights, read again in this thread if they have left memory."""
        adapter = self._catalog.in_memory(version.id)
        if adapter is not None:
            return adapter
        try:
            return self._catalog.keep(self._reader.read_version(version))
        except AdapterRefused:
            record = self._catalog.record(version.id.name)
            if record.owner == "folder" and record.current == version.number and _has_moved(record):
                # The watcher has yet to see it, or to see that it has stopped changing.
                raise Unavailable(
                    f"the folder of {record.name!r} has just changed; try again in a moment"
                ) from None
            raise

    def _served(self, name: str) -> tuple[NameRecord, Version]:
        record = self._catalog.record(name)
        if record.current_version is None:
            raise self._not_found(name, near=name, param="lora_name")
        return record, record.current_version

    def _not_found(self, wanted: str, *, near: str, param: str = "model") -> ModelNotFound:
        known = [record.name for record in self._catalog.records() if record.state != "ABSENT"]
        names = nearest_names(near, known)
        exists = f"its adapters are {', '.join(names)}" if names else "no adapter is loaded"
        if len(names) < len(known):
            exists += f" and {len(known) - len(names)} more"
        return ModelNotFound(
            f"the model {shown(wanted)} does not exist: the base is {self._spec.name!r}, and {exists}",
            param=param,
        )

    def _as_seen(self, record: NameRecord) -> AdapterEntry:
        version = record.current_version
        return AdapterEntry(
            name=record.name,
            state=record.state,
            id=version.id if version is not None else None,
            path=record.path if record.path is not None else Path(),
            error=record.error,
            loaded_at=record.loaded_at,
            num_bytes=version.num_bytes if version is not None else 0,
            rank=version.rank if version is not None else 0,
            targets=version.targets if version is not None else (),
            owner=record.owner,
            number=record.current,
            previous=record.previous,
            versions=tuple(record.versions[number] for number in sorted(record.versions)),
            aliases=tuple(sorted(record.aliases.items())),
            is_pinned=record.is_pinned,
            in_host_memory=version is not None and self._catalog.is_in_memory(version.id),
        )

    # Changing: called with the name's lock held

    def _name_lock(self, name: str) -> threading.Lock:
        return self._name_locks[hash(name) % len(self._name_locks)]

    def _settle(self, record: NameRecord, result: Adapter | str) -> None:
        """End a reading in the background: serve what it gave, or keep the reason why it gave nothing."""
        if isinstance(result, str):
            _logger.warning("%s%s", result, " (the version before serves on)" if record.current else "")
            self._catalog.put(replace(record, error=result, is_loading=False))
        else:
            self._publish(record, result)

    def _publish(self, record: NameRecord, adapter: Adapter) -> None:
        """Make `adapter` what the name points to."""
        record = record.with_version(adapter, now=time.time())
        self._catalog.put(record, adapter)
        digest = adapter.id.digest[:12]
        _logger.info("adapter %s: version %d, %s", record.name, record.current, digest)

    # Starting with what was known before

    def _restored(self, record: NameRecord) -> NameRecord:
        """A record of the database as this process may use it."""
        if record.root is not None and record.root not in self._reader.roots:
            return record.absent().ownerless()
        if record.error is not None:
            # Perhaps what stood against it was a setting: look again.
            return replace(record, signature=None, error=None, is_loading=record.current is None)
        return record

    def _reload(self, name: str) -> None:
        """Read again what a caller loaded before the restart, since its files are others now."""
        with self._name_lock(name):
            record = self._catalog.record(name)
            if record.owner == "runtime" and record.path is not None and record.root is not None:
                signature = signature_of(record.path)
                directory = record.path if signature is None else signature.real_path
                result = self._reader.try_read(name, directory, record.root)
                self._settle(replace(record, signature=signature), result)


def _version_of(record: NameRecord, selector: str) -> Version:
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


def _has_moved(record: NameRecord) -> bool:
    return record.path is not None and (
        record.signature is None or signature_of(record.path) != record.signature
    )
