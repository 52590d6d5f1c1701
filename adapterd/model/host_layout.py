"""Adapters in host memory as a GPU will hold them, so that an upload has nothing to do but to move bytes.

A file has B by rows of the output, the bank has it by rank (model/lora.py). To turn it takes several times as long as
to copy it, so it is done once, when an adapter is read and no step waits for it; and into pinned memory, as vLLM does:
from there the copy engine takes it, and no processor copies anything. On a CPU it would cost more than it saves.
"""

import logging
from collections.abc import Iterator
from dataclasses import replace

import torch

from adapterd.adapter import Adapter
from adapterd.model.transfer import copy_in_slices

logger = logging.getLogger(__name__)

_BLOCK_BYTES = 8 << 20
_ALIGN_BYTES = 64


def lay_out(adapter: Adapter) -> Adapter:
    """The same adapter, its A and the transpose of its B contiguous, in pinned memory of their own if there is any.

    One that changes more than linears stays as it is: its other tensors would hold on to the file's memory, and both
    would be kept.
    """
    if adapter.edits or not adapter.modules:
        return adapter
    sizes = [size for m in adapter.modules for size in (m.a.nbytes, m.b.nbytes)]
    rooms = _rooms(sizes)
    modules = []
    for matrices in adapter.modules:
        a, b_t = (next(rooms).view(matrix.dtype).view(matrix.shape) for matrix in (matrices.a, matrices.b.T))
        copy_in_slices(a, matrices.a)
        copy_in_slices(b_t, matrices.b.T)
        modules.append(replace(matrices, a=a, b=b_t.T))
    return replace(adapter, modules=tuple(modules))


def _rooms(sizes: list[int]) -> Iterator[torch.Tensor]:
    """uint8 of these sizes, side by side in blocks, since torch takes powers of two of pinned memory."""
    left = sum(map(_aligned, sizes))
    block = torch.empty(0, dtype=torch.uint8)
    for size in sizes:
        if _aligned(size) > len(block):
            block = _block(max(min(left, _BLOCK_BYTES), _aligned(size)))
        yield block[:size]
        block = block[_aligned(size) :]
        left -= _aligned(size)


def _block(num_bytes: int) -> torch.Tensor:
    try:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:  # the system gives a process only so much
        logger.warning("no pinned memory for an adapter, its uploads take longer: %s", error)
    return torch.empty(num_bytes, dtype=torch.uint8)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGN_BYTES) * _ALIGN_BYTES
