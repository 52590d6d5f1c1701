"""How much of the device's memory goes to keys and values and to adapters, where the settings do not say."""

import torch

from adapterd.core import BaseSpec
from adapterd.host_memory import free_host_bytes
from adapterd.model.base import Base
from adapterd.model.kv import KV_BLOCK_SIZE, kv_block_bytes
from adapterd.model.pages import adapter_bytes_of_rank

DEFAULT_LORA_RANK = 16
"""vLLM's, where a number of adapters is said and no rank."""


def size_kv_pool(base: Base, kv_bytes: int | None, max_num_seqs: int) -> int:
    """Number of KV blocks: what `kv_bytes` holds, or by default what all running sequences could fill,
    within a share of the memory that is free now.
    """
    block_bytes = kv_block_bytes(base.kv_shapes, base.dtype)
    if kv_bytes is None:
        wanted = -(-base.spec.max_model_len // KV_BLOCK_SIZE) * max_num_seqs * block_bytes
        share = 0.8 if base.device.type == "cuda" else 0.25
        kv_bytes = min(wanted, int(free_bytes(base.device) * share))
    return max(kv_bytes // block_bytes, 1)


def free_bytes(device: torch.device) -> int:
    """Memory that can be taken on the device now; on a CPU within the container's limit.

    On a CUDA device torch first gives back what it keeps of tensors that are gone: weights that were joined leave
    pieces behind (projection_triton.py), none of which is large enough for the next layer's.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0])
    return free_host_bytes()


def size_adapter_memory(
    base: Base, adapter_bytes: int | None, *, max_loras: int | None = None, max_rank: int | None = None
) -> int:
    """Bytes of adapter memory: as given, or room for `max_loras` adapters of rank `max_rank` on every linear, or by
    default a tenth of what is free, 1 GiB at most on a CPU."""
    if adapter_bytes is not None:
        return adapter_bytes
    if max_loras is not None:
        rank = DEFAULT_LORA_RANK if max_rank is None else max_rank
        return max_loras * adapter_bytes_of_rank(
            base.spec.lora_targets, rank, base.dtype, longest_row=longest_row(base.spec)
        )
    share = free_bytes(base.device) // 10
    return share if base.device.type == "cuda" else min(share, 2**30)


def longest_row(spec: BaseSpec) -> int:
    """Of all that adapters may bring: matrices lie in memory by rows, those of a mixture's experts too."""
    stacked = [
        shape
        for name, shape in spec.modules.parameters.items()
        if name.rpartition(".")[0] in spec.modules.experts
    ]
    return max((size for shape in stacked for size in shape[1:]), default=0)
