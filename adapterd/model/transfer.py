"""Small things between host and device, without either waiting for the other."""

import torch

_SLICE_ELEMENTS = 32_000
"""torch spreads copies of 32768 elements and more over all cores, which the running step needs."""
_ALIGN_BYTES = 64


def aligned(num_bytes: int) -> int:
    """Bytes that so many take, where each of several things begins on a line of a processor's cache."""
    return -(-num_bytes // _ALIGN_BYTES) * _ALIGN_BYTES


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Without waiting: torch keeps pinned memory until the copy has run. On a CPU nothing moves."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def copy_to(target: torch.Tensor, source: torch.Tensor) -> None:
    """target[:] = source, which lies on the host: `to_device` for what has its place on the device already."""
    if target.device.type == "cuda":
        target.copy_(source.pin_memory(), non_blocking=True)
    else:
        target.copy_(source)


class Readback:
    """Tensors on their way to the host, behind the kernels that make them. `begin` each, `close`, and `wait` later.

    On a CPU they are there already.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def begin(self, tensor: torch.Tensor) -> torch.Tensor:
        """What will hold the same on the host, after `wait`."""
        if self._event is None:
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    def close(self) -> None:
        """After the last `begin`."""
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(self._device))

    def wait(self) -> None:
        """Until everything has arrived."""
        if self._event is not None:
            self._event.synchronize()


def copy_in_slices(target: torch.Tensor, source: torch.Tensor) -> None:
    """target[:] = source, both [rows, width] and on the host, in pieces that this thread copies alone."""
    rows, width = target.shape
    if width > _SLICE_ELEMENTS:
        for row in range(rows):
            for start in range(0, width, _SLICE_ELEMENTS):
                part = slice(start, start + _SLICE_ELEMENTS)
                target[row, part].copy_(source[row, part])
        return
    step = max(_SLICE_ELEMENTS // max(width, 1), 1)
    for row in range(0, rows, step):
        target[row : row + step].copy_(source[row : row + step])
