"""How fast do a decode step's products stream their weights: the vendor's library, and our kernel under each tiling?

One CUDA graph launches the product over as many different weights as a chip's cache cannot hold, as a model does.
Printed: gigabytes of weights a second, of a plain read's. Tilings that do not fit a chip are left out by name.

    python -m bench.gpu_linear --tokens 1,8,16,32,64 --out bench/results/gpu_linear.json

The last line of stdout is one JSON object.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from adapterd.model.linear_triton import Tiling, few_tokens_linear

SHAPES = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
    "head": (128256, 4096),
}
"""Llama-3-8B's, (d_out, d_in)."""

TILINGS = [
    Tiling(block_out, block_in, num_splits, num_stages, num_warps)
    for block_out, block_in, num_stages, num_warps in (
        (64, 128, 4, 4), (64, 128, 6, 4), (64, 128, 8, 4), (64, 64, 8, 4), (64, 256, 4, 4), (128, 128, 3, 8),
        (128, 128, 4, 8), (128, 64, 6, 4),
    )
    for num_splits in (1, 2, 4)
]  # fmt: skip
_POOL_BYTES = 3 << 29


def seconds_of(launch: Callable[[], None], repeats: int = 4) -> float:
    """Best of some replays of a CUDA graph of `launch`."""
    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    best = float("inf")
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        best = min(best, begin.elapsed_time(end) / 1e3)
    return best


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

    found["library"] = num_bytes / seconds_of(library) / 1e9
    found["library, adding"] = num_bytes / seconds_of(library_adds) / 1e9
    for tiling in TILINGS:
        if d_in % (tiling.block_in * tiling.num_splits):
            continue
        label = f"{tiling.block_out}x{tiling.block_in}/{tiling.num_splits} s{tiling.num_stages} w{tiling.num_warps}"
        try:
            y.fill_(float("nan"))
            few_tokens_linear(x, weights[0], y, tiling)
            error = float((y.float() - exact).norm() / exact.norm())
            if error < 1e-2:
                found[label] = num_bytes / seconds_of(ours(tiling)) / 1e9
            else:
                troubles.append(f"{label} is wrong by {error}")
        except Exception as failure:  # what does not fit this chip
            troubles.append(f"{label}: {str(failure)[:80]}")
    return dict(sorted(found.items(), key=lambda item: -item[1])), troubles


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", default="1,8,32")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument(
        "--chained", default="0,1", help="0: plain launches, 1: begun while the last still runs"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda")
    pool = torch.randn(_POOL_BYTES // 2, device=device, dtype=torch.bfloat16) / 64
    copied = torch.empty_like(pool)
    read = _POOL_BYTES / seconds_of(lambda: pool.view(torch.int32).amax()) / 1e9
    copy = 2 * _POOL_BYTES / seconds_of(lambda: copied.copy_(pool)) / 1e9
    print(f"read {read:.0f} GB/s, copy {copy:.0f} GB/s", flush=True)
    results: list[dict[str, object]] = []
    for name in args.shapes.split(","):
        d_out, d_in = SHAPES[name]
        count = max(min(len(pool) // (d_out * d_in), 12), 1)
        weights = [w.view(d_out, d_in) for w in pool[: count * d_out * d_in].chunk(count)]
        for num_tokens in map(int, args.tokens.split(",")):
            found, troubles = measure(weights, num_tokens)
            best = ", ".join(f"{label} {rate:.0f}" for label, rate in list(found.items())[:6])
            print(f"{name:8} {num_tokens:3}: library {found['library']:.0f}; {best}", flush=True)
            for trouble in troubles:
                print("   ", trouble)
            results.append({"shape": name, "tokens": num_tokens, "gb_per_second": found})
    record = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "read_gb_per_second": read,
        "copy_gb_per_second": copy,
        "results": results,
    }
    if args.out:
        args.out.write_text(json.dumps(record, indent=1))
    print(json.dumps(record))


if __name__ == "__main__":
    main()
