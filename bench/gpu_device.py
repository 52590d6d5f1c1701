"""What a CUDA device is and what it can do at best: bytes a second read and copied, multiply-adds a second.

Timed by events on the device, so that launching costs nothing; on a CPU, for trying out, by the clock.
"""

import subprocess
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import triton
import triton.language as tl

from bench.hardware import synchronise

_BLOCK = 4096


@triton.jit
def read_kernel(
    data,  # float32 [num_blocks * BLOCK]
    sums,  # float32 [num_programs]: written
    num_blocks,
    BLOCK: tl.constexpr,
):
    """Every block is read once and added up: little arithmetic, no other traffic."""
    offsets = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        total += tl.load(data + block * BLOCK + offsets)
    tl.store(sums + tl.program_id(0), tl.sum(total, 0))


def describe(device: torch.device) -> dict[str, Any]:
    """The device by name, its driver, and the packages that make its kernels."""
    packages = {}
    for package in ("torch", "triton", "transformers", "peft"):
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            packages[package] = "absent"
    found: dict[str, Any] = {"packages": packages, "cuda": torch.version.cuda, "name": "cpu"}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "num_processors": properties.multi_processor_count,
            "driver": _driver(),
        }
    return found


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.mem,power.limit", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown: {error}"
    return found.stdout.strip()


def device_seconds(
    work: Callable[[], Any], device: torch.device, *, repeats: int = 15, calls: int = 1
) -> float:
    """The median over `repeats` of what one of `calls` calls in a row takes; the first ones are not counted."""
    work()
    synchronise(device)
    taken = []
    for _ in range(repeats):
        if device.type == "cuda":
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            for _ in range(calls):
                work()
            ended.record()
            ended.synchronize()
            taken.append(began.elapsed_time(ended) / 1000 / calls)
        else:
            start = time.perf_counter()
            for _ in range(calls):
                work()
            taken.append((time.perf_counter() - start) / calls)
    return float(sorted(taken)[repeats // 2])


def memory_ways(device: torch.device, num_bytes: int = 4 << 30) -> dict[str, tuple[Callable[[], Any], int]]:
    """Ways to move memory and the bytes that each moves: a kernel that only reads, torch's own reductions, and a
    copy, counted both ways."""
    num_blocks = num_bytes // 4 // _BLOCK
    data = torch.ones(num_blocks * _BLOCK, dtype=torch.float32, device=device)
    target = torch.empty_like(data)
    num_programs = 2
    if device.type == "cuda":
        num_programs = 4 * torch.cuda.get_device_properties(device).multi_processor_count
    sums = torch.zeros(num_programs, dtype=torch.float32, device=device)
    return {
        "read": (
            lambda: read_kernel[(num_programs,)](data, sums, num_blocks, BLOCK=_BLOCK, num_warps=8),
            data.nbytes,
        ),
        "torch sum": (data.sum, data.nbytes),
        "torch amax": (data.amax, data.nbytes),
        "copy": (lambda: target.copy_(data), 2 * data.nbytes),
    }


def matrix_rates(
    linears: Sequence[tuple[int, int]], device: torch.device, tokens: Sequence[int], dtype: torch.dtype
) -> dict[str, float]:
    """Operations a second of one layer's linears, (d_out, d_in) each, at these numbers of tokens; two are one
    multiply-add. Two layers take turns, so that no weight is still in a cache."""
    layers = [[torch.randn(shape, device=device, dtype=dtype) for shape in linears] for _ in range(2)]
    rates = {}
    for count in tokens:
        inputs = {d_in: torch.randn(count, d_in, device=device, dtype=dtype) for _, d_in in linears}

        def both(inputs: dict[int, torch.Tensor] = inputs) -> None:
            for weights in layers:
                for weight in weights:
                    torch.nn.functional.linear(inputs[weight.shape[1]], weight)

        flops = 2 * 2 * count * sum(d_out * d_in for d_out, d_in in linears)
        rates[str(count)] = flops / device_seconds(both, device, calls=4)
    return rates
