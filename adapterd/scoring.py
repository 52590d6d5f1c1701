"""Answers against reference answers: plain counting, no model and no judge.

The references say themselves what they are: lines of `Key: value`, one label of a few, or free text.
Nothing is normalised but white space.
"""

import math
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["fields", "label", "text"]

_FIELD = re.compile(r"([A-Za-z][A-Za-z0-9 _-]{0,30}):[ \t]*(.*)")
_NUMBER = re.compile(r"\d+(?:[.,/:-]\d+)*")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_MAX_LABELS = 20
_MAX_LABEL_WORDS = 3
_SHARED_BY_MOST = 0.8


@dataclass(frozen=True)
class Answer:
    """What was asked, what was wanted, and what came. `stopped`: the model ended by itself."""

    prompt: str
    reference: str
    text: str
    num_tokens: int
    stopped: bool
    tags: tuple[str, ...]


@dataclass(frozen=True)
class Share:
    """`count` of `total`, with its 95 % Wilson interval: what so few rows can prove."""

    count: int
    total: int

    @property
    def value(self) -> float:
        return self.count / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        if not self.total:
            return (math.nan, math.nan)
        n, p, z = self.total, self.value, 1.959964
        middle, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return ((middle - spread) / (1 + z * z / n), (middle + spread) / (1 + z * z / n))


@dataclass(frozen=True)
class LabelScore:
    """One label: how often it was wanted, given, and both."""

    wanted: int
    given: int
    both: int


@dataclass(frozen=True)
class Scores:
    """One arm over one set of rows.

    `well_formed`: the shape of the reference (its keys in order; a known label; its opening and closing
    sentence). `fields`: by key, over the rows whose reference has it. `grounded`: every number of the answer
    stands in the prompt or the reference, over the rows whose reference holds a number. `tags`: exact
    matches by tag.
    """

    exact: Share
    well_formed: Share
    stopped: Share
    grounded: Share
    fields: dict[str, Share]
    labels: dict[str, LabelScore]
    kinds: dict[Kind, Share]
    tags: dict[str, Share]
    median_tokens: float


@dataclass(frozen=True)
class _Frame:
    """What free-text references have in common, "" where they have nothing."""

    opening: str
    closing: str


def score(answers: Sequence[Answer]) -> Scores:
    """Score one arm. Raises ValueError for no answers."""
    if not answers:
        raise ValueError("there is nothing to score")
    labels = find_labels([answer.reference for answer in answers])
    kinds = [kind_of(answer.reference, labels) for answer in answers]
    frame = _frame([a.reference for a, kind in zip(answers, kinds, strict=True) if kind == "text"])
    exact = [_squeeze(answer.text) == _squeeze(answer.reference) for answer in answers]
    well_formed = [_well_formed(a, kind, labels, frame) for a, kind in zip(answers, kinds, strict=True)]
    with_numbers = [answer for answer in answers if _NUMBER.search(answer.reference)]
    return Scores(
        exact=_share(exact),
        well_formed=_share(well_formed),
        stopped=_share([answer.stopped for answer in answers]),
        grounded=_share([_is_grounded(answer) for answer in with_numbers]),
        fields=_field_shares([a for a, kind in zip(answers, kinds, strict=True) if kind == "fields"]),
        labels=_label_scores([a for a, kind in zip(answers, kinds, strict=True) if kind == "label"], labels),
        kinds={
            kind: _share([hit for hit, own in zip(exact, kinds, strict=True) if own == kind])
            for kind in ("fields", "label", "text")
            if kind in kinds
        },
        tags={
            tag: _share([hit for hit, answer in zip(exact, answers, strict=True) if tag in answer.tags])
            for tag in sorted({tag for answer in answers for tag in answer.tags})
        },
        median_tokens=statistics.median(answer.num_tokens for answer in answers),
    )


def find_labels(references: Sequence[str]) -> frozenset[str]:
    """The labels of a labelling task: if most references are one of a few short phrases, those phrases."""
    counts = Counter(_squeeze(reference) for reference in references if parse_fields(reference) is None)
    short = {text: n for text, n in counts.items() if len(text.split()) <= _MAX_LABEL_WORDS}
    repeated = sum(n for n in short.values() if n > 1)
    if len(short) > _MAX_LABELS or repeated < _SHARED_BY_MOST * sum(counts.values()):
        return frozenset()
    return frozenset(short)


def kind_of(reference: str, labels: frozenset[str]) -> Kind:
    if _squeeze(reference) in labels:
        return "label"
    return "text" if parse_fields(reference) is None else "fields"


def parse_fields(text: str) -> dict[str, str] | None:
    """`Key: value` lines in their order; None if a line is none, a key repeats, or there is only one."""
    lines = [line for line in text.strip().split("\n") if line.strip()]
    fields: dict[str, str] = {}
    for line in lines:
        match = _FIELD.fullmatch(line.strip())
        if match is None or match[1] in fields:
            return None
        fields[match[1]] = _squeeze(match[2])
    return fields if len(fields) > 1 else None


def _well_formed(answer: Answer, kind: Kind, labels: frozenset[str], frame: _Frame) -> bool:
    if kind == "label":
        return _squeeze(answer.text) in labels
    if kind == "fields":
        given, wanted = parse_fields(answer.text), parse_fields(answer.reference)
        return given is not None and wanted is not None and list(given) == list(wanted)
    text = _squeeze(answer.text)
    return bool(text) and text.startswith(frame.opening) and text.endswith(frame.closing)


def _frame(references: Sequence[str]) -> _Frame:
    """The first and the last sentence that most references share."""
    sentences = [_SENTENCE_END.split(_squeeze(reference)) for reference in references]

    def shared(candidates: Sequence[str]) -> str:
        if not candidates:
            return ""
        text, count = Counter(candidates).most_common(1)[0]
        return text if count > 1 and count >= _SHARED_BY_MOST * len(candidates) else ""

    return _Frame(shared([s[0] for s in sentences]), shared([s[-1] for s in sentences]))


def _field_shares(answers: Sequence[Answer]) -> dict[str, Share]:
    """By key: how often the value is the reference's. A key that is missing is wrong."""
    hits: dict[str, list[bool]] = {}
    for answer in answers:
        given = _lenient_fields(answer.text)
        for key, value in (parse_fields(answer.reference) or {}).items():
            hits.setdefault(key, []).append(given.get(key) == value)
    return {key: _share(values) for key, values in hits.items()}


def _lenient_fields(text: str) -> dict[str, str]:
    """The fields of those lines that are fields; the first of a key counts."""
    fields: dict[str, str] = {}
    for line in text.split("\n"):
        match = _FIELD.fullmatch(line.strip())
        if match is not None:
            fields.setdefault(match[1], _squeeze(match[2]))
    return fields


def _label_scores(answers: Sequence[Answer], labels: frozenset[str]) -> dict[str, LabelScore]:
    pairs = [(_squeeze(answer.reference), _squeeze(answer.text)) for answer in answers]
    return {
        label: LabelScore(
            wanted=sum(wanted == label for wanted, _ in pairs),
            given=sum(given == label for _, given in pairs),
            both=sum(wanted == given == label for wanted, given in pairs),
        )
        for label in sorted(labels)
    }


def _is_grounded(answer: Answer) -> bool:
    known = {*_NUMBER.findall(answer.prompt), *_NUMBER.findall(answer.reference)}
    return all(number in known for number in _NUMBER.findall(answer.text))


def _share(hits: Sequence[bool]) -> Share:
    return Share(sum(hits), len(hits))


def _squeeze(text: str) -> str:
    return " ".join(text.split())
