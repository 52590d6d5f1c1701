"""A directory of adapters that others watch, where each is swapped in by one rename of a symbolic link.

    ROOT/NAME -> .versions/NAME/DIGEST     what is served under NAME now
    ROOT/.versions/NAME/DIGEST/            its files; older ones stay for a while, for who still reads them
    ROOT/.versions/NAME/pulled.json        where that came from
    ROOT/.versions/.partial/               what is being written

Watchers skip names with a leading dot. Links are relative: the directory may be mounted elsewhere by the reader.
"""

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

from adapterd.errors import Conflict
from adapterd.sources.cache import tree_digest
from adapterd.sources.partial import partial_directory, remove_abandoned
from adapterd.sources.source import Hashes

VERSIONS = ".versions"
KEPT_VERSIONS = 3


class PublishedDirectory:
    """One writer at a time for each name; readers need no lock."""

    def __init__(self, root: Path, *, num_kept: int = KEPT_VERSIONS) -> None:
        self.root = root
        self._versions = root / VERSIONS
        self._num_kept = num_kept
        self._versions.mkdir(parents=True, exist_ok=True)
        remove_abandoned(self._versions / ".partial")

    def publish(
        self, name: str, fill: Callable[[Path], Hashes], note: Mapping[str, str | None]
    ) -> tuple[str, bool]:
        """Have `fill` write the files and make them what is served under `name`: their digest, and whether it is new.

        Raises Conflict if `name` is a directory of somebody else's, and whatever `fill` raises; then nothing has
        changed.
        """
        link = self.root / name
        if os.path.lexists(link) and self._current(name) is None:
            raise Conflict(f"{link} was not published by adapterd; move it away, or choose another name")
        with partial_directory(self._versions / ".partial") as partial:
            files = fill(partial)
            digest = tree_digest(files)
            version = self._versions / name / digest
            version.parent.mkdir(exist_ok=True)
            if not version.is_dir():
                partial.rename(version)
        is_new = self._current(name) != digest
        os.utime(version)
        if is_new:
            fresh = self._versions / f".link-{uuid.uuid4().hex}"
            fresh.symlink_to(Path(VERSIONS) / name / digest)
            fresh.replace(link)
        self._write_note(name, {**note, "digest": digest})
        self._prune(name, digest)
        return digest, is_new

    def note(self, name: str) -> Mapping[str, str | None]:
        """What `publish` was told last, if that is what is served."""
        try:
            note = json.loads((self._versions / name / "pulled.json").read_bytes())
        except (OSError, ValueError):
            return {}
        current = self._current(name)
        is_current = isinstance(note, dict) and current is not None and note.get("digest") == current
        return note if is_current and (self.root / name).is_dir() else {}

    def names(self) -> list[str]:
        """What has been published here."""
        return sorted(
            path.name
            for path in self._versions.iterdir()
            if path.is_dir() and self._current(path.name) is not None
        )

    def withdraw(self, name: str) -> None:
        """Serve a name no more. Its link goes first, then its files."""
        if self._current(name) is not None:
            (self.root / name).unlink()
        shutil.rmtree(self._versions / name, ignore_errors=True)

    def _current(self, name: str) -> str | None:
        """The digest that a link of ours leads to."""
        try:
            target = Path(os.readlink(self.root / name))
        except OSError:
            return None
        return target.name if target.parent == Path(VERSIONS) / name else None

    def _write_note(self, name: str, note: Mapping[str, str | None]) -> None:
        fresh = self._versions / name / f".{uuid.uuid4().hex}"
        fresh.write_text(json.dumps(note))
        fresh.replace(self._versions / name / "pulled.json")

    def _prune(self, name: str, digest: str) -> None:
        versions = [
            path for path in (self._versions / name).iterdir() if path.is_dir() and path.name != digest
        ]
        for path in sorted(versions, key=lambda path: path.stat().st_mtime)[: -self._num_kept + 1 or None]:
            with contextlib.suppress(OSError):
                shutil.rmtree(path)
