"""Rows that say what others say: copies, contradictions, and what is held out too."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from adapterd.training.duplicates import NearPair
from adapterd.training.problems import MAX_EXAMPLES, Finding, count
from adapterd.training.rows import Row, fold, fold_turns
from adapterd.training.shapes import excerpt, folded


def copy_findings(rows: Sequence[Row], pairs: Sequence[NearPair]) -> Iterator[Finding]:
    """Copies, near-copies, and one question with two answers. `pairs`: of near rows, as near_pairs has them."""
    by_prompt: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_prompt[fold(row)].append(row)
    copies: list[int] = []
    shown: list[str] = []
    against: list[Row] = []
    for same in by_prompt.values():
        answers: dict[str, Row] = {}
        for row in same:
            first = answers.setdefault(folded(row.answer), row)
            if first is not row:
                copies.append(row.line)
                shown.append(f"line {row.line} repeats line {first.line}")
        against += list(answers.values()) if len(answers) > 1 else []
    if copies:
        yield Finding(
            "warning",
            "duplicate",
            f"{count(copies)} the same as an earlier one",
            "a copy counts twice in training and proves nothing in validation; --fix keeps the first",
            tuple(copies),
            tuple(shown[:MAX_EXAMPLES]),
        )
    if against:
        some = tuple(
            f"line {row.line}: {excerpt(row.prompt_text)} -> {excerpt(row.answer)}" for row in against
        )
        yield Finding(
            "warning",
            "contradiction",
            f"{count(against)} with the question of another and a different answer",
            "the model learns to toss a coin; decide which answer is right",
            tuple(row.line for row in against),
            some[:MAX_EXAMPLES],
        )
    near = [pair for pair in pairs if pair.second < len(rows)]
    agreeing = [p for p in near if folded(rows[p.first].answer) == folded(rows[p.second].answer)]
    differing = [pair for pair in near if pair not in agreeing]
    for code, chosen, what in (
        ("near_duplicate", agreeing, "with the same answer"),
        ("near_contradiction", differing, "with another answer"),
    ):
        if chosen:
            yield Finding(
                "warning",
                code,
                f"{count(chosen)} nearly like another, {what}",
                "an automatic split keeps them on one side",
                tuple(rows[pair.second].line for pair in chosen),
                tuple(
                    f"line {rows[pair.second].line} and line {rows[pair.first].line} share {pair.overlap:.0%}:"
                    f" {excerpt(rows[pair.second].prompt_text)}"
                    for pair in chosen[:MAX_EXAMPLES]
                ),
            )


def leak_findings(
    rows: Sequence[Row], heldout: Sequence[Row], groups: Sequence[int], path: Path
) -> Iterator[Finding]:
    """Training rows that teach, in any turn, the answer to what a held-out row asks last.

    `groups`: of the training rows, then of the held-out ones.
    """
    exact: list[tuple[Row, Row]] = []
    near: list[tuple[Row, Row]] = []
    folded = {fold(row): row for row in heldout}
    first_heldout: dict[int, Row] = {}
    for row, group in zip(heldout, groups[len(rows) :], strict=True):
        first_heldout.setdefault(group, row)
    for row, group in zip(rows, groups, strict=False):
        asked = next((folded[prompt] for prompt in fold_turns(row) if prompt in folded), None)
        if asked is not None:
            exact.append((row, asked))
        elif group in first_heldout:
            near.append((row, first_heldout[group]))
    for level, code, found, what in (
        ("error", "leak", exact, "the same"),
        ("warning", "near_leak", near, "nearly the same"),
    ):
        if found:
            yield Finding(
                "error" if level == "error" else "warning",
                code,
                f"{count(found)} with {what} question as a row of {path}, whose result would prove nothing",
                "--fix drops them here",
                tuple(row.line for row, _ in found),
                tuple(
                    f"line {row.line} and held-out line {twin.line}: {excerpt(row.prompt_text)}"
                    for row, twin in found[:MAX_EXAMPLES]
                ),
            )
