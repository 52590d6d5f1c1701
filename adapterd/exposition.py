"""Prometheus' text formats, written so that a scrape costs what has changed since the one before.

Routers scrape twenty times a second each, and prometheus-client formats every sample anew each time: tens of
milliseconds for a hundred adapters, during which nobody's tokens move. Here each series keeps its text until its
value changes. Both formats are made of the same lines; they differ in how a counter's family is called.
"""

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

Kind = Literal["gauge", "counter", "histogram"]
Format = Literal["plain", "openmetrics"]

CONTENT_TYPES: Mapping[Format, str] = {
    "plain": "text/plain; version=0.0.4; charset=utf-8",
    "openmetrics": "application/openmetrics-text; version=1.0.0; charset=utf-8",
}


class Family:
    """All series of one name, in the order in which they came. The caller locks."""

    def __init__(
        self, name: str, help: str, kind: Kind, labels: Sequence[str] = (), buckets: Sequence[float] = ()
    ) -> None:
        self.name = name
        self._labels = tuple(labels)
        self._bounds = tuple(buckets)
        self._rows: dict[tuple[str, ...], _Number | _Histogram] = {}
        self._changed: set[tuple[str, ...]] = set()
        self._text: bytes | None = None
        plain, bare = name, name.removesuffix("_total") if kind == "counter" else name
        self._is_histogram = kind == "histogram"
        self._heads: dict[Format, bytes] = {
            "plain": f"# HELP {plain} {help}\n# TYPE {plain} {kind}\n".encode(),
            "openmetrics": f"# HELP {bare} {help}\n# TYPE {bare} {kind}\n".encode(),
        }

    def set(self, labels: tuple[str, ...], value: float) -> None:
        row = self._row(labels)
        assert isinstance(row, _Number)
        if row.value != value:
            row.value = value
            self._touch(labels)

    def add(self, labels: tuple[str, ...], value: float) -> None:
        row = self._row(labels)
        assert isinstance(row, _Number)
        row.value += value
        self._touch(labels)

    def observe(self, labels: tuple[str, ...], value: float) -> None:
        row = self._row(labels)
        assert isinstance(row, _Histogram)
        row.counts[bisect_left(self._bounds, value)] += 1
        row.sum += value
        self._touch(labels)

    def replace(self, values: Mapping[tuple[str, ...], float]) -> None:
        """Set these series, and drop those that are not among them."""
        if self._rows.keys() != values.keys():
            for labels in [labels for labels in self._rows if labels not in values]:
                self._drop(labels)
        for labels, value in values.items():
            row = self._rows.get(labels)
            if not isinstance(row, _Number) or row.value != value:  # most are as they were
                self.set(labels, value)

    def drop(self, first_label: str) -> None:
        """Drop the series whose first label has this value."""
        for labels in [labels for labels in self._rows if labels and labels[0] == first_label]:
            self._drop(labels)

    def text(self, format: Format) -> tuple[bytes, bytes]:
        """What comes before the series, and the series."""
        if self._text is None or self._changed:
            for labels in self._changed:
                self._rows[labels].render()
            self._changed.clear()
            self._text = b"".join([row.text for row in self._rows.values()])
        return self._heads[format], self._text

    def _row(self, labels: tuple[str, ...]) -> "_Number | _Histogram":
        row = self._rows.get(labels)
        if row is None:
            names = list(zip(self._labels, labels, strict=True))
            row = (
                _Histogram(self.name, names, self._bounds)
                if self._is_histogram
                else _Number(self.name, names)
            )
            self._rows[labels] = row
            self._touch(labels)
        return row

    def _touch(self, labels: tuple[str, ...]) -> None:
        self._changed.add(labels)

    def _drop(self, labels: tuple[str, ...]) -> None:
        del self._rows[labels]
        self._changed.discard(labels)
        self._text = None


class _Number:
    """One series of a gauge or a counter."""

    __slots__ = ("_prefix", "text", "value")

    def __init__(self, name: str, labels: Iterable[tuple[str, str]]) -> None:
        self._prefix = f"{name}{_braces(labels)} "
        self.value: float = 0
        self.text = b""

    def render(self) -> None:
        self.text = f"{self._prefix}{_number(self.value)}\n".encode()


class _Histogram:
    """One series of a histogram: `counts` by bucket, not yet added up, the last one without a bound."""

    __slots__ = ("_count", "_prefixes", "_sum", "counts", "sum", "text")

    def __init__(self, name: str, labels: Sequence[tuple[str, str]], bounds: Sequence[float]) -> None:
        self._prefixes = [
            f"{name}_bucket{_braces([*labels, ('le', _number(bound))])} " for bound in (*bounds, math.inf)
        ]
        self._count, self._sum = f"{name}_count{_braces(labels)} ", f"{name}_sum{_braces(labels)} "
        self.counts = [0] * len(self._prefixes)
        self.sum = 0.0
        self.text = b""

    def render(self) -> None:
        total = 0
        lines = []
        for prefix, count in zip(self._prefixes, self.counts, strict=True):
            total += count
            lines.append(f"{prefix}{total}\n")
        self.text = f"{''.join(lines)}{self._count}{total}\n{self._sum}{_number(self.sum)}\n".encode()


def render(families: Iterable[Family], format: Format) -> bytes:
    parts = [part for family in families for part in family.text(format)]
    return b"".join([*parts, b"# EOF\n"] if format == "openmetrics" else parts)


def accepted_format(accept: str) -> Format:
    """Plain text for everyone who does not ask for the other: routers send no Accept and read nothing else."""
    return "openmetrics" if "application/openmetrics-text" in accept.lower() else "plain"


def _braces(labels: Iterable[tuple[str, str]]) -> str:
    inner = ",".join(f'{name}="{_escaped(value)}"' for name, value in labels)
    return f"{{{inner}}}" if inner else ""


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def _number(value: float) -> str:
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return "NaN" if math.isnan(value) else repr(float(value))
