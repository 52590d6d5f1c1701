"""The results of bench.matrix as a picture: output tokens/s of each server by load, with PEFT's best case beside.

    python -m bench.plot RESULTS --peft RESULTS/peft.json --out docs/speed.svg

Plain SVG, written by hand: bars need no plotting library, and a picture that is text shows its changes in a diff.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path

from bench.table import NAMES, VERSUS, Key, Results, read_results

# Told apart by colour-blind eyes and in print; ours is the dark one.
SERIES = {
    "adapterd": ("adapterd", "#1b4f8f"),
    "vllm": ("vLLM", "#e69f00"),
    "llamacpp": ("llama.cpp", "#7fb7be"),
    "peft": ("PEFT, offline", "#b0a8b9"),
}
_PEFT_ADAPTERS = {"base": 0, "one": 1, "mixed8": 8, "mixed32": 32}
_BAR, _GAP, _LEFT, _WIDTH, _TOP = 13, 12, 130, 820, 46


def peft_results(path: Path) -> dict[tuple[str, int], float]:
    """Of bench.peers.peft_batch: (traffic, batch) -> output tokens/s."""
    traffic = {count: name for name, count in _PEFT_ADAPTERS.items()}
    runs = json.loads(path.read_text())["runs"]
    return {
        (traffic[run["adapters"]], run["batch"]): run["output_tokens_per_second"]
        for run in runs
        if run["adapters"] in traffic
    }


def groups(results: Results, peft: dict[tuple[str, int], float]) -> list[tuple[str, list[tuple[str, float]]]]:
    """A label and its bars (series, tokens/s), in the table's order; what was not measured has no bar."""
    found = []
    for traffic, concurrency, peers, _ in VERSUS:
        bars = []
        for series in SERIES:
            servers = (
                ["adapterd"] if series == "adapterd" else [peer for peer in peers if peer.startswith(series)]
            )
            keys = [Key(server, traffic, concurrency) for server in servers]
            bars += [(series, results[key].tokens_per_second) for key in keys if key in results]
        if (traffic, concurrency) in peft:
            bars.append(("peft", peft[traffic, concurrency]))
        found.append((f"{NAMES[traffic]}, {concurrency} at once", bars))
    return found


def svg(drawn: Sequence[tuple[str, list[tuple[str, float]]]]) -> str:
    """Horizontal bars, one group a load, each with its figure."""
    largest = max((value for _, bars in drawn for _, value in bars), default=1.0)
    scale = (_WIDTH - _LEFT - 60) / largest
    body: list[str] = []
    y = _TOP
    for label, bars in drawn:
        middle = y + max(len(bars), 1) * _BAR / 2 + 4
        body.append(f'<text x="{_LEFT - 8}" y="{middle:.0f}" text-anchor="end">{escape(label)}</text>')
        for series, value in bars:
            width = value * scale
            body.append(
                f'<rect x="{_LEFT}" y="{y}" width="{width:.1f}" height="{_BAR - 2}" fill="{SERIES[series][1]}"/>'
                f'<text x="{_LEFT + width + 5:.1f}" y="{y + _BAR - 3}">{value:.1f}</text>'
            )
            y += _BAR
        y += _GAP + (_BAR if not bars else 0)
    used = {series for _, bars in drawn for series, _ in bars}
    x = _LEFT
    for series in (series for series in SERIES if series in used):
        name, colour = SERIES[series]
        body.append(f'<rect x="{x}" y="24" width="11" height="11" fill="{colour}"/>')
        body.append(f'<text x="{x + 16}" y="34">{escape(name)}</text>')
        x += 130
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {y}" width="{_WIDTH}" height="{y}" '
        'font-family="sans-serif" font-size="11" fill="#222">\n'
        f'<rect width="{_WIDTH}" height="{y}" fill="#fff"/>\n'
        '<text x="8" y="14" font-size="12">Output tokens a second; more is better</text>\n'
        + "\n".join(body)
        + "\n</svg>\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        peft = peft_results(arguments.peft) if arguments.peft else {}
        picture = svg(groups(read_results(arguments.results), peft))
    except (OSError, ValueError) as error:
        print(f"bench.plot: {error}", file=sys.stderr)
        return 1
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(picture)
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.plot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", type=Path, metavar="DIRECTORY", help="the --out of bench.matrix")
    parser.add_argument("--peft", type=Path, metavar="FILE", help="the --out of bench.peers.peft_batch")
    parser.add_argument("--out", type=Path, required=True, metavar="SVG")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
