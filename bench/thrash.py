"""More adapters in use than fit: throughput and first tokens with adapter memory for 8 and 8, 9, 12, 16, 64 in use.

Closed loop: `--clients` clients, each asking the next question of an adapter drawn evenly among those in use as soon
as its last is answered. One daemon for all points, with 64 adapters registered and memory for 8; before each point the
adapters in use are asked once, unmeasured. A server that reloads adapters without looking at its queue falls off a
cliff here: a published one goes from 40 ms to 6,278 ms of median time to first token between 8 and 16.

    python -m bench.models --out OUT --adapters 64                   # 20 MB each, for a base of 0.6 billion
    python -m bench.thrash --models OUT --out thrash.json --svg thrash.svg

The last line of stdout is JSON; the exit status is 1 where a request failed.
"""

import argparse
import asyncio
import random
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import httpx

from bench.client import run_closed
from bench.daemon import adapterd, completion, folder_bytes, metric
from bench.report import Figures, emit, machine, summarise
from bench.target import Running, running

IN_USE = (8, 9, 12, 16, 64)
NUM_SLOTS = 8
TOKEN_IDS = range(300, 2000)


def name_of(index: int) -> str:
    return f"adapter-{index:02}"


async def run_point(server: Running, num_adapters: int, options: argparse.Namespace) -> Figures:
    draw = random.Random(f"{options.seed}/{num_adapters}")
    requests = [
        completion(
            f"base:{name_of(draw.randrange(num_adapters))}",
            options.prompt_tokens,
            options.output_tokens,
            TOKEN_IDS,
            f"{options.seed}/{num_adapters}/{index}",
        )
        for index in range(options.requests)
    ]
    warmup = [
        completion(f"base:{name_of(i)}", 8, 2, TOKEN_IDS, f"warm-up/{num_adapters}/{i}")
        for i in range(num_adapters)
    ]
    url = server.target.url
    async with httpx.AsyncClient(
        base_url=url, limits=httpx.Limits(max_connections=None), timeout=240
    ) as client:
        await run_closed(client, warmup, NUM_SLOTS)
        before = num_uploads(url), metric(url, "adapterd_preemptions_total")
        records = await run_closed(client, requests, options.clients)
        after = num_uploads(url), metric(url, "adapterd_preemptions_total")
    figures = summarise(records, {})
    whole = [record for record in records if record.error is None]
    figures["adapters_in_use"] = num_adapters
    figures["longest_ttft_seconds"] = max(record.ttft for record in whole)
    figures["uploads"], figures["preemptions"] = after[0] - before[0], after[1] - before[1]
    return figures


def svg(points: Sequence[Figures]) -> str:
    """Two curves over the number of adapters in use: output tokens/s, and the median time to first token."""
    width, height, left, top, gap = 720, 190, 70, 40, 60
    xs = [left + (width - left - 40) * i / (len(points) - 1) for i in range(len(points))]
    panels = (
        ("Output tokens a second; more is better", "#1b4f8f", [p["output_tokens_per_second"] for p in points]),
        ("Median time to first token, seconds; less is better", "#c25e00", [p["ttft_seconds"]["p50"] for p in points]),
    )  # fmt: skip
    body = []
    for number, (title, colour, values) in enumerate(panels):
        base = top + number * (height + gap) + height
        ys = [base - value / max(values) * (height - 44) for value in values]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))
        body.append(f'<text x="8" y="{base - height + 12}" font-size="12">{escape(title)}</text>')
        body.append(f'<line x1="{left}" x2="{width - 20}" y1="{base}" y2="{base}" stroke="#999"/>')
        body.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for x, y, value, point in zip(xs, ys, values, points, strict=True):
            body.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
            body.append(f'<text x="{x:.1f}" y="{y - 7:.1f}" text-anchor="middle">{value:.3g}</text>')
            label = f"{point['adapters_in_use']} in use"
            body.append(f'<text x="{x:.1f}" y="{base + 15}" text-anchor="middle">{label}</text>')
    total = top + 2 * (height + gap)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {total}" width="{width}" height="{total}" '
        'font-family="sans-serif" font-size="11" fill="#222">\n'
        f'<rect width="{width}" height="{total}" fill="#fff"/>\n'
        f'<text x="8" y="18" font-size="13">Adapter memory for {NUM_SLOTS} adapters, and more of them in use</text>\n'
        + "\n".join(body)
        + "\n</svg>\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.thrash",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", type=Path, required=True, help="the --out of bench.models")
    parser.add_argument("--adapters-in", default="adapters", help="their directory below it")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--in-use", default=",".join(map(str, IN_USE)), help="numbers of adapters in use")
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--max-num-seqs", type=int, default=16)
    parser.add_argument("--requests", type=int, default=96, help="measured, at each point")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument(
        "--memory-overhead", type=float, default=1.25, help="of an adapter in pages, over its file"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--svg", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    folders = [options.models / options.adapters_in / name_of(i) for i in range(NUM_SLOTS)]
    scale = 2 if options.dtype == "float32" else 1  # the files hold 16 bits
    # As much as eight take, which the daemon is asked for with one adapter alone: pages round up.
    memory = int(folder_bytes(folders) * scale * options.memory_overhead)
    target = adapterd(
        options.models / "base",
        options.models / options.adapters_in,
        f"--dtype={options.dtype}",
        f"--adapter-memory={memory}",
        "--kv-memory=2GiB",
        f"--max-num-seqs={options.max_num_seqs}",
    )
    points = []
    with running(target, 600.0) as server:
        first = one_adapter_bytes(target.url, options)
        if memory // first != NUM_SLOTS:
            print(
                f"memory is for {memory // first} adapters, not {NUM_SLOTS}; set --memory-overhead",
                file=sys.stderr,
            )
            return 1
        for num_adapters in map(int, options.in_use.split(",")):
            points.append(asyncio.run(run_point(server, num_adapters, options)))
            point = points[-1]
            print(
                f"{num_adapters:3} in use: {point['output_tokens_per_second']:7.1f} tokens/s,"
                f" TTFT p50 {point['ttft_seconds']['p50']:.3f} p99 {point['ttft_seconds']['p99']:.3f}"
                f" longest {point['longest_ttft_seconds']:.3f} s, {point['uploads']:.0f} uploads,"
                f" {point['num_errors']} errors",
                flush=True,
            )
    if options.svg:
        options.svg.parent.mkdir(parents=True, exist_ok=True)
        options.svg.write_text(svg(points))
    described = {
        key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()
    }
    for private in ("models", "out", "svg"):
        described.pop(private)
    result: dict[str, Any] = {
        "bench": "thrash",
        "machine": machine(),
        "options": described,
        "adapter_memory_bytes": memory,
        "adapter_bytes": first,
        "throughput_ratio_16_to_8": _ratio(points),
        "points": points,
    }
    emit(result, options.out)
    return 1 if any(point["num_errors"] for point in points) else 0


def num_uploads(url: str) -> float:
    return metric(url, "adapterd_adapter_loads_total", tier="device")


def one_adapter_bytes(url: str, options: argparse.Namespace) -> int:
    """What one adapter takes of the memory, which the daemon alone knows: pages round up."""
    request = completion(f"base:{name_of(0)}", 8, 1, TOKEN_IDS, "first")
    httpx.post(url + request.path, json=request.body, timeout=120).raise_for_status()
    return int(metric(url, "adapterd_adapter_resident_bytes"))


def _ratio(points: Sequence[Figures]) -> float | None:
    rates = {point["adapters_in_use"]: point["output_tokens_per_second"] for point in points}
    return rates[16] / rates[8] if {8, 16} <= rates.keys() else None


if __name__ == "__main__":
    sys.exit(main())
