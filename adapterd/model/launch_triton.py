"""How our Triton kernels are launched: where the chip can, each begins while the kernel in front still runs.

This is CUDA's programmatic dependent launch. A kernel so launched may do anything before `gdc_wait` but read what the
kernel in front writes, or write at all: whatever is older is complete, since every kernel here waits before it ends.
"""

from functools import cache

import torch
from triton.errors import TritonError
from triton.runtime import driver

_CAPABILITY = (9, 0)
_NUM_COUNTS = 1 << 16

LAUNCH_ERRORS: tuple[type[Exception], ...] = (RuntimeError, TritonError)
"""What a launch raises where a kernel cannot be compiled for the chip, or finds too little room on it: Triton's own
errors are no RuntimeErrors."""


@cache
def can_chain(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _CAPABILITY


def launch_options(device: torch.device) -> dict[str, bool]:
    """Keywords for a launch: the kernel's own constant CHAINED, and Triton's option."""
    chained = can_chain(device)
    return {"CHAINED": chained, "launch_pdl": chained}


def num_processors(device: torch.device) -> int:
    """Of the device; one where there is none, since Triton's interpreter runs one program at a time."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 1


def shared_bytes(device: torch.device) -> int:
    """Memory on the chip that one program may take, as Triton checks it; where there is no device, a large one's."""
    if device.type != "cuda":
        return 227 << 10
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(driver.active.utils.get_device_properties(index)["max_shared_mem"])


@cache
def zero_counts(device: torch.device) -> torch.Tensor:
    """int32 zeros with which programs of a kernel find out who comes last; each kernel leaves zeros behind.

    One piece of memory for all kernels of a device, which run one after the other on the engine's stream.
    """
    # Whoever asks first may do so in inference mode, whose tensors others could not write.
    with torch.inference_mode(False):
        return torch.zeros(_NUM_COUNTS, dtype=torch.int32, device=device)
