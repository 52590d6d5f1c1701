"""What is compared: the base, the base with a better prompt, the adapter, other models. And what each is asked."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from adapterd.composition import ResolvedModel
from adapterd.evaluation.scoring import Task, kind_of
from adapterd.training.data import Row, fold, fold_turns
from adapterd.training.forms import squeeze

ArmKind = Literal["base", "prompted", "adapter", "peer"]
Messages = tuple[Mapping[str, Any], ...]

_SHOTS_SEED = 0
_INSTRUCTIONS = ("system", "developer")


@dataclass(frozen=True)
class Prompting:
    """What is put before a row's own messages: a system message and solved examples. Both may be empty."""

    system: str | None = None
    shots: tuple[Row, ...] = ()

    def messages(self, row: Row) -> Messages:
        """The row's prompt with all that goes before it. A system message of the row's own comes after ours."""
        own = [message["content"] for message in row.prompt if message["role"] in _INSTRUCTIONS]
        system = "\n".join(part for part in (self.system, *own) if part)
        turns = [m for shot in self.shots for m in shot.messages if m["role"] not in _INSTRUCTIONS]
        turns += [message for message in row.prompt if message["role"] not in _INSTRUCTIONS]
        return ({"role": "system", "content": system}, *turns) if system else tuple(turns)


@dataclass(frozen=True)
class Arm:
    """One column of the report. `model` is None for another server's model."""

    key: str
    title: str
    kind: ArmKind
    prompting: Prompting
    model: ResolvedModel | None


def prompted_arms(
    base: ResolvedModel, *, system: str | None, shots: Sequence[Row], fit: Callable[[Prompting], bool]
) -> tuple[list[Arm], list[str]]:
    """The base with the system message, with the examples, and with both; and notes on what did not fit.

    `fit` says whether every row, asked like this, leaves room for its answer in the base's context. Examples
    are left out one by one until it does.
    """
    arms: list[Arm] = []
    notes: list[str] = []
    wanted = [Prompting(system)] if system else []
    wanted += [Prompting(None, tuple(shots))] if shots else []
    wanted += [Prompting(system, tuple(shots))] if system and shots else []
    for prompting in wanted:
        num_wanted = len(prompting.shots)
        while prompting.shots and not fit(prompting):
            prompting = replace(prompting, shots=prompting.shots[:-1])
        if len(prompting.shots) < num_wanted:
            notes.append(
                f"Only {len(prompting.shots)} of {num_wanted} examples fit the base's context beside the longest row"
                f"{', with the system prompt' if prompting.system else ''}."
            )
        if num_wanted and not prompting.shots:
            continue  # without examples it is another arm
        if not fit(prompting):
            notes.append("The system prompt does not fit the base's context beside the longest row.")
            continue
        title, key = _name(prompting)
        arms.append(Arm(key, f"{base.model} + {title}", "prompted", prompting, base))
    return arms, notes


def choose_shots(rows: Sequence[Row], task: Task, *, number: int, apart_from: Sequence[Row]) -> list[Row]:
    """`number` training rows as examples: each label or kind of answer in turn, in a fixed random order.

    Rows of which any turn asks what a held-out row asks are never among them, nor rows with tools of their own.
    """
    held_out = {fold(row) for row in apart_from}
    order = [row for row in rows if held_out.isdisjoint(_shown_prompts(row)) and not row.tools]
    random.Random(_SHOTS_SEED).shuffle(order)
    groups: dict[str, list[Row]] = {}
    for row in order:
        kind = kind_of(row.answer, task.labels)
        groups.setdefault(squeeze(row.answer) if kind == "label" else kind, []).append(row)
    # The largest group first, so that few examples show what is common.
    queues = sorted(groups.values(), key=len, reverse=True)
    chosen: list[Row] = []
    while len(chosen) < number and any(queues):
        for queue in queues:
            if queue and len(chosen) < number:
                chosen.append(queue.pop(0))
    return chosen


def _shown_prompts(row: Row) -> list[str]:
    """What an example shows the answer to: every turn of the assistant's, whether it was trained on or not."""
    answers = tuple(message["role"] == "assistant" for message in row.messages)
    return fold_turns(replace(row, trained=answers))


def _name(prompting: Prompting) -> tuple[str, str]:
    """("prompt + 5 shots", "prompt+shots")."""
    parts = ["prompt"] if prompting.system else []
    keys = list(parts)
    if prompting.shots:
        parts.append(f"{len(prompting.shots)} shot{'s' if len(prompting.shots) > 1 else ''}")
        keys.append("shots")
    return " + ".join(parts), "+".join(keys)
