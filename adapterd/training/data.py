"""Rows become tokens and a loss mask, through the renderer that serving uses; and which rows are held back.

For each assistant turn: the prompt is what the server would render for the messages before it, the answer
is its words and the token that serving stops on. So what is trained is what will be asked, token for token.
"""

import hashlib
import json
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from adapterd.errors import InvalidRequest
from adapterd.render import Renderer
from adapterd.training.duplicates import near_groups, near_pairs
from adapterd.training.rows import Row, fold, fold_turns, raise_problems, read_rows

__all__ = [
    "Example",
    "OnTooLong",
    "Row",
    "dropped_rows",
    "encode_row",
    "encode_rows",
    "fold",
    "fold_turns",
    "lines_sha256",
    "read_rows",
    "refuse_leaks",
    "split_validation",
]

_logger = logging.getLogger(__name__)

OnTooLong = Literal["error", "drop"]
_MAX_LINES_SHOWN = 20
_OPEN_THOUGHT = "<think>"


@dataclass(frozen=True)
class Example:
    """One answer to learn: loss is taken on `answer_ids`, which end with the stop token, and on nothing else."""

    line: int
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)


def encode_rows(
    rows: Sequence[Row],
    renderer: Renderer,
    *,
    max_length: int,
    path: Path,
    on_too_long: OnTooLong = "error",
) -> list[Example]:
    """One example for each trained assistant turn. Raises InvalidRequest naming the lines that cannot be learnt.

    Nothing is ever cut. A row of which any answer needs more than `max_length` tokens is refused, or with
    `on_too_long="drop"` left out whole and logged (`dropped_rows` says which); all of them cannot be left out.
    """
    examples: list[Example] = []
    problems: list[tuple[int, str]] = []
    dropped: list[int] = []
    for row in rows:
        try:
            own = encode_row(row, renderer)
        except InvalidRequest as error:
            problems.append((row.line, error.message))
            continue
        longest = max(example.num_tokens for example in own)
        if longest <= max_length:
            examples += own
        elif on_too_long == "drop":
            dropped.append(row.line)
        else:
            problems.append(
                (row.line, f"{longest} tokens are more than the {max_length} allowed; nothing is cut")
            )
    raise_problems(path, problems)
    if dropped and not examples:
        raise InvalidRequest(f"{path}: every row is longer than {max_length} tokens", param="data")
    if dropped:
        shown = ", ".join(map(str, dropped[:_MAX_LINES_SHOWN]))
        more = f" and {len(dropped) - _MAX_LINES_SHOWN} more" if len(dropped) > _MAX_LINES_SHOWN else ""
        _logger.warning(
            "%s: %d of %d rows need more than %d tokens and are left out: lines %s%s",
            *(path, len(dropped), len(rows), max_length, shown, more),
        )
    return examples


def dropped_rows(rows: Sequence[Row], examples: Sequence[Example]) -> list[int]:
    """The lines of the rows that `encode_rows` left out."""
    kept = {example.line for example in examples}
    return [row.line for row in rows if row.line not in kept]


def encode_row(row: Row, renderer: Renderer) -> list[Example]:
    """An example for each trained turn of one row, in order, whatever its length.

    Raises InvalidRequest if the base's template refuses the messages.
    """
    tools = row.tools or None
    examples = []
    for index, trained in enumerate(row.trained):
        if not trained:
            continue
        prompt = renderer.render(row.messages[:index], tools=tools)
        if row.messages[index].get("tool_calls"):
            answer = renderer.encode_calls(row.messages[: index + 1], tools=tools)
        else:
            words = _after_prompt(row.messages[index], prompt, renderer)
            answer = [*renderer.encode_answer(words), renderer.stop_token_id]
        examples.append(Example(row.line, tuple(prompt), tuple(answer)))
    return examples


def opens_thought(prompt: Sequence[int], renderer: Renderer) -> bool:
    """Whether the generation prompt has already begun a thought, as reasoning models' templates do."""
    return renderer.decode(prompt[-8:], skip_special_tokens=False).rstrip().endswith(_OPEN_THOUGHT)


def _after_prompt(message: Any, prompt: Sequence[int], renderer: Renderer) -> str:
    """The answer's words; without the opening of a thought where the prompt already ends with one."""
    words: str = message["content"]
    if words.lstrip().startswith(_OPEN_THOUGHT) and opens_thought(prompt, renderer):
        tail = renderer.decode(prompt[-8:], skip_special_tokens=False).rpartition(_OPEN_THOUGHT)[2]
        return words.lstrip().removeprefix(_OPEN_THOUGHT).removeprefix(tail)
    return words


def split_validation(rows: Sequence[Row], *, fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Training rows and validation rows: the same for the same rows and seed.

    Rows that ask the same, or nearly the same, go to one side together, so that none is a copy of a trained one;
    and rows that share a trained turn, unless that ties too many conversations together. Raises InvalidRequest if
    there are fewer than two different prompts.
    """
    if len({fold(row) for row in rows}) < 2:
        raise InvalidRequest(
            "the rows hold fewer than two different prompts, so none can be kept for validation"
        )
    wanted = max(1, round(len(rows) * fraction))
    pairs = list(near_pairs(rows))
    by_turn, by_prompt = near_groups(rows, pairs, every_turn=True), near_groups(rows, pairs)
    validation = _hold_back(_grouped(rows, by_turn), wanted, seed)
    if by_turn != by_prompt and len(validation) < wanted / 2:
        _logger.warning(
            "too many conversations share a turn (a greeting?) to keep those on one side; rows with the same last"
            " prompt are kept together. weight 0 leaves a turn untrained"
        )
        validation = _hold_back(_grouped(rows, by_prompt), wanted, seed)
    if not validation:
        _logger.warning(
            "all %d prompts are near-duplicates of one another; only equal ones are kept together", len(rows)
        )
        validation = _hold_back(_grouped(rows, [fold(row) for row in rows]), wanted, seed)
    held_back = {id(row) for row in validation}
    training = [row for row in rows if id(row) not in held_back]
    return sorted(training, key=lambda row: row.line), sorted(validation, key=lambda row: row.line)


def lines_sha256(rows: Sequence[Row]) -> str:
    """Which rows of a file these are: a hash of their lines, by which a split is known again."""
    return hashlib.sha256(json.dumps([row.line for row in rows]).encode()).hexdigest()


def _grouped(rows: Sequence[Row], keys: Sequence[object]) -> list[list[Row]]:
    groups: dict[object, list[Row]] = {}
    for row, key in zip(rows, keys, strict=True):
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def _hold_back(groups: list[list[Row]], wanted: int, seed: int) -> list[Row]:
    """The rows of some groups, about as many as wanted; none of a single group, else at least one and never all."""
    if len(groups) < 2:
        return []
    random.Random(seed).shuffle(groups)
    chosen: list[list[Row]] = []
    held = 0
    for group in groups:
        # A large group of copies must not swallow the training side.
        if held < wanted and held + len(group) <= max(wanted * 1.25, 1):
            chosen.append(group)
            held += len(group)
    if not chosen:
        chosen = [min(groups, key=len)]
    if len(chosen) == len(groups):
        chosen.pop()
    return [row for group in chosen for row in group]


def refuse_leaks(
    rows: Sequence[Row],
    heldout: Sequence[Row],
    *,
    path: Path,
    use: str = "trained on",
    among: str = "the training rows",
) -> None:
    """Raises InvalidRequest if what a held-out row asks last is asked in any turn of `rows`: it would prove nothing.

    use, among: what is done with `rows`, and what they are, for the message.
    """
    used = {prompt: row.line for row in rows for prompt in fold_turns(row)}
    raise_problems(
        path,
        [
            (row.line, f"the same prompt is {use}, in line {used[fold(row)]} of {among}")
            for row in heldout
            if fold(row) in used
        ],
    )
