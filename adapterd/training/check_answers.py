"""Whether the answers are of one kind, and whether rows and answers differ enough to teach anything."""

from collections import Counter
from collections.abc import Iterator, Sequence

from adapterd.training.duplicates import NearPair
from adapterd.training.problems import MAX_EXAMPLES, MIN_ROWS, MIN_ROWS_FOR_STATISTICS, Finding, count
from adapterd.training.rows import Row
from adapterd.training.shapes import (
    Labels,
    OddAnswer,
    closed_sets,
    excerpt,
    folded,
    near_labels,
    odd_endings,
    odd_shapes,
)

_MONOTONE_SHARE = 0.3
_NEAR_DUPLICATE_SHARE = 0.2
_MIN_WORDS = 100


def answer_findings(rows: Sequence[Row]) -> tuple[dict[str, int], list[Labels], list[Finding]]:
    """How many answers have each shape, the label sets among them, and what stands out in either."""
    findings: list[Finding] = []
    edges = tuple(row.line for row in rows if row.answer != row.answer.strip())
    if edges:
        findings.append(
            Finding(
                "warning",
                "edges",
                f"{count(edges, 'answer')} with white space at an end",
                "--fix strips it",
                edges,
            )
        )
    if len(rows) < MIN_ROWS:
        return {}, [], findings
    shapes, odd = odd_shapes(rows)
    labels = closed_sets(rows)
    findings += _odd(odd, "format", "with a shape unlike the others'")
    findings += _odd(odd_endings(rows), "ending", "with an end unlike the others'")
    slips: set[str] = set()
    for one in labels:
        near = near_labels(one)
        slips |= {slip.shown for slip in near}
        findings += _odd(
            near, "near_label", f"of {one.name} that looks like a slip of a common one", noun="value"
        )
    scarce = [
        (one, {value: count for value, count in one.scarce.items() if repr(value) not in slips})
        for one in labels
    ]
    scarce = [(one, values) for one, values in scarce if values]
    if scarce and len(rows) >= MIN_ROWS_FOR_STATISTICS:
        findings.append(
            Finding(
                "warning",
                "imbalance",
                "some labels have too few examples to be learnt",
                "write more rows for them, or fewer for the common ones",
                examples=tuple(
                    f"{one.name}: {value!r} {count} of {sum(one.counts.values())}"
                    for one, values in scarce
                    for value, count in list(values.items())[:MAX_EXAMPLES]
                ),
            )
        )
    return shapes, labels, findings


def _odd(odd: Sequence[OddAnswer], code: str, what: str, *, noun: str = "answer") -> list[Finding]:
    if not odd:
        return []
    examples = tuple(f"line {one.line}: {one.shown} (usual: {one.wanted})" for one in odd[:MAX_EXAMPLES])
    lines = tuple(one.line for one in odd)
    return [
        Finding(
            "warning",
            code,
            f"{count(odd, noun)} {what}",
            "one form is learnt sooner than two",
            lines,
            examples,
        )
    ]


def diversity_findings(
    rows: Sequence[Row], pairs: Sequence[NearPair], labels: Sequence[Labels]
) -> Iterator[Finding]:
    """Rows that are too much alike, in what they ask or in what they answer."""
    if len(rows) < MIN_ROWS_FOR_STATISTICS:
        return
    near = sum(pair.second < len(rows) for pair in pairs)
    if near > _NEAR_DUPLICATE_SHARE * len(rows):
        yield Finding(
            "warning",
            "diversity",
            f"{near} of {len(rows)} prompts are nearly copies of others",
            "vary what is asked",
        )
    words = {word for row in rows for word in row.prompt_text.casefold().split()}
    if len(words) < _MIN_WORDS:
        yield Finding(
            "warning",
            "diversity",
            f"all prompts together use {len(words)} different words",
            "vary how it is asked",
        )
    if not labels:
        answer, count = Counter(folded(row.answer) for row in rows).most_common(1)[0]
        if count > _MONOTONE_SHARE * len(rows):
            yield Finding(
                "warning",
                "diversity",
                f"{count} of {len(rows)} answers are the same: {excerpt(answer)}",
                "the model learns to say just that",
            )
