"""A cleaned copy of a file of rows, and the list of what was left out. The file itself is never touched."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterd.errors import ConfigError
from adapterd.training.patterns import repair_text
from adapterd.training.rows import Row, scan_rows
from adapterd.training.tables import Columns

DROPPED_SUFFIX = ".dropped.jsonl"


@dataclass(frozen=True)
class Fixed:
    """What `write_fixed` did. `dropped` is where the rows that were left out are listed, with their reasons."""

    path: Path
    dropped: Path
    num_kept: int
    num_repaired: int
    num_dropped: int


def write_fixed(path: Path, out: Path, *, drops: Mapping[int, str], columns: Columns | None = None) -> Fixed:
    """Write the rows of `path` that are not in `drops` to `out`, as OpenAI's chat rows, their text repaired.

    drops: a reason for each line to leave out. Both files appear whole or not at all.
    Raises ConfigError if `out` is the file itself or cannot be written.
    """
    if out.resolve() == path.resolve():
        raise ConfigError(
            f"--fix {out} is the file itself; name another, so that nothing is lost", param="fix"
        )
    file = scan_rows(path, columns=columns)
    kept, repaired = [], 0
    for row in file.rows:
        if row.line not in drops:
            plain = as_openai_row(row)
            fixed = _repaired(plain)
            repaired += fixed != plain
            kept.append(json.dumps(fixed, ensure_ascii=False))
    dropped = [
        json.dumps({"line": line, "reason": reason, "row": file.source.get(line, "")}, ensure_ascii=False)
        for line, reason in sorted(drops.items())
    ]
    list_path = out.with_name(out.name + DROPPED_SUFFIX)
    _write(list_path, dropped)
    _write(out, kept)
    return Fixed(out, list_path, len(kept), repaired, len(dropped))


def as_openai_row(row: Row) -> dict[str, Any]:
    """A row as OpenAI's fine-tuning API takes it; `tags` stays ours."""
    messages = []
    for message, trained in zip(row.messages, row.trained, strict=True):
        plain = dict(message)
        if "tool_calls" in plain:
            plain["tool_calls"] = [
                {
                    **call,
                    "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])},
                }
                for call in plain["tool_calls"]
            ]
        if plain["role"] == "assistant" and not trained:
            plain["weight"] = 0
        messages.append(plain)
    whole: dict[str, Any] = {"messages": messages}
    if row.tools:
        whole["tools"] = list(row.tools)
    if row.tags:
        whole["tags"] = list(row.tags)
    return whole


def _repaired(row: dict[str, Any]) -> dict[str, Any]:
    """The same row with its messages' words repaired, those that the repair would empty left as they are."""
    messages = []
    for message in row["messages"]:
        words = message["content"]
        fixed = repair_text(words) if words else words
        messages.append({**message, "content": fixed or words})
    return {**row, "messages": messages}


def _write(path: Path, lines: list[str]) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ConfigError(f"--fix: {path} cannot be written: {error.strerror}", param="fix") from None
