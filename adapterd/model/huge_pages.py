"""Weights of a CPU's model in memory of large pages, 2 MiB in place of 4 KiB.

A step of few tokens reads all weights, and where they lie in the checkpoint's file each 4 KiB are looked up anew, which
in a virtual machine takes two walks: on the one that was measured, 4 to 5% of a step's linears (bench/LOG.md).
"""

import logging
import mmap
from pathlib import Path

import torch
from torch import nn

from adapterd.host_memory import free_host_bytes
from adapterd.model.transfer import aligned

logger = logging.getLogger(__name__)

HUGE_PAGE_BYTES = 2 << 20
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_LEAST_ROOM = 1.25
"""Times the weights' bytes that must be free: the copy needs them before the file's pages are given back."""


def use_huge_pages(model: nn.Module) -> int:
    """Move the model's tensors, in place; returns how many bytes.

    All of them: a single one that stayed would hold on to the memory of the whole file.

    0 where they fill no large page, the system has none to give, or too little memory is free.
    """
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.device.type == "cpu" and t.nbytes]
    num_bytes = sum(aligned(tensor.nbytes) for tensor in tensors)
    if num_bytes < HUGE_PAGE_BYTES or not _offered():
        return 0
    free = free_host_bytes()
    if free < _LEAST_ROOM * num_bytes:
        logger.info(
            "weights stay where they were read: %.1f GB of memory are free, to move them into large pages takes %.1f",
            free / 1e9,
            _LEAST_ROOM * num_bytes / 1e9,
        )
        return 0
    try:
        memory = _reserve(num_bytes)
    except OSError as error:
        logger.info("weights stay where they were read: no large pages (%s)", error)
        return 0
    start = 0
    for tensor in tensors:
        place = memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        tensor.data = place.copy_(tensor.data)
        start += aligned(tensor.nbytes)
    return num_bytes


def _offered() -> bool:
    """Whether the system gives such pages to those who ask (docs.kernel.org/admin-guide/mm/transhuge.html)."""
    try:
        return "[never]" not in _SETTING.read_text()
    except OSError:
        return False


def _reserve(num_bytes: int) -> torch.Tensor:
    """uint8 [num_bytes], from the beginning of such a page on. Raises OSError where the system refuses."""
    region = mmap.mmap(-1, num_bytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    region.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(region, dtype=torch.uint8)
    first = -memory.data_ptr() % HUGE_PAGE_BYTES
    return memory[first : first + num_bytes]
