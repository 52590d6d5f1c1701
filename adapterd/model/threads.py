"""How many threads torch computes with on a CPU."""

import logging
import os
from pathlib import Path

import psutil
import torch

logger = logging.getLogger(__name__)


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
    """Physical cores, within the process's affinity and its container's share of processor time."""
    logical = psutil.cpu_count() or 1
    physical = psutil.cpu_count(logical=False) or logical
    # Linux says which of them the process may run on; elsewhere it may run on all.
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else logical
    threads_per_core = max(logical // physical, 1)
    usable = min(physical, -(-allowed // threads_per_core))
    limit = quota(Path("/sys/fs/cgroup/cpu.max"))
    return max(usable if limit is None else min(usable, limit), 1)


def quota(cpu_max: Path) -> int | None:
    """What a version 2 control group allows: "150000 100000" is one and a half processors, enough for one thread."""
    try:
        granted, period = cpu_max.read_text().split()
    except FileNotFoundError:  # not in such a group
        return None
    return None if granted == "max" else max(int(granted) // int(period), 1)
