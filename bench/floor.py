"""How fast this machine could be at best: its bandwidth and matrix rates, and the floor of each workload.

A decode step reads every weight once, each adapter in the batch once, and the keys and values of each sequence; a
prefill multiplies every token with every weight. Neither can be done faster than the machine reads or multiplies:
the floor is the longer of the two. The distance to it is what is left to gain.

    python -m bench.floor                                   # the shape of Qwen3-0.6B, 32,000 tokens
    python -m bench.floor --shape llama-3-8b --device cuda --dtypes bfloat16
    python -m bench.floor --skip-rates                      # bandwidth and the floors of decoding alone, in seconds

Run it on a quiet machine. The last line of stdout is JSON.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.hardware import MatrixRate, matrix_rates, read_bandwidth
from bench.models import SHAPES, lora_linears
from bench.report import emit, machine

_TOKENS = (1, 8, 16, 32, 128, 512)


@dataclass(frozen=True)
class Shape:
    """What of a model decides its floors. Elements, not bytes; `linears` is one layer's (d_out, d_in)."""

    linears: tuple[tuple[int, int], ...]
    num_layers: int
    head_elements: int
    num_heads: int
    kv_elements_per_token: int
    head_dim: int

    @property
    def linear_elements(self) -> int:
        return self.num_layers * sum(d_out * d_in for d_out, d_in in self.linears)

    def adapter_elements(self, rank: int) -> int:
        """All linears of all layers."""
        return self.num_layers * rank * sum(d_out + d_in for d_out, d_in in self.linears)


def shape_of(config: Any) -> Shape:
    linears = lora_linears(config)
    first = [size for path, size in linears.items() if ".layers.0." in path]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shape(
        linears=tuple(first),
        num_layers=config.num_hidden_layers,
        head_elements=config.vocab_size * config.hidden_size,
        num_heads=config.num_attention_heads,
        kv_elements_per_token=2 * config.num_hidden_layers * config.num_key_value_heads * head_dim,
        head_dim=head_dim,
    )


@dataclass(frozen=True)
class Floor:
    """Of one step: what it must read and compute, and the least seconds that either takes."""

    workload: str
    num_bytes: int
    flops: int
    memory_seconds: float
    compute_seconds: float

    @property
    def seconds(self) -> float:
        return max(self.memory_seconds, self.compute_seconds)


def decode_floor(
    shape: Shape,
    bytes_per_second: float,
    flops_per_second: float,
    *,
    batch: int,
    context: int = 160,
    num_adapters: int = 0,
    rank: int = 16,
    weight_bytes: float = 2,
) -> Floor:
    """A step that adds one token to each of `batch` sequences of `context` tokens. Adapters and KV take 2 bytes.

    `num_adapters` different ones are in the batch; if there is any, every sequence runs one.
    """
    weights = shape.linear_elements + shape.head_elements
    num_bytes = weights * weight_bytes + 2 * (
        num_adapters * shape.adapter_elements(rank) + batch * context * shape.kv_elements_per_token
    )
    per_token = weights + (shape.adapter_elements(rank) if num_adapters else 0) + _attention(shape, context)
    flops = 2 * batch * per_token
    name = f"decode, batch {batch}, context {context}, {num_adapters} adapters of rank {rank}"
    return Floor(name, int(num_bytes), flops, num_bytes / bytes_per_second, flops / flops_per_second)


def prefill_floor(
    shape: Shape,
    bytes_per_second: float,
    flops_per_second: float,
    *,
    num_tokens: int,
    rank: int | None = None,
    weight_bytes: float = 2,
) -> Floor:
    """One prompt of `num_tokens`, its last token's logits; with an adapter if `rank` is given."""
    adapter = shape.adapter_elements(rank) if rank else 0
    num_bytes = (shape.linear_elements + shape.head_elements) * weight_bytes + 2 * (
        adapter + num_tokens * shape.kv_elements_per_token
    )
    per_token = shape.linear_elements + adapter + _attention(shape, num_tokens) // 2
    flops = 2 * (num_tokens * per_token + shape.head_elements)
    name = f"prefill, {num_tokens} tokens" + (f", adapter of rank {rank}" if rank else "")
    return Floor(name, int(num_bytes), flops, num_bytes / bytes_per_second, flops / flops_per_second)


def _attention(shape: Shape, context: int) -> int:
    """Multiply-adds of one token over its context: scores, then values."""
    return 2 * shape.num_layers * shape.num_heads * shape.head_dim * context


def floors(shape: Shape, bandwidth: float, rate: float, *, rank: int, weight_bytes: float) -> list[Floor]:
    found = [
        decode_floor(
            shape, bandwidth, rate, batch=batch, num_adapters=count, rank=rank, weight_bytes=weight_bytes
        )
        for batch in (1, 8, 16, 32)
        for count in (0, 1, 8, 32)
        if count <= batch
    ]
    found += [
        prefill_floor(shape, bandwidth, rate, num_tokens=count, rank=with_rank, weight_bytes=weight_bytes)
        for count in (128, 512, 2048)
        for with_rank in (None, rank)
    ]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    device = torch.device(arguments.device)
    cores = len(os.sched_getaffinity(0)) if device.type == "cpu" else 1
    shape = shape_of(SHAPES[arguments.shape]())
    result: dict[str, Any] = {"bench": "floor", "machine": machine(), "shape": arguments.shape}

    result["bandwidth"] = {}
    bandwidth = 0.0
    for threads in sorted({1, cores}):
        ways = read_bandwidth(device, threads, arguments.megabytes << 20)
        result["bandwidth"][threads] = ways
        print(f"read bandwidth, {threads} thread{'s' if threads > 1 else ''}")
        for way, rate in sorted(ways.items(), key=lambda item: -item[1]):
            print(f"  {rate / 1e9:8.2f} GB/s  {way}")
        bandwidth = max(bandwidth, *ways.values())

    rates: list[MatrixRate] = []
    if not arguments.skip_rates:
        dtypes = [getattr(torch, name) for name in arguments.dtypes.split(",")]
        torch.set_num_threads(cores)
        rates = matrix_rates(shape.linears, device, _TOKENS, dtypes)
        print(f"the {len(shape.linears)} linears of a layer, weights from memory, {cores} threads")
        for found in rates:
            print(
                f"  {found.num_tokens:4} tokens  {found.dtype:9} {found.way:10} {1000 * found.seconds:9.3f} ms"
                f"  {found.flops_per_second / 1e9:8.1f} GFLOP/s  {found.weight_bytes_per_second / 1e9:6.2f} GB/s"
            )
        # A product of one token reads as fast as the machine can, where it is well written.
        bandwidth = max(bandwidth, *(found.weight_bytes_per_second for found in rates))
    result["rates"] = [asdict(found) for found in rates]
    # Without a measured rate only the bytes bound a step.
    peak = max((found.flops_per_second for found in rates), default=float("inf"))

    found_floors = floors(shape, bandwidth, peak, rank=arguments.rank, weight_bytes=arguments.weight_bytes)
    print(f"floors at {bandwidth / 1e9:.2f} GB/s and {peak / 1e9:.1f} GFLOP/s")
    for floor in found_floors:
        bound = "memory" if floor.memory_seconds >= floor.compute_seconds else "compute"
        print(
            f"  {1000 * floor.seconds:9.2f} ms ({bound})  {floor.num_bytes / 1e6:8.1f} MB"
            f"  {floor.flops / 1e9:8.2f} GFLOP  {floor.workload}"
        )
    result["bytes_per_second"] = bandwidth
    result["flops_per_second"] = peak if rates else None
    result["floors"] = [{**asdict(floor), "seconds": floor.seconds} for floor in found_floors]
    emit(result, arguments.out)
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.floor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-0.6b")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="to multiply in")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--weight-bytes", type=float, default=2, help="of a base weight; 1 for int8")
    parser.add_argument("--megabytes", type=int, default=1024, help="read in one pass")
    parser.add_argument(
        "--skip-rates", action="store_true", help="measure no matrix rates; floors are of memory alone"
    )
    parser.add_argument("--out", type=Path, help="write the result here too")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
