"""Which code runs behind each seam: torch's own operators anywhere, C++ on a CPU, Triton on a CUDA device."""

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Literal

import torch
from torch import nn

from adapterd.errors import BaseRefused
from adapterd.model import native
from adapterd.model.attention import ContextFactory, paged_context
from adapterd.model.attention_cpu import native_context
from adapterd.model.int8 import Int8Product, int8_linear
from adapterd.model.kv import KVShape
from adapterd.model.layer_cpu import fuse_native
from adapterd.model.lora import LoraStep
from adapterd.model.lora_cpu import NativeLoraStep
from adapterd.model.mlps import SiluMulFunction
from adapterd.model.norms import RMSNormFunction
from adapterd.model.pointwise_cpu import native_rms_norm, native_silu_mul

logger = logging.getLogger(__name__)

KernelName = Literal["auto", "torch", "native", "triton"]


Fuse = Callable[[nn.Module, LoraStep, Mapping[int, KVShape], Callable[[], object]], None]
"""(model with wrapped linears, step, shapes by layer, one forward of the model): put together what belongs together."""


@dataclass(frozen=True)
class Kernels:
    """How a step adds adapters, how it attends, how linears of 8 bits multiply, and what runs fused between them."""

    lora_step: Callable[[], LoraStep]
    paged_context: ContextFactory
    is_native: bool
    int8_product: Int8Product = int8_linear
    rms_norm: RMSNormFunction | None = None
    silu_mul: SiluMulFunction | None = None
    fuse: Fuse | None = None


TORCH_KERNELS = Kernels(LoraStep, paged_context, is_native=False)
NATIVE_KERNELS = Kernels(
    NativeLoraStep,
    native_context,
    is_native=True,
    rms_norm=native_rms_norm,
    silu_mul=native_silu_mul,
    fuse=fuse_native,
)


Attend = Callable[[ContextFactory], object]
"""Has every layer of a base attend once, by contexts that are so made."""


def choose_kernels(
    wanted: KernelName, device: torch.device, dtype: torch.dtype, attend: Attend = lambda make_context: None
) -> Kernels:
    """`auto` takes the fastest that apply, are there and can do what `attend` asks of them on a CUDA device.

    Raises BaseRefused if the ones asked for cannot be had.
    """
    if wanted == "torch":
        return TORCH_KERNELS
    if wanted == "native" or (wanted == "auto" and device.type == "cpu"):
        applies = device.type == "cpu" and dtype in (torch.float32, torch.bfloat16)
        if applies and native.load():
            return NATIVE_KERNELS
        if wanted == "native":
            reason = (
                f"are not built; run `{native.BUILD_COMMAND}`"
                if applies
                else f"do not run {dtype} on {device}"
            )
            raise BaseRefused(f"the C++ operators {reason}")
        if not applies:
            logger.warning(
                "adapters and attention run through torch's own operators, several times slower: the C++ operators do"
                " not run %s; start with --dtype bfloat16",
                str(dtype).removeprefix("torch."),
            )
        return TORCH_KERNELS
    missing = _why_not_triton(device, dtype)
    if missing is None:
        kernels = _triton_kernels(device)
        missing = _why_not_attend(kernels, attend)
        if missing is None:
            return kernels
    if wanted == "triton":
        raise BaseRefused(f"the Triton kernels {missing}")
    logger.warning("adapters and attention run through torch's own operators: the Triton kernels %s", missing)
    return TORCH_KERNELS


def _why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    if find_spec("triton") is None:
        return "need the package triton; run `pip install triton`"
    # In Triton's interpreter they run anywhere, slowly: that is for tests.
    runs = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    if not runs or dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"do not run {dtype} on {device}"
    return None


def _why_not_attend(kernels: Kernels, attend: Attend) -> str | None:
    from adapterd.model.launch_triton import LAUNCH_ERRORS

    try:
        attend(kernels.paged_context)
    except LAUNCH_ERRORS as error:
        reason = str(error).partition("\n")[0]
        return f"cannot compute this base's attention here: {type(error).__name__}: {reason}"
    return None


def _triton_kernels(device: torch.device) -> Kernels:
    # Imported here: a CPU need not have the package, and pays nothing for it where it has.
    from adapterd.model.attention_triton import triton_context
    from adapterd.model.int8_triton import int8_linear_triton
    from adapterd.model.layer_triton import fuse_triton
    from adapterd.model.lora_triton import TritonLoraStep
    from adapterd.model.pointwise_triton import triton_rms_norm, triton_silu_mul

    return Kernels(
        partial(TritonLoraStep, device),
        triton_context,
        is_native=False,
        int8_product=int8_linear_triton,
        rms_norm=triton_rms_norm,
        silu_mul=triton_silu_mul,
        fuse=fuse_triton,
    )
