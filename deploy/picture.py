"""The dashboard's panels as one SVG, drawn from a Prometheus: what Grafana would show, without Grafana.

    python -m deploy.picture http://127.0.0.1:9090 --minutes 1 --out dashboard.svg

Grafana is in no package index, so this draws the same queries in the same places, plainly: it shows whether each panel
has data and whether a person could read it, not how Grafana looks.
"""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import httpx

from deploy.monitoring import ROWS, Panel

_WIDTH, _HEIGHT, _GAP, _COLUMNS, _HEAD = 400, 190, 12, 3, 26
_COLOURS = (
    "#1b4f8f",
    "#e69f00",
    "#3a8f5c",
    "#b0478f",
    "#7fb7be",
    "#8c6d31",
    "#b0a8b9",
    "#d1495b",
    "#555",
    "#66a61e",
)
_RATE = "10s"


@dataclass(frozen=True)
class Line:
    name: str
    points: tuple[tuple[float, float], ...]


def filled_in(expression: str, rate: str = _RATE) -> str:
    """Grafana's variables, all pods of all namespaces."""
    for variable, value in (("$__rate_interval", rate), ("$namespace", ".*"), ("$pod", ".*")):
        expression = expression.replace(variable, value)
    return expression


def lines(url: str, panel: Panel, minutes: float) -> list[Line]:
    """What a panel's queries return over the last minutes. Raises RuntimeError with Prometheus' words."""
    found = []
    end = time.time()
    for legend, expression in panel.queries:
        parameters = {
            "query": filled_in(expression),
            "start": end - 60 * minutes,
            "end": end,
            "step": minutes,
        }
        answer = httpx.get(f"{url}/api/v1/query_range", params=parameters, timeout=30).json()
        if answer["status"] != "success":
            raise RuntimeError(f"{panel.title}: {answer['error']}")
        for series in answer["data"]["result"]:
            points = ((float(at), float(value)) for at, value in series["values"])
            whole = tuple((at, value) for at, value in points if math.isfinite(value))
            found.append(Line(_named(legend, series["metric"]), whole))
    return found


def _named(legend: str, labels: dict[str, str]) -> str:
    for label, value in labels.items():
        legend = legend.replace("{{" + label + "}}", value)
    return legend


def number(value: float, unit: str) -> str:
    if unit == "percentunit":
        return f"{value:.0%}" if value >= 0.1 or value == 0 else f"{value:.2%}"
    if unit == "s":
        return f"{value:.2g} s" if value >= 1 else f"{1000 * value:.3g} ms"
    return f"{value:.3g}"


def draw(panel: Panel, drawn: Sequence[Line], x: float, y: float) -> str:
    """One panel: title, lines from zero to the largest value, a legend."""
    parts = [
        f'<rect x="{x}" y="{y}" width="{_WIDTH}" height="{_HEIGHT}" fill="#fff" stroke="#ccc"/>',
        f'<text x="{x + 8}" y="{y + 17}" font-weight="bold">{escape(panel.title)}</text>',
    ]
    points = [point for line in drawn for point in line.points]
    if not points:
        parts.append(
            f'<text x="{x + _WIDTH / 2}" y="{y + 95}" text-anchor="middle" fill="#b00">no data</text>'
        )
        return "".join(parts)
    if panel.kind == "stat":
        last = number(drawn[0].points[-1][1], panel.unit)
        parts.append(f'<text x="{x + 200}" y="{y + 115}" font-size="40" text-anchor="middle">{last}</text>')
        return "".join(parts)
    first, last_at = min(at for at, _ in points), max(at for at, _ in points)
    top = max(value for _, value in points) or 1.0
    left, right, upper, lower = x + 62, x + _WIDTH - 10, y + 28, y + 140
    for share in (0, 0.5, 1):
        level = lower - share * (lower - upper)
        parts.append(f'<line x1="{left}" x2="{right}" y1="{level}" y2="{level}" stroke="#eee"/>')
        label = number(share * top, panel.unit)
        parts.append(f'<text x="{left - 5}" y="{level + 4}" text-anchor="end" fill="#666">{label}</text>')
    for index, line in enumerate(drawn):
        colour = _COLOURS[index % len(_COLOURS)]
        place = [
            f"{left + (at - first) / max(last_at - first, 1) * (right - left):.1f},"
            f"{lower - value / top * (lower - upper):.1f}"
            for at, value in line.points
        ]
        parts.append(
            f'<polyline points="{" ".join(place)}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
        )
        legend_x, legend_y = x + 8 + index % 4 * 98, y + 158 + index // 4 * 14
        parts.append(f'<text x="{legend_x}" y="{legend_y}" fill="{colour}">{escape(line.name[:16])}</text>')
    return "".join(parts)


def svg(url: str, minutes: float) -> str:
    body: list[str] = []
    y: float = _GAP
    for title, panels in ROWS:
        body.append(f'<text x="{_GAP}" y="{y + 16}" font-size="15">{escape(title)}</text>')
        y += _HEAD
        for index, panel in enumerate(panels):
            x = _GAP + index % _COLUMNS * (_WIDTH + _GAP)
            body.append(draw(panel, lines(url, panel, minutes), x, y + index // _COLUMNS * (_HEIGHT + _GAP)))
        y += -(-len(panels) // _COLUMNS) * (_HEIGHT + _GAP)
    width = _GAP + _COLUMNS * (_WIDTH + _GAP)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y:.0f}" width="{width}" height="{y:.0f}" '
        'font-family="sans-serif" font-size="11" fill="#222">\n'
        f'<rect width="{width}" height="{y:.0f}" fill="#f6f6f6"/>\n' + "\n".join(body) + "\n</svg>\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.picture",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("url", help="of a Prometheus")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--out", type=Path, required=True, metavar="SVG")
    arguments = parser.parse_args(argv)
    try:
        arguments.out.write_text(svg(arguments.url, arguments.minutes))
    except (OSError, RuntimeError, httpx.HTTPError) as error:
        print(f"deploy.picture: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
