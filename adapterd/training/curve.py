"""The loss curve as a picture: a few lines of SVG, which every browser and every code host shows.

Written by hand rather than with matplotlib: two lines and two axes are not worth thirty megabytes of dependencies,
and the same run gives the same bytes.
"""

import math
from collections.abc import Sequence

from adapterd.training.history import StepRecord

CURVE_FILE = "training.svg"

_WIDTH, _HEIGHT = 720, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 28, 36
_TRAIN_COLOUR, _VALID_COLOUR, _INK = "#8aa4c8", "#c0392b", "#444"
_SMOOTHED_POINTS = 300


def loss_curve(history: Sequence[StepRecord], *, best_step: int, title: str) -> str:
    """An SVG: training loss (means of neighbouring steps if there are many), validation loss, the best step."""
    train = _thin([(r.step, r.train_loss) for r in history if r.train_loss is not None])
    valid = [(float(r.step), r.valid_loss) for r in history if r.valid_loss is not None]
    losses = [loss for _, loss in (*train, *valid)]
    low, high = min(losses, default=0.0), max(losses, default=1.0)
    low = min(low, 0.0) if low < high * 0.2 else low
    high = high if high > low else low + 1
    last = max((r.step for r in history), default=1) or 1

    def x(step: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * step / last

    def y(loss: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - loss) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" '
        f'height="{_HEIGHT}" font-family="sans-serif" font-size="11" fill="{_INK}">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="16" font-size="13">{_escaped(title)}</text>',
    ]
    for tick in _ticks(low, high):
        parts.append(
            f'<path d="M{_LEFT} {y(tick):.1f}H{_WIDTH - _RIGHT}" stroke="#e5e5e5"/>'
            f'<text x="{_LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>'
        )
    for tick in _ticks(0, last):
        parts.append(f'<text x="{x(tick):.1f}" y="{_HEIGHT - 18}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<text x="{_WIDTH / 2:.0f}" y="{_HEIGHT - 4}" text-anchor="middle">step</text>')
    if best_step:
        parts.append(
            f'<path d="M{x(best_step):.1f} {_TOP}V{_HEIGHT - _BOTTOM}" stroke="{_INK}" stroke-dasharray="3 3"/>'
            f'<text x="{x(best_step) - 4:.1f}" y="{_TOP + 10}" text-anchor="end">best: {best_step}</text>'
        )
    for points, colour, width in ((train, _TRAIN_COLOUR, 1.5), (valid, _VALID_COLOUR, 2)):
        if points:
            line = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in points)
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="{width}"/>')
    for row, (name, colour) in enumerate((("training", _TRAIN_COLOUR), ("validation", _VALID_COLOUR))):
        parts.append(
            f'<rect x="{_WIDTH - 96}" y="{8 + 14 * row}" width="10" height="3" fill="{colour}"/>'
            f'<text x="{_WIDTH - 82}" y="{13 + 14 * row}">{name}</text>'
        )
    return "\n".join([*parts, "</svg>", ""])


def _thin(points: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """Means of neighbours, so that at most some hundred points are drawn."""
    size = math.ceil(len(points) / _SMOOTHED_POINTS) or 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(s for s, _ in g) / len(g), sum(v for _, v in g) / len(g)) for g in groups]


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers between the two."""
    step = 10.0 ** math.floor(math.log10((high - low) / 2))
    while (high - low) / step > 6:
        step *= 2 if round(step / 10 ** math.floor(math.log10(step))) != 2 else 2.5
    first = math.ceil(low / step)
    return [round(step * i, 10) for i in range(first, math.floor(high / step) + 1)]


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
