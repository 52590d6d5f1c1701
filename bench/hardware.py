"""What this machine can do at best: bytes read a second, and multiply-adds a second at a model's own shapes."""

import contextlib
import ctypes
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

_C_SOURCE = Path(__file__).parent / "read_bandwidth.c"
_LAYERS_TO_ROTATE_BYTES = 192 << 20
"""Weights taken in turn while timing, so that none is still in a cache when its turn comes again."""


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(
    work: Callable[[], Any], device: torch.device, *, repeats: int = 5, warmup: int = 1
) -> float:
    """Of one call of `work`, the device idle before and after."""
    return sorted(call_seconds(work, device, repeats=repeats, warmup=warmup))[repeats // 2]


def call_seconds(
    work: Callable[[], Any], device: torch.device, *, repeats: int, warmup: int = 1
) -> list[float]:
    for _ in range(warmup):
        work()
    taken = []
    for _ in range(repeats):
        synchronise(device)
        began = time.perf_counter()
        work()
        synchronise(device)
        taken.append(time.perf_counter() - began)
    return taken


@contextlib.contextmanager
def num_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def read_bandwidth(device: torch.device, threads: int, num_bytes: int, repeats: int = 5) -> dict[str, float]:
    """Bytes read a second, by way of reading; the best of several passes, since a pass can only be slowed down."""
    data = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    rows = data.view(-1, 4096)
    ones = torch.ones(4096, dtype=torch.float32, device=device)
    ways: dict[str, Callable[[], Any]] = {
        "torch sum float32": data.sum,
        "torch amax float32": data.amax,
        "torch matrix times vector float32": lambda: rows @ ones,
        "torch sum of rows": lambda: rows.sum(0),
    }
    if device.type == "cuda":
        # A copy reads and writes: half its time is a read's, if both run at one speed.
        target = torch.empty_like(data)
        ways["torch copy, counted twice"] = lambda: target.copy_(data)
    elif (read := compiled_read()) is not None:
        ways["vector read (C)"] = lambda: _in_threads(read, data.data_ptr(), num_bytes, threads)
    with num_threads(threads):
        best = {way: min(call_seconds(work, device, repeats=repeats)) for way, work in ways.items()}
    return {way: num_bytes * (2 if "twice" in way else 1) / seconds for way, seconds in best.items()}


def compiled_read() -> Any | None:
    """read_bandwidth.c as a function, or None where there is no C compiler."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as directory:
        library = Path(directory) / "read_bandwidth.so"
        command = [compiler, "-O3", "-march=native", "-shared", "-fPIC", "-o", str(library), str(_C_SOURCE)]
        subprocess.run(command, check=True)
        function = ctypes.CDLL(str(library)).read_all
    function.restype = ctypes.c_uint64
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return function


def _in_threads(read: Any, address: int, num_bytes: int, threads: int) -> None:
    share = num_bytes // threads // 256 * 256
    # ctypes lets go of the interpreter's lock while the function runs.
    running = [threading.Thread(target=read, args=(address + i * share, share)) for i in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()


@dataclass(frozen=True)
class MatrixRate:
    """One layer's linears at one number of tokens: how long, and what that is in arithmetic and in weight bytes."""

    num_tokens: int
    dtype: str
    way: str
    seconds: float
    flops_per_second: float
    weight_bytes_per_second: float


def matrix_rates(
    linears: Sequence[tuple[int, int]],
    device: torch.device,
    tokens: Sequence[int],
    dtypes: Sequence[torch.dtype],
    repeats: int = 5,
) -> list[MatrixRate]:
    """Every way to multiply, at every number of tokens. linears: (d_out, d_in) of one layer."""
    found = []
    size = sum(d_out * d_in for d_out, d_in in linears)
    for dtype in dtypes:
        num_layers = min(max(_LAYERS_TO_ROTATE_BYTES // (size * dtype.itemsize), 2), 16)
        layers = [
            [torch.randn(shape, dtype=torch.float32).to(device, dtype) for shape in linears]
            for _ in range(num_layers)
        ]
        for way, prepare in _ways(device, dtype):
            for count in tokens:
                products = [prepare(layer, count) for layer in layers]
                inputs = {d_in: torch.randn(count, d_in).to(device, dtype) for _, d_in in linears}
                turn = iter(range(10**9))

                def one_layer(products: Any = products, inputs: Any = inputs, turn: Any = turn) -> None:
                    for product, (_, d_in) in zip(products[next(turn) % len(products)], linears, strict=True):
                        product(inputs[d_in])

                with torch.inference_mode():
                    seconds = median_seconds(one_layer, device, repeats=repeats, warmup=len(layers))
                found.append(
                    MatrixRate(
                        num_tokens=count,
                        dtype=str(dtype).removeprefix("torch."),
                        way=way,
                        seconds=seconds,
                        flops_per_second=2 * size * count / seconds,
                        weight_bytes_per_second=size * dtype.itemsize / seconds,
                    )
                )
                del products
    return found


Prepare = Callable[[Sequence[torch.Tensor], int], list[Callable[[torch.Tensor], torch.Tensor]]]


def _ways(device: torch.device, dtype: torch.dtype) -> list[tuple[str, Prepare]]:
    ways: list[tuple[str, Prepare]] = [("linear", _plain)]
    if device.type == "cpu" and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        try:
            _prepacked([torch.zeros(8, 8, dtype=dtype)], 1)
        except RuntimeError:  # oneDNN has no layout of its own for 16 bits on a processor without AVX-512
            return ways
        ways.append(("prepacked", _prepacked))
    return ways


def _plain(weights: Sequence[torch.Tensor], num_tokens: int) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    return [lambda x, w=weight: F.linear(x, w) for weight in weights]  # type: ignore[misc]


def _prepacked(
    weights: Sequence[torch.Tensor], num_tokens: int
) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    """oneDNN's own weight layout, chosen for this number of tokens."""
    ops = torch.ops.mkldnn
    packed = [ops._reorder_linear_weight(weight, num_tokens) for weight in weights]
    return [
        lambda x, w=weight: ops._linear_pointwise(x, w, None, "none", [], "")  # type: ignore[misc]
        for weight in packed
    ]
