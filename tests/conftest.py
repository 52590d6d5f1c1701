"""What has to be in the environment before torch and triton are imported, and how many processes run the tests.

`make test` runs them in several processes beside each other, `python -m pytest` in one.
"""

import os

import pytest

IS_BESIDE_OTHERS = "PYTEST_XDIST_WORKER" in os.environ
if IS_BESIDE_OTHERS:
    # torch's threads sleep while they wait: one that looks for work takes a processor from the other processes.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch  # noqa: E402  (reads what is set above)

if IS_BESIDE_OTHERS:
    # After the import: this process computes with as many threads as it does alone, and what it starts with one.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

if not torch.cuda.is_available():
    # Without a CUDA device Triton's kernels run in its interpreter.
    os.environ["TRITON_INTERPRET"] = "1"

MAX_PROCESSES = 4
"""Each holds torch and a model or two, half a gigabyte."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """What `--numprocesses auto` means: one for each processor that this process may use."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, MAX_PROCESSES)
