"""The results of bench.fleet and bench.fleet_sim as a picture: hits, first tokens and moves by policy.

    python -m bench.fleet_plot --fleet fleet.json --sim sim.json --out docs/fleet.svg

Plain SVG, as bench.plot's: one row of panels for the fleet on loopback, measured beside simulated, and one for the
large simulated one.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

_MEASURED, _SIMULATED = "#1b4f8f", "#7fb7be"
_WIDTH, _BAR, _LEFT = 1020, 16, 190

FIGURES: tuple[tuple[str, Callable[[dict[str, Any]], float], Callable[[float], str]], ...] = (
    ("requests that found their adapter", lambda f: f["hit_rate"], lambda v: f"{v:.0%}"),
    ("first token, p50", lambda f: f["ttft_seconds"]["p50"], lambda v: _seconds(v)),
    ("first token, p99", lambda f: f["ttft_seconds"]["p99"], lambda v: _seconds(v)),
    ("adapters moved per 1000 requests", lambda f: f["uploads_per_1000_requests"], lambda v: f"{v:.0f}"),
)


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 1 else f"{1000 * value:.0f} ms"


def rows(
    fleet: dict[str, Any], sim: dict[str, Any]
) -> list[tuple[str, list[tuple[str, str, dict[str, Any]]]]]:
    """Of each fleet: its title, and (policy, colour, figures) of each bar."""
    setup, traffic = fleet["setup"], sim["traffic"]
    small = [
        (f"{policy}, {kind}", colour, figures[kind])
        for policy, figures in fleet["policies"].items()
        for kind, colour in (("measured", _MEASURED), ("simulated", _SIMULATED))
    ]
    large = [(policy, _SIMULATED, figures) for policy, figures in sim["policies"].items()]
    return [
        (f"{setup['num_pods']} daemons on loopback, {setup['num_adapters']} adapters", small),
        (f"{sim['pods']} pods, {traffic['num_adapters']:,} adapters, simulated", large),
    ]


def svg(fleet: dict[str, Any], sim: dict[str, Any]) -> str:
    body: list[str] = []
    y = 8
    for title, bars in rows(fleet, sim):
        y += 20
        body.append(f'<text x="10" y="{y}" font-size="14" font-weight="bold">{escape(title)}</text>')
        y += 12
        for index, (label, _, _) in enumerate(bars):
            place = y + 22 + index * (_BAR + 6) + _BAR - 4
            body.append(f'<text x="{_LEFT - 8}" y="{place}" text-anchor="end">{escape(label)}</text>')
        panel = (_WIDTH - _LEFT) / len(FIGURES)
        for column, (name, value_of, shown) in enumerate(FIGURES):
            x = _LEFT + column * panel
            largest = max(value_of(figures) for _, _, figures in bars) or 1.0
            body.append(f'<text x="{x:.0f}" y="{y + 12}" fill="#555">{escape(name)}</text>')
            for index, (_, colour, figures) in enumerate(bars):
                value, top = value_of(figures), y + 22 + index * (_BAR + 6)
                width = max(1.0, value / largest * (panel - 70))
                body.append(
                    f'<rect x="{x:.0f}" y="{top}" width="{width:.1f}" height="{_BAR}" fill="{colour}"/>'
                    f'<text x="{x + width + 5:.1f}" y="{top + _BAR - 4}">{shown(value)}</text>'
                )
        y += 22 + len(bars) * (_BAR + 6)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {y + 10}" width="{_WIDTH}" height="{y + 10}" '
        'font-family="sans-serif" font-size="11" fill="#222">\n'
        f'<rect width="{_WIDTH}" height="{y + 10}" fill="#fff"/>\n' + "\n".join(body) + "\n</svg>\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.fleet_plot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--fleet", type=Path, required=True, metavar="FILE", help="the --out of bench.fleet")
    parser.add_argument(
        "--sim", type=Path, required=True, metavar="FILE", help="the --out of bench.fleet_sim"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="SVG")
    arguments = parser.parse_args(argv)
    try:
        picture = svg(json.loads(arguments.fleet.read_text()), json.loads(arguments.sim.read_text()))
    except (OSError, KeyError, ValueError) as error:
        print(f"bench.fleet_plot: {error}", file=sys.stderr)
        return 1
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
