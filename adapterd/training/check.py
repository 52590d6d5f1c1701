"""Everything that is to be known of a file of rows before anybody trains on it. No torch.

`check_rows` looks at one thing after another and says what it found; what is shown and how is check_view's.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path

from adapterd.errors import InvalidRequest
from adapterd.render import Renderer
from adapterd.training.advice import facts_beyond_rows
from adapterd.training.data import Example, encode_row, opens_thought, split_validation
from adapterd.training.duplicates import NearPair, near_groups, near_pairs
from adapterd.training.messages import message_text
from adapterd.training.patterns import find_patterns
from adapterd.training.problems import Finding, Level
from adapterd.training.rows import Row, RowFile, fold, scan_rows
from adapterd.training.shapes import (
    Labels,
    OddAnswer,
    closed_sets,
    excerpt,
    near_labels,
    odd_endings,
    odd_shapes,
)
from adapterd.training.tables import Columns

MIN_ROWS = 10
"""OpenAI's minimum, and ours: fewer rows teach nothing that a prompt could not say."""

_FEW_ROWS = 50
_ENOUGH_ROWS = 500
_MAX_EXAMPLES = 5
_MIN_ROWS_FOR_STATISTICS = 20
_MONOTONE_SHARE = 0.3
_NEAR_DUPLICATE_SHARE = 0.2
_MIN_WORDS = 100


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
    examples, unusable = _encode(file.rows, renderer, context)
    findings += unusable
    findings += _of_rendering(file.rows, examples, renderer)
    both = [*file.rows, *heldout_rows]
    pairs = list(near_pairs(both))
    findings += _of_copies(file.rows, pairs)
    if other is not None:
        findings += _of_leaks(file.rows, heldout_rows, near_groups(both, pairs), other.path)
    shapes, labels, of_answers = _of_answers(file.rows)
    findings += of_answers
    findings += _of_diversity(file.rows, pairs, labels)
    findings += _of_patterns(file.rows)
    findings += _of_facts(file.rows, heldout_rows)
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
        some = tuple(f"{other.path}:{p.line}: {p.sentence}" for p in other.problems[:_MAX_EXAMPLES])
        lines = len({problem.line for problem in other.problems})
        yield Finding("error", "heldout", f"{lines} unusable lines among the held-out rows", examples=some)
    elif not other.rows:
        yield Finding("error", "heldout", f"{other.path} holds no rows")


def _encode(
    rows: Sequence[Row], renderer: Renderer, context: int
) -> tuple[dict[int, list[Example]], list[Finding]]:
    """The examples of each row that can be rendered, by line, and findings on the others."""
    examples: dict[int, list[Example]] = {}
    refused: dict[str, list[int]] = defaultdict(list)
    too_long: dict[int, int] = {}
    for row in rows:
        try:
            examples[row.line] = encode_row(row, renderer)
        except InvalidRequest as error:
            refused[error.message].append(row.line)
            continue
        longest = max(example.num_tokens for example in examples[row.line])
        if longest > context:
            too_long[row.line] = longest
    findings = [Finding("error", "template", reason, "", tuple(lines)) for reason, lines in refused.items()]
    if too_long:
        some = tuple(f"line {line}: {n} tokens" for line, n in list(too_long.items())[:_MAX_EXAMPLES])
        findings.append(
            Finding(
                "error",
                "too_long",
                f"{_count(too_long)} with more than the {context} tokens of the context: nothing is ever cut",
                "shorten them, or leave them out: --fix here, --on-too-long drop in training",
                tuple(too_long),
                some,
            )
        )
    return examples, findings


def _of_rendering(
    rows: Sequence[Row], examples: Mapping[int, Sequence[Example]], renderer: Renderer
) -> Iterator[Finding]:
    thoughtless = [
        row.line
        for row in rows
        for index, example in zip(_trained(row), examples.get(row.line, ()), strict=False)
        if opens_thought(example.prompt_ids, renderer) and "</think>" not in message_text(row.messages[index])
    ]
    if thoughtless:
        yield Finding(
            "warning",
            "thought",
            "the base's template opens a thought before each answer, which the answers of"
            f" {_count(set(thoughtless))} never close",
            "begin the answers with </think>, or with a thought and </think>: else the answer is learnt as a thought",
            tuple(dict.fromkeys(thoughtless)),
        )
    with_tools = tuple(row.line for row in rows if row.tools)
    first = next((row for row in rows if row.tools and row.line in examples), None)
    if first is not None and not _shows_tools(first, renderer):
        yield Finding(
            "warning",
            "tools_unseen",
            "the base's template says nothing of the tools that a row lists, in training as in serving",
            "describe them in the system message, or take a base whose template knows tools",
            with_tools,
        )
    if with_tools:
        yield Finding(
            "note",
            "tools",
            f"{_count(with_tools)} with tools, rendered by the base's template",
            "adapterd's own /v1/chat/completions takes no tools yet; such an adapter also runs in vLLM",
            with_tools,
        )
    repeated = tuple(
        row.line
        for row in rows
        if any(a["role"] == b["role"] != "tool" for a, b in zip(row.messages, row.messages[1:], strict=False))
    )
    if repeated:
        yield Finding(
            "note", "order", f"{_count(repeated)} with two messages of one role in a row", "", repeated
        )


def _shows_tools(row: Row, renderer: Renderer) -> bool:
    before = row.messages[: _trained(row)[0]]
    return renderer.render(before, tools=row.tools) != renderer.render(before)


def _trained(row: Row) -> list[int]:
    return [index for index, trained in enumerate(row.trained) if trained]


def _of_copies(rows: Sequence[Row], pairs: Sequence[NearPair]) -> Iterator[Finding]:
    by_prompt: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_prompt[fold(row)].append(row)
    copies: list[int] = []
    shown: list[str] = []
    against: list[Row] = []
    for same in by_prompt.values():
        answers: dict[str, Row] = {}
        for row in same:
            first = answers.setdefault(_folded(row.answer), row)
            if first is not row:
                copies.append(row.line)
                shown.append(f"line {row.line} repeats line {first.line}")
        against += list(answers.values()) if len(answers) > 1 else []
    if copies:
        yield Finding(
            "warning",
            "duplicate",
            f"{_count(copies)} that only repeat others",
            "a copy counts twice in training and proves nothing in validation; --fix keeps the first",
            tuple(copies),
            tuple(shown[:_MAX_EXAMPLES]),
        )
    if against:
        some = tuple(
            f"line {row.line}: {excerpt(row.prompt_text)} -> {excerpt(row.answer)}" for row in against
        )
        yield Finding(
            "warning",
            "contradiction",
            f"{_count(against)} with the question of another and a different answer",
            "the model learns to toss a coin; decide which answer is right",
            tuple(row.line for row in against),
            some[:_MAX_EXAMPLES],
        )
    near = [pair for pair in pairs if pair.second < len(rows)]
    agreeing = [p for p in near if _folded(rows[p.first].answer) == _folded(rows[p.second].answer)]
    differing = [pair for pair in near if pair not in agreeing]
    for code, chosen, what in (
        ("near_duplicate", agreeing, "with the same answer"),
        ("near_contradiction", differing, "with another answer"),
    ):
        if chosen:
            yield Finding(
                "warning",
                code,
                f"{_count(chosen)} nearly like another, {what}",
                "an automatic split keeps them on one side",
                tuple(rows[pair.second].line for pair in chosen),
                tuple(
                    f"line {rows[pair.second].line} and line {rows[pair.first].line} share {pair.overlap:.0%}:"
                    f" {excerpt(rows[pair.second].prompt_text)}"
                    for pair in chosen[:_MAX_EXAMPLES]
                ),
            )


def _of_leaks(
    rows: Sequence[Row], heldout: Sequence[Row], groups: Sequence[int], path: Path
) -> Iterator[Finding]:
    """`groups`: of the training rows, then of the held-out ones."""
    exact: list[tuple[Row, Row]] = []
    near: list[tuple[Row, Row]] = []
    folded = {fold(row): row for row in heldout}
    first_heldout: dict[int, Row] = {}
    for row, group in zip(heldout, groups[len(rows) :], strict=True):
        first_heldout.setdefault(group, row)
    for row, group in zip(rows, groups, strict=False):
        if fold(row) in folded:
            exact.append((row, folded[fold(row)]))
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
                f"{_count(found)} with {what} question as a row of {path}, whose result would prove nothing",
                "--fix drops them here",
                tuple(row.line for row, _ in found),
                tuple(
                    f"line {row.line} and held-out line {twin.line}: {excerpt(row.prompt_text)}"
                    for row, twin in found[:_MAX_EXAMPLES]
                ),
            )


def _of_answers(rows: Sequence[Row]) -> tuple[dict[str, int], list[Labels], list[Finding]]:
    findings: list[Finding] = []
    edges = tuple(row.line for row in rows if row.answer != row.answer.strip())
    if edges:
        findings.append(
            Finding(
                "warning",
                "edges",
                f"{_count(edges, 'answer')} with white space at an end",
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
    if scarce and len(rows) >= _MIN_ROWS_FOR_STATISTICS:
        findings.append(
            Finding(
                "warning",
                "imbalance",
                "some labels have too few examples to be learnt",
                "write more rows for them, or fewer for the common ones",
                examples=tuple(
                    f"{one.name}: {value!r} {count} of {sum(one.counts.values())}"
                    for one, values in scarce
                    for value, count in list(values.items())[:_MAX_EXAMPLES]
                ),
            )
        )
    return shapes, labels, findings


def _odd(odd: Sequence[OddAnswer], code: str, what: str, *, noun: str = "answer") -> list[Finding]:
    if not odd:
        return []
    examples = tuple(f"line {one.line}: {one.shown} (usual: {one.wanted})" for one in odd[:_MAX_EXAMPLES])
    lines = tuple(one.line for one in odd)
    return [
        Finding(
            "warning",
            code,
            f"{_count(odd, noun)} {what}",
            "one form is learnt sooner than two",
            lines,
            examples,
        )
    ]


def _of_diversity(
    rows: Sequence[Row], pairs: Sequence[NearPair], labels: Sequence[Labels]
) -> Iterator[Finding]:
    if len(rows) < _MIN_ROWS_FOR_STATISTICS:
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
        answer, count = Counter(_folded(row.answer) for row in rows).most_common(1)[0]
        if count > _MONOTONE_SHARE * len(rows):
            yield Finding(
                "warning",
                "diversity",
                f"{count} of {len(rows)} answers are the same: {excerpt(answer)}",
                "the model learns to say just that",
            )


def _of_patterns(rows: Sequence[Row]) -> Iterator[Finding]:
    found: dict[tuple[str, str], dict[int, str]] = defaultdict(dict)
    for row in rows:
        for message in row.messages:
            for match in find_patterns(message_text(message)):
                found[match.code, match.what].setdefault(row.line, match.shown)
    hints = {
        "secret": "a model can say again what it has read; --fix drops these rows",
        "personal_data": "a model can say again what it has read; replace it by made-up data if it is real",
        "encoding": "--fix repairs wrong decoding and leaves out what cannot be seen",
    }
    for (code, what), lines in found.items():
        examples = tuple(f"line {line}: {shown}" for line, shown in list(lines.items())[:_MAX_EXAMPLES])
        level: Level = "note" if code == "personal_data" else "warning"
        yield Finding(level, code, f"{_count(lines)} with {what}", hints[code], tuple(lines), examples)


def _of_facts(rows: Sequence[Row], heldout: Sequence[Row]) -> Iterator[Finding]:
    if len(rows) < _MIN_ROWS_FOR_STATISTICS:
        return
    training: Sequence[Row] = rows
    if not heldout:
        try:
            training, heldout = split_validation(rows, fraction=0.2, seed=0)
        except InvalidRequest:
            return
    advice = facts_beyond_rows(training, heldout)
    if advice.use_retrieval:
        lines = tuple(one.line for one in advice.unknown)
        yield Finding("warning", "facts", advice.sentence, "adapterd eval measures it", lines)


def _count(things: Sized, noun: str = "row") -> str:
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())
