"""What the adapter directories hold right now, by looking: names, paths, and a signature that moves with the files.

Polling, not file events: it works alike on network volumes and through the link swaps of Kubernetes.
Reads no file's content and keeps no state; `folders.py` decides what to load.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from adapterd.file_names import ADAPTER_FILES, CONFIG_FILE, REFUSED_FILES, SEAL_FILE
from adapterd.model_name import is_adapter_name

WATCHED_FILES = ADAPTER_FILES | REFUSED_FILES


@dataclass(frozen=True)
class Signature:
    """Where a folder really is, and name, size, times and inode of each watched file in it.

    Who reads must read `real_path`: a link that led there may point elsewhere by now, and back again.
    """

    real_path: Path
    files: tuple[tuple[str, int, int, int, int], ...]

    @property
    def sealed(self) -> bool:
        """The folder says itself which bytes belong together, so it can be judged at first sight."""
        return any(file[0] == SEAL_FILE for file in self.files)


@dataclass(frozen=True)
class Found:
    """A folder with an adapter_config.json, under a root."""

    name: str
    path: Path
    root: Path
    signature: Signature


@dataclass(frozen=True)
class Scan:
    """`unreadable` roots could not be listed this time, so what is missing below them proves nothing."""

    found: dict[str, Found]
    unreadable: frozenset[Path]
    problems: tuple[str, ...]


def scan(roots: Sequence[Path], named: Mapping[str, Path] = MappingProxyType({})) -> Scan:
    """All adapters below the roots: each folder with an adapter_config.json, or a root that is one itself.

    `named` are folders beside the roots, each of one adapter, under names that they need not bear.
    """
    found = {
        name: Found(name, path, path, signature)
        for name, path in named.items()
        if (signature := signature_of(path)) is not None
    }
    unreadable: set[Path] = set()
    problems: list[str] = []
    for root in roots:
        try:
            children = [root] if (root / CONFIG_FILE).exists() else _folders(root)
        except OSError as error:
            unreadable.add(root)
            problems.append(f"adapter directory {root} cannot be read: {error.strerror}")
            continue
        for child in children:
            signature = signature_of(child)
            if signature is None:
                continue
            if not is_adapter_name(child.name):
                problems.append(
                    f"{child} is skipped: an adapter's name has letters, digits, '.', '_' and '-', at most 128"
                )
            elif child.name in found:
                problems.append(
                    f"{child} is skipped: {found[child.name].path} has the same name and comes first"
                )
            else:
                found[child.name] = Found(child.name, child, root, signature)
    return Scan(found, frozenset(unreadable), tuple(problems))


def find_watched(name: str, roots: Sequence[Path], named: Mapping[str, Path]) -> Path | None:
    """The folder that `scan` finds under this name; None if there is none. Looks at no other name."""
    if name in named and signature_of(named[name]) is not None:
        return named[name]
    for root in roots:
        try:
            child = root if (root / CONFIG_FILE).exists() else root / name
        except OSError:
            continue
        if child.name == name and signature_of(child) is not None:
            return child
    return None


def signature_of(directory: Path) -> Signature | None:
    """The folder's signature now; None if it has no adapter_config.json, or is just being replaced."""
    files = []
    try:
        real_path = os.path.realpath(directory, strict=True) if directory.is_symlink() else str(directory)
        with os.scandir(real_path) as listing:
            for entry in listing:
                if entry.name in WATCHED_FILES:
                    status = entry.stat()
                    files.append(
                        (entry.name, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
                    )
    except OSError:
        return None
    files.sort()
    return Signature(Path(real_path), tuple(files)) if any(file[0] == CONFIG_FILE for file in files) else None


def _folders(root: Path) -> list[Path]:
    with os.scandir(root) as listing:
        # A leading dot is for what is being written (".NAME.tmp") and for ".versions".
        names = sorted(entry.name for entry in listing if not entry.name.startswith(".") and entry.is_dir())
    return [root / name for name in names]
