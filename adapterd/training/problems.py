"""What is wrong with a row, and how to put it right."""

from collections.abc import Sized
from dataclasses import dataclass, field
from typing import Literal

MIN_ROWS = 10
"""OpenAI's minimum, and ours: fewer rows teach nothing that a prompt could not say."""

MIN_ROWS_FOR_STATISTICS = 20
MAX_EXAMPLES = 5


@dataclass(frozen=True)
class Problem:
    """One thing that keeps the row of `line` from being used. `code` is for programs, `hint` may be empty."""

    line: int
    code: str
    message: str
    hint: str = ""

    @property
    def sentence(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


@dataclass
class Problems:
    """Collects what is wrong with one row while it is read."""

    line: int
    found: list[Problem] = field(default_factory=list)

    def add(self, code: str, message: str, hint: str = "") -> None:
        self.found.append(Problem(self.line, code, message, hint))


Level = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """Something to know about a file. An error makes it unusable as it is; `lines` are the rows it is about."""

    level: Level
    code: str
    message: str
    hint: str = ""
    lines: tuple[int, ...] = ()
    examples: tuple[str, ...] = ()
    """What was found, a line each, for some of `lines`."""


def count(things: Sized, noun: str = "row") -> str:
    """As in `3 rows`, `1 row`."""
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"
