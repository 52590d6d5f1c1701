"""Where an adapter lies that `train` or `pull` has published, and swapping its version by one rename. No torch.

    ROOT/NAME -> .versions/NAME/DIGEST     what is served under NAME now
    ROOT/.versions/NAME/DIGEST/            its files; earlier versions lie beside them
    ROOT/.versions/NAME/pulled.json        only if `pull` is the name's writer: where that came from

A name has one writer: `pull` prunes and withdraws what it wrote, so the note beside the versions says which these are,
and neither writes where the other does. Watchers skip names with a leading dot. Links are relative: the directory may
be mounted elsewhere by the reader.
"""

import os
import uuid
from pathlib import Path

VERSIONS_FOLDER = ".versions"
PULL_NOTE = "pulled.json"


def versions_of(link: Path) -> Path:
    """The folder of all versions of the adapter that is served as `link`."""
    return link.parent / VERSIONS_FOLDER / link.name


def current_digest(link: Path) -> str | None:
    """Which of its versions `link` leads to; None if there is no such link, or it leads elsewhere."""
    try:
        target = Path(os.readlink(link))
    except OSError:
        return None
    return target.name if target.parent == Path(VERSIONS_FOLDER) / link.name else None


def is_pulled(link: Path) -> bool:
    """Whether `pull` writes the versions of this adapter."""
    return (versions_of(link) / PULL_NOTE).is_file()


def point(link: Path, digest: str) -> None:
    """Have `link` lead to a version that is there, whatever it led to before; on disk once this returns."""
    fresh = link.with_name(f".{link.name}.{uuid.uuid4().hex}.link")
    try:
        fresh.symlink_to(Path(VERSIONS_FOLDER) / link.name / digest)
        fresh.replace(link)
    finally:
        fresh.unlink(missing_ok=True)
    sync_directory(link.parent)


def sync_directory(directory: Path) -> None:
    """Have the disk know what names the directory holds."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
