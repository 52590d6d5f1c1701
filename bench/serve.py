"""Load on any OpenAI-compatible server: throughput, latency, goodput, memory and start-up, over HTTP.

Closed loop (`--concurrency 8`: clients that wait for their answer) or open loop (`--rate 2 --cv 1`: arrivals that
do not wait). Answers are greedy, streamed, of a fixed number of tokens (`ignore_eos`); every prompt is new, so no
prefix cache helps. A first, unmeasured load at the same concurrency touches every adapter once. Token counts are
the server's `usage`, checked against the chunks that came; errors are counted and shown.

    python -m bench.serve --url http://127.0.0.1:8000 --model mini --adapters support,medical --concurrency 8
    python -m bench.serve --server bench/peers/adapterd.toml --adapters 8 --popularity distinct --concurrency 8
    python -m bench.serve --server bench/peers/adapterd.toml --rate 2 --cv 4 --slo ttft=2,itl=0.3
    python -m bench.serve --compare bench/peers/adapterd.toml bench/peers/vllm.toml --concurrency 1 --rounds 2

`--compare` starts two servers in turn, A B A B, and prints A's figures over B's. The last line of stdout is JSON.
"""

import argparse
import asyncio
import dataclasses
import resource
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import httpx

from bench.client import run_closed, run_open
from bench.load import Load, build_requests, build_warmup, find_prompt_form
from bench.report import Figures, describe, emit, machine, median_of, parse_objective, ratios, summarise
from bench.target import Running, Target, read_target, running, server_version
from bench.workload import (
    COMMON_WORDS,
    Lengths,
    read_trace,
    single_token_words,
)


async def run_round(server: Running, load: Load, round_index: int) -> Figures:
    """Warm up, then one measured run."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    timeout = httpx.Timeout(load.request_timeout_seconds, connect=30.0)
    target = server.target
    async with httpx.AsyncClient(base_url=target.url, limits=limits, timeout=timeout) as client:
        form = await find_prompt_form(client, load, target)
        warmup = build_warmup(load, target, form, round_index)
        failed = [r.error for r in await run_closed(client, warmup, load.concurrency or 1) if r.error]
        if failed:
            raise RuntimeError(f"{target.name} failed {len(failed)} requests of the warm-up: {failed[0]}")
        requests = build_requests(load, target, form, round_index)
        began, cpu_began = time.perf_counter(), _cpu_seconds()
        if load.rate:
            records = await run_open(client, requests)
        else:
            records = await run_closed(client, requests, load.concurrency or 1)
        client_cpu = (_cpu_seconds() - cpu_began) / (time.perf_counter() - began)
    figures = summarise(records, load.objective)
    figures["server_version"] = server_version(target)
    figures["prompt_form"] = form.kind
    figures["peak_rss_bytes"] = server.memory.peak_rss_bytes
    figures["startup_seconds"] = server.startup_seconds
    figures["client_cpu_share"] = client_cpu  # of one core: what the load itself takes from the server
    return figures


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def measure(
    target: Target, load: Load, arguments: argparse.Namespace, rounds: Iterable[int]
) -> list[Figures]:
    """The figures of each round, on one start of the server."""
    found = []
    with running(target, arguments.start_timeout, arguments.pid) as server:
        for round_index in rounds:
            found.append(asyncio.run(run_round(server, load, round_index)))
            print(f"{target.name}, round {round_index + 1}\n{describe(found[-1])}", flush=True)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        load = load_of(arguments)
        result: dict[str, Any] = {"bench": "serve", "machine": machine(), "load": described(load)}
        if arguments.compare:
            targets = [read_target(path) for path in arguments.compare]
            runs: dict[int, list[Figures]] = {0: [], 1: []}
            for round_index in range(arguments.rounds):
                for index, target in enumerate(targets):
                    runs[index] += measure(target, load, arguments, [round_index])
            result["servers"] = [
                {"target": shown(target), "runs": runs[index], "median": median_of(runs[index])}
                for index, target in enumerate(targets)
            ]
            result["ratios"] = ratios(runs[0], runs[1])
            print(f"{targets[0].name} / {targets[1].name}, median of {arguments.rounds} rounds")
            for name, ratio in result["ratios"].items():
                print(f"{name:>16}  {ratio:.3f}")
        else:
            target = _target(arguments)
            figures = measure(target, load, arguments, range(arguments.rounds))
            result |= {"target": shown(target), "runs": figures, "median": median_of(figures)}
    except (OSError, RuntimeError, ValueError) as error:
        print(f"bench.serve: {error}", file=sys.stderr)
        return 1
    emit(result, arguments.out)
    return 0


def described(load: Load) -> dict[str, Any]:
    described = dataclasses.asdict(load)
    del described["words"]
    described["token_ids"] = [load.token_ids.start, load.token_ids.stop]
    described["lengths"] = _shortened(load.lengths)
    return described


def _shortened(lengths: Sequence[Lengths]) -> Any:
    kinds = set(lengths)
    if len(kinds) == 1:
        return {"num_requests": len(lengths), **dataclasses.asdict(lengths[0])}
    return [[length.prompt_tokens, length.output_tokens] for length in lengths]


def shown(target: Target) -> dict[str, Any]:
    """As its file says it, with variables unexpanded: results name no place of the machine they come from."""
    return dataclasses.asdict(target)


def _target(arguments: argparse.Namespace) -> Target:
    target = read_target(arguments.server) if arguments.server else Target()
    names = ("url", "model", "adapter_model", "start", "ready")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    return dataclasses.replace(target, **given)


def load_of(arguments: argparse.Namespace) -> Load:
    """Raises OSError or ValueError for a file or a value that cannot be used."""
    concurrency = None if arguments.rate else arguments.concurrency or 1
    if arguments.trace:
        trace = read_trace(arguments.trace)
        count = arguments.requests or len(trace)
        lengths = [trace[i % len(trace)] for i in range(count)]
    else:
        count = arguments.requests or 4 * (concurrency or 8)
        lengths = [Lengths(arguments.prompt_tokens, arguments.output_tokens)] * count
    number = arguments.adapters.isdecimal()
    names = (
        [f"adapter-{i:02}" for i in range(int(arguments.adapters))]
        if number
        else arguments.adapters.split(",")
    )
    first, _, last = arguments.token_ids.partition(":")
    words = single_token_words(arguments.tokenizer) if arguments.tokenizer else COMMON_WORDS
    return Load(
        lengths=tuple(lengths),
        adapters=tuple(names),
        popularity=arguments.popularity,
        concurrency=concurrency,
        rate=arguments.rate,
        cv=arguments.cv,
        prompt=arguments.prompt,
        token_ids=range(int(first), int(last)),
        words=tuple(words),
        seed=arguments.seed,
        objective=parse_objective(arguments.slo) if arguments.slo else {},
        request_timeout_seconds=arguments.request_timeout,
        num_warmup=arguments.warmup,
    )


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--server", type=Path, metavar="FILE", help="a server's description, as in bench/peers/*.toml")
    add(
        "--compare",
        type=Path,
        nargs=2,
        metavar="FILE",
        help="two descriptions: run them in turn, print ratios",
    )
    add("--url", help="root of a server that runs, or that --start starts (default http://127.0.0.1:8000)")
    add("--model", help="the base's name in the API")
    add(
        "--adapter-model",
        help="an adapter's name in the API (default {adapter}; adapterd: {model}:{adapter})",
    )
    add("--start", metavar="COMMAND", help="start the server with this, and stop it at the end")
    add("--ready", metavar="PATH", help="answers 200 once the server serves (default /health)")
    add("--start-timeout", type=float, default=900.0, metavar="SECONDS")
    add("--pid", type=int, help="the server's process, to see its memory, where it was not started here")
    add("--concurrency", type=int, help="closed loop: clients at once (default 1)")
    add("--rate", type=float, help="open loop: requests a second")
    add("--cv", type=float, default=1.0, help="of the gaps between arrivals; 1 is Poisson")
    add("--requests", type=int, help="measured requests (default: 4 a client, or the trace's)")
    add(
        "--warmup",
        type=int,
        help="unmeasured requests first (default: as many as run at once, and every adapter)",
    )
    add("--adapters", default="0", help="how many (adapter-00, ...; 0: the base alone), or names with commas")
    add("--popularity", default="distinct", help="identical, distinct, uniform or zipf:1.5")
    add("--prompt-tokens", type=int, default=128)
    add("--output-tokens", type=int, default=64)
    add(
        "--trace",
        type=Path,
        help='JSONL of {"prompt_tokens": .., "output_tokens": ..}, instead of fixed lengths',
    )
    add(
        "--prompt",
        choices=("auto", "ids", "text", "chat"),
        default="auto",
        help="auto: ids if taken, else text",
    )
    add("--token-ids", default="1000:30000", metavar="FIRST:END", help="prompts are drawn from these ids")
    add("--tokenizer", type=Path, metavar="TOKENIZER_JSON", help="texts are made of its words of one token")
    add(
        "--slo", metavar="ttft=..,itl=..", help="objective in seconds for goodput: ttft, tpot, itl (p99), e2e"
    )
    add(
        "--request-timeout",
        type=float,
        default=900.0,
        metavar="SECONDS",
        help="without a byte from the server",
    )
    add("--rounds", type=int, default=1, help="runs; the result is their median")
    add("--seed", type=int, default=0)
    add("--out", type=Path, help="write the result here too")
    arguments = parser.parse_args(argv)
    if arguments.rate and arguments.concurrency:
        parser.error("--rate is an open loop and --concurrency a closed one; give one of them")
    if arguments.compare and (arguments.server or arguments.url or arguments.start or arguments.pid):
        parser.error("--compare takes its servers from the two files alone")
    return arguments


if __name__ == "__main__":
    # Ended from outside, it still ends the server that it has started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
