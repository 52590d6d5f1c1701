"""The engine without HTTP: how fast it steps, and in which room a step's time goes.

One static batch after another, as PEFT's `generate` would run it: all prompts are given at once, the steps until
every sequence has its first token are the prefill, the others the decode. The registry, the tokenizer and the
server take no part; subtract these figures from bench/serve.py's to see what they cost.

    python -m bench.models --out OUT
    python -m bench.engine --models OUT --concurrency 1,8 --adapters 0,1,8
    python -m bench.engine --models OUT --concurrency 8 --adapters 8 --profile      # torch's operators, by time

The last line of stdout is JSON.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from adapterd.adapter import read_adapter
from adapterd.core import RequestId
from adapterd.model.base import Base, load_base
from adapterd.model.checkpoint import DtypeName
from adapterd.token_table import TokenizerIdentity
from bench.hardware import synchronise
from bench.offline import OfflineEngine, Sizes
from bench.report import emit, machine, percentile


class Rooms:
    """Seconds spent in chosen methods, step by step. A room inside another counts in both.

    It replaces methods of living objects by timed ones, private ones too: what a step consists of is the very
    thing to be seen, and a renamed method stops the bench by name.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._now: dict[str, float] = {}
        self.steps: list[dict[str, float]] = []

    def watch(self, room: str, owner: object, method: str) -> None:
        inner: Callable[..., Any] = getattr(owner, method)

        def timed(*arguments: Any, **keywords: Any) -> Any:
            synchronise(self._device)
            began = time.perf_counter()
            result = inner(*arguments, **keywords)
            synchronise(self._device)
            self._now[room] = self._now.get(room, 0.0) + time.perf_counter() - began
            return result

        setattr(owner, method, timed)

    def end_step(self, seconds: float) -> None:
        self.steps.append({"step": seconds, **self._now})
        self._now = {}


class Bench:
    """An engine over the models that bench/models.py made."""

    def __init__(self, base: Base, directory: Path, sizes: Sizes) -> None:
        self.base = base
        self.adapters = [
            read_adapter(path, name=path.name, spec=base.spec, tokenizer=_NO_TOKENIZER)
            for path in sorted((directory / "adapters").iterdir())
        ]
        self.offline = OfflineEngine(base, sizes, self.adapters)
        self.engine = self.offline.engine
        self.rooms = Rooms(base.device)
        scheduler, outputs = self.engine._scheduler, self.engine._outputs
        self.rooms.watch("schedule", scheduler, "schedule")
        self.rooms.watch("forward", self.offline.runner, "_forward")
        self.rooms.watch("sample", self.offline.runner, "_sample")
        self.rooms.watch("outputs", outputs, "build")
        self.rooms.watch("update", scheduler, "update")

    def run(self, concurrency: int, num_adapters: int, prompt: int, output: int, seed: str) -> dict[str, Any]:
        """One static batch; sequence i runs adapter i mod num_adapters, the base if there are none."""
        for i in range(concurrency):
            adapter = self.adapters[i % num_adapters] if num_adapters else None
            self.offline.submit(prompt, output, adapter, f"{seed}/{i}")
        self.rooms.steps = []
        first_tokens: set[RequestId] = set()
        num_prefill_steps = 0
        while self.engine.has_work():
            began = time.perf_counter()
            outputs = self.engine.step()
            self.rooms.end_step(time.perf_counter() - began)
            if len(first_tokens) < concurrency:
                num_prefill_steps += 1
                first_tokens.update(found.request_id for found in outputs)
        prefill, decode = self.rooms.steps[:num_prefill_steps], self.rooms.steps[num_prefill_steps:]
        seconds = sum(step["step"] for step in self.rooms.steps)
        prefill_seconds = sum(step["step"] for step in prefill)
        return {
            "output_tokens_per_second": concurrency * output / seconds,
            "prefill_seconds": prefill_seconds,
            "prefill_tokens_per_second": concurrency * prompt / prefill_seconds,
            "prefill_rooms_ms": _rooms_ms(prefill),
            "decode_step_ms": 1000 * statistics.median(step["step"] for step in decode) if decode else None,
            # What the machine does while others leave it alone.
            "decode_step_ms_p10": 1000 * percentile([step["step"] for step in decode], 10)
            if decode
            else None,
            "decode_rooms_ms": _rooms_ms(decode),
        }


_NO_TOKENIZER = TokenizerIdentity(frozenset(), {})


def _rooms_ms(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median of each room over the steps, and what of a step is in none of them."""
    if not steps:
        return {}
    rooms = [room for room in steps[0] if room != "step"]
    rest = [step["step"] - sum(step.get(room, 0.0) for room in rooms) for step in steps]
    found = {room: 1000 * statistics.median(step.get(room, 0.0) for step in steps) for room in rooms}
    return {**found, "rest": 1000 * statistics.median(rest)}


def _profile(bench: Bench, concurrency: int, num_adapters: int, prompt: int) -> str:
    """torch's operators of some decode steps, by their own time."""
    for i in range(concurrency):
        adapter = bench.adapters[i % num_adapters] if num_adapters else None
        bench.offline.submit(prompt, 16, adapter, f"profile/{i}")
    for _ in range(4):
        bench.engine.step()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if bench.base.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(8):
            bench.engine.step()
    while bench.engine.has_work():
        bench.engine.step()
    key = "self_cuda_time_total" if bench.base.device.type == "cuda" else "self_cpu_time_total"
    return str(profile.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=50))


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    result: dict[str, Any] = {"bench": "engine", "machine": machine()}
    concurrencies = [int(count) for count in arguments.concurrency.split(",")]
    adapter_counts = [int(count) for count in arguments.adapters.split(",")]
    began = time.perf_counter()
    base = load_base(
        str(arguments.models / "base"),
        dtype=arguments.dtype,
        quantization=arguments.quantization,
        device=arguments.device,
        kernels=arguments.kernels,
    )
    load_seconds = time.perf_counter() - began
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    sizes = Sizes(
        max_num_seqs=max(concurrencies),
        max_num_batched_tokens=arguments.max_num_batched_tokens,
        adapter_memory=arguments.adapter_memory,
        kv_memory=arguments.kv_memory,
    )
    bench = Bench(base, arguments.models, sizes)
    result |= {
        "architecture": base.spec.architecture,
        "dtype": base.spec.dtype,
        "quantization": arguments.quantization,
        "lora_step": type(base.lora_step).__name__,
        "num_threads": torch.get_num_threads(),
        "load_seconds": load_seconds,
        "prompt_tokens": arguments.prompt_tokens,
        "output_tokens": arguments.output_tokens,
        "runs": [],
    }
    print(
        f"base loaded in {load_seconds:.1f} s; {torch.get_num_threads()} threads; {type(base.lora_step).__name__}"
    )
    for concurrency in concurrencies:
        for count in adapter_counts:
            if count > concurrency:
                continue  # a static batch cannot run more adapters than sequences
            bench.run(concurrency, count, arguments.prompt_tokens, 4, f"warm-up {concurrency} {count}")
            repeats = [
                bench.run(
                    concurrency,
                    count,
                    arguments.prompt_tokens,
                    arguments.output_tokens,
                    f"{concurrency} {count} {i}",
                )
                for i in range(arguments.repeats)
            ]
            repeats.sort(key=lambda run: run["output_tokens_per_second"])
            median = repeats[len(repeats) // 2]
            result["runs"].append({"concurrency": concurrency, "adapters": count, **median})
            print(_line(concurrency, count, median), flush=True)
            if arguments.profile:
                print(_profile(bench, concurrency, count, arguments.prompt_tokens))
    emit(result, arguments.out)
    return 0


def _line(concurrency: int, count: int, run: dict[str, Any]) -> str:
    rooms = ", ".join(f"{room} {ms:.1f}" for room, ms in run["decode_rooms_ms"].items())
    return (
        f"concurrency {concurrency:2}, {count:2} adapters: {run['output_tokens_per_second']:7.2f} output tokens/s, "
        f"prefill {run['prefill_tokens_per_second']:7.1f} tokens/s, "
        f"decode step {run['decode_step_ms'] or 0:.1f} ms, p10 {run['decode_step_ms_p10'] or 0:.1f} ({rooms})"
    )


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.engine",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    dtypes: tuple[DtypeName, ...] = ("auto", "float32", "bfloat16", "float16")
    add = parser.add_argument
    add("--models", type=Path, required=True, help="the --out of bench.models")
    add("--concurrency", default="1,8", help="sizes of the static batch")
    add("--adapters", default="0,1,8", help="how many different ones in the batch; 0 is the base")
    add("--prompt-tokens", type=int, default=128)
    add("--output-tokens", type=int, default=64)
    add("--repeats", type=int, default=3, help="the median by tokens a second is kept")
    add("--dtype", choices=dtypes, default="bfloat16")
    add("--quantization", choices=("none", "int8", "bnb-8bit", "bnb-4bit"), default="none")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add(
        "--kernels",
        choices=("auto", "torch", "native", "triton"),
        default="auto",
        help="auto: the C++ operators where they are built, Triton on cuda",
    )
    add("--threads", type=int, help="torch's (default: the program's choice)")
    add("--max-num-batched-tokens", type=int, default=2048)
    add("--kv-memory", type=int, default=1 << 30, metavar="BYTES")
    add("--adapter-memory", type=int, default=1 << 30, metavar="BYTES")
    add("--profile", action="store_true", help="print torch's operators of some decode steps")
    add("--out", type=Path, help="write the result here too")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
