"""The control groups this process belongs to, of either version: where Linux says a container's or a service's limits.

Version 2 has one tree for all resources, version 1 one for each (docs.kernel.org/admin-guide/cgroup-v2.html and
cgroup-v1/cgroups.html). A limit of a group holds for all below it, so each on the way up is asked. No torch.
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Literal

CONTROL_GROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")

Version = Literal[1, 2]


def groups_of(controller: str, control_groups: Path, own_groups: Path) -> Iterator[tuple[Path, Version]]:
    """Directories of the process's groups that a controller ("memory", "cpu") may limit, and of all above them.

    Some may not be there: a container that shares the machine's namespace is told a path of the machine, and finds its
    own group mounted as the root.
    """
    for line in read_text(own_groups).splitlines():
        _, controllers, path = line.split(":", 2)
        version: Version
        if not controllers:
            root, version = control_groups, 2
        elif controller in controllers.split(","):
            root, version = control_groups / controller, 1
        else:
            continue
        own = PurePosixPath(path.lstrip("/"))
        if ".." not in own.parts:  # a group beside the namespace's root, which is not mounted here
            yield from (
                (root / above, version) for above in (own, *own.parents) if above != PurePosixPath(".")
            )
        yield root, version


def read_text(file: Path) -> str:
    """Empty where there is none: not Linux, not mounted, or not for this user to read."""
    try:
        return file.read_text()
    except OSError:
        return ""
