"""Mistakes that can be seen in settings and rows, looked for before anybody is asked: an evaluation may take hours."""

from collections.abc import Sequence

from adapterd.composition import ResolvedModel
from adapterd.config import EvalSettings
from adapterd.errors import ConfigError, InvalidRequest
from adapterd.evaluation.arms import Prompting
from adapterd.evaluation.ask import Asker
from adapterd.evaluation.gate import Limit, check_limits
from adapterd.evaluation.output import check_place
from adapterd.evaluation.scoring import Answer, Scores, score
from adapterd.evaluation.task import EvalTask

_MAX_LINES_SHOWN = 20


def check_places(settings: EvalSettings) -> None:
    """Raises ConfigError for a report that could not be written."""
    for path in (settings.json_out, settings.markdown_out, settings.html_out):
        if path is not None:
            check_place(path)


def check_figures(name: str, task: EvalTask, settings: EvalSettings, limits: Sequence[Limit]) -> None:
    """Raises ConfigError if the adapter's rows will have no deciding metric, or none that a limit is on."""
    expected = _figures(task, settings)
    if task.metric not in expected.metrics:
        raise ConfigError(
            f"--metric: the rows of {name} have no {task.metric!r}; they have {', '.join(expected.metrics)}",
            param="metric",
        )
    check_limits(name, expected, limits)


def check_rows(task: EvalTask, settings: EvalSettings, asker: Asker, base: ResolvedModel) -> None:
    """Raises InvalidRequest for rows that a peer cannot be asked, or that leave no room for their own answer."""
    if settings.peer_url is not None and any(row.tools for row in task.rows):
        raise InvalidRequest(
            f"{task.data}: a peer is not asked rows with tools; leave out --peer-url", param="peer_url"
        )
    prompts = asker.render(task.rows, Prompting(), base)
    full = [
        row.line for prompt, row in zip(prompts, task.rows, strict=True) if not asker.fits_answer(prompt, row)
    ]
    if full:
        raise InvalidRequest(
            f"{task.data}: the prompts of lines {', '.join(map(str, sorted(full)[:_MAX_LINES_SHOWN]))} leave no room"
            f" in the context of {asker.max_model_len} tokens for their answers",
            param="data",
        )


def _figures(task: EvalTask, settings: EvalSettings) -> Scores:
    """What the rows will have figures of, whatever is answered: that is a matter of their references alone."""
    perfect = [
        Answer(row.prompt_text, reference, reference, num_tokens=0, stopped=True, tags=row.tags)
        for row, reference in zip(task.rows, task.references, strict=True)
    ]
    expected = score(task.task, perfect)
    right = [1.0] * len(perfect)
    if settings.samples > 1:
        expected = expected.with_values("consistency", right)
    if settings.judge_url is not None:
        expected = expected.with_values("judge", right)
    return expected
