"""What an adapter is measured on: its folder's rows and eval.toml, and what the command line says instead."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

from adapterd.config import EvalSettings, TaskSettings, load_settings
from adapterd.errors import ConfigError, InvalidRequest
from adapterd.evaluation.formats import read_format
from adapterd.evaluation.held_back import NOTE, find_held_back
from adapterd.evaluation.scoring import TITLES, Task
from adapterd.render import Renderer
from adapterd.training.data import Row, encode_row, fold, fold_turns, read_rows
from adapterd.training.rows import raise_problems
from adapterd.training.tables import parse_columns

TASK_FILE = "eval.toml"
HELDOUT_FILE, TRAIN_FILE = "heldout.jsonl", "train.jsonl"
GENERAL_FILE = "general.txt"


@dataclass(frozen=True)
class EvalTask:
    """Rows to ask, rows to take examples from, and what a good answer is."""

    data: Path
    rows: tuple[Row, ...]
    references: tuple[str, ...]
    """What each row's answer reads like when the model writes it."""
    train: tuple[Row, ...]
    system: str | None
    num_shots: int
    task: Task
    metric: str
    max_tokens: int
    num_leaked: int
    """Held-out rows whose prompt is also trained on, in any turn of a row: their answers prove nothing."""
    notes: tuple[str, ...] = ()
    """What the report is to say about the rows."""


def read_task(folder: Path, settings: EvalSettings, renderer: Renderer) -> EvalTask:
    """The task of the adapter in `folder`. A flag, variable or --config key that was given wins over its eval.toml.

    Raises ConfigError, and InvalidRequest for bad rows.
    """
    given = {
        name: getattr(settings, name)
        for name in settings.model_fields_set
        if name in TaskSettings.model_fields
    }
    own = folder / TASK_FILE
    wanted = load_settings(TaskSettings, given, {}, own if own.is_file() else None)
    columns = parse_columns(wanted.map)
    data = wanted.data if wanted.data is not None else folder / HELDOUT_FILE
    train: Sequence[Row] = ()
    notes: tuple[str, ...] = ()
    if wanted.train is not None:
        train = read_rows(wanted.train, columns=columns)
    elif (folder / TRAIN_FILE).is_file():
        train = read_rows(folder / TRAIN_FILE, columns=columns)
    if wanted.data is None and wanted.train is not None and not data.is_file():
        data = wanted.train
        train, rows = find_held_back(folder, data, train)
        notes = (NOTE,)
    else:
        rows = read_rows(data, columns=columns)
    rows = rows[: settings.limit]
    references = [reference_of(row, renderer) for row in rows]
    raise_problems(data, _beyond(rows, renderer, wanted.max_tokens))
    form = read_format(wanted.format_regex, wanted.json_schema)
    if form is not None:
        for row, reference in zip(rows, references, strict=True):
            if not form.is_valid(reference):
                raise InvalidRequest(
                    f"{data}:{row.line}: the reference answer {reference[:80]!r} is itself not valid by"
                    f" {form.describe}",
                    param="format_regex",
                )
    task = Task.of(references, form)
    trained = {prompt for row in train for prompt in fold_turns(row)}
    return EvalTask(
        data=data,
        rows=tuple(rows),
        references=tuple(references),
        train=tuple(train),
        system=_system_prompt(wanted),
        num_shots=wanted.shots,
        task=task,
        metric=_metric(wanted.metric, task),
        max_tokens=wanted.max_tokens,
        num_leaked=sum(fold(row) in trained for row in rows),
        notes=notes,
    )


def answer_ids(row: Row, renderer: Renderer) -> list[int]:
    """The tokens of a row's answer as they are trained, with the stop token."""
    last = replace(row, trained=(*[False] * (len(row.messages) - 1), True))
    return list(encode_row(last, renderer)[-1].answer_ids)


def reference_of(row: Row, renderer: Renderer) -> str:
    """The words of the answer; calls of tools in the base's own notation, as a model writes them."""
    if not row.messages[-1].get("tool_calls"):
        return row.answer
    return renderer.decode(answer_ids(row, renderer), skip_special_tokens=True)


def read_general(path: Path | None) -> list[str]:
    """The texts on which a specialist should not get worse: paragraphs of `path`, or those that are shipped.

    Raises ConfigError for a file that cannot be read or is empty.
    """
    try:
        data = (
            files("adapterd.evaluation").joinpath(GENERAL_FILE).read_bytes()
            if path is None
            else path.read_bytes()
        )
        text = data.decode("utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", param="general") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: {error}", param="general") from None
    texts = [part.strip() for part in text.replace("\r\n", "\n").split("\n\n") if part.strip()]
    if not texts:
        raise ConfigError(f"{path} holds no text", param="general")
    return texts


def _beyond(rows: Sequence[Row], renderer: Renderer, max_tokens: int) -> list[tuple[int, str]]:
    """The lines whose reference nobody could give in `max_tokens`, its end included: every arm would be wrong there."""
    lengths = [(row.line, len(answer_ids(row, renderer))) for row in rows]
    longest = max(length for _, length in lengths)
    return [
        (
            line,
            f"the reference answer takes {length} tokens and --max-tokens allows {max_tokens};"
            f" --max-tokens {longest} is enough for all",
        )
        for line, length in lengths
        if length > max_tokens
    ]


def _system_prompt(settings: TaskSettings) -> str | None:
    if settings.system_prompt_file is None:
        return settings.system_prompt
    if settings.system_prompt is not None:
        raise ConfigError(
            "--system-prompt and --system-prompt-file are both given; give one", param="system_prompt"
        )
    try:
        return settings.system_prompt_file.read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read {settings.system_prompt_file}: {error}", param="system_prompt_file"
        ) from None


def _metric(name: str | None, task: Task) -> str:
    if name is None:
        return task.deciding_metric
    if name not in TITLES:
        raise ConfigError(f"--metric: {name!r} is none of {', '.join(TITLES)}", param="metric")
    return name
