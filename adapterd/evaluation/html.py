"""The report as one page of HTML that needs nothing else: no script, no network, no font."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import jinja2

from adapterd.evaluation.report import (
    OTHER_LABEL,
    confusion,
    differing_rows,
    number_rows,
    p_value,
    pair_rows,
    table_rows,
    time_rows,
)
from adapterd.evaluation.result import Result
from adapterd.evaluation.scoring import TITLES
from adapterd.evaluation.statistics import Estimate
from adapterd.training.forms import squeeze

TEMPLATE_FILE = "report.html.jinja"
MAX_EXAMPLES = 200
_BEST_BAR = 100


@dataclass(frozen=True)
class Example:
    """One row where answers differ; `answers` are (arm, its kind, text, whether it is the reference), ours first."""

    line: int
    prompt: str
    reference: str
    tags: tuple[str, ...]
    effect: str
    answers: tuple[tuple[str, str, str, bool], ...]


def as_html(results: Sequence[Result]) -> str:
    """All that the Markdown says, with every differing row (of each adapter the first 200) and all arms beside it."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = files("adapterd.evaluation").joinpath(TEMPLATE_FILE).read_text(encoding="utf-8")
    return environment.from_string(source).render(reports=[_page(result) for result in results])


def _page(result: Result) -> dict[str, Any]:
    labels, counts = confusion(result)
    rows = differing_rows(result)
    return {
        "result": result,
        "metric": TITLES[result.metric],
        "titles": [arm.arm.title for arm in result.arms],
        "kinds": [arm.arm.kind for arm in result.arms],
        "metrics": [
            (title.replace("`", ""), [_bar(one) for one in found]) for title, found in table_rows(result)
        ],
        "numbers": [*number_rows(result), *time_rows(result)],
        "pairs": [
            (title.replace("`", ""), difference, p_value(difference))
            for title, difference in pair_rows(result)
        ],
        "tags": _tags(result),
        "labels": [*labels, OTHER_LABEL] if labels else [],
        "confusion": list(zip(labels, counts, strict=True)),
        "num_differing": len(rows),
        "examples": [_example(result, row) for row in rows[:MAX_EXAMPLES]],
        "prompts": [(arm.arm.title, arm.arm.prompting) for arm in result.arms if arm.arm.kind == "prompted"],
    }


def _bar(found: Estimate | None) -> dict[str, Any] | None:
    if found is None or not found.n:
        return None
    left, right = _BEST_BAR * max(0.0, found.low), _BEST_BAR * min(1.0, found.high)
    return {
        "value": f"{found.value:.1%}",
        "interval": f"{found.low:.1%} to {found.high:.1%}, n = {found.n}",
        "width": f"{_BEST_BAR * found.value:.1f}",
        "left": f"{left:.1f}",
        "span": f"{max(0.5, right - left):.1f}",
    }


def _tags(result: Result) -> list[tuple[str, list[dict[str, Any] | None]]]:
    names = sorted({tag for tags in result.adapter.scores.tags for tag in tags})
    return [(name, [_bar(arm.tag(name, result.metric)) for arm in result.arms]) for name in names]


def _example(result: Result, row: int) -> Example:
    answer = result.adapter.answers[row]
    ours = result.adapter.values(result.metric)[row] or 0.0
    theirs = result.best.other.values(result.metric)[row] or 0.0
    return Example(
        line=result.lines[row],
        prompt=answer.prompt,
        reference=answer.reference,
        tags=answer.tags,
        effect="mended" if ours > theirs else "broken" if ours < theirs else "neither",
        answers=tuple(
            (
                arm.arm.title,
                arm.arm.kind,
                arm.answers[row].text,
                squeeze(arm.answers[row].text) == squeeze(answer.reference),
            )
            for arm in sorted(result.arms, key=lambda arm: arm is not result.adapter)
        ),
    )
