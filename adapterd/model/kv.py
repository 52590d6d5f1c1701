"""The keys and values of running sequences, in blocks of a few tokens.

Only tensors: which block belongs to whom is booked by engine/blocks.py. A block spans all layers; token i of a
sequence lives in slot `block_table[i // block_size] * block_size + i % block_size` of every layer.
"""

import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass

import torch

KV_BLOCK_SIZE = 16
"""Tokens in a block: small enough that a short answer wastes little, large enough that tables stay short."""


@dataclass(frozen=True)
class KVShape:
    """What one attention layer stores for a token: keys [num_heads, key_dim], values [num_heads, value_dim]."""

    num_heads: int
    key_dim: int
    value_dim: int

    @property
    def num_elements(self) -> int:
        return self.num_heads * (self.key_dim + self.value_dim)


def kv_block_bytes(shapes: Mapping[int, KVShape], dtype: torch.dtype) -> int:
    """Bytes that one block takes over all layers."""
    return KV_BLOCK_SIZE * dtype.itemsize * sum(shape.num_elements for shape in shapes.values())


class KVPool:
    """Device memory for `num_blocks` blocks. keys[layer]: [num_slots, num_heads, key_dim], values alike."""

    def __init__(
        self, shapes: Mapping[int, KVShape], num_blocks: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        num_slots = num_blocks * KV_BLOCK_SIZE
        self.num_blocks = num_blocks
        self.device = device
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        for layer, shape in shapes.items():
            self.keys[layer] = _zeros((num_slots, shape.num_heads, shape.key_dim), dtype, device)
            self.values[layer] = _zeros((num_slots, shape.num_heads, shape.value_dim), dtype, device)

    def write(self, layer: int, slot_mapping: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store key [num_tokens, num_heads, key_dim] and value at slot_mapping int64 [num_tokens]."""
        self.keys[layer].index_copy_(0, slot_mapping, key)
        self.values[layer].index_copy_(0, slot_mapping, value)


def _zeros(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeroed rather than empty: masked slots are multiplied by a zero weight, and 0 * NaN is NaN.

    On a CPU the system's own zeroed pages, which are memory only once they are written: a server starts without
    touching what it may never use.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or num_bytes == 0:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=dtype).view(shape)
