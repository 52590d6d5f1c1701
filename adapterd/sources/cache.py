"""Downloads kept on disk by content, within a budget of bytes: the longest unused leave first.

    CACHE/objects/DIGEST/     one adapter's files; DIGEST is over their names and hashes
    CACHE/sources/HASH.json   what a source held when it was last looked at: its state, and which object that is
    CACHE/partial/            downloads under way; each appears under objects/ by one rename

Several processes may share a cache. An object that leaves while somebody reads it costs that reader a download,
never an answer: what is read is hashed again.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

from adapterd.errors import ConfigError, SourceFailed
from adapterd.sources.download import Downloader
from adapterd.sources.partial import locked, partial_directory, remove_abandoned
from adapterd.sources.source import NO_HASHES, Hashes, Source, hashes_text, parse_source

CACHE_BYTES = 16 << 30
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cached:
    """One adapter's files on this disk. `source` names these very bytes, as far as its address can."""

    directory: Path
    source: Source
    files: Hashes


class SourceCache:
    """Every method may be called from any thread; `fetch` waits for the network."""

    def __init__(self, directory: Path, downloader: Downloader, *, max_bytes: int = CACHE_BYTES) -> None:
        """Raises ConfigError if `directory` cannot be used."""
        try:
            for name in ("objects", "sources", "partial"):
                (directory / name).mkdir(parents=True, exist_ok=True)
            # Free of links, since what is read from it has to be below it.
            directory = directory.resolve(strict=True)
            remove_abandoned(directory / "partial")
        except OSError as error:
            raise ConfigError(f"the cache {directory} cannot be used: {error}", param="cache") from error
        self.objects = directory / "objects"
        self._sources = directory / "sources"
        self._partial = directory / "partial"
        self._downloader = downloader
        self._max_bytes = max_bytes

    def fetch(self, source: Source, hashes: Hashes = NO_HASHES) -> Cached:
        """The files of a remote source as they are now, downloaded unless these very files are here.

        A source that is pinned by its address or by hashes is not asked again. Raises Forbidden, SourceMissing,
        SourceFailed, AdapterRefused.
        """
        self._downloader.check(source)
        note = self._note(source, hashes)
        if source.is_pinned or hashes:
            cached = self._kept(note)
            if cached is not None:
                return cached
        held = self._downloader.look(source)
        if held.state is not None and note.get("state") == held.state:
            cached = self._kept(note)
            if cached is not None:
                return cached
        try:
            with partial_directory(self._partial) as partial:
                files = self._downloader.fetch(held, partial, hashes)
                cached = Cached(self._publish(partial, files), held.source, files)
            for asked in {
                (source, hashes_text(hashes)),
                (held.source, hashes_text(hashes)),
                (held.source, None),
            }:
                self._remember(*asked, held.state, cached)
            self._evict(spare=cached.directory)
        except OSError as error:
            raise SourceFailed(f"the source {source} could not be kept in the cache: {error}") from error
        return cached

    def holds(self, directory: Path) -> bool:
        """Whether a directory is an object of this cache, and whole. Counts as a use of it."""
        return directory.parent == self.objects and self._whole(directory) is not None

    # Notes: what a source held

    def _note_path(self, source: Source, hashes: str | None) -> Path:
        key = hashlib.sha256(f"{source}\n{hashes}".encode()).hexdigest()
        return self._sources / f"{key}.json"

    def _note(self, source: Source, hashes: Hashes) -> dict[str, str | None]:
        try:
            note = json.loads(self._note_path(source, hashes_text(hashes)).read_bytes())
        except (OSError, ValueError):
            return {}
        return note if isinstance(note, dict) else {}

    def _remember(self, source: Source, hashes: str | None, state: str | None, cached: Cached) -> None:
        note = {"pinned": str(cached.source), "state": state, "object": cached.directory.name}
        path = self._note_path(source, hashes)
        fresh = path.with_name(f".{uuid.uuid4().hex}")
        fresh.write_text(json.dumps(note))
        fresh.replace(path)

    def _kept(self, note: dict[str, str | None]) -> Cached | None:
        """The object that a note names, if it is here and whole."""
        name, pinned = note.get("object"), note.get("pinned")
        if name is None or pinned is None:
            return None
        files = self._whole(self.objects / name)
        if files is None:
            return None
        return Cached(self.objects / name, parse_source(pinned)[0], files)

    # Objects

    def _whole(self, directory: Path) -> Hashes | None:
        """The hashes of an object's files, now the last used; one whose files have changed is thrown away."""
        try:
            files = {path.name: _sha256(path) for path in directory.iterdir()}
            os.utime(directory)
        except FileNotFoundError:
            return None
        if tree_digest(files) == directory.name:
            return files
        _logger.warning("%s is thrown away: its files have changed since they were downloaded", directory)
        self._discard(directory)
        return None

    def _publish(self, partial: Path, files: Hashes) -> Path:
        directory = self.objects / tree_digest(files)
        # The same content may be here already, from another source.
        if self._whole(directory) is None:
            try:
                partial.rename(directory)
            except OSError:
                if not directory.is_dir():  # somebody else was quicker
                    raise
        return directory

    def _evict(self, spare: Path) -> None:
        """Down to the budget. Only the newest download is safe: somebody is about to read it."""
        with locked(self._sources.parent / "evict.lock"):
            listing = sorted(self._listing())
            total = sum(size for _, size, _ in listing)
            for _, size, directory in listing:
                if total > self._max_bytes and directory != spare:
                    self._discard(directory)
                    total -= size
            kept = {path.name for path in self.objects.iterdir()}
            for path in self._sources.glob("*.json"):
                with contextlib.suppress(OSError, ValueError):
                    if json.loads(path.read_bytes()).get("object") not in kept:
                        path.unlink()

    def _discard(self, directory: Path) -> None:
        """Out of sight by one rename, so that nobody finds half of it."""
        gone = self._partial / uuid.uuid4().hex
        with contextlib.suppress(FileNotFoundError):
            directory.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def _listing(self) -> list[tuple[float, int, Path]]:
        """(last used, bytes, directory) of each object."""
        listing = []
        for directory in self.objects.iterdir():
            with contextlib.suppress(FileNotFoundError):
                size = sum(path.stat().st_size for path in directory.iterdir())
                listing.append((directory.stat().st_mtime, size, directory))
        return listing


def tree_digest(files: Hashes) -> str:
    """sha256 of the lines that `sha256sum` prints for the files, in the order of their names."""
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
