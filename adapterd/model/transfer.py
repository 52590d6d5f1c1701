"""Small things between host and device, without either waiting for the other. On a CPU nothing moves."""

import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Without waiting: torch keeps pinned memory until the copy has run."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class Readback:
    """Tensors on their way to the host, behind the kernels that make them. `begin` each, `close`, and `wait` later."""

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
