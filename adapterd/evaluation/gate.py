"""`--fail-under`: a limit that the adapter's figures must reach, for continuous integration."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from adapterd.errors import ConfigError
from adapterd.evaluation.compare import ArmResult
from adapterd.evaluation.result import Result
from adapterd.evaluation.scoring import TITLES, Scores
from adapterd.evaluation.statistics import Estimate

_EXTRA = {
    "macro_f1": "macro F1 of the labels",
    "gain": "lower end of the 95 % interval of the gain over the best without training: has to be above its limit",
    "general": "the base's loss on general text divided by the adapter's: 1 is nothing forgotten",
}


@dataclass(frozen=True)
class Limit:
    metric: str
    minimum: float


def parse_limits(texts: Sequence[str]) -> list[Limit]:
    """`exact=0.9`, `gain=0`, `slots:Category=0.95`, `exact@edge=0.5`. Raises ConfigError naming what is allowed."""
    limits = []
    for text in texts:
        metric, equals, value = text.rpartition("=")
        try:
            minimum = float(value)
        except ValueError:
            minimum = math.nan
        if not equals or math.isnan(minimum):
            raise ConfigError(
                f"--fail-under: {text!r} is not METRIC=VALUE, as in exact=0.9", param="fail_under"
            )
        name = metric.partition("@")[0].partition(":")[0]
        if (
            name not in TITLES.keys() | _EXTRA.keys()
            or (":" in metric and (name != "slots" or "@" in metric))
            or ("@" in metric and name not in TITLES)
        ):
            raise ConfigError(
                f"--fail-under: {metric!r} is no metric; there are {', '.join((*TITLES, *_EXTRA))},"
                " slots:NAME for one slot and METRIC@TAG for the rows of a tag",
                param="fail_under",
            )
        limits.append(Limit(metric, minimum))
    return limits


def check_limits(name: str, scores: Scores, limits: Sequence[Limit]) -> None:
    """Raises ConfigError for a limit on what the rows of the adapter `name` have no figure of."""
    for limit in limits:
        if limit.metric not in ("gain", "general") and not _has(scores, limit.metric):
            known = [*scores.metrics, *(f"slots:{key}" for key in scores.by_slot)]
            raise ConfigError(
                f"--fail-under: the rows of {name} have no {limit.metric!r}; they have {', '.join(known)}",
                param="fail_under",
            )


def failures(result: Result, limits: Sequence[Limit]) -> list[str]:
    """A line for each limit that is missed, or that there is no figure for: a judge may have graded nothing."""
    lines = []
    for limit in limits:
        value = _value(result, limit.metric)
        if math.isnan(value):
            lines.append(f"{result.name}: there is no {limit.metric}, so it is not {limit.minimum:g} or more")
        elif limit.metric == "gain" and not value > limit.minimum:
            # An interval that begins at the limit proves nothing beyond it.
            lines.append(f"{result.name}: gain is {value:.4f}, not above {limit.minimum:g}")
        elif not value >= limit.minimum:
            lines.append(f"{result.name}: {limit.metric} is {value:.4f}, under {limit.minimum:g}")
    return lines


def _has(scores: Scores, metric: str) -> bool:
    name, tag, slot = _parts(metric)
    if slot:
        return slot in scores.by_slot
    if name == "macro_f1":
        return any(pair is not None for pair in scores.labels)
    values = scores.values.get(name, (None,) * len(scores.tags))
    return any(
        value is not None and (not tag or tag in tags)
        for value, tags in zip(values, scores.tags, strict=True)
    )


def _value(result: Result, metric: str) -> float:
    """NaN where there is none."""
    if metric == "gain":
        return result.best.overall.low
    if metric == "general":
        ours, theirs = result.adapter.general_loss, result.base.general_loss
        assert ours is not None, "the adapter is local"
        assert theirs is not None, "the base is local"
        return theirs.value / ours.value
    found = _estimate(result.adapter, metric)
    return math.nan if found is None else found.value


def _estimate(adapter: ArmResult, metric: str) -> Estimate | None:
    """Of `exact`, `slots:Category` or `exact@edge`; None if the rows have no such thing."""
    name, tag, slot = _parts(metric)
    if slot:
        return adapter.slot(slot) if slot in adapter.scores.by_slot else None
    if tag:
        return adapter.tag(tag, name)
    return adapter.estimate(name)


def _parts(metric: str) -> tuple[str, str, str]:
    """Name, tag and slot of `exact`, `exact@edge` and `slots:Category`; "" for what is not there."""
    name, _, tag = metric.partition("@")
    name, _, slot = name.partition(":")
    return name, tag, slot
