"""Adapters loaded, replaced, pinned, aliased and unloaded by 32 threads at once, under traffic: what goes wrong?

The real daemon over HTTP, on the embedded base in float32, with device memory for fewer adapters than are used. Each
thread makes 1,024 operations on eight names, drawn from a seed, each name having three contents of its own and one
that all share. Meanwhile four clients ask of adapters that nobody touches, which are pinned, and four of those that
come and go, of which half the names find room beside them: once so many are pinned, the rest is refused.

Every answer must be, token for token, PEFT's own greedy answer with the version that its digest header names, and that
version must be one of the name's; adapters that come and go may also be missing (404, 409), or find all memory pinned
(429, which must say so and when to come back). After the storm more are pinned than fit, so that pins and requests
surely meet that. Every request must end in time, and none with another error. After everything was unloaded the daemon
must hold what it held before: bytes of adapters on the device and on the host, blocks of keys and values, sequences
that run or wait; before that, what was pinned last must be on the device as far as there is room.

    python -m bench.load_storm --threads 32 --operations 1024 --seed 0 --out storm.json

The last line of stdout is JSON; the exit status is 1 where anything was wrong. Not a measurement of speed.
"""

import argparse
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

import adapterd as package
from bench.daemon import adapterd, metric
from bench.models import SHAPES, lora_linears, make_adapter
from bench.report import Figures, emit, machine
from bench.storm_threads import (
    ALIASES,
    Asked,
    Asker,
    Operator,
    Outcome,
    ask,
    change,
    wrong_answer,
    wrong_outcome,
)
from bench.target import running
from bench.update_storm import Reference
from bench.workload import token_prompt

STEADY = tuple(f"steady-{i}" for i in range(4))
NUM_CONTENTS = 3
RANK = 8
TARGETS = ("q_proj", "v_proj")
OUTPUT_TOKENS = 12
PROMPT = token_prompt(12, range(300, 2000), "load-storm")
"""One for all: keys and values that one version left behind are there for another to take, if it could."""

DEVICE_BYTES = 153_600
HOST_BYTES = 20 * 57_344
"""Device memory of one adapter, pages of 153,600 bytes; host memory for twenty, each 57,344 bytes in bfloat16 as it is
on disk. Of 29 contents neither tier holds all."""

CUT_SHARE = 0.2
MAX_SECONDS = 60.0
SETTLE_SECONDS = 30.0

BALANCE: Mapping[str, str] = {
    "device_adapter_bytes": "adapterd_adapter_resident_bytes",
    "device_adapter_bytes_in_use": "adapterd_adapter_held_bytes",
    "host_adapter_bytes": "adapterd_host_adapter_bytes",
    "kv_blocks_held": "adapterd_kv_blocks_held",
    "running": "vllm:num_requests_running",
    "waiting": "vllm:num_requests_waiting",
    "adapters": "adapterd_adapters",
}
"""What must be as it was before: our word for it -> its series."""


@dataclass(frozen=True)
class Contents:
    """steady: name -> its folder. touched: name -> the folders it may be loaded from."""

    steady: Mapping[str, Path]
    touched: Mapping[str, Sequence[Path]]


def make_contents(directory: Path, served: Path, num_touched: int) -> Contents:
    """Write every adapter: the steady ones below `served`, those of `num_touched` others below `directory`."""
    linears = {
        path: shape
        for path, shape in lora_linears(SHAPES["mini"]()).items()
        if path.rpartition(".")[2] in TARGETS
    }
    seeds = iter(range(1, 1000))

    def made(folder: Path) -> Path:
        make_adapter(linears, folder, RANK, next(seeds), strength=1.0)
        return folder

    shared = made(directory / "shared")
    return Contents(
        steady={name: made(served / name) for name in STEADY},
        touched={
            name: [*(made(directory / f"{name}-{i}") for i in range(NUM_CONTENTS)), shared]
            for name in (f"touched-{i}" for i in range(num_touched))
        },
    )


def references_of(client: httpx.Client, contents: Contents, base: Path) -> dict[str, dict[str, list[int]]]:
    """name -> digest -> PEFT's answer; the touched ones are loaded in turn to learn their digests.

    Raises RuntimeError where the quiet daemon already answers otherwise, or two contents answer alike.
    """
    peft = Reference(base)
    expected = {
        folder: peft.greedy(folder, PROMPT, OUTPUT_TOKENS)
        for folder in {*contents.steady.values(), *(f for fs in contents.touched.values() for f in fs)}
    }
    if len({tuple(ids) for ids in expected.values()}) < len(expected):
        raise RuntimeError("two adapters answer alike, so a mistake between them would not be seen")
    found: dict[str, dict[str, list[int]]] = {}
    for name, folders in [*((n, [f]) for n, f in contents.steady.items()), *contents.touched.items()]:
        for folder in folders:
            if name in contents.touched:
                body = {"name": name, "source": str(folder), "replace": True}
                client.post("/v1/adapters", json=body).raise_for_status()
            asked = ask(client, name, PROMPT, OUTPUT_TOKENS, cut=False)
            if asked.token_ids != expected[folder]:
                raise RuntimeError(f"before the storm {asked} is not PEFT's {expected[folder]}")
            found.setdefault(name, {})[asked.digest] = expected[folder]
    return found


def lost_pins(client: httpx.Client, num_rooms: int) -> list[str]:
    """What is wrong with the pins: versions that pinned names mean do not come to be in device memory, though it has
    room for as many. Two that shared one and parted may be one too many: then as many as fit must be there."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        cards = client.get("/v1/adapters").raise_for_status().json()["data"]
        pinned = {card["digest"]: card["tier"] for card in cards if card["pinned"]}
        num_there = sum(tier == "device" for tier in pinned.values())
        if num_there == min(len(pinned), num_rooms):
            return []
        if time.monotonic() > deadline:
            return [
                f"of {len(pinned)} pinned versions {num_there} are in device memory, which holds {num_rooms}"
            ]
        time.sleep(0.2)


def unload_all(client: httpx.Client, names: Iterable[str]) -> list[str]:
    """Unload and forget names; what of that was not answered as it should be."""
    wrong = []
    for name in names:
        response = client.delete(f"/v1/adapters/{name}", params={"deadline_seconds": SETTLE_SECONDS})
        if response.status_code not in (200, 404):
            wrong.append(f"the last unload of {name}: HTTP {response.status_code}: {response.text[:300]}")
    return wrong


def pin_all(client: httpx.Client, names: Iterable[str]) -> None:
    for name in names:
        client.post(f"/v1/adapters/{name}/pin", json={}).raise_for_status()


def missing_refusals(outcomes: Sequence[Outcome], asked: Sequence[Asked]) -> list[str]:
    """Which of those who must have met memory full of pinned adapters did not."""
    wrong = []
    if not any(outcome.status == 429 for outcome in outcomes):
        wrong.append("no pin was refused, and more names were pinned than there was room for")
    if not any(one.status == 429 for one in asked):
        wrong.append("no request was refused while pinned adapters took all memory")
    return wrong


def fill_with_pins(
    client: httpx.Client, contents: Mapping[str, Sequence[Path]]
) -> tuple[list[Outcome], list[Asked]]:
    """Load and pin every name, more than there is room for, and ask each for an answer: by chance alone a short storm
    need not come to that."""
    outcomes = []
    for name, folders in contents.items():
        body = {"name": name, "source": str(folders[0])}
        outcomes.append(change(client, "load", name, "POST", "/v1/adapters", body))
        outcomes.append(change(client, "pin", name, "POST", f"/v1/adapters/{name}/pin", {}))
    return outcomes, [ask(client, name, PROMPT, OUTPUT_TOKENS, cut=False) for name in contents]


def balance(client: httpx.Client, url: str) -> dict[str, float]:
    """The books with every steady adapter in memory and nothing to do."""
    for name in STEADY:
        ask(client, name, PROMPT, OUTPUT_TOKENS, cut=False)
    return {word: metric(url, series) for word, series in BALANCE.items()}


def settled_balance(client: httpx.Client, url: str, before: Mapping[str, float]) -> dict[str, float]:
    """The books once they are as before, or as they are after `SETTLE_SECONDS`."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while (after := balance(client, url)) != before and time.monotonic() < deadline:
        time.sleep(0.2)
    return after


def unbalanced(before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    """What is not as it was."""
    return [
        f"{word}: {before[word]:g} before and {after[word]:g} after"
        for word in before
        if before[word] != after[word]
    ]


def storm(
    url: str, contents: Contents, options: argparse.Namespace
) -> tuple[list[Operator], list[Asker], list[Asker], list[float]]:
    """Run it; (operators, askers of the steady, askers of the touched, resident bytes at each quarter)."""
    stop = threading.Event()
    models = [*contents.touched, *(f"{name}@{alias}" for name in contents.touched for alias in ALIASES)]

    def asker(names: Sequence[str], seed: str) -> Asker:
        return Asker(url, names, PROMPT, OUTPUT_TOKENS, seed, stop, MAX_SECONDS, CUT_SHARE)

    operators = [
        Operator(url, contents.touched, options.operations, f"{options.seed}/{i}", MAX_SECONDS)
        for i in range(options.threads)
    ]
    steady = [asker([name], f"{options.seed}/{name}") for name in STEADY]
    touched = [asker(models, f"{options.seed}/comes-and-goes-{i}") for i in range(4)]
    for thread in (*steady, *touched, *operators):
        thread.start()
    resident = []
    for quarter in (1, 2, 3, 4):
        due = options.threads * options.operations * quarter // 4
        while sum(len(operator.outcomes) for operator in operators) < due:
            time.sleep(0.1)
        resident.append(metric(url, "process_resident_memory_bytes"))
    stop.set()
    for thread in (*operators, *steady, *touched):
        thread.join()
    return operators, steady, touched, resident


def measure(options: argparse.Namespace) -> Figures:
    base = Path(package.__file__).parent / "mini"
    found_machine = machine()
    num_rooms = len(STEADY) + options.names // 2
    with tempfile.TemporaryDirectory() as scratch:
        served, made = Path(scratch) / "adapters", Path(scratch) / "contents"
        contents = make_contents(made, served, options.names)
        target = adapterd(
            Path("mini"),
            served,
            "--dtype=float32",
            f"--adapter-memory={num_rooms * DEVICE_BYTES}",
            f"--host-memory={HOST_BYTES}",
            "--kv-memory=64MiB",
            f"--state={Path(scratch) / 'state'}",
            "--allow-runtime-adapters",
            f"--allow-source={made.resolve()}",
            "--log-level=warning",
        )
        with running(target, 600.0), httpx.Client(base_url=target.url, timeout=MAX_SECONDS) as client:
            references = references_of(client, contents, base)
            wrong = unload_all(client, contents.touched)
            pin_all(client, STEADY)
            before, rss = balance(client, target.url), metric(target.url, "process_resident_memory_bytes")
            began = time.perf_counter()
            operators, steady, touched, quarters = storm(target.url, contents, options)
            seconds = time.perf_counter() - began
            wrong += lost_pins(client, num_rooms) + unload_all(client, contents.touched)
            filling, asked_when_full = fill_with_pins(client, contents.touched)
            wrong += unload_all(client, contents.touched)
            after = settled_balance(client, target.url, before)
            last = [ask(client, name, PROMPT, OUTPUT_TOKENS, cut=False) for name in STEADY]
            rss_after = metric(target.url, "process_resident_memory_bytes")
            open_fds = metric(target.url, "process_open_fds")
            is_ready = client.get("/readyz").status_code == 200
    outcomes = [*(outcome for operator in operators for outcome in operator.outcomes), *filling]
    wrong += missing_refusals(filling, asked_when_full)
    of_steady = [*(asked for asker in steady for asked in asker.asked), *last]
    of_touched = [*(asked for asker in touched for asked in asker.asked), *asked_when_full]
    wrong += [text for outcome in outcomes if (text := wrong_outcome(outcome, MAX_SECONDS))]
    for all_asked, may_be_gone in ((of_steady, False), (of_touched, True)):
        for asked in all_asked:
            text = wrong_answer(asked, references[asked.name], MAX_SECONDS, may_be_gone=may_be_gone)
            wrong += [] if text is None else [text]
    wrong += unbalanced(before, after)
    wrong += [] if is_ready else ["the daemon is not ready after it all"]
    return {
        "bench": "load_storm",
        "machine": found_machine,
        "threads": options.threads,
        "operations_each": options.operations,
        "names": options.names,
        "adapters_that_fit": num_rooms,
        "seed": options.seed,
        "storm_seconds": seconds,
        "operations": statuses_by_kind(outcomes),
        "refused_for_room": {
            "pins_and_prefetches": sum(outcome.status == 429 for outcome in outcomes),
            "requests": sum(asked.status == 429 for asked in of_touched),
        },
        "answers_of_the_steady": len(of_steady),
        "answers_of_the_touched": dict(sorted(Counter(str(asked.status) for asked in of_touched).items())),
        "versions_answered": len({(asked.name, asked.digest) for asked in of_touched if asked.digest}),
        "answers_cut_by_the_client": sum(a.is_cut for a in (*of_steady, *of_touched) if a.status == 200),
        "longest_operation_seconds": max(outcome.seconds for outcome in outcomes),
        "longest_answer_seconds": max(asked.seconds for asked in (*of_steady, *of_touched)),
        "before": before,
        "after": after,
        "rss_bytes": {"before": rss, "quarters": quarters, "after": rss_after},
        "open_fds_after": open_fds,
        "num_wrong": len(wrong),
        "wrong": wrong[:20],
    }


def statuses_by_kind(outcomes: Sequence[Outcome]) -> dict[str, dict[str, int]]:
    """kind -> status -> how many."""
    table: dict[str, Counter[str]] = {}
    for outcome in outcomes:
        table.setdefault(outcome.kind, Counter())[str(outcome.status)] += 1
    return {kind: dict(sorted(counts.items())) for kind, counts in sorted(table.items())}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.load_storm",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--threads", type=int, default=32)
    parser.add_argument("--operations", type=int, default=1024, help="of each thread")
    parser.add_argument("--names", type=int, default=8, help="that come and go")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    try:
        result = measure(options)
    except (OSError, RuntimeError, httpx.HTTPError) as error:
        print(f"bench.load_storm: {error}", file=sys.stderr)
        return 1
    emit(result, options.out)
    return 1 if result["num_wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
