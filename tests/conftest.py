"""What has to be in the environment before torch and triton are imported, and how many processes run the tests.

`make test` runs them in several processes beside each other, `python -m pytest` in one.
"""

import os
from collections.abc import Iterator

import pytest


def num_processors() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if num_processes := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # Processes beside each other share the processors, as does what they start: more threads wait for one another.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(num_processors() // int(num_processes), 1)))

import torch  # noqa: E402  (reads what is set above)

if not torch.cuda.is_available():
    # Without a CUDA device Triton's kernels run in its interpreter.
    os.environ["TRITON_INTERPRET"] = "1"

MAX_PROCESSES = 4
"""Each holds torch and a model or two, half a gigabyte."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """What `--numprocesses auto` means: one for each processor, or one that has the CUDA device to itself."""
    return 1 if torch.cuda.is_available() else min(num_processors(), MAX_PROCESSES)


@pytest.fixture
def several_threads() -> Iterator[None]:
    """Two at least, for operators that share out their work: a process beside others may have but one."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(before, 2))
    yield
    torch.set_num_threads(before)
