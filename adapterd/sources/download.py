"""Fetching what a remote source holds into a directory: the files of an adapter and no others, hashed on the way.

Three kinds of places: the Hub through huggingface_hub, object stores through fsspec, the web through httpx2. Each
says first what is there (`look`), then gives one file after the other (`fetch`). Whatever goes wrong is a
SourceFailed or a SourceMissing that names the source, and the directory is the caller's to throw away.
"""

import hashlib
import importlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, Protocol

from adapterd.errors import AdapterdError, AdapterRefused, SourceFailed, SourceMissing
from adapterd.file_names import ADAPTER_FILES, REFUSED_FILES, REQUIRED_FILES
from adapterd.sources.allow import AllowList
from adapterd.sources.source import NO_HASHES, Hashes, Source, lists_files

DOWNLOAD_SECONDS = 600.0
MAX_SOURCE_BYTES = 16 << 30

Sizes = Mapping[str, int | None]


@dataclass(frozen=True)
class Held:
    """What a source holds now. `source` names these bytes as exactly as such an address can; `state` changes
    whenever the files do, and is None where the place does not tell. A size may be unknown."""

    source: Source
    state: str | None
    sizes: Sizes


class Place(Protocol):
    """Somewhere files are fetched from. Methods wait for the network; any exception of theirs is reported."""

    def look(self, source: Source) -> Held: ...

    def fetch(self, held: Held, name: str, sink: "Sink") -> None:
        """Write one of the files that `look` found."""
        ...


class Sink:
    """A file that is being written: hashed, bounded in size and in time. A write raises SourceFailed."""

    def __init__(self, file: BinaryIO, source: Source, max_bytes: int, deadline_seconds: float) -> None:
        self._file = file
        self._source = source
        self._max_bytes = max_bytes
        self._deadline_seconds = deadline_seconds
        self._hash = hashlib.sha256()
        self.num_bytes = 0

    def write(self, data: bytes) -> int:
        self.num_bytes += len(data)
        if self.num_bytes > self._max_bytes:
            raise SourceFailed(
                f"the source {self._source} holds more than the {self._max_bytes} bytes allowed"
            )
        if time.monotonic() > self._deadline_seconds:
            raise SourceFailed(f"the source {self._source} took too long; see --download-timeout")
        self._hash.update(data)
        return self._file.write(data)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


class Downloader:
    """Fetches sources that `allow` lets pass. Every method may be called from any thread."""

    def __init__(
        self,
        allow: AllowList,
        *,
        timeout_seconds: float = DOWNLOAD_SECONDS,
        max_bytes: int = MAX_SOURCE_BYTES,
        places: Mapping[str, Callable[[], Place]] | None = None,
    ) -> None:
        """`places` makes the place of each scheme; the real ones if None."""
        self._allow = allow
        self._timeout_seconds = timeout_seconds
        self._max_bytes = max_bytes
        self._places = _real_places(allow) if places is None else places

    def look(self, source: Source) -> Held:
        """What a source holds now. Raises Forbidden, SourceMissing or SourceFailed."""
        place = self._place(source)
        with _reported(source):
            held = place.look(source)
        for name in REFUSED_FILES & held.sizes.keys():
            raise AdapterRefused(
                f"the source {source} holds {name}, which is a pickle or one of several weight files;"
                " adapterd reads one adapter_model.safetensors (PEFT's save_pretrained writes it)"
            )
        for name in REQUIRED_FILES:
            if name not in held.sizes:
                raise SourceMissing(f"the source {source} holds no {name}, so it is no PEFT adapter")
        num_bytes = sum(size or 0 for name, size in held.sizes.items() if name in ADAPTER_FILES)
        if num_bytes > self._max_bytes:
            raise SourceFailed(
                f"the source {source} holds {num_bytes} bytes, and {self._max_bytes} are allowed"
            )
        return held

    def fetch(self, held: Held, into: Path, hashes: Hashes = NO_HASHES) -> Hashes:
        """Write the files into a directory, which is empty, and flush them; the sha256 of each.

        Where every file was declared, only those are fetched. Raises SourceFailed, and AdapterRefused for a
        hash that is not the declared one.
        """
        place = self._place(held.source)
        names = set(hashes) if lists_files(hashes) else ADAPTER_FILES & held.sizes.keys()
        deadline_seconds = time.monotonic() + self._timeout_seconds
        left = self._max_bytes
        fetched: dict[str, str] = {}
        for name in sorted(names):
            if name not in held.sizes:
                raise SourceFailed(f"the source {held.source} lacks {name}, whose sha256 was declared")
            with (into / name).open("xb") as file:
                sink = Sink(file, held.source, left, deadline_seconds)
                with _reported(held.source):
                    place.fetch(held, name, sink)
                file.flush()
                os.fsync(file.fileno())
            left -= sink.num_bytes
            fetched[name] = sink.sha256
            expected = held.sizes[name]
            if expected is not None and sink.num_bytes != expected:
                raise SourceFailed(
                    f"{name} of the source {held.source} came with {sink.num_bytes} bytes instead of {expected}"
                )
            if name in hashes and hashes[name] != sink.sha256:
                raise AdapterRefused(
                    f"{name} of the source {held.source} has sha256 {sink.sha256}, and {hashes[name]} was declared;"
                    " it is damaged, or it was replaced",
                    code="sha256_mismatch",
                )
        return MappingProxyType(fetched)

    def check(self, source: Source) -> None:
        """Raises Forbidden for a source that is not allowed."""
        self._allow.check(source)

    def _place(self, source: Source) -> Place:
        self.check(source)
        return self._places[source.scheme]()


@contextmanager
def _reported(source: Source) -> Iterator[None]:
    """Whatever a client library raises, told as ours."""
    try:
        yield
    except AdapterdError:
        raise
    except FileNotFoundError as error:
        raise SourceMissing(f"the source {source} does not exist") from error
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        raise SourceFailed(f"the source {source} could not be read: {reason}") from error


def _real_places(allow: AllowList) -> Mapping[str, Callable[[], Place]]:
    """Imported when first needed: most daemons need none of them, and an object store's library is an extra."""

    def hub() -> Place:
        from adapterd.sources.hub import Hub

        return Hub()

    def local() -> Place:
        from adapterd.sources.local import Local

        return Local()

    def web() -> Place:
        from adapterd.sources.web import Web

        return Web(allow)

    def store(scheme: str, module: str) -> Place:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise SourceFailed(
                f"{scheme}:// needs the package {module}, which is not installed: pip install 'adapterd[{scheme}]'"
            ) from error
        from adapterd.sources.store import Store

        return Store(scheme)

    return {
        "file": local,
        "hf": hub,
        "http": web,
        "https": web,
        "s3": lambda: store("s3", "s3fs"),
        "gs": lambda: store("gs", "gcsfs"),
    }
