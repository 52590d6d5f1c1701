"""Where the seconds of a start go: one line for the log, in which nothing is left out. No torch."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from adapterd.control_groups import read_text


class Stages:
    """Each stage lasts from the end of the one before, the first from the beginning; so they add up to the whole."""

    def __init__(self, clock: Callable[[], float] = time.time, began_seconds: float | None = None) -> None:
        """began_seconds: on the clock; None for now."""
        self._clock = clock
        self._began = self._last = clock() if began_seconds is None else began_seconds
        self._seconds: dict[str, float] = {}

    @classmethod
    def of_this_process(cls) -> "Stages":
        """From when the operating system made the process: Python and what it imports count too."""
        return cls(began_seconds=time.time() - _age_seconds())

    def done(self, stage: str) -> None:
        """The stage ends now. One that comes again is added to."""
        now = self._clock()
        self._seconds[stage] = self._seconds.get(stage, 0.0) + now - self._last
        self._last = now

    def __str__(self) -> str:
        each = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in self._seconds.items())
        return f"{self._last - self._began:.1f} s: {each}"


def _age_seconds() -> float:
    """Of this process. Linux counts from its boot, which in time of day is known to a second only: too little here."""
    after_name = read_text(Path("/proc/self/stat")).rpartition(")")[2].split()
    if not after_name:
        return time.time() - float(psutil.Process().create_time())
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(after_name[19]) / os.sysconf("SC_CLK_TCK")
