"""Directories that are being filled: gone again unless they were renamed, also when the process is killed.

PARENT/ID/lock     held by whoever fills it; a lock ends with its process
PARENT/ID/files    what becomes an adapter by one rename
"""

import contextlib
import fcntl
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

_GRACE_SECONDS = 60.0
"""A directory may be younger than its lock by this much."""


@contextlib.contextmanager
def partial_directory(parent: Path) -> Iterator[Path]:
    """An empty directory to fill, and to rename once it is whole."""
    base = parent / uuid.uuid4().hex
    base.mkdir(parents=True)
    try:
        with locked(base / "lock"):
            files = base / "files"
            files.mkdir()
            yield files
    finally:
        shutil.rmtree(base, ignore_errors=True)


def remove_abandoned(parent: Path) -> None:
    """Remove what a process left behind when it was killed: nobody holds its lock any more."""
    bases = list(parent.iterdir()) if parent.is_dir() else []
    for base in bases:
        with contextlib.suppress(OSError):
            if time.time() - base.stat().st_mtime > _GRACE_SECONDS:
                with locked(base / "lock", wait=False):
                    shutil.rmtree(base, ignore_errors=True)


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a lock that ends with the process. Raises BlockingIOError if another holds it and `wait` is false."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
