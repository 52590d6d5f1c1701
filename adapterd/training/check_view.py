"""A report on rows for people and for programs; and one row's tokens, with those that carry loss marked."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TextIO

from adapterd.render import Renderer
from adapterd.training.check import Report
from adapterd.training.data import encode_row
from adapterd.training.problems import Finding, Level
from adapterd.training.rows import Row

_BINS = 10
_BAR = 40
_MAX_LINES = 12
_LEVELS: tuple[tuple[Level, str], ...] = (("error", "31"), ("warning", "33"), ("note", "36"))
_PROMPT, _TRAINED, _STOP = "2", ("30;42", "30;102"), "30;43"


def wants_colour(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """Colour is for a terminal, unless NO_COLOR is set to anything (no-color.org)."""
    return stream.isatty() and not environ.get("NO_COLOR") and environ.get("TERM") != "dumb"


def as_text(report: Report, *, colour: bool) -> str:
    paint = _painter(colour)
    verdict = paint("usable", "32;1") if report.is_usable else paint("not usable", "31;1")
    bad = f", {report.num_bad_rows} rows that cannot be read" if report.num_bad_rows else ""
    lines = [f"{printable(str(report.path))}: {report.num_rows} rows{bad}: {verdict}"]
    for level, code in _LEVELS:
        for finding in report.of(level):
            lines += _finding(finding, paint(level, code))
    lines += ["", *_tokens(report)]
    if report.shapes:
        lines += ["", "answers are"]
        lines += [f"  {count:>6}  {printable(shape)}" for shape, count in report.shapes.items()]
    for labels in report.labels:
        lines += ["", f"values of {printable(labels.name)}"]
        lines += [f"  {count:>6}  {printable(value)}" for value, count in labels.counts.items()]
    return "\n".join(lines)


def as_json(report: Report) -> dict[str, Any]:
    """Plain data. `lengths` and `lines` are whole, where the text shows some."""
    return {
        "path": str(report.path),
        "usable": report.is_usable,
        "num_rows": report.num_rows,
        "num_bad_rows": report.num_bad_rows,
        "base": report.base,
        "context": report.context,
        "tokens": {
            "total": report.lengths.total,
            "trained": report.lengths.trained,
            "longest": max(report.lengths.rows, default=0),
            "rows": list(report.lengths.rows),
        },
        "answers": dict(report.shapes),
        "labels": {labels.key: labels.counts for labels in report.labels},
        "findings": [
            {
                "level": finding.level,
                "code": finding.code,
                "message": finding.message,
                "hint": finding.hint,
                "lines": list(finding.lines),
                "examples": list(finding.examples),
            }
            for finding in report.findings
        ],
    }


def mask_text(row: Row, renderer: Renderer, *, colour: bool) -> str:
    """Every token of a row as training sees it: those with loss in colour, or in double brackets without it."""
    examples = encode_row(row, renderer)
    parts = []
    for number, example in enumerate(examples, 1):
        parts.append(
            f"line {row.line}, answer {number} of {len(examples)}: {len(example.prompt_ids)} tokens are read,"
            f" {len(example.answer_ids)} carry loss, the last is the stop token"
        )
        shown = [_shown(token, renderer) for token in (*example.prompt_ids, *example.answer_ids)]
        prompt, answer = shown[: len(example.prompt_ids)], shown[len(example.prompt_ids) :]
        if colour:
            text = f"\x1b[{_PROMPT}m{''.join(prompt)}\x1b[0m"
            for index, token in enumerate(answer):
                code = _STOP if index == len(answer) - 1 else _TRAINED[index % 2]
                text += f"\x1b[{code}m{token}\x1b[0m"
        else:
            text = "".join(prompt) + "".join(f"⟦{token}⟧" for token in answer)
        parts.append(text)
    return "\n".join(parts)


def mask_json(row: Row, renderer: Renderer) -> dict[str, Any]:
    """The same for programs: one list of tokens for each answer."""
    return {
        "line": row.line,
        "answers": [
            [
                {"id": token, "text": _shown(token, renderer), "loss": has_loss}
                for ids, has_loss in ((example.prompt_ids, False), (example.answer_ids, True))
                for token in ids
            ]
            for example in encode_row(row, renderer)
        ],
    }


def printable(text: str) -> str:
    """What a file says must not steer the terminal."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def histogram(values: Sequence[int]) -> list[str]:
    """Ten bars of equal width in tokens, from the shortest row to the longest."""
    low, high = min(values), max(values)
    width = max(1, math.ceil((high - low + 1) / _BINS))
    counts = [0] * ((high - low) // width + 1)
    for value in values:
        counts[(value - low) // width] += 1
    return [
        f"  {low + index * width:>6} to {low + (index + 1) * width - 1:<6} {count:>6}"
        f"  {'█' * math.ceil(_BAR * count / max(counts))}".rstrip()
        for index, count in enumerate(counts)
    ]


def _finding(finding: Finding, level: str) -> Iterator[str]:
    where = f" [{_ranges(finding.lines)}]" if finding.lines else ""
    yield f"  {level}: {printable(finding.message)}{where}"
    if finding.hint:
        yield f"      {printable(finding.hint)}"
    for example in finding.examples:
        yield f"      - {printable(example)}"


def _tokens(report: Report) -> Iterator[str]:
    lengths = report.lengths
    yield f"tokens, as {report.base} reads them (context {report.context})"
    if not lengths.rows:
        yield "  no row could be rendered"
        return
    yield (
        f"  {lengths.total:,} in one epoch, {lengths.trained:,} of them carry loss;"
        f" a row has {statistics.median(lengths.rows):g} in the middle, {max(lengths.rows)} at most"
    )
    yield from histogram(lengths.rows)


def _ranges(lines: Sequence[int]) -> str:
    """`lines 1, 3-5, 9`, and how many more."""
    runs: list[list[int]] = []
    for line in sorted(set(lines)):
        if runs and line == runs[-1][1] + 1:
            runs[-1][1] = line
        else:
            runs.append([line, line])
    shown = [str(a) if a == b else f"{a}-{b}" for a, b in runs[:_MAX_LINES]]
    left = sum(b - a + 1 for a, b in runs[_MAX_LINES:])
    noun = "line" if len(set(lines)) == 1 else "lines"
    return f"{noun} {', '.join(shown)}" + (f" and {left} more" if left else "")


def _shown(token: int, renderer: Renderer) -> str:
    """A token's text. Half a character is shown as its bytes; a line break is kept and made visible."""
    data = renderer.token_bytes[token]
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return "".join(f"\\x{byte:02x}" for byte in data)
    return "\\n\n".join(printable(line) for line in text.split("\n"))


def _painter(colour: bool) -> Any:
    return (lambda text, code: f"\x1b[{code}m{text}\x1b[0m") if colour else (lambda text, code: text)
