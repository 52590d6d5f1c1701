"""One adapter updated ten times a second while others answer: is any answer stale or mixed, and does anyone notice?

Four adapters under constant traffic, over HTTP, against the real daemon in float32. First without updates; then one of
them is given new content every 100 ms (`POST /v1/adapters`, each a folder of other weights), 1,000 times; then without
updates again, so that a machine that grows slower or faster by itself does so on both sides of the comparison. Every
answer of the updated adapter must be, token for token, PEFT's own greedy answer with the version that its digest
header names; that version must have been current at some moment between sending the request and its first byte. The
other three must give their one answer throughout, and their inter-token latency is compared with that without.

    python -m bench.models --out OUT --shape qwen3-0.2b --adapters 2000 --ranks 8 --targets q_proj,v_proj
    python -m bench.update_storm --models OUT --out storm.json

The last line of stdout is JSON. PEFT's answers are worked out after the measurement, or at another time: keep the
answers with `--measure-only --out FILE`, then `--check FILE --out FILE`.
"""

import argparse
import asyncio
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from bench.daemon import adapterd, metric
from bench.report import emit, machine, percentile, spread
from bench.target import running
from bench.workload import token_prompt

TOKEN_IDS = range(1000, 7000)
PROMPT_TOKENS = 12
UPDATED, OTHERS = "updated", ("steady-0", "steady-1", "steady-2")


@dataclass
class Answer:
    """Seconds are those of the run's clock; `digest` is the header's."""

    name: str
    sent: float
    headed: float
    digest: str
    token_ids: list[int] = field(default_factory=list)
    chunks: list[float] = field(default_factory=list)
    error: str | None = None

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in zip(self.chunks, self.chunks[1:], strict=False)]


@dataclass
class Update:
    """One version: when it was asked for, and from when on it had to be used. Index 0 was there at the start."""

    folder: Path
    digest: str
    began: float
    done: float


def prompt_of(name: str) -> list[int]:
    return token_prompt(PROMPT_TOKENS, TOKEN_IDS, name)


async def ask(client: httpx.AsyncClient, name: str, output_tokens: int) -> Answer:
    body = {
        "model": f"base:{name}",
        "prompt": prompt_of(name),
        "max_tokens": output_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    answer = Answer(name, time.perf_counter(), 0.0, "")
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            answer.headed = time.perf_counter()
            if response.status_code != 200:
                answer.error = f"HTTP {response.status_code}: {(await response.aread()).decode()[:200]}"
                return answer
            answer.digest = response.headers["x-adapterd-digest"]
            async for line in response.aiter_lines():
                data = line.removeprefix("data: ")
                if not data or data == "[DONE]":
                    continue
                chunk = json.loads(data)
                if "error" in chunk:
                    answer.error = json.dumps(chunk["error"])[:200]
                for choice in chunk.get("choices", ()):
                    answer.token_ids += choice.get("token_ids") or []
                    answer.chunks.append(time.perf_counter())
    except httpx.HTTPError as error:
        answer.error = f"{type(error).__name__}: {error}"
    return answer


async def traffic(
    client: httpx.AsyncClient, name: str, tokens: int, stop: asyncio.Event, into: list[Answer]
) -> None:
    while not stop.is_set():
        into.append(await ask(client, name, tokens))


async def publish(client: httpx.AsyncClient, folder: Path) -> Update:
    began = time.perf_counter()
    body = {"name": UPDATED, "source": str(folder), "replace": True}
    response = await client.post("/v1/adapters", json=body)
    if response.status_code not in (200, 201):
        raise RuntimeError(f"an update was refused: HTTP {response.status_code}: {response.text[:300]}")
    return Update(folder, response.json()["digest"], began, time.perf_counter())


async def storm(
    url: str, versions: Sequence[Path], options: argparse.Namespace
) -> tuple[Any, Any, list[Update]]:
    """(answers without updates, before and after, answers with them, the updates)."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        updates = [await publish(client, versions[0])]
        runs: list[list[Answer]] = []
        for with_updates in (False, True, False):
            answers: list[Answer] = []
            stop = asyncio.Event()
            tasks = [
                asyncio.create_task(traffic(client, name, tokens, stop, answers))
                for name, tokens in (
                    (UPDATED, options.short_tokens),
                    *((n, options.output_tokens) for n in OTHERS),
                )
            ]
            if with_updates:
                due = time.perf_counter()
                for folder in versions[1:]:
                    due += options.interval
                    await asyncio.sleep(max(due - time.perf_counter(), 0))
                    updates.append(await publish(client, folder))
            else:
                await asyncio.sleep(options.seconds_without / 2)
            stop.set()
            await asyncio.gather(*tasks)
            runs.append(answers)
    return [*runs[0], *runs[2]], runs[1], updates


def check_versions(answers: Sequence[Answer], updates: Sequence[Update]) -> list[str]:
    """Every answer must be of a version that was current between its sending and its first byte."""
    wrong = []
    for answer in (a for a in answers if a.name == UPDATED and a.error is None):
        candidates = [
            update.digest
            for index, update in enumerate(updates)
            if update.began <= answer.headed
            and (index + 1 == len(updates) or updates[index + 1].done >= answer.sent)
        ]
        if answer.digest not in candidates:
            wrong.append(
                f"sent at {answer.sent:.3f}, answered by {answer.digest[:12]}, not by {len(candidates)} current"
            )
    return wrong


class Reference:
    """PEFT's greedy answers in float32, one adapter at a time on one base."""

    def __init__(self, base: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._torch = torch
        self._model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        # Answers go on to their length, whatever they say, as with ignore_eos.
        self._model.generation_config.eos_token_id = None
        self._peft: Any = None

    def greedy(self, folder: Path, prompt: Sequence[int], num_tokens: int) -> list[int]:
        from peft import PeftModel

        torch = self._torch
        if self._peft is None:
            self._peft = PeftModel.from_pretrained(self._model, folder, adapter_name="v")
        else:
            self._peft.delete_adapter("v")
            self._peft.load_adapter(folder, adapter_name="v")
        self._peft.set_adapter("v")
        with torch.inference_mode():
            found = self._peft.generate(
                input_ids=torch.tensor([list(prompt)]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=num_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        ids: list[int] = found[0, len(prompt) :].tolist()
        return ids


def figures(without: Sequence[Answer], during: Sequence[Answer], updates: Sequence[Update]) -> dict[str, Any]:
    """What was seen, but for whether the tokens were right."""

    def gaps(answers: Sequence[Answer]) -> list[float]:
        return [gap for answer in answers if answer.name != UPDATED for gap in answer.gaps]

    known = {update.digest for update in updates}
    stale = check_versions([*without, *during], updates)
    unknown = [
        a for a in (*without, *during) if a.name == UPDATED and a.error is None and a.digest not in known
    ]
    return {
        "updates": len(updates) - 1,
        "seconds_of_updates": updates[-1].done - updates[1].began,
        "update_seconds": spread([update.done - update.began for update in updates[1:]]),
        "answers_of_the_updated": sum(answer.name == UPDATED for answer in during),
        "versions_answered": len({answer.digest for answer in during if answer.name == UPDATED}),
        "answers_of_the_others": sum(answer.name != UPDATED for answer in during),
        "errors": sorted({answer.error for answer in (*without, *during) if answer.error is not None}),
        "num_stale": len(stale) + len(unknown),
        "stale": stale[:5],
        "others_itl_without": spread(gaps(without)),
        "others_itl_during": spread(gaps(during)),
        "others_itl_p99_ratio": percentile(gaps(during), 99) / percentile(gaps(without), 99),
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The storm itself; its answers are kept in the result until `check` has looked at them."""
    made = options.models / options.adapters_in
    versions = [made / f"adapter-{i:02}" for i in range(options.updates + 1)]
    steady = {name: made / f"adapter-{options.updates + 1 + i:02}" for i, name in enumerate(OTHERS)}
    missing = [folder for folder in (*versions, *steady.values()) if not folder.is_dir()]
    if missing:
        raise FileNotFoundError(f"{missing[0]}: bench.models --adapters {options.updates + 4} makes enough")
    with tempfile.TemporaryDirectory() as scratch:
        served = Path(scratch) / "adapters"
        for name, folder in steady.items():
            shutil.copytree(folder, served / name)
        target = adapterd(
            options.models / "base",
            served,
            "--dtype=float32",
            "--adapter-memory=64MiB",
            "--host-memory=256MiB",
            "--kv-memory=512MiB",
            "--allow-runtime-adapters",
            f"--allow-source={made.resolve()}",
        )
        with running(target, 600.0) as server:
            without, during, updates = asyncio.run(storm(target.url, versions, options))
            resident = metric(target.url, "adapterd_adapter_resident_bytes")
            peak = server.memory.peak_rss_bytes
    folders = {f"{UPDATED} {update.digest}": update.folder.name for update in updates}
    folders |= {
        f"{a.name} {a.digest}": steady[a.name].name for a in without if a.name != UPDATED and not a.error
    }
    answers = [
        [answer.name, answer.digest, answer.token_ids]
        for answer in (*without, *during)
        if answer.error is None
    ]
    return {
        "bench": "update_storm",
        "machine": machine(),
        "interval_seconds": options.interval,
        **figures(without, during, updates),
        "adapter_resident_bytes_after": resident,
        "peak_rss_bytes": peak,
        "unchecked": {"folders": folders, "answers": answers},
    }


def check(result: dict[str, Any], options: argparse.Namespace) -> None:
    """Compare every answer with PEFT's, and put the outcome in the place of the answers."""
    unchecked = result.pop("unchecked")
    reference = Reference(options.models / "base")
    by_version: dict[tuple[str, str], list[list[int]]] = {}
    for name, digest, token_ids in unchecked["answers"]:
        by_version.setdefault((name, digest), []).append(token_ids)
    wrong: list[str] = []
    for (name, digest), given in by_version.items():
        tokens = options.short_tokens if name == UPDATED else options.output_tokens
        folder = unchecked["folders"].get(f"{name} {digest}")
        if folder is None:
            wrong.append(f"{name} answered as {digest[:12]}, which nobody published")
            continue
        expected = reference.greedy(options.models / options.adapters_in / folder, prompt_of(name), tokens)
        wrong += [f"{name} {digest[:12]}: {ids} is not {expected}" for ids in given if ids != expected]
    result |= {
        "answers_compared_with_peft": len(unchecked["answers"]),
        "versions_compared_with_peft": len(by_version),
        "num_wrong": len(wrong),
        "wrong": wrong[:5],
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.update_storm",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", type=Path, required=True, help="the --out of bench.models")
    parser.add_argument("--adapters-in", default="adapters", help="their directory below it")
    parser.add_argument("--updates", type=int, default=1000)
    parser.add_argument("--interval", type=float, default=0.1, help="seconds between updates")
    parser.add_argument(
        "--seconds-without",
        type=float,
        default=100.0,
        help="traffic without updates, half before and half after",
    )
    parser.add_argument("--output-tokens", type=int, default=64, help="of an answer of the other three")
    parser.add_argument("--short-tokens", type=int, default=8, help="of an answer of the updated one")
    parser.add_argument(
        "--measure-only", action="store_true", help="leave the comparison with PEFT to --check"
    )
    parser.add_argument("--check", type=Path, metavar="FILE", help="compare the answers of an earlier --out")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    try:
        result = json.loads(options.check.read_text()) if options.check else measure(options)
    except (OSError, RuntimeError) as error:
        print(f"bench.update_storm: {error}", file=sys.stderr)
        return 1
    if not options.measure_only:
        check(result, options)
    emit(result, options.out)
    return 1 if result["errors"] or result["num_stale"] or result.get("num_wrong") else 0


if __name__ == "__main__":
    sys.exit(main())
