"""The registry with thousands of adapters: how long it takes to start, what memory it keeps, what requests pay for it.

Makes N adapters for the embedded base, each with the tokenizer files that PEFT saves, then in one process each:
starts with an empty state (every folder is read), starts again (nothing has changed), and runs S-LoRA's power-law
workload (arXiv 2311.03285: adapter index = int(power(alpha) * N)) over a few and over all of them, in turn. Host
memory is smaller than all adapters together, so that weights come and go.

    python -m bench.registry --work DIRECTORY --out FILE     # 2,000 adapters, about 300 MB below DIRECTORY
    python -m bench.registry --work DIRECTORY --adapters 200 --requests 100

The last line of stdout is JSON.
"""

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch

from adapterd.adapter_writer import write_adapter
from adapterd.config import ServeSettings
from adapterd.core import Output, Request, RequestId, SamplingParams
from adapterd.daemon import Daemon
from adapterd.model.find import find_base
from bench.report import emit, machine

NUM_FEW = 5
NUM_CLIENTS = 16
SHARED_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
TARGETS = ("q_proj", "v_proj")


def name_of(index: int) -> str:
    return f"adapter-{index:05}"


def make_adapters(directory: Path, count: int, rank: int) -> int:
    """Write what is missing of `count` adapters of different content; their bytes on disk."""
    settings = ServeSettings.model_validate({"base": "mini"})
    spec = Daemon.build(settings).spec
    shapes = {path: shape for path, shape in spec.lora_targets.items() if path.rpartition(".")[2] in TARGETS}
    base = find_base("mini")
    for index in range(count):
        folder = directory / name_of(index)
        if folder.exists():
            continue
        draw = torch.Generator().manual_seed(index)
        tensors = {
            path: (
                torch.randn(rank, d_in, generator=draw) * 0.02,
                torch.randn(d_out, rank, generator=draw) * 0.02,
            )
            for path, (d_out, d_in) in shapes.items()
        }
        options: dict[str, Any] = {"r": rank, "lora_alpha": 2 * rank, "target_modules": TARGETS}
        write_adapter(folder, tensors, base_name="mini", base_fingerprint=None, **options)
        for name in SHARED_FILES:
            shutil.copy(base / name, folder / name)
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def power_law(num_requests: int, num_adapters: int, alpha: float, seed: int) -> list[int]:
    """The adapter of each request: int(x * N), x of density alpha * x^(alpha - 1). Skew grows as alpha falls."""
    draw = random.Random(seed)
    return [int(draw.random() ** (1 / alpha) * num_adapters) for _ in range(num_requests)]


def started(work: Path, host_memory: int) -> tuple[Daemon, dict[str, float]]:
    """A daemon over all adapters, its registry loaded; seconds, reads and bytes that took."""
    settings = ServeSettings.model_validate(
        {
            "base": "mini",
            "adapters": (work / "adapters",),
            "state": work / "state",
            "host_memory": host_memory,
        }
    )
    daemon = Daemon.build(settings, state=settings.state, sources=settings)
    before = psutil.Process().memory_info().rss
    began = time.perf_counter()
    daemon.registry.start()
    if not daemon.registry.wait_loaded(3600):
        raise SystemExit("the registry did not load its adapters within an hour")
    seconds = time.perf_counter() - began
    stats = daemon.registry.stats()
    return daemon, {
        "start_seconds": seconds,
        "num_ready": stats.num_ready,
        "num_failed": stats.num_failed,
        "num_reads": stats.num_reads,
        "host_bytes": stats.host_bytes,
        "host_bytes_total": stats.host_bytes_total or 0,
        "rss_grown_bytes": psutil.Process().memory_info().rss - before,
    }


class Clients:
    """A closed loop of requests: each resolves its adapter, leases it, and waits for its answer."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._done: dict[RequestId, threading.Event] = {}
        daemon.engine.start(self._deliver)

    def _deliver(self, outputs: list[Output]) -> None:
        for output in outputs:
            if output.finish_reason is not None:
                self._done[output.request_id].set()

    def run(self, adapters: Sequence[int], *, label: str, seed: str) -> dict[str, float]:
        """Requests per second, and how often weights had to be read for them.

        Requests are known by `label`; their prompts and lengths follow from `seed`.
        """
        before = self._daemon.registry.stats()
        began = time.perf_counter()
        with ThreadPoolExecutor(NUM_CLIENTS) as pool:
            list(
                pool.map(
                    lambda item: self._ask(f"{label}-{item[0]}", f"{seed}-{item[0]}", item[1]),
                    enumerate(adapters),
                )
            )
        seconds = time.perf_counter() - began
        after = self._daemon.registry.stats()
        return {
            "requests_per_second": len(adapters) / seconds,
            "num_adapters_used": len(set(adapters)),
            "num_reads": after.num_reads - before.num_reads,
            "host_bytes": after.host_bytes,
        }

    def _ask(self, label: str, seed: str, adapter: int) -> None:
        daemon = self._daemon
        resolved = daemon.registry.resolve_waiting(f"mini:{name_of(adapter)}", 60)
        lease = daemon.registry.lease(resolved.mix)
        draw = random.Random(seed)
        prompt = tuple(draw.randrange(300, 2000) for _ in range(draw.randrange(8, 128)))
        params = SamplingParams(max_tokens=draw.randrange(8, 64), temperature=0, ignore_eos=True)
        request = Request(
            RequestId(label), prompt, params, resolved.mix, resolved.eos_token_ids, time.monotonic()
        )
        done = self._done[request.id] = threading.Event()
        daemon.engine.submit(request)
        if not done.wait(300):
            raise SystemExit(f"request {label} has had no answer for five minutes")
        lease.release()
        del self._done[request.id]


def measure_start(work: Path, host_memory: int) -> dict[str, float]:
    daemon, figures = started(work, host_memory)
    daemon.registry.stop()
    return figures


def measure_requests(
    work: Path, host_memory: int, num_adapters: int, num_requests: int, alpha: float, rounds: int
) -> dict[str, Any]:
    """Few and all adapters in turn, the same requests otherwise."""
    daemon, _ = started(work, host_memory)
    clients = Clients(daemon)
    few = power_law(num_requests, NUM_FEW, alpha, seed=42)
    many = power_law(num_requests, num_adapters, alpha, seed=42)
    clients.run(few[: num_requests // 4], label="warm", seed="warm")
    runs: dict[str, list[dict[str, float]]] = {"few": [], "many": []}
    for round_number in range(rounds):
        for kind, adapters in (("few", few), ("many", many)):
            runs[kind].append(clients.run(adapters, label=f"{kind}{round_number}", seed=str(round_number)))
    daemon.engine.stop()
    daemon.registry.stop()
    medians = {
        kind: statistics.median(run["requests_per_second"] for run in done) for kind, done in runs.items()
    }
    return {"runs": runs, "medians": medians, "ratio": medians["many"] / medians["few"]}


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(argv)
    if options.phase == "make":
        emit(
            {"disk_bytes": make_adapters(options.work / "adapters", options.adapters, options.rank)},
            options.out,
        )
    elif options.phase == "start":
        emit(measure_start(options.work, options.host_memory), options.out)
    elif options.phase == "requests":
        sizes = (options.host_memory, options.adapters, options.requests, options.alpha, options.rounds)
        emit(measure_requests(options.work, *sizes), options.out)
    else:
        emit(
            {"bench": "registry", "machine": machine(), "settings": settings_of(options), **whole(options)},
            options.out,
        )
    return 0


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    return {key: value for key, value in vars(options).items() if key not in ("work", "out", "phase")}


def whole(options: argparse.Namespace) -> dict[str, Any]:
    """Every part in a process of its own, so that no part finds what the one before left in memory."""

    def part(phase: str) -> dict[str, Any]:
        flags = [f"--{key.replace('_', '-')}={value}" for key, value in settings_of(options).items()]
        command = [
            sys.executable,
            "-m",
            "bench.registry",
            "--work",
            str(options.work),
            "--phase",
            phase,
            *flags,
        ]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        figures: dict[str, Any] = json.loads(output.splitlines()[-1])
        return figures

    made = part("make")
    shutil.rmtree(options.work / "state", ignore_errors=True)
    return {**made, "first_start": part("start"), "restart": part("start"), "requests": part("requests")}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.registry", description=str(__doc__).partition("\n")[0])
    parser.add_argument(
        "--work", type=Path, required=True, metavar="DIRECTORY", help="for the adapters and the state"
    )
    parser.add_argument("--adapters", type=int, default=2000)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--host-memory", type=int, default=16 << 20, help="bytes")
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--alpha", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--phase", choices=("make", "start", "requests"), help="one part, in this process")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result here too")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
