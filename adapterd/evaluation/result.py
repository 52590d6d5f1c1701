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
from adapterd.evaluation.scoring import TITLES


@dataclass(frozen=True)
class Result:
    """One adapter and the others over the same rows. Digests and names say what exactly was measured.

    `best`: against the best without training; `against_base`: against the bare base, None where no row has a value
    for both. `notes`: what was left out or should be known, in sentences.
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
    against_base: Comparison | None
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

    An arm that has no value of the metric on any row beside the adapter's is left out of the comparisons, and noted.
    Raises ConfigError if that leaves nothing without training to compare with.
    """
    adapter = next(result for result in arms if result.arm.kind == "adapter")
    base = next(result for result in arms if result.arm.kind == "base")
    comparisons: list[Comparison] = []
    left_out: list[str] = []
    for other in arms:
        if other is adapter:
            continue
        comparison = compare_arms(adapter, other, metric)
        if comparison is not None:
            comparisons.append(comparison)
        else:
            left_out.append(
                f"`{other.arm.title}` is not compared: on no row are there its value and the adapter's of"
                f" {TITLES[metric]}."
            )
    best = best_without_training(comparisons)
    if best is None:
        raise ConfigError(
            f"--metric: the rows of {name} have no {metric!r} to compare by; they have"
            f" {', '.join(adapter.scores.metrics)}",
            param="metric",
        )
    peers = [one for one in comparisons if one.other.arm.kind == "peer"]
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
        against_base=next((one for one in comparisons if one.other is base), None),
        peers=tuple(peers),
        verdict=judge_need(adapter, best, num_prompted=num_prompted, peers=peers, base=base, facts=facts),
        notes=(*notes, *left_out),
    )
