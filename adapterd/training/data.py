"""Rows of chat messages become tokens and a loss mask, through the renderer that serving uses.

For each assistant turn: the prompt is what the server would render for the messages before it, the answer
is its text and the token that serving stops on. So what is trained is what will be asked, token for token.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterd.errors import InvalidRequest
from adapterd.render import Renderer

_MAX_PROBLEMS_SHOWN = 20
_ROW_KEYS = frozenset({"messages", "tags"})
_MESSAGE_KEYS = frozenset({"role", "content", "weight"})
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Row:
    """One line of a JSONL file. `trained[i]` says whether message i is an answer to learn."""

    line: int
    messages: tuple[Mapping[str, str], ...]
    trained: tuple[bool, ...]
    tags: tuple[str, ...]

    @property
    def prompt(self) -> tuple[Mapping[str, str], ...]:
        """All but the last message, which is the answer."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        return self.messages[-1]["content"]


@dataclass(frozen=True)
class Example:
    """One answer to learn: loss is taken on `answer_ids`, which end with the stop token, and on nothing else."""

    line: int
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)


def read_rows(path: Path) -> list[Row]:
    """Read a JSONL file in OpenAI's chat form. Raises InvalidRequest listing each bad line and what is wrong with it.

    Content is a string or text parts; `weight: 0` leaves an assistant turn untrained; `tags` beside `messages`
    label a row for the evaluation.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}", param="data") from error
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{path} is not UTF-8: {error}", param="data") from error
    rows: list[Row] = []
    problems: list[tuple[int, str]] = []
    for line, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        try:
            rows.append(_parse_row(line, content))
        except ValueError as error:
            problems.append((line, str(error)))
    _raise_problems(path, problems)
    if not rows:
        raise InvalidRequest(f"{path} holds no rows", param="data")
    return rows


def encode_rows(rows: Sequence[Row], renderer: Renderer, *, max_length: int, path: Path) -> list[Example]:
    """One example for each trained assistant turn. Raises InvalidRequest naming the lines that cannot be learnt.

    Nothing is ever cut: a row of more than `max_length` tokens is refused.
    """
    examples: list[Example] = []
    problems: list[tuple[int, str]] = []
    for row in rows:
        try:
            examples.extend(_encode_row(row, renderer, max_length))
        except (ValueError, InvalidRequest) as error:
            problems.append((row.line, str(error)))
    _raise_problems(path, problems)
    return examples


def split_validation(rows: Sequence[Row], *, fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Training rows and validation rows. Rows that ask the same go to the same side, so that none is a copy.

    Raises InvalidRequest if there are fewer than two different prompts.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(fold(row), []).append(row)
    if len(groups) < 2:
        raise InvalidRequest(
            "the rows hold fewer than two different prompts, so none can be kept for validation"
        )
    shuffled = list(groups.values())
    random.Random(seed).shuffle(shuffled)
    wanted = max(1, round(len(rows) * fraction))
    training: list[Row] = []
    validation: list[Row] = []
    for index, group in enumerate(shuffled):
        is_last_chance = not training and index == len(shuffled) - 1
        (validation if len(validation) < wanted and not is_last_chance else training).extend(group)
    return sorted(training, key=lambda row: row.line), sorted(validation, key=lambda row: row.line)


def refuse_leaks(rows: Sequence[Row], heldout: Sequence[Row], *, path: Path) -> None:
    """Raises InvalidRequest if a held-out prompt is also trained on: its result would prove nothing."""
    trained = {fold(row): row.line for row in rows}
    problems = [
        (row.line, f"the same prompt is trained on, in line {trained[fold(row)]} of the training rows")
        for row in heldout
        if fold(row) in trained
    ]
    _raise_problems(path, problems)


def fold(row: Row) -> str:
    """A prompt without its case and spacing: what counts as the same question."""
    return "\n".join(" ".join(message["content"].casefold().split()) for message in row.prompt)


def _parse_row(line: int, content: str) -> Row:
    try:
        row = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("messages"), list):
        raise ValueError("no object with a list 'messages'")
    unknown = sorted(set(row) - _ROW_KEYS)
    if unknown:
        raise ValueError(f"{unknown[0]!r} is not supported; a row has {' and '.join(sorted(_ROW_KEYS))}")
    tags = row.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise ValueError("'tags' is no list of strings")
    messages = [_parse_message(index, message) for index, message in enumerate(row["messages"])]
    roles = [message["role"] for message in messages]
    if not roles or roles[-1] != "assistant":
        raise ValueError("the last message is not the assistant's, so there is nothing to learn")
    turns = roles[1:] if roles[0] == "system" else roles
    for index, role in enumerate(turns):
        if role != ("user", "assistant")[index % 2]:
            raise ValueError(f"roles do not alternate: {', '.join(roles)}")
    trained = [
        role == "assistant" and message.get("weight", 1) != 0
        for role, message in zip(roles, row["messages"], strict=True)
    ]
    if not any(trained):
        raise ValueError("every assistant message has weight 0, so there is nothing to learn")
    return Row(line, tuple(messages), tuple(trained), tuple(tags))


def _parse_message(index: int, message: Any) -> dict[str, str]:
    if not isinstance(message, dict):
        raise ValueError(f"message {index} is no object")
    unknown = sorted(set(message) - _MESSAGE_KEYS)
    if unknown:
        raise ValueError(f"message {index}: {unknown[0]!r} is not supported")
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES:
        raise ValueError(f"message {index}: role {role!r} is none of {', '.join(_ROLES)}")
    if "weight" in message and (role != "assistant" or message["weight"] not in (0, 1)):
        raise ValueError(f"message {index}: 'weight' is 0 or 1, on assistant messages")
    if isinstance(content, list):
        content = "".join(_text_part(index, part) for part in content)
    if not isinstance(content, str) or not content.strip():
        raise ValueError(f"message {index}: content is empty or no text")
    return {"role": role, "content": content}


def _text_part(index: int, part: Any) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise ValueError(f"message {index}: content holds a part that is no text")
    return str(part["text"])


def _encode_row(row: Row, renderer: Renderer, max_length: int) -> list[Example]:
    examples = []
    for index, trained in enumerate(row.trained):
        if not trained:
            continue
        answer = [*renderer.encode_answer(row.messages[index]["content"]), renderer.stop_token_id]
        example = Example(row.line, tuple(renderer.render(row.messages[:index])), tuple(answer))
        if example.num_tokens > max_length:
            raise ValueError(
                f"{example.num_tokens} tokens are more than the {max_length} allowed; nothing is cut"
            )
        examples.append(example)
    return examples


def _raise_problems(path: Path, problems: Sequence[tuple[int, str]]) -> None:
    if not problems:
        return
    lines = [f"{path}:{line}: {problem}" for line, problem in problems[:_MAX_PROBLEMS_SHOWN]]
    if len(problems) > len(lines):
        lines.append(f"... and {len(problems) - len(lines)} more lines")
    raise InvalidRequest("\n".join(lines), param="data")
