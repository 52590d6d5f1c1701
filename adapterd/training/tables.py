"""CSV and TSV as lines of key and text, and which key holds what."""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterd.errors import ConfigError, InvalidRequest
from adapterd.training.problems import Problems

_SUFFIXES = (".csv", ".tsv")
_QUOTE = "quote fields that hold the delimiter, a quote or a line break"


@dataclass(frozen=True)
class Columns:
    """The keys of a row, or columns of a table, that hold its texts. `system` may be missing from the rows."""

    prompt: str = "prompt"
    completion: str = "completion"
    system: str = "system"


@dataclass(frozen=True)
class Line:
    """A row before it is understood: `value` is None where it could not even be read, and `problems` says why."""

    number: int
    source: str
    value: dict[str, Any] | None
    problems: Problems


def parse_columns(pairs: Sequence[str]) -> Columns | None:
    """`prompt=question completion=reply` as Columns; None for none. Raises ConfigError for anything else."""
    given: dict[str, str] = {}
    for pair in pairs:
        role, equals, column = pair.partition("=")
        if not equals or not column or role not in ("prompt", "completion", "system") or role in given:
            raise ConfigError(
                f"--map: {pair!r} is not one of prompt=COLUMN, completion=COLUMN and system=COLUMN",
                param="map",
            )
        given[role] = column
    return Columns(**given) if given else None


def is_table(path: Path) -> bool:
    return path.suffix.lower() in _SUFFIXES


def table_lines(path: Path, text: str, columns: Columns | None) -> Iterator[Line]:
    """Every record by the line it begins on; a field may hold line breaks. Raises InvalidRequest for a wrong header."""
    header_line = text.partition("\n")[0]
    delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=header_line.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    source = text.split("\n")
    begins = 1
    try:
        header = next(reader, [])
        _check_header(path, header, columns)
        while True:
            begins = reader.line_num + 1
            record = next(reader, None)
            if record is None:
                return
            if not record:
                continue
            problems = Problems(begins)
            lines = "\n".join(source[begins - 1 : reader.line_num]).rstrip("\r")
            if len(record) != len(header):
                problems.add("csv", f"{len(record)} fields where the header has {len(header)}", _QUOTE)
                yield Line(begins, lines, None, problems)
            else:
                yield Line(begins, lines, dict(zip(header, record, strict=True)), problems)
    except csv.Error as error:
        problems = Problems(begins)
        problems.add("csv", f"no CSV from here on: {error}", _QUOTE)
        yield Line(begins, "\n".join(source[begins - 1 :]), None, problems)


def _check_header(path: Path, header: Sequence[str], columns: Columns | None) -> None:
    repeated = [name for name in header if list(header).count(name) > 1]
    if repeated:
        raise InvalidRequest(f"{path}:1: the column {repeated[0]!r} stands twice in the header", param="data")
    names = columns or Columns()
    wanted = [names.prompt, names.completion]
    if names.system != Columns.system:
        wanted.append(names.system)
    missing = [name for name in wanted if name not in header]
    if missing:
        raise InvalidRequest(
            f"{path}:1: no column {missing[0]!r}; the header has {', '.join(map(repr, header)) or 'none'}"
            " (name them: --map prompt=COLUMN completion=COLUMN)",
            param="map",
        )
