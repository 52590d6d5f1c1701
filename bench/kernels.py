"""The two operators that are ours, alone: adding adapters, and attending over paged keys and values.

Each is timed alone, one linear after the other and one layer's attention, beside its reference and its floor: the
bytes it must read over the measured bandwidth, or its multiply-adds over the measured rate at which torch multiplies
the layer's matrices, whichever is longer. Weights and caches are taken in turn from more memory than the processor's
cache holds.

The engine runs less of this alone: a family whose layers it can fuse adds adapters within the call that multiplies
(C++), or shrinks beside the product and for several linears at once (Triton, from CUDA graphs; here a time holds the
launches from Python). `bench.engine` and `bench.gpu_decode` time that.

    python -m bench.kernels                       # the shape of Qwen3-0.6B
    python -m bench.kernels --kernels torch --dtype float32
    python -m bench.kernels --device cuda --shape llama-3-8b --ranks 16

`--out` gets figures as they come. The last line of stdout is JSON.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from adapterd.adapter import Adapter
from adapterd.core import AdapterDigest, AdapterId, alone
from adapterd.deltas import LoraMatrices
from adapterd.model.attention import paged_attention_reference, plan_attention
from adapterd.model.attention_one import Scoring
from adapterd.model.kernels import TORCH_KERNELS, Kernels, choose_kernels
from adapterd.model.kv import KV_BLOCK_SIZE, KVPool, KVShape
from adapterd.model.lora import LoraBank, LoraStep, Segment
from adapterd.model.threads import use_all_cores
from bench.floor import shape_of
from bench.gpu_report import Report
from bench.hardware import matrix_rates, median_seconds, read_bandwidth
from bench.models import SHAPES, lora_linears
from bench.report import machine

_NUM_LAYERS = 4
"""Of the model's, taken in turn; figures are for one."""

SEGMENTS = ((1, 1), (8, 1), (8, 8), (32, 1), (32, 8), (32, 32), (512, 1), (512, 8))
"""(tokens in the batch, adapters they run, evenly)."""

DECODES = tuple((batch, context) for batch in (1, 8, 32) for context in (128, 512, 1024))
CHUNKS = ((128, 128), (512, 512), (512, 2048))
"""(new tokens of one sequence, its context with them)."""


@dataclass(frozen=True)
class Timing:
    """Of one layer. `reference_seconds` is torch's own, one sequence or one adapter at a time."""

    workload: str
    seconds: float
    reference_seconds: float
    floor_seconds: float


@dataclass(frozen=True)
class Limits:
    """What the machine does at best."""

    bytes_per_second: float
    flops_per_second: float

    def floor_seconds(self, num_bytes: float, flops: float) -> float:
        return max(num_bytes / self.bytes_per_second, flops / self.flops_per_second)


def time_lora(
    config: Any,
    kernels: Kernels,
    dtype: torch.dtype,
    device: torch.device,
    limits: Limits,
    ranks: Sequence[int],
) -> Iterator[Timing]:
    """All linears of a layer, from x and y that are there already to y with the adapters in it."""
    linears = {
        path: size
        for path, size in lora_linears(config).items()
        if any(f".layers.{layer}." in path for layer in range(_NUM_LAYERS))
    }
    of_layer = [[path for path in linears if f".layers.{i}." in path] for i in range(_NUM_LAYERS)]
    for rank in ranks:
        adapters = [_adapter(linears, rank, index, dtype) for index in range(32)]
        num_bytes = sum(adapter.num_bytes for adapter in adapters)
        bank = LoraBank(linears, 2 * num_bytes, dtype, device)
        for adapter in adapters:
            bank.take(adapter)
            bank.fill(adapter)
        for num_tokens, num_adapters in SEGMENTS:
            share = num_tokens // num_adapters
            segments = tuple(
                Segment(i * share, (i + 1) * share, bank.products(alone(adapter.id)))
                for i, adapter in enumerate(adapters[:num_adapters])
            )
            x = {d_in: torch.randn(num_tokens, d_in).to(device, dtype) for _, d_in in linears.values()}
            y = {
                d_out: torch.zeros(num_tokens, d_out, dtype=dtype, device=device)
                for d_out, _ in linears.values()
            }
            elements = sum(sum(linears[path]) for path in of_layer[0])
            yield Timing(
                f"add_lora, rank {rank}, {num_tokens} tokens, {num_adapters} adapters",
                _time_step(kernels.lora_step(), segments, num_tokens, of_layer, linears, x, y, device),
                _time_step(LoraStep(), segments, num_tokens, of_layer, linears, x, y, device),
                limits.floor_seconds(
                    (num_adapters * rank + num_tokens) * elements * dtype.itemsize,
                    2 * num_tokens * rank * elements,
                ),
            )


def _time_step(
    step: LoraStep,
    segments: tuple[Segment, ...],
    num_tokens: int,
    of_layer: Sequence[Sequence[str]],
    linears: dict[str, tuple[int, int]],
    x: dict[int, torch.Tensor],
    y: dict[int, torch.Tensor],
    device: torch.device,
) -> float:
    """Seconds of one layer. What a step prepares once for all layers is not in it."""
    step.begin(segments, num_tokens)
    turn = iter(range(10**9))

    def one_layer() -> None:
        for path in of_layer[next(turn) % len(of_layer)]:
            d_out, d_in = linears[path]
            step.add(path, y[d_out], x[d_in])

    with torch.inference_mode():
        return median_seconds(one_layer, device, repeats=21, warmup=len(of_layer))


def _adapter(linears: dict[str, tuple[int, int]], rank: int, index: int, dtype: torch.dtype) -> Adapter:
    modules = tuple(
        LoraMatrices(path, torch.randn(rank, d_in).to(dtype), torch.randn(d_out, rank).to(dtype), 1e-3)
        for path, (d_out, d_in) in linears.items()
    )
    return Adapter(
        id=AdapterId(AdapterDigest(f"adapter-{index}"), f"adapter-{index}"),
        path=Path(),
        modules=modules,
        max_rank=rank,
        num_bytes=sum(matrices.a.nbytes + matrices.b.nbytes for matrices in modules),
        base_model_name=None,
        chat_template=None,
        eos_token_ids=None,
        generation_defaults={},
    )


def time_attention(
    config: Any, kernels: Kernels, dtype: torch.dtype, device: torch.device, limits: Limits
) -> Iterator[Timing]:
    """One layer, without the writing of new keys and values; slots of a sequence are whole blocks, shuffled."""
    shape = shape_of(config)
    num_kv_heads, head_dim = config.num_key_value_heads, shape.head_dim
    longest = max([batch * context for batch, context in DECODES] + [context for _, context in CHUNKS])
    num_blocks = longest // KV_BLOCK_SIZE
    pool = KVPool(
        {layer: KVShape(num_kv_heads, head_dim, head_dim) for layer in range(_NUM_LAYERS)},
        num_blocks,
        dtype,
        device,
    )
    for layer in range(_NUM_LAYERS):
        pool.keys[layer].normal_()
        pool.values[layer].normal_()
    scoring = Scoring(head_dim**-0.5)
    blocks = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(0))
    slots = (blocks[:, None] * KV_BLOCK_SIZE + torch.arange(KV_BLOCK_SIZE)).flatten()
    workloads = [(f"decode, batch {b}, context {c}", [1] * b, [c] * b) for b, c in DECODES]
    workloads += [(f"prefill, {n} tokens, context {c}", [n], [c]) for n, c in CHUNKS]
    for name, new_tokens, contexts in workloads:
        starts = [sum(contexts[:i]) for i in range(len(contexts))]
        by_sequence = [
            slots[start : start + context] for start, context in zip(starts, contexts, strict=True)
        ]
        query = torch.randn(sum(new_tokens), shape.num_heads, head_dim).to(device, dtype)
        key = torch.randn(sum(new_tokens), num_kv_heads, head_dim).to(device, dtype)
        context = kernels.paged_context(pool, by_sequence, new_tokens)
        plan = plan_attention(by_sequence, new_tokens, device)

        def ours(layer: int, query: Any = query, key: Any = key, context: Any = context) -> None:
            context.attend(layer, query, key, key, scoring)

        def reference(layer: int, query: Any = query, plan: Any = plan) -> None:
            paged_attention_reference(query, pool.keys[layer], pool.values[layer], plan, scoring)

        # A chunk's token sees what is before it: on average its context less half of the chunk.
        pairs = sum(n * (c - (n - 1) / 2) for n, c in zip(new_tokens, contexts, strict=True))
        num_bytes = 2 * num_kv_heads * head_dim * sum(contexts) * dtype.itemsize
        yield Timing(
            f"attention, {name}",
            _time_layers(ours, device),
            _time_layers(reference, device),
            limits.floor_seconds(num_bytes, 4 * shape.num_heads * head_dim * pairs),
        )


def _time_layers(work: Callable[[int], None], device: torch.device) -> float:
    turn = iter(range(10**9))
    with torch.inference_mode():
        return median_seconds(lambda: work(next(turn) % _NUM_LAYERS), device, repeats=11, warmup=_NUM_LAYERS)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    taken_on = machine()
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    if device.type == "cpu":
        use_all_cores()
    config = SHAPES[arguments.shape]()
    kernels = choose_kernels(arguments.kernels, device, dtype)
    cores = len(os.sched_getaffinity(0)) if device.type == "cpu" else 1
    # In the faster of the two types: without 16-bit instructions a processor multiplies best in float32.
    rates = matrix_rates(shape_of(config).linears, device, [512], sorted({dtype, torch.float32}, key=str))
    limits = Limits(
        max(read_bandwidth(device, cores, 512 << 20).values()), max(rate.flops_per_second for rate in rates)
    )
    report = Report(
        arguments.out,
        bench="kernels",
        machine=taken_on,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        shape=arguments.shape,
        dtype=arguments.dtype,
        kernels=_name(kernels),
        num_threads=torch.get_num_threads(),
        **asdict(limits),
        timings=[],
    )
    print(_head(report.figures), flush=True)
    ranks = [int(rank) for rank in arguments.ranks.split(",")]
    for part, timings in (
        ("add_lora", time_lora(config, kernels, dtype, device, limits, ranks)),
        ("attention", time_attention(config, kernels, dtype, device, limits)),
    ):
        with report.part(part):
            for timing in timings:
                report.keep("timings", [*report.figures["timings"], asdict(timing)])
                print(_line(asdict(timing)), flush=True)
    print(json.dumps(report.figures))
    return int(report.failed)


def _name(kernels: Kernels) -> str:
    if kernels is TORCH_KERNELS:
        return "torch"
    return "native" if kernels.is_native else "triton"


def table(figures: dict[str, Any]) -> str:
    """What a person wants to see of the kept figures; what failed is missing."""
    errors = [f"FAILED {part}: {error[:160]}" for part, error in figures["errors"].items()]
    return "\n".join([_head(figures), *map(_line, figures["timings"]), *errors])


def _head(figures: dict[str, Any]) -> str:
    return (
        f"{figures['kernels']} kernels on {figures['device']}, {figures['shape']}, {figures['dtype']}, "
        f"{figures['num_threads']} threads; floors at {figures['bytes_per_second'] / 1e9:.2f} GB/s and "
        f"{figures['flops_per_second'] / 1e9:.1f} GFLOP/s"
    )


def _line(timing: dict[str, Any]) -> str:
    return (
        f"  {1000 * timing['seconds']:9.3f} ms  reference {1000 * timing['reference_seconds']:9.3f}"
        f"  floor {1000 * timing['floor_seconds']:9.3f}  {timing['workload']}"
    )


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--shape", choices=sorted(SHAPES), default="qwen3-0.6b")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--kernels", choices=("auto", "torch", "native", "triton"), default="auto")
    add("--ranks", default="8,16,32,64")
    add("--out", type=Path, help="write the figures here as they come")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
