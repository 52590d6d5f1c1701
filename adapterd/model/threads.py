"""How many threads torch computes with on a CPU."""

import logging
import os
from collections.abc import Iterator, Set
from pathlib import Path

import psutil
import torch

from adapterd.control_groups import CONTROL_GROUPS, OWN_GROUPS, groups_of, read_text

logger = logging.getLogger(__name__)

_PROCESSORS = Path("/sys/devices/system/cpu")
_SIBLINGS = ("core_cpus_list", "thread_siblings_list")
"""Which processors are threads of one core: what Linux calls the file, and called it before 5.10.

Its core_id will not do: on some processors it counts from zero again in every die of a package.
"""


def use_all_cores() -> None:
    """One thread for each physical core this process may use. OMP_NUM_THREADS, where set, was already obeyed by torch.

    Two threads of one core share its vector units: a second one adds nothing to products and slows their partner.
    """
    if os.environ.get("OMP_NUM_THREADS"):
        return
    count = num_usable_cores()
    if count != torch.get_num_threads():
        torch.set_num_threads(count)
    logger.info("computing with %d threads", count)


def num_usable_cores() -> int:
    """Physical cores, within the process's affinity and its control groups' share of processor time."""
    # Linux says which of them the process may run on; elsewhere it may run on all.
    allowed = (
        os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(psutil.cpu_count() or 1))
    )
    usable = num_cores(allowed, _PROCESSORS)
    if usable is None:
        usable = min(psutil.cpu_count(logical=False) or len(allowed), len(allowed))
    limit = quota(CONTROL_GROUPS, OWN_GROUPS)
    return max(usable if limit is None else min(usable, limit), 1)


def num_cores(processors: Set[int], folder: Path) -> int | None:
    """Cores that have at least one of the processors, as Linux numbers them; None where `folder` does not tell."""
    cores = {_siblings(folder / f"cpu{number}" / "topology") for number in processors}
    return None if "" in cores else len(cores)


def _siblings(topology: Path) -> str:
    return next((text for name in _SIBLINGS if (text := read_text(topology / name).strip())), "")


def quota(control_groups: Path, own_groups: Path) -> int | None:
    """Whole processors that the narrowest group grants, at least one: of one and a half, enough for one thread.

    None where no group limits the time, only the share of it (weights) or nothing at all.
    """
    shares = _time_shares(control_groups, own_groups)
    return min((max(granted // period, 1) for granted, period in shares), default=None)


def _time_shares(control_groups: Path, own_groups: Path) -> Iterator[tuple[int, int]]:
    """(microseconds granted, of each so many) of every group with a limit."""
    for group, version in groups_of("cpu", control_groups, own_groups):
        if version == 2:
            numbers = read_text(group / "cpu.max").split()
        else:
            numbers = [
                *read_text(group / "cpu.cfs_quota_us").split(),
                *read_text(group / "cpu.cfs_period_us").split(),
            ]
        if len(numbers) == 2 and all(number.isdecimal() for number in numbers):  # no limit: "max", or -1
            yield int(numbers[0]), int(numbers[1])
