"""What `pull` publishes, each in the layout of `published.py`: names of its own, pruned and withdrawn by it alone."""

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

from adapterd.errors import Conflict
from adapterd.published import PULL_NOTE, VERSIONS_FOLDER, current_digest, is_pulled, point, versions_of
from adapterd.sources.cache import tree_digest
from adapterd.sources.partial import partial_directory, remove_abandoned
from adapterd.sources.source import Hashes

KEPT_VERSIONS = 3


class PublishedDirectory:
    """One writer at a time for each name; readers need no lock. What is being written is in .versions/.partial."""

    def __init__(self, root: Path, *, num_kept: int = KEPT_VERSIONS) -> None:
        self.root = root
        self._num_kept = num_kept
        self._partial = root / VERSIONS_FOLDER / ".partial"
        self._partial.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(self._partial)

    def publish(
        self, name: str, fill: Callable[[Path], Hashes], note: Mapping[str, str | None]
    ) -> tuple[str, bool]:
        """Have `fill` write the files and make them what is served under `name`: their digest, and whether it is new.

        Raises Conflict if `name` is somebody else's, a directory or an adapter that was trained here, and whatever
        `fill` raises; then nothing has changed.
        """
        link = self.root / name
        if not _may_be_written(link):
            raise Conflict(
                f"{link} was not published by adapterd pull; move it and what is in {versions_of(link)} away, or"
                " choose another name"
            )
        with partial_directory(self._partial) as partial:
            files = fill(partial)
            digest = tree_digest(files)
            version = versions_of(link) / digest
            version.parent.mkdir(exist_ok=True)
            if not is_pulled(link):
                _write_note(link, {})  # before any version: one without a note would be somebody else's
            if not version.is_dir():
                partial.rename(version)
        is_new = current_digest(link) != digest
        os.utime(version)
        if is_new:
            point(link, digest)
        _write_note(link, {**note, "digest": digest})
        self._prune(link, digest)
        return digest, is_new

    def note(self, name: str) -> Mapping[str, str | None]:
        """What `publish` was told last, if that is what is served."""
        link = self.root / name
        try:
            note = json.loads((versions_of(link) / PULL_NOTE).read_bytes())
        except (OSError, ValueError):
            return {}
        current = current_digest(link)
        is_current = isinstance(note, dict) and current is not None and note.get("digest") == current
        return note if is_current and link.is_dir() else {}

    def names(self) -> list[str]:
        """What `publish` has published here."""
        names = (path.name for path in self._partial.parent.iterdir())
        return sorted(name for name in names if is_pulled(self.root / name))

    def withdraw(self, name: str) -> None:
        """Serve one of `names` no more. Its link goes first, and the note last: until then the name is ours."""
        link = self.root / name
        if current_digest(link) is not None:
            link.unlink()
        for path in versions_of(link).iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
        shutil.rmtree(versions_of(link), ignore_errors=True)

    def _prune(self, link: Path, digest: str) -> None:
        versions = [path for path in versions_of(link).iterdir() if path.is_dir() and path.name != digest]
        for path in sorted(versions, key=lambda path: path.stat().st_mtime)[: -self._num_kept + 1 or None]:
            with contextlib.suppress(OSError):
                shutil.rmtree(path)


def _may_be_written(link: Path) -> bool:
    """Whether a name is pull's already, or nobody's."""
    if os.path.lexists(link):
        return current_digest(link) is not None and is_pulled(link)
    return is_pulled(link) or not any(path.is_dir() for path in versions_of(link).glob("*"))


def _write_note(link: Path, note: Mapping[str, str | None]) -> None:
    fresh = versions_of(link) / f".{uuid.uuid4().hex}"
    fresh.write_text(json.dumps(note))
    fresh.replace(versions_of(link) / PULL_NOTE)
