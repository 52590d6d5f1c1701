"""Everything that was found about one adapter: what the reports are written from."""

from collections.abc import Sequence
from dataclasses import dataclass

from adapterd.errors import ConfigError
from adapterd.evaluation.compare import (
    ArmResult,
    Comparison,
    Verdict,
    best_without_training,
    compare_arms,
    judge_need,
)


@dataclass(frozen=True)
class Result:
    """One adapter and the others over the same rows. Digests and names say what exactly was measured.

    `best`: against the best without training; `against_base`: against the bare base. `notes`: what was left
    out or should be known, in sentences.
    """

    name: str
    digest: str
    base_name: str
    data: str
    metric: str
    lines: tuple[int, ...]
    arms: tuple[ArmResult, ...]
    adapter: ArmResult
    base: ArmResult
    best: Comparison
    against_base: Comparison
    peers: tuple[Comparison, ...]
    verdict: Verdict
    notes: tuple[str, ...]


def put_together(
    *,
    name: str,
    digest: str,
    base_name: str,
    data: str,
    metric: str,
    lines: Sequence[int],
    arms: Sequence[ArmResult],
    notes: Sequence[str],
    facts: str | None = None,
) -> Result:
    """`arms` hold one base and one adapter, and any number of prompted ones and peers. `facts`: what to say of rows
    that ask for facts.

    Raises ConfigError if the rows have no such metric.
    """
    adapter = next(result for result in arms if result.arm.kind == "adapter")
    if metric not in adapter.scores.values:
        raise ConfigError(
            f"--metric: the rows of {name} have no {metric!r}; they have {', '.join(adapter.scores.values)}",
            param="metric",
        )
    base = next(result for result in arms if result.arm.kind == "base")
    best = compare_arms(adapter, best_without_training(arms, metric), metric)
    peers = [compare_arms(adapter, result, metric) for result in arms if result.arm.kind == "peer"]
    num_prompted = sum(result.arm.kind == "prompted" for result in arms)
    return Result(
        name=name,
        digest=digest,
        base_name=base_name,
        data=data,
        metric=metric,
        lines=tuple(lines),
        arms=tuple(arms),
        adapter=adapter,
        base=base,
        best=best,
        against_base=compare_arms(adapter, base, metric),
        peers=tuple(peers),
        verdict=judge_need(adapter, best, num_prompted=num_prompted, peers=peers, base=base, facts=facts),
        notes=tuple(notes),
    )
