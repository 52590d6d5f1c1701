"""Answers against reference answers, row by row: counting and comparing, no model and no judge.

Unless a form is given, the references say themselves what they are: lines of `Key: value`, one label of a
few, or free text. Nothing is normalised but white space.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from adapterd.evaluation.formats import AnswerFormat, Slots
from adapterd.evaluation.similarity import chrf, rouge_l
from adapterd.training.forms import FIELD, find_labels, parse_fields, squeeze

Kind = Literal["fields", "label", "text"]

TITLES: Mapping[str, str] = {
    "exact": "exact match",
    "label_accuracy": "label accuracy",
    "valid": "valid format",
    "slots": "slot accuracy",
    "grounded": "no invented number",
    "chrf": "chrF",
    "rouge_l": "ROUGE-L",
    "judge": "judged right",
    "consistency": "same answer over seeds",
    "stopped": "ended by itself",
}
"""Every metric that a row has a value of, 0 to 1 and the higher the better, in the order of the tables."""

_NUMBER = re.compile(r"\d+(?:[.,/:-]\d+)*")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
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


Values = tuple[float | None, ...]
"""One value a row; None where the metric says nothing of that row."""


@dataclass(frozen=True)
class Scores:
    """One arm over one set of rows.

    `values` by metric. `valid`: the given form, or the shape of the reference (its keys in order; a known
    label; its opening and closing sentence). `slots`: the share of the reference's slots that are right,
    over all rows whose reference has any; `by_slot` the same by slot, 0 or 1. `grounded`: every number of the
    answer stands in the prompt or the reference, over the rows whose reference holds one. `labels`:
    (wanted, given) of each row whose reference is a label. `kinds` and `tags` of each row.
    """

    values: Mapping[str, Values]
    by_slot: Mapping[str, Values]
    labels: tuple[tuple[str, str] | None, ...]
    kinds: tuple[Kind, ...]
    tags: tuple[tuple[str, ...], ...]

    @property
    def metrics(self) -> tuple[str, ...]:
        """Those that some row has a value of."""
        return tuple(name for name, row in self.values.items() if any(value is not None for value in row))

    def with_values(self, metric: str, row: Sequence[float | None]) -> "Scores":
        """The same with one more metric, measured elsewhere."""
        return replace(self, values={**self.values, metric: tuple(row)})


@dataclass(frozen=True)
class Task:
    """What the references of a set are: the labels among them, what free texts share, and the form if one is given."""

    labels: frozenset[str]
    opening: str
    closing: str
    form: AnswerFormat | None

    @classmethod
    def of(cls, references: Sequence[str], form: AnswerFormat | None = None) -> "Task":
        """Raises ValueError for no references."""
        if not references:
            raise ValueError("there is nothing to score")
        labels = find_labels(references)
        texts = [reference for reference in references if kind_of(reference, labels) == "text"]
        opening, closing = _shared_sentences(texts)
        return cls(labels, opening, closing, form)

    @property
    def deciding_metric(self) -> str:
        """What two arms are compared by unless something else is asked for."""
        return "label_accuracy" if self.labels else "exact"


def score(task: Task, answers: Sequence[Answer]) -> Scores:
    """Score one arm. Raises ValueError for no answers."""
    if not answers:
        raise ValueError("there is nothing to score")
    kinds = tuple(kind_of(answer.reference, task.labels) for answer in answers)
    pairs = list(zip(answers, kinds, strict=True))
    exact = tuple(float(_same(task, answer)) for answer in answers)
    slots = [_slot_hits(task, answer, kind) for answer, kind in pairs]
    names = list(dict.fromkeys(name for hits in slots for name in hits))
    values: dict[str, Values] = {
        "exact": exact,
        "label_accuracy": tuple(
            hit if kind == "label" else None for hit, kind in zip(exact, kinds, strict=True)
        ),
        "valid": tuple(float(_is_valid(task, answer, kind)) for answer, kind in pairs),
        "slots": tuple(sum(hits.values()) / len(hits) if hits else None for hits in slots),
        "grounded": tuple(
            float(_is_grounded(answer)) if _NUMBER.search(answer.reference) else None for answer in answers
        ),
        "stopped": tuple(float(answer.stopped) for answer in answers),
    }
    texts = [
        (squeeze(answer.text), squeeze(answer.reference)) if kind == "text" else None
        for answer, kind in pairs
    ]
    if any(texts):
        for name, measure in (("chrf", chrf), ("rouge_l", rouge_l)):
            measured = measure([pair for pair in texts if pair is not None])
            if measured is not None:
                left = iter(measured)
                values[name] = tuple(None if pair is None else next(left) for pair in texts)
    return Scores(
        values={name: row for name, row in values.items() if any(value is not None for value in row)},
        by_slot={name: tuple(hits.get(name) for hits in slots) for name in names},
        labels=tuple(
            (squeeze(answer.reference), squeeze(answer.text)) if kind == "label" else None
            for answer, kind in pairs
        ),
        kinds=kinds,
        tags=tuple(answer.tags for answer in answers),
    )


def kind_of(reference: str, labels: frozenset[str]) -> Kind:
    if squeeze(reference) in labels:
        return "label"
    return "text" if parse_fields(reference) is None else "fields"


def macro_f1(pairs: Sequence[tuple[str, str]]) -> float:
    """The unweighted mean over the wanted labels of 2 TP / (wanted + given). NaN of nothing."""
    wanted, given = Counter(pair[0] for pair in pairs), Counter(pair[1] for pair in pairs)
    both = Counter(pair[0] for pair in pairs if pair[0] == pair[1])
    if not wanted:
        return float("nan")
    return sum(2 * both[label] / (wanted[label] + given[label]) for label in wanted) / len(wanted)


def _same(task: Task, answer: Answer) -> bool:
    if task.form is not None:
        return task.form.same(answer.text, answer.reference)
    return squeeze(answer.text) == squeeze(answer.reference)


def _is_valid(task: Task, answer: Answer, kind: Kind) -> bool:
    if task.form is not None:
        return task.form.is_valid(answer.text)
    if kind == "label":
        return squeeze(answer.text) in task.labels
    if kind == "fields":
        given, wanted = parse_fields(answer.text), parse_fields(answer.reference)
        return given is not None and wanted is not None and list(given) == list(wanted)
    text = squeeze(answer.text)
    return bool(text) and text.startswith(task.opening) and text.endswith(task.closing)


def _slot_hits(task: Task, answer: Answer, kind: Kind) -> dict[str, float]:
    """By slot of the reference: whether the answer fills it with the same. A slot that is missing is wrong."""
    wanted: Slots | None
    given: Slots | None
    if task.form is not None:
        wanted, given = task.form.slots(answer.reference), task.form.slots(answer.text)
    else:
        wanted = parse_fields(answer.reference) if kind == "fields" else None
        given = _lenient_fields(answer.text)
    return {
        name: float(given is not None and name in given and _equal(given[name], value))
        for name, value in (wanted or {}).items()
    }


def _equal(given: str | None, wanted: str | None) -> bool:
    return given == wanted if given is None or wanted is None else squeeze(given) == squeeze(wanted)


def _lenient_fields(text: str) -> dict[str, str]:
    """The fields of those lines that are fields; the first of a key counts."""
    fields: dict[str, str] = {}
    for line in text.split("\n"):
        match = FIELD.fullmatch(line.strip())
        if match is not None:
            fields.setdefault(match[1], squeeze(match[2]))
    return fields


def _shared_sentences(references: Sequence[str]) -> tuple[str, str]:
    """The first and the last sentence that most references share, "" where they share none."""
    sentences = [_SENTENCE_END.split(squeeze(reference)) for reference in references]

    def shared(candidates: Sequence[str]) -> str:
        if not candidates:
            return ""
        text, count = Counter(candidates).most_common(1)[0]
        return text if count > 1 and count >= _SHARED_BY_MOST * len(candidates) else ""

    return shared([s[0] for s in sentences]), shared([s[-1] for s in sentences])


def _is_grounded(answer: Answer) -> bool:
    known = {*_NUMBER.findall(answer.prompt), *_NUMBER.findall(answer.reference)}
    return all(number in known for number in _NUMBER.findall(answer.text))
