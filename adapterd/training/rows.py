"""Training rows: what a file of examples holds, and everything that is wrong with it, line by line.

Three forms become one: OpenAI's chat rows, prompt and completion, and CSV. Plain Python: no tokenizer, no torch.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapterd.errors import InvalidRequest
from adapterd.training.messages import message_text, parse_chat, parse_pair
from adapterd.training.problems import Problem, Problems
from adapterd.training.tables import Columns, Line, is_table, table_lines

_MAX_PROBLEMS_SHOWN = 20
_FOREIGN_FORMS: tuple[tuple[frozenset[str], str], ...] = (
    (frozenset({"conversations"}), "this is ShareGPT's form; write messages with role and content"),
    (
        frozenset({"instruction", "output"}),
        "this is Alpaca's form; say --map prompt=instruction completion=output",
    ),
    (frozenset({"preferred_output"}), "preference rows (DPO) are not trained on yet"),
    (frozenset({"chosen"}), "preference rows (DPO) are not trained on yet"),
    (
        frozenset({"text"}),
        "bare text does not say which part is the answer; write messages, or prompt and completion",
    ),
)


@dataclass(frozen=True)
class Row:
    """One example. `messages` are as chat templates read them; `trained[i]` says whether i is an answer to learn.

    line: where it stands in its file. tags: labels for the evaluation. tools: what the model may call.
    """

    line: int
    messages: tuple[Mapping[str, Any], ...]
    trained: tuple[bool, ...]
    tags: tuple[str, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()

    @property
    def prompt(self) -> tuple[Mapping[str, Any], ...]:
        """All but the last message, which is the answer."""
        return self.messages[:-1]

    @property
    def prompt_text(self) -> str:
        """What is said before the answer, without roles; calls of tools as JSON."""
        return "\n".join(message_text(message) for message in self.prompt)

    @property
    def answer(self) -> str:
        """The words of the last message, and its calls of tools as JSON, a line each."""
        return message_text(self.messages[-1])


@dataclass
class RowFile:
    """What `scan_rows` found.

    source: a row's text in the file, by line. unused: keys or columns that nobody reads.
    had_mark: the file opened with a byte order mark, which was left out.
    """

    path: Path
    rows: list[Row] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    source: dict[int, str] = field(default_factory=dict)
    unused: set[str] = field(default_factory=set)
    had_mark: bool = False


def fold(row: Row) -> str:
    """A prompt without its case and spacing: what counts as the same question."""
    return fold_turns(row)[-1]


def fold_turns(row: Row) -> list[str]:
    """Every prompt of a row, folded: what stands before each trained turn, and before the last one, in order.

    A row of several turns teaches the answer to each of them, so whoever asks what is trained on asks all of these.
    """
    texts = [" ".join(message_text(message).casefold().split()) for message in row.prompt]
    turns = [index for index, trained in enumerate(row.trained[:-1]) if trained]
    return ["\n".join(texts[:turn]) for turn in (*turns, len(texts))]


def read_rows(path: Path, *, columns: Columns | None = None) -> list[Row]:
    """The rows of a file. Raises InvalidRequest listing each bad line and what is wrong with it.

    JSONL of chat messages (OpenAI's form; `weight: 0` leaves an assistant turn untrained, `tags` beside
    `messages` label a row for the evaluation) or of prompt and completion; CSV where the file's name ends so.
    `columns` names the keys or columns where they are called something else.
    """
    file = scan_rows(path, columns=columns)
    raise_problems(path, [(problem.line, problem.sentence) for problem in file.problems])
    if not file.rows:
        raise InvalidRequest(f"{path} holds no rows", param="data")
    return file.rows


def scan_rows(path: Path, *, columns: Columns | None = None) -> RowFile:
    """The good rows and every problem of the others. Raises InvalidRequest for a file that is no text at all."""
    text, had_mark = _read_text(path)
    file = RowFile(path, had_mark=had_mark)
    lines = table_lines(path, text, columns) if is_table(path) else _json_lines(text)
    for line in lines:
        file.source[line.number] = line.source
        row = None if line.value is None else _parse_row(line, columns, file.unused, is_csv=is_table(path))
        if row is not None and not line.problems.found:
            file.rows.append(row)
        file.problems += line.problems.found
    return file


def raise_problems(path: Path, problems: Sequence[tuple[int, str]]) -> None:
    """Raises InvalidRequest with a line for each (line, problem), the first twenty of them; or does nothing."""
    if not problems:
        return
    lines = [f"{path}:{line}: {problem}" for line, problem in problems[:_MAX_PROBLEMS_SHOWN]]
    if len(problems) > len(lines):
        lines.append(f"... and {len(problems) - len(lines)} more lines")
    raise InvalidRequest("\n".join(lines), param="data")


def _parse_row(line: Line, columns: Columns | None, unused: set[str], *, is_csv: bool) -> Row | None:
    value, problems = line.value, line.problems
    assert value is not None
    names = columns or Columns()
    if "messages" in value:
        parsed = parse_chat(value, problems)
    elif names.prompt in value or names.completion in value:
        others = set(value) - {names.prompt, names.completion, names.system}
        if is_csv or columns is not None:
            unused |= others
            value = {key: text for key, text in value.items() if key not in others}
        parsed = parse_pair(value, names, problems)
    else:
        keys = ", ".join(map(repr, list(value)[:5])) or "no key"
        hint = next((hint for form, hint in _FOREIGN_FORMS if form <= set(value)), "")
        problems.add("form", f"neither 'messages' nor 'prompt' and 'completion': the row has {keys}", hint)
        return None
    if parsed is None:
        return None
    return Row(line.number, parsed.messages, parsed.trained, parsed.tags, parsed.tools)


def _read_text(path: Path) -> tuple[str, bool]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}", param="data") from error
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InvalidRequest(f"{path} is UTF-16; save it as UTF-8", param="data")
    had_mark = data.startswith(b"\xef\xbb\xbf")
    try:
        return data.decode("utf-8-sig"), had_mark
    except UnicodeDecodeError as error:
        byte = data[error.start + 3 * had_mark] if error.start + 3 * had_mark < len(data) else 0
        line = data.count(b"\n", 0, error.start) + 1
        raise InvalidRequest(
            f"{path}:{line}: the file is not UTF-8 (byte {byte:#04x});"
            " if it comes from a spreadsheet, save it as CSV UTF-8",
            param="data",
        ) from error


def _json_lines(text: str) -> Iterator[Line]:
    # Only a line feed ends a line: U+2028 and its like may stand inside a JSON string.
    for number, source in enumerate(text.split("\n"), 1):
        if not source.strip():
            continue
        problems, value, reason = Problems(number), None, ""
        try:
            value = json.loads(source, object_pairs_hook=_without_repeats, parse_constant=_no_constant)
            if not isinstance(value, dict):
                reason = f"it is {_kind(value)}"
        except json.JSONDecodeError as error:
            reason = f"no JSON: {error.msg} at character {error.pos + 1}"
        except (ValueError, RecursionError) as error:
            reason = f"no JSON: {error}"
        if reason:
            # OpenAI's words for it, so that who knows them from there knows them here.
            problems.add(
                "json",
                "Expected file to have JSONL format, where every line is a JSON dictionary."
                f" Line {number} is not a dictionary"
                f' (HINT: line starts with: {json.dumps(source.strip()[:20], ensure_ascii=False)[:-1]}..."):'
                f" {reason}",
                _json_hint(number, source.strip()),
            )
        yield Line(number, source, value if not reason else None, problems)


def _json_hint(number: int, start: str) -> str:
    if number == 1 and start.startswith("["):
        return "one array is no JSONL; write an object a line: jq -c '.[]' FILE"
    if start in ("{", "[") or start.startswith(('"messages"', "}", "]")):
        return "an object stands on one line, without line breaks: jq -c . FILE"
    if start.startswith("{'"):
        return "this is Python's spelling; write rows with json.dumps"
    return ""


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} stands twice in one object")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _kind(value: object) -> str:
    names: dict[type, str] = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
