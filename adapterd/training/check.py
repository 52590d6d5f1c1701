"""Everything that is to be known of a file of rows before anybody trains on it. No torch.

`check_rows` looks at one thing after another and says what it found; what is shown and how is check_view's.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from adapterd.render import Renderer
from adapterd.training.check_answers import answer_findings, diversity_findings
from adapterd.training.check_contents import fact_findings, pattern_findings
from adapterd.training.check_copies import copy_findings, leak_findings
from adapterd.training.check_rendering import encode_all, rendering_findings
from adapterd.training.duplicates import near_groups, near_pairs
from adapterd.training.problems import MAX_EXAMPLES, MIN_ROWS, Finding, Level
from adapterd.training.rows import RowFile, scan_rows
from adapterd.training.shapes import Labels
from adapterd.training.tables import Columns

_FEW_ROWS = 50
_ENOUGH_ROWS = 500


@dataclass(frozen=True)
class Lengths:
    """Tokens. `rows`: of every row that can be rendered, its longest example. `trained`: those with loss."""

    rows: tuple[int, ...]
    total: int
    trained: int


@dataclass(frozen=True)
class Report:
    """What was found. `drops` says, by line, why `--fix` leaves a row out."""

    path: Path
    num_rows: int
    num_bad_rows: int
    base: str
    context: int
    lengths: Lengths
    labels: tuple[Labels, ...]
    shapes: Mapping[str, int]
    findings: tuple[Finding, ...]
    drops: Mapping[int, str]

    @property
    def is_usable(self) -> bool:
        return not self.of("error")

    def of(self, level: Level) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == level]


def check_rows(
    path: Path,
    renderer: Renderer,
    *,
    base: str,
    context: int,
    columns: Columns | None = None,
    heldout: Path | None = None,
) -> Report:
    """Look at every row. `context`: tokens that a row may have; longer ones are errors.

    Raises InvalidRequest only for a file that cannot be read as text at all.
    """
    file = scan_rows(path, columns=columns)
    other = scan_rows(heldout, columns=columns) if heldout is not None else None
    heldout_rows = other.rows if other is not None else []
    findings = [*_of_file(file), *_of_size(file)]
    if other is not None:
        findings += _of_heldout_file(other)
    examples, unusable = encode_all(file.rows, renderer, context)
    findings += unusable
    findings += rendering_findings(file.rows, examples, renderer)
    both = [*file.rows, *heldout_rows]
    pairs = list(near_pairs(both))
    findings += copy_findings(file.rows, pairs)
    if other is not None:
        findings += leak_findings(file.rows, heldout_rows, near_groups(both, pairs), other.path)
    shapes, labels, of_their_kind = answer_findings(file.rows)
    findings += of_their_kind
    findings += diversity_findings(file.rows, pairs, labels)
    findings += pattern_findings(file.rows)
    findings += fact_findings(file.rows, heldout_rows)
    longest = {
        row.line: max(e.num_tokens for e in examples[row.line]) for row in file.rows if row.line in examples
    }
    flat = [example for own in examples.values() for example in own]
    return Report(
        path=path,
        num_rows=len(file.rows),
        num_bad_rows=len({problem.line for problem in file.problems}),
        base=base,
        context=context,
        lengths=Lengths(
            rows=tuple(longest.values()),
            total=sum(example.num_tokens for example in flat),
            trained=sum(len(example.answer_ids) for example in flat),
        ),
        labels=tuple(labels),
        shapes=shapes,
        findings=tuple(findings),
        drops=_drops(findings),
    )


_DROPPED: Mapping[str, str] = {
    "template": "the base's template refuses it",
    "too_long": "it is longer than the context",
    "duplicate": "a copy of an earlier row",
    "near_duplicate": "nearly a copy of an earlier row, with the same answer",
    "leak": "a held-out row asks the same",
    "near_leak": "a held-out row asks nearly the same",
    "secret": "it holds a secret",
}


def _drops(findings: Sequence[Finding]) -> dict[int, str]:
    drops: dict[int, str] = {}
    for finding in findings:
        if finding.code in _DROPPED or (finding.level == "error" and finding.code.startswith("row_")):
            for line in finding.lines:
                drops.setdefault(line, _DROPPED.get(finding.code, finding.message))
    return drops


def _of_file(file: RowFile) -> Iterator[Finding]:
    grouped: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for problem in file.problems:
        grouped[problem.code, problem.message, problem.hint].append(problem.line)
    for (code, message, hint), lines in grouped.items():
        yield Finding("error", f"row_{code}", message, hint, tuple(lines))
    if file.had_mark:
        yield Finding("note", "byte_order_mark", "the file opens with a byte order mark, which is left out")
    if file.unused:
        names = ", ".join(map(repr, sorted(file.unused)))
        yield Finding("note", "unused", f"columns that nobody reads: {names}")


def _of_size(file: RowFile) -> Iterator[Finding]:
    count = len(file.rows)
    if count < MIN_ROWS:
        yield Finding(
            "error",
            "too_few",
            f"{count} usable rows; at least {MIN_ROWS} are needed",
            "below that, put the examples into the prompt instead",
        )
    elif count < _FEW_ROWS:
        yield Finding(
            "warning",
            "few",
            f"{count} usable rows; improvements are seen from {_FEW_ROWS} to 100 on",
            "compare with a better prompt first: adapterd eval does",
        )
    elif count < _ENOUGH_ROWS:
        yield Finding(
            "note",
            "few",
            f"{count} usable rows: enough for one format or tone; {_ENOUGH_ROWS} and more for harder tasks",
        )


def _of_heldout_file(other: RowFile) -> Iterator[Finding]:
    if other.problems:
        some = tuple(f"{other.path}:{p.line}: {p.sentence}" for p in other.problems[:MAX_EXAMPLES])
        lines = len({problem.line for problem in other.problems})
        yield Finding("error", "heldout", f"{lines} unusable lines among the held-out rows", examples=some)
    elif not other.rows:
        yield Finding("error", "heldout", f"{other.path} holds no rows")
