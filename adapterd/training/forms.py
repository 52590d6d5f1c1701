"""What answers are by their looks: lines of `Key: value`, one label of a few, or free text."""

import re
from collections import Counter
from collections.abc import Sequence

FIELD = re.compile(r"([A-Za-z][A-Za-z0-9 _-]{0,30}):[ \t]*(.*)")
"""A line of `Key: value`: the key, the value."""

_MAX_LABELS = 20
_MAX_LABEL_WORDS = 3
_REPEATED_BY_MOST = 0.8


def find_labels(references: Sequence[str]) -> frozenset[str]:
    """The labels of a labelling task: if most references are one of a few short phrases, those phrases."""
    counts = Counter(squeeze(reference) for reference in references if parse_fields(reference) is None)
    short = {text: n for text, n in counts.items() if len(text.split()) <= _MAX_LABEL_WORDS}
    repeated = sum(n for n in short.values() if n > 1)
    if len(short) > _MAX_LABELS or repeated < _REPEATED_BY_MOST * sum(counts.values()):
        return frozenset()
    return frozenset(short)


def parse_fields(text: str) -> dict[str, str] | None:
    """`Key: value` lines in their order; None if a line is none, a key repeats, or there is only one."""
    lines = [line for line in text.strip().split("\n") if line.strip()]
    fields: dict[str, str] = {}
    for line in lines:
        match = FIELD.fullmatch(line.strip())
        if match is None or match[1] in fields:
            return None
        fields[match[1]] = squeeze(match[2])
    return fields if len(fields) > 1 else None


def squeeze(text: str) -> str:
    return " ".join(text.split())
