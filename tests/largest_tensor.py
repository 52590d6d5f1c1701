"""How much memory a computation takes at once, as far as one tensor shows it."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LargestTensor(TorchDispatchMode):
    """`num_bytes` of the largest tensor that torch gave back while this was on."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        tensors = found if isinstance(found, tuple | list) else [found]
        self.num_bytes = max(self.num_bytes, *(t.nbytes for t in tensors if isinstance(t, torch.Tensor)), 0)
        return found
