"""Adapters in host memory as a GPU will hold them, so that an upload has nothing to do but to move bytes.

A file has B by rows of the output, the bank has it by rank (model/lora.py), and a file is often in float32 where the
base is not. To turn takes up to twice as long as to copy (bench/LOG.md), so it is done once, when an adapter is read
and no step waits for it; and into pinned memory, as vLLM does: from there the copy engine takes it, and no processor
copies anything. On a CPU it would cost more than it saves.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from adapterd.adapter import Adapter
from adapterd.model.transfer import aligned, copy_in_slices

logger = logging.getLogger(__name__)

_BLOCK_BYTES = 8 << 20

Allocate = Callable[[int], torch.Tensor]
"""Number of bytes -> uint8; raises RuntimeError where there is no such memory."""


def pinned(num_bytes: int) -> torch.Tensor:
    """torch takes powers of two, and keeps for the next adapter what one has given back."""
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)


def lay_out(adapter: Adapter, dtype: torch.dtype, allocate: Allocate = pinned) -> Adapter:
    """The same adapter, its A and the transpose of its B contiguous and of this type, in memory of their own.

    It stays as it is where there is no such memory, which is logged, and where it changes more than linears: its other
    tensors would hold on to the file's memory, and both would be kept.
    """
    if adapter.edits or not adapter.modules:
        return adapter
    sizes = [matrix.numel() * dtype.itemsize for m in adapter.modules for matrix in (m.a, m.b)]
    modules = []
    try:
        rooms = _rooms(sizes, allocate)
        for matrices in adapter.modules:
            a, b_t = (next(rooms).view(dtype).view(m.shape) for m in (matrices.a, matrices.b.T))
            copy_in_slices(a, matrices.a)
            copy_in_slices(b_t, matrices.b.T)
            modules.append(replace(matrices, a=a, b=b_t.T))
    except RuntimeError as error:  # the system gives a process only so much
        logger.warning("adapter %s: no pinned memory, so its uploads take longer: %s", adapter.id.name, error)
        return adapter
    return replace(adapter, modules=tuple(modules), num_bytes=sum(sizes))


def _rooms(sizes: list[int], allocate: Allocate) -> Iterator[torch.Tensor]:
    """uint8 of these sizes, side by side in blocks: of powers of two, but for what is larger than a block alone.

    What is left of a block when the next does not fit is lost.
    """
    left = sum(map(aligned, sizes))
    block = torch.empty(0, dtype=torch.uint8)
    for size in sizes:
        if aligned(size) > len(block):
            power_of_two = 1 << (left.bit_length() - 1)
            block = allocate(max(min(power_of_two, _BLOCK_BYTES), aligned(size)))
        yield block[:size]
        block = block[aligned(size) :]
        left -= aligned(size)
