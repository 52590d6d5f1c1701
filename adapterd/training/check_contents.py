"""What the texts hold that a model should not learn: secrets, personal data, damage, and facts."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

from adapterd.errors import InvalidRequest
from adapterd.training.advice import facts_beyond_rows
from adapterd.training.data import split_validation
from adapterd.training.messages import message_text
from adapterd.training.patterns import find_patterns
from adapterd.training.problems import MAX_EXAMPLES, MIN_ROWS_FOR_STATISTICS, Finding, Level, count
from adapterd.training.rows import Row


def pattern_findings(rows: Sequence[Row]) -> Iterator[Finding]:
    """Secrets, personal data and damaged encodings, by pattern."""
    found: dict[tuple[str, str, bool], dict[int, str]] = defaultdict(dict)
    for row in rows:
        for message in row.messages:
            for match in find_patterns(message_text(message)):
                found[match.code, match.what, match.is_mended].setdefault(row.line, match.shown)
    hints = {
        "secret": "a model can say again what it has read; --fix drops these rows",
        "personal_data": "a model can say again what it has read; replace it by made-up data if it is real",
        "encoding": "--fix leaves it: what was meant is to be had from where the text came from",
    }
    for (code, what, is_mended), lines in found.items():
        examples = tuple(f"line {line}: {shown}" for line, shown in list(lines.items())[:MAX_EXAMPLES])
        hint = "--fix mends it" if is_mended else hints[code]
        level: Level = "note" if code == "personal_data" else "warning"
        yield Finding(level, code, f"{count(lines)} with {what}", hint, tuple(lines), examples)


def fact_findings(rows: Sequence[Row], heldout: Sequence[Row]) -> Iterator[Finding]:
    """Held-out answers that neither prompts nor other answers hold; without held-out rows, of a split."""
    if len(rows) < MIN_ROWS_FOR_STATISTICS:
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
