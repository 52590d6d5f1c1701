"""From a finished directory to where a daemon finds it, by one rename: `NAME -> .versions/NAME/DIGEST`.

Earlier versions stay where they are: pointing the link at one of them takes the new one back.
"""

import shutil
from pathlib import Path

from adapterd.adapter_writer import replace_files
from adapterd.errors import InvalidRequest
from adapterd.published import is_pulled, point, sync_directory, versions_of


def check_target(target: Path, *, in_place: bool) -> None:
    """Raise InvalidRequest, before any work is done, if `target` could not become or stay an adapter's place."""
    if is_pulled(target):
        raise InvalidRequest(
            f"{target} belongs to adapterd pull, which would put its own version back; use another --name or --out",
            param="out",
        )
    if target.is_symlink() or not target.exists() or in_place:
        return
    raise InvalidRequest(
        f"{target} is a folder or file of its own, not a link that can be pointed at a new version; move it away,"
        " or use another --name or --out",
        param="out",
    )


def publish(staged: Path, target: Path, *, digest: str, in_place: bool) -> Path:
    """Make the whole directory `staged` the current content of `target`; returns where the files then lie.

    In place, the files of an existing folder are replaced one by one, adapterd.json with their hashes the last; a
    README.md that is there stays. Else a new version appears and the link is swapped. `staged` is gone afterwards.
    """
    if in_place:
        replace_files(target, _contents(staged, keep=target))
        shutil.rmtree(staged)
        return target
    version = versions_of(target) / digest
    if version.exists():  # the same weights once more: only their card and curve can be new
        replace_files(version, _contents(staged, keep=None))
        shutil.rmtree(staged)
    else:
        version.parent.mkdir(parents=True, exist_ok=True)
        staged.rename(version)
        sync_directory(version.parent)
    point(target, digest)
    return version


def _contents(staged: Path, *, keep: Path | None) -> dict[str, bytes]:
    """The files by name, adapterd.json the last; without a README.md if the folder `keep` has one."""
    names = sorted((path.name for path in staged.iterdir()), key=lambda name: (name == "adapterd.json", name))
    return {
        name: (staged / name).read_bytes()
        for name in names
        if not (name == "README.md" and keep is not None and (keep / name).exists())
    }
