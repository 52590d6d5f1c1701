"""From a source to an Adapter: where its files are or have to be brought, and reading them, again if need be.

Called in a pool or in a caller's own thread, never under a lock that requests need: it waits for disk and network.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from adapterd.adapter import Adapter, read_adapter
from adapterd.core import AdapterEvents, BaseSpec, Unobserved
from adapterd.errors import AdapterdError, AdapterRefused, InvalidRequest
from adapterd.model_name import shown
from adapterd.names import Version
from adapterd.peft_deltas import BaseWeights
from adapterd.peft_proof import AdapterProver
from adapterd.peft_targets import Layouts
from adapterd.sources.places import AdapterPlaces
from adapterd.sources.source import NO_HASHES, Hashes, Source, parse_source
from adapterd.token_table import TokenizerIdentity
from adapterd.watch import Signature, find_watched, signature_of

_logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Files:
    """Where an adapter's files lie: a folder below `root`, links unfollowed, and how it looks.

    `source` says where they were downloaded from, None for a folder of its own; `hashes` are those declared.
    """

    path: Path
    root: Path
    signature: Signature | None
    source: str | None
    hashes: Hashes


@dataclass(frozen=True)
class AdaptedBase:
    """The base that adapters are read for. `fingerprint` is compared with the one that an adapter was made for;
    `weights` are for adapters that are read beside the base's tensors. Both as in `adapter.read_adapter`. `lay_out`
    gives an adapter as it is to lie in host memory."""

    spec: BaseSpec
    tokenizer: TokenizerIdentity
    fingerprint: str | None = None
    weights: BaseWeights | None = None
    lay_out: Callable[[Adapter], Adapter] = lambda adapter: adapter


class AdapterReader:
    """Reads for one base: below what is watched, below the directories that are allowed, and from the cache."""

    def __init__(
        self,
        base: AdaptedBase,
        places: AdapterPlaces,
        *,
        check: Callable[[Adapter], None] = lambda adapter: None,
        events: AdapterEvents | None = None,
    ) -> None:
        """`places` are `found`. `check` raises AdapterRefused for an adapter that can never fit."""
        self._directories = places.directories
        self._named = places.named
        self._base = base
        self._allow = places.allow
        self._cache = places.cache
        self._local = (*places.directories, *places.named.values(), *places.allow.roots)
        self._roots = self._local if self._cache is None else (*self._local, self._cache.objects)
        self._prover = AdapterProver(base.spec)
        self._layouts = Layouts(base.spec)
        self._check = check
        self._events: AdapterEvents = Unobserved() if events is None else events
        self._lock = threading.Lock()
        self.num_reads = 0

    def may_read(self, root: Path, source: str | None) -> bool:
        """Whether what was read before, below `root` and perhaps from a remote source, may still be read."""
        if source is None:
            return root in self._roots
        return self._cache is not None and self._allow.allows(parse_source(source)[0])

    def watched(self, name: str) -> Path | None:
        """The folder that is watched for this name now."""
        return find_watched(name, self._directories, self._named)

    def obtain(self, source: Source, hashes: Hashes, *, param: str = "source") -> Files:
        """Where a source's files are, downloaded if they have to be.

        A path that is not absolute counts from each directory, then from where the daemon was started. Raises
        InvalidRequest for a path that is below no directory, and what `SourceCache.fetch` raises.
        """
        if not source.is_local:
            self._allow.check(source)
            if self._cache is None:
                raise InvalidRequest(
                    f"the source {source} needs a cache; start with --cache DIR", param=param
                )
            cached = self._cache.fetch(source, hashes)
            signature = signature_of(cached.directory)
            return Files(cached.directory, self._cache.objects, signature, str(cached.source), hashes)
        for root in self._local:
            for start in (root, Path.cwd()):
                candidate = Path(os.path.normpath(start / source.path))
                below = candidate.is_relative_to(root) or candidate.is_relative_to(root.resolve())
                if below and candidate.is_dir():
                    return Files(candidate, root, signature_of(candidate), None, hashes)
        raise InvalidRequest(
            f"{shown(source.path)} is no folder below the adapter directories (--adapters), nor below one that"
            " --allow-source names",
            param=param,
        )

    def read_files(self, name: str, files: Files) -> Adapter:
        """Raises AdapterRefused."""
        directory = files.path if files.signature is None else files.signature.real_path
        return self.read(name, directory, files.root, files.hashes)

    def read(self, name: str, directory: Path, root: Path, hashes: Hashes = NO_HASHES) -> Adapter:
        """Raises AdapterRefused."""
        began = time.monotonic()
        adapter = read_adapter(
            directory,
            name=name,
            spec=self._base.spec,
            tokenizer=self._base.tokenizer,
            base_fingerprint=self._base.fingerprint,
            root=root,
            hashes=hashes,
            base_weights=self._base.weights,
            prover=self._prover,
            layouts=self._layouts,
        )
        self._check(adapter)
        adapter = self._base.lay_out(adapter)
        with self._lock:
            self.num_reads += 1
        self._events.adapter_loaded(name, "host", time.monotonic() - began)
        return adapter

    def try_read(self, name: str, read: Callable[[], T]) -> T | str:
        """What `read` gives, or why there is nothing."""
        try:
            return read()
        except AdapterdError as error:
            return error.message
        except Exception as error:  # a reader's bug must end in a FAILED name, not in one that loads for ever
            _logger.exception("adapter %s: reading failed", name)
            return f"adapter {name!r} could not be read: {type(error).__name__}: {error}"

    def needs_download(self, version: Version) -> bool:
        """Whether a version's files are on no disk of ours."""
        return version.source is not None and signature_of(version.path) is None

    def read_version(self, version: Version) -> Adapter:
        """Read a known version once more, downloaded again if the cache has lost it.

        Raises AdapterRefused if something else lies there by now, and what `obtain` raises.
        """
        name, path = version.id.name, version.path
        if version.source is not None and self._cache is not None and self._cache.holds(path):
            root = self._cache.objects
        elif version.source is not None:
            files = self.obtain(parse_source(version.source)[0], NO_HASHES)
            path, root = files.path, files.root
        else:
            found = next((root for root in self._roots if path.is_relative_to(root.resolve())), None)
            if found is None:
                raise AdapterRefused(
                    f"version {version.number} of {name!r} is in {path}, which is below no adapter directory"
                )
            root = found
        if signature_of(path) is None:
            raise AdapterRefused(_gone(version, "is no adapter any more"))
        adapter = self.read(name, path, root)
        if adapter.id != version.id:
            raise AdapterRefused(_gone(version, f"holds {adapter.id.digest[:12]!r} by now"))
        return adapter


def _gone(version: Version, reason: str) -> str:
    return (
        f"version {version.number} of {version.id.name!r} is gone: it is no longer in memory, and "
        f"{version.source or version.path} {reason}. Keep each version in a place of its own to be able to return to it"
    )
