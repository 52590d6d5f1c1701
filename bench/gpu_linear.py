"""How fast do a decode step's products stream their weights: the vendor's library, and our kernel under each tiling?

One CUDA graph launches the product over as many different weights as a chip's cache cannot hold, as a model does.
Printed: gigabytes of weights a second, of a plain read's. Tilings that do not fit a chip are left out by name.

    python -m bench.gpu_linear --tokens 1,8,16,32,64 --out bench/results/gpu_linear.json
    python -m bench.gpu_linear --shape qwen3-0.6b --products qkv,down --tokens 32

Figures are kept as they come. The last line of stdout is one JSON object.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from adapterd.model.linear_triton import Tiling, few_tokens_linear
from bench.floor import shape_of
from bench.gpu_arguments import report_of
from bench.models import SHAPES, config_of

PRODUCTS = ("qkv", "o", "gate_up", "down", "head")
"""A layer's four as the engine fuses them, and the last of all."""

TILINGS = [
    Tiling(block_out, block_in, num_splits, num_stages, num_warps)
    for block_out, block_in, num_stages, num_warps in (
        (64, 128, 4, 4), (64, 128, 6, 4), (64, 128, 8, 4), (64, 64, 8, 4), (64, 256, 4, 4), (128, 128, 3, 8),
        (128, 128, 4, 8), (128, 64, 6, 4),
    )
    for num_splits in (1, 2, 4)
]  # fmt: skip


def products_of(config: Any) -> dict[str, tuple[int, int]]:
    """(d_out, d_in) by product."""
    hidden, inner = config.hidden_size, config.intermediate_size
    head_dim = shape_of(config).head_dim
    queries, keys = head_dim * config.num_attention_heads, head_dim * config.num_key_value_heads
    return {
        "qkv": (queries + 2 * keys, hidden),
        "o": (hidden, queries),
        "gate_up": (2 * inner, hidden),
        "down": (hidden, inner),
        "head": (config.vocab_size, hidden),
    }


def seconds_of(launch: Callable[[], object], device: torch.device, repeats: int = 4) -> float:
    """Best of some replays of a CUDA graph of `launch`; on a CPU, to try it out, of some calls."""
    launch()
    if device.type != "cuda":
        return min(_clocked(launch) for _ in range(repeats))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    best = float("inf")
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        best = min(best, begin.elapsed_time(end) / 1e3)
    return best


def _clocked(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(weights: Sequence[torch.Tensor], num_tokens: int) -> tuple[dict[str, float], list[str]]:
    """Gigabytes a second by way, the fastest first; and what was wrong or did not fit."""
    d_out, d_in = weights[0].shape
    num_bytes = sum(weight.nbytes for weight in weights)
    x = torch.randn(num_tokens, d_in, device=weights[0].device, dtype=weights[0].dtype)
    y = torch.zeros(num_tokens, d_out, device=x.device, dtype=x.dtype)
    exact = torch.mm(x.float(), weights[0].float().T)
    found: dict[str, float] = {}
    troubles: list[str] = []

    def library() -> None:
        for weight in weights:
            torch.mm(x, weight.T, out=y)

    def library_adds() -> None:
        for weight in weights:
            y.addmm_(x, weight.T)

    def ours(tiling: Tiling) -> Callable[[], None]:
        def launch() -> None:
            for weight in weights:
                few_tokens_linear(x, weight, y, tiling)

        return launch

    found["library"] = num_bytes / seconds_of(library, x.device) / 1e9
    found["library, adding"] = num_bytes / seconds_of(library_adds, x.device) / 1e9
    for tiling in TILINGS:
        if d_in % (tiling.block_in * tiling.num_splits):
            continue
        label = f"{tiling.block_out}x{tiling.block_in}/{tiling.num_splits} s{tiling.num_stages} w{tiling.num_warps}"
        try:
            y.fill_(float("nan"))
            few_tokens_linear(x, weights[0], y, tiling)
            error = float((y.float() - exact).norm() / exact.norm())
            if error < 1e-2:
                found[label] = num_bytes / seconds_of(ours(tiling), x.device) / 1e9
            else:
                troubles.append(f"{label} is wrong by {error}")
        except Exception as failure:  # what does not fit this chip
            troubles.append(f"{label}: {str(failure)[:80]}")
    return dict(sorted(found.items(), key=lambda item: -item[1])), troubles


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    report = report_of("gpu_linear", arguments)
    pool = torch.randn((arguments.megabytes << 20) // dtype.itemsize, device=device, dtype=dtype) / 64
    with report.part("bandwidth"):
        copied = torch.empty_like(pool)
        report.keep(
            "gb_per_second",
            {
                "read": pool.nbytes / seconds_of(lambda: pool.view(torch.int32).amax(), device) / 1e9,
                "copy": 2 * pool.nbytes / seconds_of(lambda: copied.copy_(pool), device) / 1e9,
            },
        )
    shapes = products_of(config_of(arguments.shape))
    results: list[dict[str, Any]] = []
    for name in arguments.products.split(","):
        d_out, d_in = shapes[name]
        count = max(min(len(pool) // (d_out * d_in), 12), 1)
        weights = [w.view(d_out, d_in) for w in pool[: count * d_out * d_in].chunk(count)]
        for num_tokens in map(int, arguments.tokens.split(",")):
            with report.part(f"{name}, {num_tokens} tokens"):
                found, troubles = measure(weights, num_tokens)
                results.append(
                    {"product": name, "tokens": num_tokens, "gb_per_second": found, "left_out": troubles}
                )
                report.keep("results", results)
                print(_line(results[-1]), *troubles, sep="\n    ", flush=True)
    print(table(report.figures))
    print(json.dumps(report.figures))
    return int(report.failed)


def table(figures: dict[str, Any]) -> str:
    """What a person wants to see of the kept figures; parts that failed are missing."""
    lines = [f"{figures['gpu']['name']}, {figures['settings']['shape']}, GB/s of weights"]
    if speeds := figures.get("gb_per_second"):
        lines.append(", ".join(f"{way} {rate:.0f}" for way, rate in speeds.items()))
    lines += [_line(result) for result in figures.get("results", [])]
    lines += [f"FAILED {part}: {error[:160]}" for part, error in figures["errors"].items()]
    return "\n".join(lines)


def _line(result: dict[str, Any]) -> str:
    found: dict[str, float] = result["gb_per_second"]
    ours = [f"{label} {rate:.0f}" for label, rate in found.items() if not label.startswith("library")]
    return (
        f"{result['product']:8} {result['tokens']:3}: library {found['library']:.0f}; {', '.join(ours[:4])}"
    )


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_linear",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--shape", choices=sorted(SHAPES), default="llama-3-8b")
    add("--products", default=",".join(PRODUCTS), help="some of them, with commas")
    add("--tokens", default="1,8,32", help="numbers of tokens in the step")
    add(
        "--device", choices=("cpu", "cuda"), default="cuda", help="cpu: to try it out in Triton's interpreter"
    )
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    add("--megabytes", type=int, default=1536, help="of weights that are read in turn")
    add("--out", type=Path, help="write the figures here as they come")
    arguments = parser.parse_args(argv)
    unknown = set(arguments.products.split(",")) - set(PRODUCTS)
    if unknown:
        parser.error(f"--products {', '.join(sorted(unknown))}: there are {', '.join(PRODUCTS)}")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
