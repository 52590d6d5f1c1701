"""What the answers of a file look like, and which ones break the shape of the others. Plain counting."""

import difflib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from adapterd.training.forms import find_labels, parse_fields
from adapterd.training.rows import Row

_ESTABLISHED_SHARE = 0.1
_COVERED_SHARE = 0.8
_CLOSED_SET = 20
_RARE = 0.1
_NEAR_RATIO = 0.8
_MIN_PER_LABEL = 5
_MAX_IMBALANCE = 20
_LABEL = re.compile(r"[^\n]{1,60}")


@dataclass(frozen=True)
class OddAnswer:
    """An answer that differs from the others. `wanted` says what they are, or what this one may have meant."""

    line: int
    shown: str
    wanted: str


@dataclass(frozen=True)
class Labels:
    """How often each value of a small, closed set is the answer, or stands under `key` in it; commonest first."""

    key: str
    lines: Mapping[str, tuple[int, ...]]

    @property
    def name(self) -> str:
        return f"{self.key!r}" if self.key else "the answer"

    @property
    def counts(self) -> dict[str, int]:
        return {value: len(lines) for value, lines in self.lines.items()}

    @property
    def scarce(self) -> dict[str, int]:
        """Values with too few examples to be learnt, or far fewer than the commonest."""
        largest = max(self.counts.values())
        return {
            value: count
            for value, count in self.counts.items()
            if count < _MIN_PER_LABEL or count * _MAX_IMBALANCE < largest
        }


def shape_of(answer: str) -> str:
    """An answer's form in words: JSON with its keys, `Key: value` lines with theirs, a list, a table, text."""
    text = answer.strip()
    if text.startswith(("{", "[")):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return "broken JSON" if text.endswith(("}", "]")) or text.startswith('{"') else "text"
        return (
            f"JSON with {', '.join(map(repr, value)) or 'no key'}"
            if isinstance(value, dict)
            else "a JSON array"
        )
    if text.startswith("```"):
        return "a block of code"
    fields = parse_fields(text)
    if fields is not None:
        return f"the lines {', '.join(f'{key}:' for key in fields)}"
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if len(lines) > 1 and all(line.startswith(("- ", "* ", "• ")) for line in lines):
        return "a list with bullets"
    if len(lines) > 1 and all(re.match(r"\d+[.)] ", line) for line in lines):
        return "a numbered list"
    return "text"


def odd_shapes(rows: Sequence[Row]) -> tuple[dict[str, int], list[OddAnswer]]:
    """The established shapes with their counts, and the answers of no such shape.

    A shape is established if a tenth of the answers have it. Where those cover too few of the answers, the
    file has no shape to break, and nothing is odd.
    """
    labels = find_labels([row.answer for row in rows])
    shapes = [_label_shape(row.answer, labels) for row in rows]
    counts = Counter(shapes)
    established = {
        shape: n for shape, n in counts.most_common() if n >= max(2, _ESTABLISHED_SHARE * len(rows))
    }
    if sum(established.values()) < _COVERED_SHARE * len(rows):
        return {}, []
    wanted = " or ".join(established)
    odd = [
        OddAnswer(row.line, f"{shape}: {excerpt(row.answer)}", wanted)
        for row, shape in zip(rows, shapes, strict=True)
        if shape not in established
    ]
    return established, odd


def odd_endings(rows: Sequence[Row]) -> list[OddAnswer]:
    """Answers in plain text that do not end as nine of ten do: with, or without, a mark of punctuation."""
    plain = [row for row in rows if shape_of(row.answer) == "text" and row.answer.strip()]
    ended = {row.line: bool(re.search(r"[.!?…。！？\"')\]]$", row.answer.strip())) for row in plain}  # noqa: RUF001
    for is_usual, wanted in (
        (True, "a full stop or its like at the end"),
        (False, "no punctuation at the end"),
    ):
        odd = [row for row in plain if ended[row.line] is not is_usual]
        if plain and 0 < len(odd) <= _RARE * len(plain):
            return [OddAnswer(row.line, f"...{row.answer.strip()[-40:]!r}", wanted) for row in odd]
    return []


def closed_sets(rows: Sequence[Row]) -> list[Labels]:
    """The labels of a labelling task, and the keys of fields or JSON whose values are few and repeat."""
    values: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for key, value in _values(row.answer):
            values[key][value].append(row.line)
    found = []
    for key, lines in values.items():
        total = sum(map(len, lines.values()))
        frequent = sum(len(own) for own in lines.values() if len(own) > 1)
        if 1 < len(lines) <= _CLOSED_SET and frequent >= _COVERED_SHARE * total and total >= 2 * len(lines):
            ordered = sorted(lines.items(), key=lambda item: (-len(item[1]), item[0]))
            found.append(Labels(key, {value: tuple(own) for value, own in ordered}))
    return found


def near_labels(labels: Labels) -> list[OddAnswer]:
    """Rare values that look like a slip of a common one: `Shiping`, `medium ` beside `Medium`."""
    odd = []
    counts = labels.counts
    for value, count in counts.items():
        for common in counts:
            is_rare = common != value and count <= max(1, _RARE * counts[common])
            if is_rare and (value.casefold() == common.casefold() or _looks_like(value, common)):
                odd += [OddAnswer(line, repr(value), f"perhaps {common!r}") for line in labels.lines[value]]
                break
    return odd


def _looks_like(value: str, common: str) -> bool:
    ratio = difflib.SequenceMatcher(None, value.casefold(), common.casefold()).ratio()
    return len(common) > 3 and ratio >= _NEAR_RATIO and abs(len(value) - len(common)) <= 2


def _values(answer: str) -> Iterator[tuple[str, str]]:
    """("", the whole answer) of one line, or each key with its value."""
    text = answer.strip()
    if text.startswith("{"):
        try:
            parsed = json.loads(text)
        except (ValueError, RecursionError):
            return
        if isinstance(parsed, dict):
            yield from ((key, value) for key, value in parsed.items() if isinstance(value, str))
        return
    fields = parse_fields(text)
    if fields is not None:
        yield from fields.items()
    elif _LABEL.fullmatch(text):
        yield "", text


def _label_shape(answer: str, labels: frozenset[str]) -> str:
    return "a label" if " ".join(answer.split()) in labels else shape_of(answer)


def excerpt(text: str) -> str:
    """The beginning of a text on one line, quoted."""
    flat = " ".join(text.split())
    return repr(flat if len(flat) <= 60 else f"{flat[:57]}...")


def folded(text: str) -> str:
    """Without case and spacing: what counts as the same answer."""
    return " ".join(text.casefold().split())
