"""How much host memory this process may still take: what the machine has free, within its control groups' limits. And
giving back what it took.

A container sees the whole machine's memory and is killed at its own limit, or that of a group above it
(docs.kernel.org/admin-guide/cgroup-v2.html and cgroup-v1/memory.html). Elsewhere, and without a limit, it is what the
machine has free. No torch.
"""

import ctypes
from dataclasses import dataclass
from pathlib import Path

import psutil

from adapterd.control_groups import CONTROL_GROUPS, OWN_GROUPS, Version, groups_of, read_text


@dataclass(frozen=True)
class _Files:
    """What a version calls them. `reclaimable`: the field of memory.stat with files that were read and lie idle."""

    limits: tuple[str, ...]
    usage: str
    reclaimable: str


# Above memory.high the kernel slows a group down; it is a limit to stay below all the same.
_FILES: dict[Version, _Files] = {
    1: _Files(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
    2: _Files(("memory.max", "memory.high"), "memory.current", "inactive_file"),
}


def free_host_bytes() -> int:
    """Bytes that can be taken now without swapping, and without reaching the limit of any group above."""
    free = int(psutil.virtual_memory().available)
    room = group_room(CONTROL_GROUPS, OWN_GROUPS)
    return free if room is None else min(free, room)


def give_back_freed() -> None:
    """Hand to the system what was freed and the allocator kept (malloc_trim(3); nothing where there is no glibc)."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(ctypes.c_size_t(0))


def group_room(control_groups: Path, own_groups: Path) -> int | None:
    """Bytes left within the narrowest limit of the groups that `own_groups` lists; None where there is no limit.

    Usage counts as the kubelet counts it: without files that were read and not touched again.
    """
    rooms = []
    for group, version in groups_of("memory", control_groups, own_groups):
        files = _FILES[version]
        limits = [limit for name in files.limits if (limit := _number(group / name)) is not None]
        usage = _number(group / files.usage)
        if limits and usage is not None:
            in_use = max(usage - _field(group / "memory.stat", files.reclaimable), 0)
            rooms.append(max(min(limits) - in_use, 0))
    return min(rooms, default=None)


def _number(file: Path) -> int | None:
    """None for no limit: "max", or no such file. (Version 1 writes a number near 2^63, which limits nothing.)"""
    text = read_text(file).strip()
    return int(text) if text.isdecimal() else None


def _field(file: Path, name: str) -> int:
    pairs = (line.split() for line in read_text(file).splitlines())
    return next((int(value) for key, value in pairs if key == name), 0)
