"""The results of bench.matrix as Markdown: us against the better peer, and what adapters cost against their bytes.

    python -m bench.table bench/results/2026-11-23-epyc                                  # to look at
    python -m bench.table bench/results/2026-11-23-epyc --into bench/README.md         # between its markers
    python -m bench.table bench/results/2026-11-28-epyc-7003 --into bench/README.md --markers speed-avx2    # others

Figures are medians over the visits. What one of our own loads takes of another is the median of the ratios within a
visit, or between servers visited as often, of visits of one number: a machine drifts by more than adapters cost. A
cell that was not measured is shown as missing, never left out.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

BASE_BYTES = 946_339_840
ADAPTER_BYTES_PER_RANK = 1_261_568
"""Of the shape that bench.models makes by default; bench/LOG.md has the arithmetic."""

MARKERS = "speed"
_MISSING = "not measured"


class Key(NamedTuple):
    server: str
    traffic: str
    concurrency: int


@dataclass(frozen=True)
class Measured:
    """A cell's medians over its visits, and how far apart these were. rates: output tokens/s by visit."""

    rates: Mapping[int, float]
    tokens_per_second: float
    first_token_seconds: float
    peak_bytes: float | None
    startup_seconds: float | None
    num_visits: int
    spread: float
    num_errors: int


Results = Mapping[Key, Measured]

NAMES = {"base": "base", "one": "one adapter", "mixed8": "8 mixed", "mixed32": "32 mixed"}

# traffic, concurrency, the peers that answer it, the ratio asked for.
VERSUS: tuple[tuple[str, int, tuple[str, ...], float], ...] = (
    ("base", 1, ("llamacpp-base", "vllm"), 1.0),
    ("one", 1, ("llamacpp", "vllm-lora"), 1.0),
    ("base", 8, ("vllm", "llamacpp-base"), 1.0),
    ("base", 16, ("vllm", "llamacpp-base"), 1.0),
    ("one", 8, ("vllm-lora", "llamacpp"), 2.5),
    ("one", 16, ("vllm-lora", "llamacpp"), 2.5),
    ("mixed8", 8, ("vllm-lora", "llamacpp"), 4.0),
    ("mixed8", 16, ("vllm-lora", "llamacpp"), 4.0),
    ("mixed32", 16, ("vllm-lora-32",), 4.0),
)

# what, (server, traffic, adapters' ranks), the part of the byte ratio asked for; each against base traffic.
_EIGHT, _ALL = (16,) * 8, (16,) * 32
TAX: tuple[tuple[str, str, str, int, tuple[int, ...], float], ...] = (
    ("all requests on one adapter", "adapterd", "one", 8, (), 0.95),
    ("all requests on one adapter", "adapterd", "one", 32, (), 0.95),
    ("1 adapter", "adapterd", "one", 8, (16,), 0.90),
    ("8 distinct", "adapterd", "mixed8", 8, _EIGHT, 0.90),
    ("8 of ranks 8 to 64", "adapterd-ranks", "mixed8", 8, (8, 16, 32, 64) * 2, 0.90),
    ("1 adapter", "adapterd", "one", 32, (16,), 0.90),
    ("8 distinct", "adapterd", "mixed8", 32, _EIGHT, 0.90),
    ("32 distinct", "adapterd", "mixed32", 32, _ALL, 0.90),
)


def read_results(directory: Path) -> dict[Key, Measured]:
    """Raises ValueError if there are none."""
    found: dict[Key, dict[int, dict[str, Any]]] = {}
    for path in sorted(directory.glob("*.json")):
        result = json.loads(path.read_text())
        if "cell" in result:
            found.setdefault(Key(**result["cell"]), {})[result["visit"]] = result["median"]
    if not found:
        raise ValueError(f"{directory} has no results of bench.matrix")
    return {key: _measured(medians) for key, medians in found.items()}


def _measured(by_visit: Mapping[int, dict[str, Any]]) -> Measured:
    medians = list(by_visit.values())
    rates = {visit: median["output_tokens_per_second"] for visit, median in by_visit.items()}
    rate = statistics.median(rates.values())

    def middle(name: str) -> float | None:
        known = [median[name] for median in medians if median[name] is not None]
        return statistics.median(known) if known else None

    def percentile_50(name: str) -> float:
        known = [median[name]["p50"] for median in medians if median[name]]
        return statistics.median(known) if known else float("nan")

    return Measured(
        rates=rates,
        tokens_per_second=rate,
        first_token_seconds=percentile_50("ttft_seconds"),
        peak_bytes=middle("peak_rss_bytes"),
        startup_seconds=middle("startup_seconds"),
        num_visits=len(rates),
        spread=(max(rates.values()) - min(rates.values())) / rate if rate else 0.0,
        num_errors=sum(median["num_errors"] for median in medians),
    )


def better_peer(results: Results, traffic: str, concurrency: int, peers: Sequence[str]) -> Key | None:
    keys = [Key(peer, traffic, concurrency) for peer in peers]
    known = [key for key in keys if key in results]
    return max(known, key=lambda key: results[key].tokens_per_second) if known else None


def share_of(found: Measured, base: Measured) -> float:
    """The median of the visits' ratios where both were visited as often, else the medians' ratio."""
    if found.rates.keys() != base.rates.keys():
        return found.tokens_per_second / base.tokens_per_second
    return statistics.median(rate / base.rates[visit] for visit, rate in found.rates.items())


def byte_ratio(ranks: Sequence[int]) -> float:
    """What throughput the adapters' bytes leave of the base's, were a step nothing but reading weights."""
    return BASE_BYTES / (BASE_BYTES + ADAPTER_BYTES_PER_RANK * sum(ranks))


def versus_table(results: Results) -> list[str]:
    lines = [
        "| traffic | at once | adapterd | llama.cpp | vLLM | over the better | asked | first token: adapterd, it |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for traffic, concurrency, peers, asked in VERSUS:
        ours = results.get(Key("adapterd", traffic, concurrency))
        best_key = better_peer(results, traffic, concurrency, peers)
        best = results[best_key] if best_key else None
        rates = {
            kind: next(
                (
                    _rate(results.get(Key(peer, traffic, concurrency)))
                    for peer in peers
                    if peer.startswith(kind)
                ),
                "",
            )
            for kind in ("llamacpp", "vllm")
        }
        ratio = f"**{ours.tokens_per_second / best.tokens_per_second:.2f}**" if ours and best else _MISSING
        first = f"{ours.first_token_seconds:.2f}, {best.first_token_seconds:.2f} s" if ours and best else ""
        lines.append(
            f"| {NAMES[traffic]} | {concurrency} | {_rate(ours)} | {rates['llamacpp']} | {rates['vllm']} | {ratio} "
            f"| {asked:g} | {first} |"
        )
    return lines


def tax_table(results: Results) -> list[str]:
    lines = [
        "| adapters in the batch | at once | output tokens/s | of base | bytes allow | of what bytes allow | asked |",
        "|---|---|---|---|---|---|---|",
    ]
    for what, server, traffic, concurrency, ranks, asked in TAX:
        base = results.get(Key("adapterd", "base", concurrency))
        found = results.get(Key(server, traffic, concurrency))
        allowed = byte_ratio(ranks)
        row = f"| {what} | {concurrency} | {_rate(found)} "
        if base and found:
            share = share_of(found, base)
            row += f"| {share:.2f} | {allowed:.2f} | **{share / allowed:.2f}** | {asked:g} |"
        else:
            row += f"| {_MISSING} | {allowed:.2f} | | {asked:g} |"
        lines.append(row)
    for concurrency in (8, 32):
        holding = results.get(Key("adapterd", "base", concurrency))
        bare = results.get(Key("adapterd-base", "base", concurrency))
        both = holding and bare
        share_text = f"{share_of(holding, bare):.2f}" if holding and bare else ""
        lines.append(
            f"| base traffic, 32 adapters held, over none held | {concurrency} | {_rate(holding)} "
            f"| {share_text if both else _MISSING} | 1.00 | **{share_text}** | 0.99 |"
        )
    return lines


def int8_table(results: Results) -> list[str]:
    """The base's linears in 8 bits, against its own 16 bits and llama.cpp's q8_0."""
    lines = [
        "| linears in 8 bits | at once | adapterd int8 | over its bfloat16 | asked | llama.cpp q8_0 |",
        "|---|---|---|---|---|---|",
    ]
    for traffic, concurrency, asked in (
        ("base", 1, "1.6"),
        ("one", 1, ""),
        ("base", 8, ""),
        ("mixed8", 8, ""),
    ):
        whole = results.get(Key("adapterd-int8", traffic, concurrency))
        ours = results.get(Key("adapterd", traffic, concurrency))
        theirs = results.get(Key("llamacpp-q8", traffic, concurrency))
        ratio = f"**{whole.tokens_per_second / ours.tokens_per_second:.2f}**" if whole and ours else _MISSING
        lines.append(
            f"| {NAMES[traffic]} | {concurrency} | {_rate(whole)} | {ratio} | {asked} "
            f"| {_rate(theirs) if theirs else ''} |"
        )
    return lines


def server_table(results: Results) -> list[str]:
    """Peak memory, the largest that any cell showed, and start-up, the median over the cells."""
    lines = ["| server | peak memory | start-up |", "|---|---|---|"]
    for server in dict.fromkeys(key.server for key in results):
        cells = [found for key, found in results.items() if key.server == server]
        peaks = [cell.peak_bytes for cell in cells if cell.peak_bytes is not None]
        starts = [cell.startup_seconds for cell in cells if cell.startup_seconds is not None]
        peak = f"{max(peaks) / 1e9:.1f} GB" if peaks else _MISSING
        start = f"{statistics.median(starts):.0f} s" if starts else _MISSING
        lines.append(f"| {server} | {peak} | {start} |")
    return lines


def _rate(found: Measured | None) -> str:
    if found is None:
        return _MISSING
    errors = f" ({found.num_errors} failed)" if found.num_errors else ""
    return f"{found.tokens_per_second:.1f}{errors}"


def machine_line(directory: Path) -> str:
    """On what and when, by the first file; and how far apart a cell's visits were at most."""
    first = json.loads(min(directory.glob("*.json")).read_text())["machine"]
    results = read_results(directory)
    widest = max((cell.spread for cell in results.values() if cell.num_visits > 1), default=0.0)
    files = [json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))]
    busiest = max(file["machine"]["busy_cpus"] for file in files)
    described = {file["cell"]["server"]: file["target"]["name"] for file in files if "cell" in file}
    others = ", ".join(f"{server}'s is {name}" for server, name in described.items() if server != name)
    return (
        f"Output tokens a second, medians over the visits. {first['num_cpus']} processors, {first['cpu']}, "
        f"{', '.join(first['cpu_flags'])}; torch {first['packages']['torch']}; {first['date'][:10]}. Visits to the "
        f"same cell differ by {widest:.0%} at most; others kept {busiest:.2f} processors busy at most."
        + (f" Another description than the matrix names: {others}." if others else "")
    )


def markdown(directory: Path) -> str:
    results = read_results(directory)
    parts = [
        [machine_line(directory)],
        versus_table(results),
        tax_table(results),
        int8_table(results),
        server_table(results),
    ]
    return "\n\n".join("\n".join(part) for part in parts)


def markers(name: str = MARKERS) -> tuple[str, str]:
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def write_between_markers(text: str, table: str, name: str = MARKERS) -> str:
    """Raises ValueError if a marker is missing."""
    begin, end = markers(name)
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"the file needs a line {begin} and, below it, a line {end}")
    return f"{before}{begin}\n{table}\n{end}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        table = markdown(arguments.results)
        texts = {
            path: write_between_markers(path.read_text(), table, arguments.markers) for path in arguments.into
        }
    except (OSError, ValueError) as error:
        print(f"bench.table: {error}", file=sys.stderr)
        return 1
    for path, text in texts.items():
        path.write_text(text)
    if not texts:
        print(table)
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", type=Path, metavar="DIRECTORY")
    parser.add_argument(
        "--into", type=Path, nargs="+", default=[], metavar="FILE", help="put the tables there"
    )
    parser.add_argument(
        "--markers",
        default=MARKERS,
        metavar="NAME",
        help=f"between which of its markers (default: {MARKERS})",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
