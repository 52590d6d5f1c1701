"""Name -> current version of an adapter: sources, background loading, versions, leases.

Host memory only. A version is there while a name points to it or a lease holds it; when the last of
them goes, `on_drop` is told. Reading happens in a small pool and never under the lock.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from adapterd.adapter import Adapter, read_adapter
from adapterd.composition import ResolvedModel, compose, resolve_base
from adapterd.core import AdapterId, AdapterMix, BaseSpec
from adapterd.errors import (
    AdapterdError,
    AdapterRefused,
    ConfigError,
    Conflict,
    InvalidRequest,
    ModelNotFound,
    Unavailable,
)
from adapterd.model_name import BASE_ALIAS, Part, is_adapter_name, nearest_names, parse_model_name, shown
from adapterd.token_table import TokenizerIdentity
from adapterd.versions import Lease, VersionTable
from adapterd.watch import Found, Signature, scan, signature_of

_logger = logging.getLogger(__name__)

State = Literal["LOADING", "READY", "FAILED"]
Dropped = tuple[AdapterId, ...]
"""Versions that nothing holds any more; `on_drop` is told once the lock is free."""

_NUM_LOADERS = 4
# A folder that is replaced by two renames is missing for an instant.
_POLLS_UNTIL_GONE = 2


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


@dataclass
class _Entry:
    name: str
    path: Path
    root: Path
    watched: bool
    current: Adapter | None = None
    error: str | None = None
    loaded_at: float | None = None
    seen: Signature | None = None
    tried: Signature | None = None
    in_flight: bool = False
    polls_missing: int = 0

    @property
    def state(self) -> State:
        if self.current is not None:
            return "READY"
        return "FAILED" if self.error is not None else "LOADING"


class AdapterRegistry:
    """All adapters of one base. Every method may be called from any thread; only `load` waits for a disk."""

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
    ) -> None:
        """`check` raises AdapterRefused for an adapter that can never fit; `on_drop` hears of versions that left.

        Raises ConfigError if one of `directories` is none.
        """
        for directory in directories:
            if not directory.is_dir():
                raise ConfigError(f"adapter directory {directory} does not exist", param="adapters")
        self._spec = spec
        self._roots = tuple(Path(os.path.abspath(directory)) for directory in directories)
        self._tokenizer = tokenizer
        self._base_fingerprint = base_fingerprint
        self._poll_seconds = poll_seconds
        self._on_drop = on_drop
        self._check = check
        self._changed = threading.Condition()
        self._entries: dict[str, _Entry] = {}
        self._versions = VersionTable()
        self._unloaded: dict[str, Signature | None] = {}
        # One of a fixed number of locks per name: loads of one name take turns, a flood of names costs nothing.
        self._name_locks = tuple(threading.Lock() for _ in range(64))
        self._reported: set[str] = set()
        self._stopping = threading.Event()
        self._pool: ThreadPoolExecutor | None = None
        self._watcher: threading.Thread | None = None

    def start(self) -> None:
        """Look at the directories once, load what is there in the background, and keep watching."""
        self._pool = ThreadPoolExecutor(_NUM_LOADERS, thread_name_prefix="adapter-load")
        self._poll(first=True)
        self._watcher = threading.Thread(target=self._watch, name="adapter-watch", daemon=True)
        self._watcher.start()

    def stop(self) -> None:
        """Stop watching and loading; what is loaded stays. Harmless if never started."""
        self._stopping.set()
        if self._watcher is not None:
            self._watcher.join()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def wait_loaded(self, timeout: float) -> bool:
        """Wait until no name is LOADING, at most `timeout` seconds; whether that came about."""
        with self._changed:
            return self._changed.wait_for(
                lambda: all(entry.state != "LOADING" for entry in self._entries.values()), timeout
            )

    def resolve(self, model: str) -> ResolvedModel:
        """What `model` names now. Raises ModelNotFound, Unavailable (loading), AdapterRefused, InvalidRequest."""
        parts = parse_model_name(model, base_name=self._spec.name)
        if not parts:
            return resolve_base(self._spec)
        with self._changed:
            adapters = [self._find(part, model) for part in parts]
        return compose(self._spec, parts, adapters)

    def lease(self, mix: AdapterMix) -> Lease:
        """Hold the versions of a mix that `resolve` gave, for as long as its result is alive or another holds them."""
        held: list[AdapterId] = []
        try:
            with self._changed:
                for adapter_id, _ in mix:
                    self._versions.hold(adapter_id)
                    held.append(adapter_id)
        except Unavailable:
            self._release(held)
            raise
        return Lease(lambda: self._release(held))

    def weights(self, adapter_id: AdapterId) -> Adapter:
        """A leased version's matrices. Touches no disk. KeyError if nobody holds it, which is our own bug."""
        with self._changed:
            return self._versions[adapter_id]

    def load(self, name: str, path: Path | str, *, inplace: bool) -> AdapterId:
        """Read `path` in this thread and make it `name`'s current version; requests from now on use it.

        Without `inplace` a name that is already served is a Conflict. A relative path is looked for below
        each adapter directory; one that is not below any of them is an InvalidRequest. Raises AdapterRefused
        for an adapter that cannot be applied; then the version before serves on.
        """
        if not is_adapter_name(name):
            raise InvalidRequest(
                f"{shown(name)} is no adapter name: letters, digits, '.', '_' and '-', at most 128",
                param="lora_name",
            )
        if name in (self._spec.name, BASE_ALIAS):
            raise Conflict(f"{name!r} is the base's own name", param="lora_name")
        directory, root = self._locate(str(path))
        with self._name_locks[hash(name) % len(self._name_locks)]:
            with self._changed:
                known = self._entries.get(name)
                if known is not None and known.current is not None and not inplace:
                    raise Conflict(
                        f"the adapter {name!r} is already loaded; set load_inplace to replace it",
                        param="lora_name",
                    )
            signature = signature_of(directory)
            adapter = self._read(name, directory if signature is None else signature.real_path, root)
            with self._changed:
                entry = self._entries.get(name)
                if entry is None or not (entry.watched and entry.path == directory):
                    watched = directory.parent in self._roots and directory.name == name
                    entry = self._adopt(_Entry(name, directory, root, watched))
                self._unloaded.pop(name, None)
                entry.seen = entry.tried = signature
                dropped = self._publish(entry, adapter)
        self._tell(dropped)
        return adapter.id

    def unload(self, name: str) -> AdapterId:
        """Forget a name. Running requests keep their weights; a watched folder stays out until it changes."""
        with self._changed:
            entry = self._entries.get(name)
            if entry is None or entry.current is None:
                raise self._not_found(name, near=name, param="lora_name")
            adapter_id = entry.current.id
            if entry.watched:
                self._unloaded[name] = entry.seen
            dropped = self._remove(name)
        self._tell(dropped)
        return adapter_id

    def list(self) -> tuple[AdapterEntry, ...]:
        """Every name with its state, in alphabetical order."""
        with self._changed:
            return tuple(_as_seen(self._entries[name]) for name in sorted(self._entries))

    # Resolving and publishing: called with the lock held

    def _find(self, part: Part, model: str) -> Adapter:
        entry = self._entries.get(part.name)
        if entry is None:
            raise self._not_found(model, near=part.name)
        if entry.current is None:
            if entry.error is not None:
                raise AdapterRefused(entry.error, param="model")
            raise Unavailable(f"the adapter {part.name!r} is still loading; try again in a moment")
        if part.version is None or entry.current.id.digest.startswith(part.version):
            return entry.current
        adapter = self._versions.find(part.name, part.version)
        if adapter is None:
            raise ModelNotFound(
                f"the adapter {part.name!r} has no version {part.version!r} here; its current version is"
                f" {entry.current.id.digest[:12]!r}",
                param="model",
            )
        return adapter

    def _not_found(self, wanted: str, *, near: str, param: str = "model") -> ModelNotFound:
        names = nearest_names(near, self._entries)
        exists = f"its adapters are {', '.join(names)}" if names else "no adapter is loaded"
        if len(names) < len(self._entries):
            exists += f" and {len(self._entries) - len(names)} more"
        return ModelNotFound(
            f"the model {shown(wanted)} does not exist: the base is {self._spec.name!r}, and {exists}",
            param=param,
        )

    def _publish(self, entry: _Entry, adapter: Adapter) -> Dropped:
        """Make `adapter` what the name points to."""
        previous = entry.current
        entry.current, entry.error, entry.loaded_at = self._versions.add(adapter), None, time.time()
        self._changed.notify_all()
        _logger.info(
            "adapter %s: version %s, %d bytes", entry.name, adapter.id.digest[:12], adapter.num_bytes
        )
        return self._let_go([] if previous is None else [previous.id])

    def _adopt(self, entry: _Entry) -> _Entry:
        """Put an entry under its name, taking over what is served there."""
        previous = self._entries.get(entry.name)
        if previous is not None:
            entry.current, entry.loaded_at = previous.current, previous.loaded_at
        self._entries[entry.name] = entry
        return entry

    def _remove(self, name: str) -> Dropped:
        entry = self._entries.pop(name)
        self._changed.notify_all()
        return self._let_go([] if entry.current is None else [entry.current.id])

    def _let_go(self, adapter_ids: Sequence[AdapterId]) -> Dropped:
        return tuple(adapter_id for adapter_id in adapter_ids if self._versions.let_go(adapter_id))

    # Called without the lock

    def _release(self, adapter_ids: Sequence[AdapterId]) -> None:
        with self._changed:
            dropped = self._let_go(adapter_ids)
        self._tell(dropped)

    def _tell(self, dropped: Dropped) -> None:
        for adapter_id in dropped:
            self._on_drop(adapter_id)

    # Loading

    def _locate(self, path: str) -> tuple[Path, Path]:
        """Where a requested path is and which root it is below; both as given, with links unfollowed.

        A path that is not absolute counts from each root, then from where the daemon was started.
        """
        for root in self._roots:
            for start in (root, Path.cwd()):
                candidate = Path(os.path.normpath(start / path))
                below = candidate.is_relative_to(root) or candidate.is_relative_to(root.resolve())
                if below and candidate.is_dir():
                    return candidate, root
        raise InvalidRequest(f"{shown(path)} is no folder below the adapter directories", param="lora_path")

    def _read(self, name: str, directory: Path, root: Path) -> Adapter:
        adapter = read_adapter(
            directory,
            name=name,
            spec=self._spec,
            tokenizer=self._tokenizer,
            base_fingerprint=self._base_fingerprint,
            root=root,
        )
        self._check(adapter)
        return adapter

    def _load_found(self, entry: _Entry, found: Found) -> None:
        """Background: read what the watcher found. Files that moved under the reader are left for the next poll."""
        dropped: Dropped = ()
        with self._name_locks[hash(found.name) % len(self._name_locks)]:
            adapter, error = self._try_read(found)
            whole = signature_of(found.path) == found.signature
            with self._changed:
                entry.in_flight = False
                if self._entries.get(found.name) is entry and whole:
                    entry.tried = found.signature
                    if adapter is not None:
                        dropped = self._publish(entry, adapter)
                    else:
                        entry.error = error
                        self._changed.notify_all()
                        _logger.warning(
                            "%s%s", error, " (the version before serves on)" if entry.current else ""
                        )
        self._tell(dropped)

    def _try_read(self, found: Found) -> tuple[Adapter | None, str | None]:
        try:
            return self._read(found.name, found.signature.real_path, found.root), None
        except AdapterdError as error:
            return None, error.message
        except (
            Exception
        ) as error:  # a reader's bug must end in a FAILED entry, not in a name that loads for ever
            _logger.exception("adapter %s: reading failed", found.name)
            return None, f"adapter {found.name!r} could not be read: {type(error).__name__}: {error}"

    def _watch(self) -> None:
        seconds = self._poll_seconds
        while not self._stopping.wait(seconds):
            began = time.monotonic()
            self._poll(first=False)
            # Ten thousand folders on a slow disk take a while to look at; never spend more than a tenth on it.
            seconds = max(self._poll_seconds, 10 * (time.monotonic() - began))

    def _poll(self, *, first: bool) -> None:
        result = scan(self._roots)
        for problem in set(result.problems) - self._reported:
            _logger.warning("%s", problem)
        self._reported = set(result.problems)
        dropped: Dropped = ()
        with self._changed:
            for found in result.found.values():
                self._consider(found, first=first)
            for entry in list(self._entries.values()):
                if not entry.watched or entry.root in result.unreadable or entry.name in result.found:
                    entry.polls_missing = 0
                    continue
                entry.polls_missing += 1
                if entry.polls_missing >= _POLLS_UNTIL_GONE:
                    _logger.info("adapter %s: its folder is gone", entry.name)
                    dropped += self._remove(entry.name)
        self._tell(dropped)

    def _consider(self, found: Found, *, first: bool) -> None:
        """Load a folder that is new or changed, once it has stopped changing or says itself that it is whole."""
        if found.name in self._unloaded:
            if self._unloaded[found.name] == found.signature:
                return
            del self._unloaded[found.name]
        entry = self._entries.get(found.name)
        if entry is None:
            entry = self._adopt(_Entry(found.name, found.path, found.root, watched=True))
        if not entry.watched or entry.in_flight or entry.tried == found.signature:
            return
        settled = first or found.signature.sealed or entry.seen == found.signature
        entry.seen = found.signature
        if settled and self._pool is not None:
            entry.in_flight = True
            self._pool.submit(self._load_found, entry, found)


def _as_seen(entry: _Entry) -> AdapterEntry:
    adapter = entry.current
    modules = adapter.modules if adapter is not None else ()
    return AdapterEntry(
        name=entry.name,
        state=entry.state,
        id=adapter.id if adapter is not None else None,
        path=entry.path,
        error=entry.error,
        loaded_at=entry.loaded_at,
        num_bytes=adapter.num_bytes if adapter is not None else 0,
        rank=adapter.max_rank if adapter is not None else 0,
        targets=tuple(sorted({matrices.module.rpartition(".")[2] for matrices in modules})),
    )
