"""A run's state on disk, whole or not at all: what makes a killed run go on where it was.

One file a checkpoint, `STEP.SHA256.pt`: written under another name, synced, renamed, the directory synced. The
name holds the hash of the content, so a file that is cut off or damaged is known as such, and the one before it
is used. A full disk costs the new checkpoint, never an old one. Tensors and plain values only: nothing in the
file can run code.
"""

import contextlib
import fcntl
import hashlib
import io
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch

from adapterd.training.errors import ResumeRefused

_logger = logging.getLogger(__name__)

_NAME = re.compile(r"(\d{9})\.([0-9a-f]{64})\.pt")
_KEPT = 2


@contextlib.contextmanager
def only_run(directory: Path) -> Iterator[Path]:
    """Hold a run's directory, made if need be, so that no second run of the same name writes there too.

    At the end it is removed again, and what was made to hold it, unless something is left in them. Raises
    ResumeRefused if another process holds it.
    """
    made = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    lock = directory / "lock"
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ResumeRefused(
                f"another run is at work in {directory}; wait for it, or use another --name or --out"
            ) from None
        try:
            yield directory
        finally:
            lock.unlink()
            for folder in dict.fromkeys((directory, directory.parent, *made)):
                with contextlib.suppress(OSError):
                    folder.rmdir()


class Checkpoints:
    """The checkpoints of one run. `identity` is what must be equal for a run to be the same run."""

    def __init__(self, directory: Path, identity: Mapping[str, str]) -> None:
        self.directory = directory
        self._identity = dict(identity)

    def save(self, step: int, state: Mapping[str, Any]) -> bool:
        """Write the state after `step`. False if the disk did not take it: said in the log, and nothing is lost."""
        temporary = self.directory / f".{step}.{os.getpid()}.tmp"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                hashed = _HashedWriter(file)
                torch.save({"identity": self._identity, "step": step, **state}, cast(IO[bytes], hashed))
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(self.directory / f"{step:09d}.{hashed.digest()}.pt")
            _sync(self.directory)
        # torch reports what the file's write raised as a RuntimeError of its own.
        except (OSError, RuntimeError) as error:
            temporary.unlink(missing_ok=True)
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            kept = self._files()
            _logger.error(
                "the checkpoint of step %d could not be written to %s (%s); %s stands, training goes on",
                step,
                self.directory,
                getattr(cause, "strerror", None) or cause,
                f"that of step {_step(kept[0])}" if kept else "none",
            )
            return False
        for old in self._files()[_KEPT:]:
            old.unlink(missing_ok=True)
        return True

    def load(self) -> dict[str, Any] | None:
        """The newest whole state, on the CPU; None if there is none.

        Raises ResumeRefused if it is of another run, naming all that differs.
        """
        for path in self._files():
            try:
                state = _read(path)
            except (OSError, ValueError) as error:
                _logger.warning(
                    "checkpoint %s is damaged (%s); the one before it is used", path.name[:9], error
                )
                continue
            self._check_identity(state["identity"], int(state["step"]))
            return state
        if self._files():
            raise ResumeRefused(
                f"every checkpoint in {self.directory} is damaged; start afresh with --no-resume"
            )
        return None

    def clear(self) -> None:
        """Remove all of them."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _files(self) -> list[Path]:
        """Newest first."""
        found = [path for path in self.directory.glob("*.pt") if _NAME.fullmatch(path.name)]
        return sorted(found, reverse=True)

    def _check_identity(self, theirs: Mapping[str, str], step: int) -> None:
        names = sorted(theirs.keys() | self._identity.keys())
        differing = [
            f"{name} was {theirs.get(name)} and is {self._identity.get(name)}"
            for name in names
            if theirs.get(name) != self._identity.get(name)
        ]
        if differing:
            raise ResumeRefused(
                f"{self.directory} holds a run that stopped after step {step}, and this one is not the same: "
                + "; ".join(differing)
                + ". Go on with what it was begun with, or start afresh with --no-resume"
            )


class _HashedWriter(io.RawIOBase):
    """A file that hashes what goes through it, so that no checkpoint is ever whole in memory."""

    def __init__(self, file: Any) -> None:
        super().__init__()
        self._file = file
        self._hash = hashlib.sha256()

    def write(self, data: Any) -> int:
        self._hash.update(data)
        return int(self._file.write(data))

    def flush(self) -> None:
        self._file.flush()

    def digest(self) -> str:
        return self._hash.hexdigest()


def _read(path: Path) -> dict[str, Any]:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != match[2]:
        raise ValueError("its content is not what its name says")
    state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return state


def _step(path: Path) -> int:
    return int(path.name[:9])


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
