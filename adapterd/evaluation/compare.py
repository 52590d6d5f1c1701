"""The arms' scores put together: estimates, paired tests of the adapter against the others, and what follows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from adapterd.evaluation.arms import Arm
from adapterd.evaluation.ask import Cost, Loss
from adapterd.evaluation.scoring import TITLES, Answer, Kind, Scores, Values, macro_f1
from adapterd.evaluation.statistics import Difference, Estimate, bootstrap, compare, estimate, ratio_estimate

# A gain of less than a point is not worth an adapter, whatever its interval says.
_WORTH_HAVING = 0.01
# A loss on general text that grew by this share is named: the specialist has begun to forget.
_FORGETS_FROM = 0.1

Outcome = Literal["better", "prompt_is_enough", "not_proven", "worse"]


@dataclass(frozen=True)
class ArmResult:
    """One arm over all rows. `losses` of the references and `general` of the general texts: None for a peer."""

    arm: Arm
    answers: tuple[Answer, ...]
    scores: Scores
    cost: Cost
    losses: tuple[Loss | None, ...] | None
    general: tuple[Loss, ...] | None

    def estimate(self, metric: str) -> Estimate | None:
        """None where the metric says nothing of this arm."""
        if metric == "macro_f1":
            return self._macro_f1()
        values = self.scores.values.get(metric)
        return None if values is None else estimate([value for value in values if value is not None])

    def slot(self, name: str) -> Estimate:
        return estimate([value for value in self.scores.by_slot[name] if value is not None])

    def kind(self, kind: Kind) -> Estimate:
        """Exact matches of the rows whose reference is of this kind."""
        rows = zip(self.scores.values["exact"], self.scores.kinds, strict=True)
        return estimate([value for value, own in rows if own == kind and value is not None])

    def tag(self, tag: str, metric: str) -> Estimate:
        """Over the rows of the tag; of nothing where the metric says nothing of this arm."""
        rows = zip(self.values(metric), self.scores.tags, strict=True)
        return estimate([value for value, tags in rows if value is not None and tag in tags])

    def values(self, metric: str) -> Values:
        """One value a row; None in all where the metric says nothing of this arm."""
        return self.scores.values.get(metric, (None,) * len(self.answers))

    @property
    def loss(self) -> Estimate | None:
        """Nats a token of the references."""
        return None if self.losses is None else _per_token([loss for loss in self.losses if loss is not None])

    @property
    def general_loss(self) -> Estimate | None:
        """Nats a token of the general texts."""
        return None if self.general is None else _per_token(self.general)

    def _macro_f1(self) -> Estimate | None:
        pairs = [pair for pair in self.scores.labels if pair is not None]
        if not pairs:
            return None
        low, high = bootstrap(len(pairs), lambda rows: macro_f1([pairs[row] for row in rows]))
        return Estimate(macro_f1(pairs), low, high, len(pairs))


@dataclass(frozen=True)
class Comparison:
    """The adapter against one other arm in the deciding metric; over all rows and by tag."""

    other: ArmResult
    metric: str
    overall: Difference
    by_tag: dict[str, Difference]


@dataclass(frozen=True)
class Verdict:
    """What the numbers say, in sentences. `outcome` of the adapter against the best that prompting gives."""

    outcome: Outcome
    sentences: tuple[str, ...]


def compare_arms(adapter: ArmResult, other: ArmResult, metric: str) -> Comparison | None:
    """Pairs are the rows of which both arms have a value; None where there is no such row."""
    rows = [
        (ours, theirs, tags)
        for ours, theirs, tags in zip(
            adapter.values(metric), other.values(metric), adapter.scores.tags, strict=True
        )
        if ours is not None and theirs is not None
    ]
    if not rows:
        return None
    names = sorted({tag for _, _, tags in rows for tag in tags})
    return Comparison(
        other=other,
        metric=metric,
        overall=compare([a for a, _, _ in rows], [b for _, b, _ in rows]),
        by_tag={
            name: compare(
                [a for a, _, tags in rows if name in tags], [b for _, b, tags in rows if name in tags]
            )
            for name in names
        },
    )


def best_without_training(comparisons: Sequence[Comparison]) -> Comparison | None:
    """With the base as it is or with a prompt, whichever is best. Chosen on the same rows, which favours it.

    None where none of them can be compared.
    """
    untrained = [one for one in comparisons if one.other.arm.kind in ("base", "prompted")]
    return max(untrained, key=lambda one: _value(one.other, one.metric), default=None)


def judge_need(
    adapter: ArmResult,
    best: Comparison,
    *,
    num_prompted: int,
    peers: Sequence[Comparison],
    base: ArmResult,
    facts: str | None = None,
) -> Verdict:
    """Is the adapter worth having? In the field's order: prompting first, then training, and nothing forgotten."""
    difference, title = best.overall, best.other.arm.title
    gain = _with_interval(difference)
    name = TITLES[best.metric]
    sentences: list[str] = []
    outcome: Outcome
    if _value(adapter, best.metric) == _value(best.other, best.metric) == 0:
        outcome = "not_proven"
        sentences.append(
            f"Not proven: {name} is 0 for the adapter and for all without training, so it tells nothing of these"
            f" {difference.n} rows. Another metric may: --metric."
        )
    elif difference.low > 0 and difference.value >= _WORTH_HAVING:
        outcome = "better"
        sentences.append(f"The adapter is better than `{title}`, the best without training: {name} {gain}.")
    elif difference.high < 0:
        outcome = "worse"
        sentences.append(f"You do not need this adapter: `{title}` is better. {name} {gain}.")
    elif difference.value < _WORTH_HAVING:
        outcome = "prompt_is_enough"
        sentences.append(
            f"You do not need this adapter, as far as {difference.n} rows show: `{title}` is as good. {name} {gain}."
        )
    else:
        outcome = "not_proven"
        sentences.append(
            f"Not proven: these {difference.n} rows cannot tell the adapter from `{title}`. {name} {gain};"
            f" some {_rows_needed(difference)} rows would."
        )
    if not num_prompted:
        sentences.append(
            "No better prompt was tried. Give one with --system-prompt, or training rows for examples (--train)."
        )
    if facts is not None:
        sentences.append(facts)
    for peer in peers:
        sentences.append(_against_peer(peer))
    sentences += _forgetting(adapter, base)
    return Verdict(outcome, tuple(sentences))


def _with_interval(difference: Difference) -> str:
    value, low, high = (f"{100 * part:+.1f}" for part in (difference.value, difference.low, difference.high))
    return f"{value} points ({low} to {high})"


def _against_peer(peer: Comparison) -> str:
    gain = _with_interval(peer.overall)
    title = peer.other.arm.title
    if peer.overall.low > 0:
        return f"The adapter is better than `{title}`: {gain}."
    if peer.overall.high < 0:
        return f"`{title}` is better than the adapter: {gain} for the adapter."
    return f"The rows cannot tell the adapter from `{title}`: {gain}. Where that is near enough, it can replace it."


def _forgetting(adapter: ArmResult, base: ArmResult) -> list[str]:
    ours, theirs = adapter.general_loss, base.general_loss
    if ours is None or theirs is None or not theirs.n:
        return []
    growth = ours.value / theirs.value - 1
    if growth >= _FORGETS_FROM:
        return [
            f"It forgets: the loss on general text is {growth:.0%} higher than the base's"
            f" ({ours.value:.2f} against {theirs.value:.2f} nats a token). Fewer steps, a lower rate or general rows"
            " among the training rows would help, if it is to answer anything else."
        ]
    return [
        f"General text: {ours.value:.2f} nats a token, the base {theirs.value:.2f} ({growth:+.0%}), so little was"
        " forgotten."
    ]


def _rows_needed(difference: Difference) -> int:
    """An interval shrinks with the root of the rows: how many until it no longer holds 0, were the gain the same.

    Always more than there are.
    """
    half = (difference.high - difference.low) / 2
    found = math.ceil(difference.n * (half / difference.value) ** 2 / 10) * 10
    return max(found, difference.n // 10 * 10 + 10)  # it may be the test that could not tell: then a few more


def _per_token(losses: Sequence[Loss]) -> Estimate:
    return ratio_estimate([loss.nats for loss in losses], [float(loss.num_tokens) for loss in losses])


def _value(result: ArmResult, metric: str) -> float:
    found = result.estimate(metric)
    return -math.inf if found is None or np.isnan(found.value) else found.value
