"""Which code runs behind each seam: torch's own operators anywhere, or the C++ ones on a CPU."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from adapterd.errors import BaseRefused
from adapterd.model import native
from adapterd.model.attention import ContextFactory, paged_context
from adapterd.model.attention_cpu import native_context
from adapterd.model.lora import LoraStep
from adapterd.model.lora_cpu import NativeLoraStep

KernelName = Literal["auto", "torch", "native"]


@dataclass(frozen=True)
class Kernels:
    """How a step adds adapters, and how it attends."""

    lora_step: Callable[[], LoraStep]
    paged_context: ContextFactory
    is_native: bool


TORCH_KERNELS = Kernels(LoraStep, paged_context, is_native=False)
NATIVE_KERNELS = Kernels(NativeLoraStep, native_context, is_native=True)


def choose_kernels(wanted: KernelName, device: torch.device, dtype: torch.dtype) -> Kernels:
    """`auto` takes the C++ operators where they apply and are built. Raises BaseRefused if `native` cannot be had."""
    applies = device.type == "cpu" and dtype in (torch.float32, torch.bfloat16)
    if wanted != "torch" and applies and native.load():
        return NATIVE_KERNELS
    if wanted == "native":
        reason = (
            f"are not built; run `{native.BUILD_COMMAND}`" if applies else f"do not run {dtype} on {device}"
        )
        raise BaseRefused(f"the C++ operators {reason}")
    return TORCH_KERNELS
