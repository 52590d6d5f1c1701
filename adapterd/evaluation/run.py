"""`adapterd eval`: the base, the base with a better prompt, the adapter and any peers over the same held-out rows.

The local arms run on the engine that serves, one arm at a time so that each one's time is its own.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from adapterd.composition import ResolvedModel
from adapterd.config import EvalSettings, flag
from adapterd.daemon import Daemon
from adapterd.entries import AdapterEntry
from adapterd.errors import AdapterRefused, ConfigError, ModelNotFound
from adapterd.evaluation.arms import Arm, Prompting, choose_shots, prompted_arms
from adapterd.evaluation.ask import Asker
from adapterd.evaluation.beforehand import check_figures, check_places, check_rows
from adapterd.evaluation.compare import ArmResult
from adapterd.evaluation.gate import Limit, failures, parse_limits
from adapterd.evaluation.html import as_html
from adapterd.evaluation.output import check_card, write_card, write_file
from adapterd.evaluation.remote import Endpoint, Judge, ask_peer
from adapterd.evaluation.report import as_json, as_markdown, card_block
from adapterd.evaluation.result import Result, put_together
from adapterd.evaluation.scoring import score
from adapterd.evaluation.task import EvalTask, read_general, read_task
from adapterd.training.advice import facts_beyond_rows
from adapterd.training.card import CARD_FILE
from adapterd.training.data import Row

_logger = logging.getLogger(__name__)

_LOAD_TIMEOUT_SECONDS = 600.0
_ROWS_MEASURED = 16
_ROWS_SAMPLED = 100
"""Rows whose agreement over seeds is measured: enough for a share, and each costs several answers."""


@dataclass(frozen=True)
class Evaluation:
    """All that was found. `folders`: the adapters', in the order of the results.

    `report`: as Markdown; `missed`: a line for each missed `--fail-under`.
    """

    results: tuple[Result, ...]
    folders: tuple[Path, ...]
    report: str
    missed: tuple[str, ...]


def evaluate(settings: EvalSettings) -> Evaluation:
    """Evaluate every adapter asked for. Writes nothing: see `write_files`.

    Whatever can be seen before anybody is asked is refused before: ConfigError, ModelNotFound, AdapterRefused, and
    InvalidRequest for bad rows. Raises Unavailable if a peer or the judge does not answer, and ConfigError if the judge
    was to decide and graded too little.
    """
    if not settings.adapters:
        raise ConfigError(
            "no adapters to evaluate; name their folders, as in adapterd eval adapters/support",
            param="adapters",
        )
    limits = parse_limits(settings.fail_under)
    general = read_general(settings.general)
    peers = _peers(settings)
    judge = _judge(settings)
    check_places(settings)
    daemon = Daemon.build(settings)
    daemon.registry.start()
    try:
        daemon.registry.wait_loaded(_LOAD_TIMEOUT_SECONDS)
        entries = _chosen(daemon.registry.list(), settings.adapter)
        tasks = [_checked_task(daemon, entry, settings, limits) for entry in entries]
        results = [
            evaluate_adapter(daemon, entry, task, settings, general=general, peers=peers, judge=judge)
            for entry, task in zip(entries, tasks, strict=True)
        ]
    finally:
        daemon.registry.stop()
    return Evaluation(
        results=tuple(results),
        folders=tuple(entry.path for entry in entries),
        report=as_markdown(results),
        missed=tuple(line for result in results for line in failures(result, limits)),
    )


def write_files(found: Evaluation, settings: EvalSettings) -> None:
    """The reports and cards that the settings ask for. Raises ConfigError for one that cannot be written."""
    for path, text in (
        (settings.json_out, as_json(found.results)),
        (settings.markdown_out, found.report),
        (settings.html_out, as_html(found.results)),
    ):
        if path is not None:
            write_file(path, text)
    if settings.write_card:
        for folder, result in zip(found.folders, found.results, strict=True):
            write_card(folder / CARD_FILE, card_block(result))


def _checked_task(
    daemon: Daemon, entry: AdapterEntry, settings: EvalSettings, limits: Sequence[Limit]
) -> EvalTask:
    task = read_task(entry.path, settings, daemon.renderer)
    check_figures(entry.name, task, settings, limits)
    check_rows(task, settings, _asker(daemon, task, settings), daemon.registry.resolve(daemon.spec.name))
    if settings.write_card:
        check_card(entry.path / CARD_FILE)
    return task


def _asker(daemon: Daemon, task: EvalTask, settings: EvalSettings) -> Asker:
    return Asker(daemon, max_tokens=task.max_tokens, max_at_once=settings.max_queue)


def evaluate_adapter(
    daemon: Daemon,
    entry: AdapterEntry,
    task: EvalTask,
    settings: EvalSettings,
    *,
    general: Sequence[str] = (),
    peers: Sequence[Endpoint] = (),
    judge: Judge | None = None,
) -> Result:
    """Ask every arm every row, and compare. The task's rows have been checked."""
    asker = _asker(daemon, task, settings)
    base = daemon.registry.resolve(daemon.spec.name)
    adapted = daemon.registry.resolve_waiting(f"{daemon.spec.name}:{entry.name}", _LOAD_TIMEOUT_SECONDS)
    shots = choose_shots(task.train, task.task, number=task.num_shots, apart_from=task.rows)

    longest = _longest_rows(asker, task, base)

    def fits(prompting: Prompting) -> bool:
        return all(asker.fits(prompt) for prompt in asker.render(longest, prompting, base))

    prompted, notes = prompted_arms(base, system=task.system, shots=shots, fit=fits)
    arms = [
        Arm("base", base.model, "base", Prompting(), base),
        *prompted,
        Arm("adapter", adapted.model, "adapter", Prompting(), adapted),
    ]
    notes += task.notes
    if task.num_leaked:
        notes.append(
            f"{task.num_leaked} of the {len(task.rows)} held-out prompts are also training prompts. The adapter's"
            " result on them proves nothing: keep them apart (adapterd check --heldout)."
        )
    lease = daemon.registry.lease(adapted.mix)
    try:
        results = [_local(asker, arm, task, settings, general) for arm in arms]
    finally:
        lease.release()
    # The peer gets all the help that prompting can give.
    helped = Prompting(task.system, tuple(shots))
    for endpoint in peers:
        results.append(_peer(endpoint, helped, task, settings))
    if judge is not None:
        results = [_judged(judge, result) for result in results]
        notes += _judge_notes(judge, results)
    return put_together(
        name=entry.name,
        digest=adapted.digest,
        base_name=daemon.spec.name,
        data=task.data.name,
        metric=task.metric,
        lines=[row.line for row in task.rows],
        arms=results,
        notes=notes,
        facts=_facts(task),
    )


def _facts(task: EvalTask) -> str | None:
    """What to say if the answers hold facts that no training could give; None where they do not."""
    if not task.train:
        return None
    advice = facts_beyond_rows(task.train, task.rows)
    return f"Use retrieval: {advice.sentence}." if advice.use_retrieval else None


def _longest_rows(asker: Asker, task: EvalTask, base: ResolvedModel) -> list[Row]:
    """The rows by which one tells whether a longer prompt fits."""
    prompts = asker.render(task.rows, Prompting(), base)
    by_length = sorted(zip(prompts, task.rows, strict=True), key=lambda pair: -len(pair[0]))
    return [row for _, row in by_length[:_ROWS_MEASURED]]


def _local(
    asker: Asker, arm: Arm, task: EvalTask, settings: EvalSettings, general: Sequence[str]
) -> ArmResult:
    model = arm.model
    assert model is not None, "a local arm has a model"
    _logger.info("asking %s: %d rows", arm.title, len(task.rows))
    prompts = asker.render(task.rows, arm.prompting, model)
    answers, cost = asker.answers(
        task.rows, task.references, prompts, model, price_per_hour=settings.price_per_hour
    )
    scores = score(task.task, answers)
    if settings.samples > 1:
        scores = scores.with_values("consistency", _agreement(asker, prompts, model, settings))
    return ArmResult(
        arm=arm,
        answers=tuple(answers),
        scores=scores,
        cost=cost,
        # A prompt takes no part in general text: there the prompted base is the base. And scoring long prompts token
        # by token would cost more than all the answers.
        losses=None if arm.kind == "prompted" else tuple(asker.answer_losses(task.rows, prompts, model)),
        general=None if arm.kind == "prompted" else tuple(asker.text_losses(general, model)),
    )


def _agreement(
    asker: Asker, prompts: Sequence[list[int]], model: ResolvedModel, settings: EvalSettings
) -> list[float | None]:
    """Of some rows, evenly spread; None of the others."""
    picked = range(0, len(prompts), -(-len(prompts) // _ROWS_SAMPLED))
    some = [prompts[row] for row in picked]
    shares = asker.agreement(some, model, samples=settings.samples, temperature=settings.temperature)
    found = dict(zip(picked, shares, strict=True))
    return [found.get(row) for row in range(len(prompts))]


def _peer(endpoint: Endpoint, prompting: Prompting, task: EvalTask, settings: EvalSettings) -> ArmResult:
    _logger.info("asking %s at %s: %d rows", endpoint.model, endpoint.url, len(task.rows))
    answers, cost = ask_peer(
        endpoint,
        task.rows,
        task.references,
        [prompting.messages(row) for row in task.rows],
        max_tokens=task.max_tokens,
        price_in=settings.peer_price_in,
        price_out=settings.peer_price_out,
    )
    return ArmResult(
        arm=Arm(f"peer:{endpoint.model}", endpoint.model, "peer", prompting, None),
        answers=tuple(answers),
        scores=score(task.task, answers),
        cost=cost,
        losses=None,
        general=None,
    )


def _judged(judge: Judge, result: ArmResult) -> ArmResult:
    _logger.info("%s grades %s", judge.endpoint.model, result.arm.title)
    return replace(result, scores=result.scores.with_values("judge", judge.grade(result.answers)))


def _judge_notes(judge: Judge, results: Sequence[ArmResult]) -> list[str]:
    ungraded = sum(value is None for result in results for value in result.scores.values.get("judge", ()))
    asked = sum(len(result.answers) for result in results)
    note = f"The judge is `{judge.endpoint.model}`; a judge errs too, so read some of its grades."
    return [note if not ungraded else f"{note} It gave no grade to {ungraded} of {asked} answers."]


def _peers(settings: EvalSettings) -> list[Endpoint]:
    if (settings.peer_url is None) != (not settings.peer_model):
        raise ConfigError("--peer-url and --peer-model belong together; give both or none", param="peer_url")
    if settings.peer_url is None:
        for name in ("peer_key_env", "peer_price_in", "peer_price_out"):
            _refuse_without(settings, name, "--peer-url")
        return []
    return [Endpoint(settings.peer_url, model, settings.peer_key_env) for model in settings.peer_model]


def _judge(settings: EvalSettings) -> Judge | None:
    if (settings.judge_url is None) != (settings.judge_model is None):
        raise ConfigError(
            "--judge-url and --judge-model belong together; give both or none", param="judge_url"
        )
    if settings.judge_url is None or settings.judge_model is None:
        _refuse_without(settings, "judge_key_env", "--judge-url")
        return None
    return Judge(Endpoint(settings.judge_url, settings.judge_model, settings.judge_key_env))


def _refuse_without(settings: EvalSettings, name: str, needed: str) -> None:
    if getattr(settings, name) is not None:
        raise ConfigError(f"{flag(name)} means nothing without {needed}", param=name)


def _chosen(entries: Sequence[AdapterEntry], names: Sequence[str]) -> list[AdapterEntry]:
    known = {entry.name: entry for entry in entries}
    for name in names:
        if name not in known:
            raise ModelNotFound(
                f"no adapter {name!r} in the adapter directories; there are {', '.join(known) or 'none'}"
            )
    chosen = [known[name] for name in names] if names else list(entries)
    if not chosen:
        raise ConfigError(
            "the adapter directories hold no adapter (no adapter_config.json in any)", param="adapters"
        )
    for entry in chosen:
        if entry.id is None:
            raise AdapterRefused(entry.error or f"adapter {entry.name!r} did not load in time")
    return chosen
