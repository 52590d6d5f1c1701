"""How much host memory this process may still take: what the machine has free, within its control groups' limits.

A container sees the whole machine's memory and is killed at its own limit. Linux says that limit in files, of two
versions (docs.kernel.org/admin-guide/cgroup-v2.html and cgroup-v1/memory.html); each group on the way up may have one.
Elsewhere, and without a limit, it is what the machine has free. No torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil

CONTROL_GROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class _Files:
    """What a version calls them. `reclaimable`: the field of memory.stat with files that were read and lie idle."""

    limits: tuple[str, ...]
    usage: str
    reclaimable: str


# Above memory.high the kernel slows a group down; it is a limit to stay below all the same.
_VERSION_2 = _Files(("memory.max", "memory.high"), "memory.current", "inactive_file")
_VERSION_1 = _Files(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")


def free_host_bytes() -> int:
    """Bytes that can be taken now without swapping, and without reaching the limit of any group above."""
    free = int(psutil.virtual_memory().available)
    room = group_room(CONTROL_GROUPS, OWN_GROUPS)
    return free if room is None else min(free, room)


def group_room(control_groups: Path, own_groups: Path) -> int | None:
    """Bytes left within the narrowest limit of the groups that `own_groups` lists; None where there is no limit.

    Usage counts as the kubelet counts it: without files that were read and not touched again.
    """
    rooms = []
    for group, files in _groups(control_groups, own_groups):
        limits = [limit for name in files.limits if (limit := _number(group / name)) is not None]
        usage = _number(group / files.usage)
        if limits and usage is not None:
            in_use = max(usage - _field(group / "memory.stat", files.reclaimable), 0)
            rooms.append(max(min(limits) - in_use, 0))
    return min(rooms, default=None)


def _groups(control_groups: Path, own_groups: Path) -> Iterator[tuple[Path, _Files]]:
    """The process's memory groups and all above them. Some may not be there: a container that shares the machine's
    namespace is told a path of the machine, and finds its own group mounted as the root."""
    for line in _text(own_groups).splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, files = control_groups, _VERSION_2
        elif "memory" in controllers.split(","):
            root, files = control_groups / "memory", _VERSION_1
        else:
            continue
        own = PurePosixPath(path.lstrip("/"))
        if ".." not in own.parts:  # a group beside the namespace's root, which is not mounted here
            yield from ((root / above, files) for above in (own, *own.parents) if above != PurePosixPath("."))
        yield root, files


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:  # not Linux, not mounted, or not for this user to read
        return ""


def _number(file: Path) -> int | None:
    """None for no limit: "max", or no such file. (Version 1 writes a number near 2^63, which limits nothing.)"""
    text = _text(file).strip()
    return int(text) if text.isdecimal() else None


def _field(file: Path, name: str) -> int:
    pairs = (line.split() for line in _text(file).splitlines())
    return next((int(value) for key, value in pairs if key == name), 0)
