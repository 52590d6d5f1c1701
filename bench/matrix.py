"""The whole comparison in one command: every server under every load of bench/matrix.toml, in an A B A B order.

Each visit starts one server, runs its cells one after the other, and stops it; never are two servers up at once.
Each cell of each visit is one file below --out, as bench.serve writes it: what is there is not measured again, so a
run that was cut short goes on where it stopped. Tables and pictures are made of the files by bench.table and
bench.plot.

    python -m bench.matrix --plan                                       # what would run, and for how long
    python -m bench.matrix --out bench/results/2026-11-23-epyc --budget 35
    python -m bench.matrix --out bench/results/2026-11-23-epyc --only 'adapterd.*base'
    python -m bench.matrix --out OUT --instead vllm=vllm-float32       # another description of the same server

The last line of stdout is JSON.
"""

import argparse
import asyncio
import json
import re
import signal
import sys
import time
import tomllib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bench.load import Load
from bench.report import describe, emit, machine, median_of
from bench.serve import described, run_round, shown
from bench.target import read_target, running
from bench.workload import COMMON_WORDS, Lengths

_PROMPT_TOKENS, _OUTPUT_TOKENS = 128, 64
_TOKEN_IDS = range(1000, 30_000)
_MARKED = {"": ("", "anchor"), "anchor": ("anchor",), "late": ("late",)}
"""Which cells a kind of visit runs, by their mark."""
_WARMUP_SHARE = 0.5
"""Of a measured request's time, roughly, since a prompt takes as long and the answer is short."""


@dataclass(frozen=True)
class Cell:
    """One load on one server. `adapters` is how many there are to choose from; `warmup` None is all that may matter."""

    server: str
    traffic: str
    adapters: int
    popularity: str
    concurrency: int
    requests: int
    expect: float
    warmup: int | None = None
    mark: Literal["", "anchor", "late"] = ""

    @property
    def name(self) -> str:
        return f"{self.server}.{self.traffic}.c{self.concurrency}"

    @property
    def expected_seconds(self) -> float:
        warmup = max(self.concurrency, self.adapters) if self.warmup is None else self.warmup
        return (self.requests + _WARMUP_SHARE * warmup) * _OUTPUT_TOKENS / self.expect

    def load(self, round_index: int, output_tokens: int = _OUTPUT_TOKENS) -> Load:
        return Load(
            lengths=(Lengths(_PROMPT_TOKENS, output_tokens),) * self.requests,
            adapters=tuple(f"adapter-{i:02}" for i in range(self.adapters)),
            popularity=self.popularity,
            concurrency=self.concurrency,
            rate=None,
            cv=1.0,
            prompt="auto",
            token_ids=_TOKEN_IDS,
            words=COMMON_WORDS,
            # Every server gets the same prompts, every visit and every cell of it others: prompts that one cell has
            # left in a server's prefix cache would be free for the next.
            seed=zlib.crc32(f"{self.traffic}.c{self.concurrency}/{round_index}".encode()),
            objective={},
            request_timeout_seconds=900.0,
            num_warmup=self.warmup,
        )


@dataclass(frozen=True)
class Visit:
    """One start of one server. `number` counts the visits to this server from 0."""

    server: str
    number: int
    start_seconds: float
    cells: tuple[Cell, ...]

    @property
    def expected_seconds(self) -> float:
        return self.start_seconds + sum(cell.expected_seconds for cell in self.cells)


def read_matrix(path: Path) -> list[Visit]:
    """The visits in their order. Raises ValueError for a name that the file does not define."""
    table = tomllib.loads(path.read_text())
    visits: list[Visit] = []
    for entry in table["order"]:
        server, _, kind = entry.partition(" ")
        if server not in table["servers"] or kind not in _MARKED:
            known = ", ".join(table["servers"])
            raise ValueError(
                f"{path}: order has {entry!r}; allowed are {known}, with ' anchor', ' late' or nothing after"
            )
        cells = [
            _cell(path, server, dict(cell), table["traffic"]) for cell in table["servers"][server]["cells"]
        ]
        visits.append(
            Visit(
                server,
                sum(visit.server == server for visit in visits),
                table["servers"][server]["start_seconds"],
                tuple(cell for cell in cells if cell.mark in _MARKED[kind]),
            )
        )
    return visits


def _cell(path: Path, server: str, cell: dict[str, Any], traffic: dict[str, dict[str, Any]]) -> Cell:
    if cell["traffic"] not in traffic:
        raise ValueError(
            f"{path}: {server} has traffic {cell['traffic']!r}; allowed are {', '.join(traffic)}"
        )
    return Cell(server=server, **cell, **traffic[cell["traffic"]])


def result_path(out: Path, cell: Cell, visit: Visit) -> Path:
    return out / f"{cell.name}.{visit.number}.json"


def still_to_run(visits: Sequence[Visit], out: Path | None, only: str) -> list[Visit]:
    """Without the cells that are there already or whose name `only` does not match; without empty visits."""
    left = []
    for visit in visits:
        cells = tuple(
            cell
            for cell in visit.cells
            if re.search(only, cell.name) and not (out and result_path(out, cell, visit).exists())
        )
        if cells:
            left.append(Visit(visit.server, visit.number, visit.start_seconds, cells))
    return left


def plan(visits: Sequence[Visit]) -> str:
    lines = []
    for visit in visits:
        cells = " ".join(f"{cell.traffic}.c{cell.concurrency}" for cell in visit.cells)
        lines.append(f"{visit.expected_seconds / 60:5.1f} min  {visit.server} ({visit.number})  {cells}")
    total = sum(visit.expected_seconds for visit in visits) / 60
    return "\n".join([*lines, f"{total:5.1f} min  together, if the guesses in the matrix hold"])


def run_visit(visit: Visit, description: Path, out: Path, deadline: float, output_tokens: int) -> int:
    """How many cells it left out because they would not end before the deadline. A file appears whole or not at all."""
    target = read_target(description)
    num_left_out = 0
    # Before the start: a server that waits for work may spin, and would count among the others.
    taken_on = machine()
    with running(target, timeout_seconds=900.0) as server:
        for cell in visit.cells:
            if time.perf_counter() + cell.expected_seconds > deadline:
                num_left_out += 1
                print(f"left out for want of time: {cell.name}", flush=True)
                continue
            load = cell.load(visit.number, output_tokens)
            figures = asyncio.run(run_round(server, load, 0))
            print(f"{cell.name}, visit {visit.number}\n{describe(figures)}", flush=True)
            result = {
                "bench": "serve",
                "cell": {"server": cell.server, "traffic": cell.traffic, "concurrency": cell.concurrency},
                "visit": visit.number,
                "machine": taken_on,
                "load": described(load),
                "target": shown(target),
                "runs": [figures],
                "median": median_of([figures]),
            }
            path = result_path(out, cell, visit)
            partial = path.with_suffix(".partial")
            partial.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(result, indent=1) + "\n")
            partial.rename(path)
    return num_left_out


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        visits = read_matrix(arguments.matrix)
        unknown = sorted(set(arguments.instead) - {visit.server for visit in visits})
        if unknown:
            known = ", ".join(dict.fromkeys(visit.server for visit in visits))
            raise ValueError(f"--instead names {', '.join(unknown)}; {arguments.matrix} has {known}")
        visits = still_to_run(visits, arguments.out, arguments.only)
    except (OSError, KeyError, TypeError, ValueError) as error:
        print(f"bench.matrix: {error}", file=sys.stderr)
        return 1
    print(plan(visits), flush=True)
    if arguments.plan:
        return 0
    began = time.perf_counter()
    deadline = began + 60 * arguments.budget if arguments.budget else float("inf")
    failed: list[str] = []
    num_left_out = 0
    for visit in visits:
        # A server that cannot be started must not cost the figures of the others.
        try:
            if time.perf_counter() + visit.start_seconds > deadline:
                num_left_out += len(visit.cells)
                continue
            description = arguments.peers / f"{arguments.instead.get(visit.server, visit.server)}.toml"
            num_left_out += run_visit(visit, description, arguments.out, deadline, arguments.output_tokens)
        except (OSError, RuntimeError, ValueError) as error:
            print(f"bench.matrix: {visit.server}, visit {visit.number}: {error}", file=sys.stderr, flush=True)
            failed.append(f"{visit.server}.{visit.number}")
    emit(
        {
            "bench": "matrix",
            "minutes": (time.perf_counter() - began) / 60,
            "num_files": len(list(arguments.out.glob("*.json"))),
            "num_left_out": num_left_out,
            "failed": failed,
        },
        None,
    )
    return 1 if failed else 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.matrix",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    here = Path(__file__).parent
    add = parser.add_argument
    add("--matrix", type=Path, default=here / "matrix.toml", metavar="FILE")
    add("--peers", type=Path, default=here / "peers", help="where the servers' descriptions are")
    add(
        "--instead",
        type=_server_and_description,
        action="append",
        default=[],
        metavar="SERVER=DESCRIPTION",
        help="start this one of the matrix's servers as another file of --peers says; may be given again",
    )
    add("--out", type=Path, metavar="DIRECTORY", help="for the results, one file a cell and visit")
    add("--plan", action="store_true", help="show what would run, and run nothing")
    add("--only", default="", metavar="REGEX", help="cells whose name SERVER.TRAFFIC.cN it matches")
    add("--budget", type=float, metavar="MINUTES", help="leave out what would not end in time")
    add(
        "--output-tokens",
        type=int,
        default=_OUTPUT_TOKENS,
        help="of an answer; fewer only to try the servers",
    )
    arguments = parser.parse_args(argv)
    arguments.instead = dict(arguments.instead)
    if not arguments.plan and arguments.out is None:
        parser.error("--out is needed to run; --plan runs nothing")
    return arguments


def _server_and_description(text: str) -> tuple[str, str]:
    server, equals, description = text.partition("=")
    if not (server and equals and description):
        raise argparse.ArgumentTypeError(f"{text!r} is not SERVER=DESCRIPTION, as in vllm=vllm-float32")
    return server, description


if __name__ == "__main__":
    # Ended from outside, it still ends the server that it has started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
