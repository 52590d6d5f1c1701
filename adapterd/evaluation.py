"""An adapter against the bare base on held-out rows: the engine that serves, one batch for both."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from adapterd.composition import ResolvedModel
from adapterd.core import Request, RequestId, SamplingParams
from adapterd.daemon import Daemon, DaemonSettings
from adapterd.errors import AdapterRefused, ConfigError, ModelNotFound
from adapterd.registry import AdapterEntry
from adapterd.scoring import Answer, Kind, Scores, Share, score
from adapterd.training.data import Row, read_rows

HELDOUT_FILE = "heldout.jsonl"
CARD_FILE = "README.md"
CARD_BEGIN, CARD_END = "<!-- results:begin -->", "<!-- results:end -->"
_KIND_TITLES: Mapping[Kind, str] = {
    "fields": "exact match, fields",
    "label": "exact match, labels",
    "text": "exact match, free text",
}
_LOAD_TIMEOUT_SECONDS = 600.0
_ROWS_AT_ONCE = 64


class EvaluationSettings(DaemonSettings, Protocol):
    """What an evaluation is told; `config.EvalSettings` is the real thing. `adapter`: names, none for all."""

    @property
    def adapter(self) -> Sequence[str]: ...
    @property
    def data(self) -> Path | None: ...
    @property
    def limit(self) -> int | None: ...
    @property
    def max_tokens(self) -> int: ...
    @property
    def json_out(self) -> Path | None: ...
    @property
    def write_card(self) -> bool: ...


@dataclass(frozen=True)
class Result:
    """One adapter and the bare base over the same rows. Digests and hashes say what exactly was measured."""

    adapter: str
    digest: str
    base: str
    data: str
    num_rows: int
    base_scores: Scores
    adapter_scores: Scores
    answers: tuple[tuple[int, str, str], ...]
    """(line, the base's answer, the adapter's answer), for whoever wants to read them."""


def evaluate(settings: EvaluationSettings) -> str:
    """Evaluate every adapter asked for; the report as text. Writes JSON and model cards if told to.

    Raises ConfigError, ModelNotFound, AdapterRefused, and InvalidRequest for bad rows.
    """
    if not settings.adapters:
        raise ConfigError(
            "no adapters to evaluate; name their folders, as in adapterd eval adapters/support",
            param="adapters",
        )
    daemon = Daemon.build(settings)
    daemon.registry.start()
    try:
        daemon.registry.wait_loaded(_LOAD_TIMEOUT_SECONDS)
        entries = _chosen(daemon.registry.list(), settings.adapter)
        results = [(entry, evaluate_adapter(daemon, entry, settings)) for entry in entries]
    finally:
        daemon.registry.stop()
    if settings.json_out is not None:
        report = [as_json(result) for _, result in results]
        settings.json_out.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    if settings.write_card:
        for entry, result in results:
            write_card(entry.path / CARD_FILE, as_markdown(result))
    return "\n\n".join(f"{result.adapter}\n\n{as_markdown(result)}" for _, result in results)


def evaluate_adapter(daemon: Daemon, entry: AdapterEntry, settings: EvaluationSettings) -> Result:
    """Ask base and adapter every row, greedily, and score both."""
    data = settings.data if settings.data is not None else entry.path / HELDOUT_FILE
    rows = read_rows(data)[: settings.limit]
    base = daemon.registry.resolve(daemon.spec.name)
    adapted = daemon.registry.resolve_waiting(f"{daemon.spec.name}:{entry.name}", _LOAD_TIMEOUT_SECONDS)
    lease = daemon.registry.lease(adapted.mix)
    base_answers: list[Answer] = []
    adapter_answers: list[Answer] = []
    try:
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            some = rows[start : start + _ROWS_AT_ONCE]
            from_base, from_adapter = _ask(daemon, some, (base, adapted), settings.max_tokens)
            base_answers += from_base
            adapter_answers += from_adapter
    finally:
        lease.release()
    return Result(
        adapter=entry.name,
        digest=adapted.digest,
        base=daemon.spec.name,
        data=data.name,
        num_rows=len(rows),
        base_scores=score(base_answers),
        adapter_scores=score(adapter_answers),
        answers=tuple(
            (row.line, theirs.text, ours.text)
            for row, theirs, ours in zip(rows, base_answers, adapter_answers, strict=True)
        ),
    )


def _ask(
    daemon: Daemon, rows: Sequence[Row], models: Sequence[ResolvedModel], max_tokens: int
) -> list[list[Answer]]:
    """One batch: every row to every model. The answers by model, then by row."""
    requests: list[Request] = []
    for number, row in enumerate(rows):
        for arm, model in enumerate(models):
            prompt = daemon.renderer.render(row.prompt, chat_template=model.chat_template)
            room = daemon.spec.max_model_len - len(prompt)
            requests.append(
                Request(
                    id=RequestId(f"eval-{arm}-{number}"),
                    prompt_token_ids=tuple(prompt),
                    params=SamplingParams(max_tokens=max(1, min(max_tokens, room)), temperature=0.0),
                    mix=model.mix,
                    eos_token_ids=model.eos_token_ids,
                    arrival_seconds=time.monotonic(),
                )
            )
    finished = daemon.generate(requests)
    answers: list[list[Answer]] = []
    for arm in range(len(models)):
        answers.append([])
        for number, row in enumerate(rows):
            one = finished[RequestId(f"eval-{arm}-{number}"), 0]
            answers[-1].append(
                Answer(
                    prompt="\n".join(message["content"] for message in row.prompt),
                    reference=row.answer,
                    text=one.text,
                    num_tokens=len(one.token_ids),
                    stopped=one.finish_reason == "stop",
                    tags=row.tags,
                )
            )
    return answers


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


def as_json(result: Result) -> dict[str, Any]:
    """Plain data: each share as count, total, value and 95 % interval."""

    def plain(value: Any) -> Any:
        if isinstance(value, Share):
            low, high = value.interval
            numbers = {"value": value.value, "low": low, "high": high}
            # JSON has no NaN: of nothing there is no share.
            return {"count": value.count, "total": value.total} | (numbers if value.total else {})
        if isinstance(value, Scores):
            return {key: plain(getattr(value, key)) for key in value.__dataclass_fields__}
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return asdict(value) if hasattr(value, "__dataclass_fields__") else value

    fields = {key: plain(getattr(result, key)) for key in result.__dataclass_fields__ if key != "answers"}
    answers = [{"line": line, "base": base, "adapter": adapted} for line, base, adapted in result.answers]
    return fields | {"answers": answers}


def as_markdown(result: Result) -> str:
    """The result block of a model card."""
    base, adapted = result.base_scores, result.adapter_scores
    lines = [
        f"{result.num_rows} held-out rows of `{result.data}`, greedy; base `{result.base}`, adapter version"
        f" `{result.digest[:12]}`. In brackets: 95 % Wilson interval.",
        "",
        f"| | `{result.base}` | `{result.base}:{result.adapter}` |",
        "|---|---|---|",
        _row("exact match", base.exact, adapted.exact),
    ]
    if len(adapted.kinds) > 1:
        lines += [_row(_KIND_TITLES[kind], base.kinds[kind], share) for kind, share in adapted.kinds.items()]
    lines.append(_row("well-formed", base.well_formed, adapted.well_formed))
    lines += [_row(f"`{key}` right", base.fields[key], share) for key, share in adapted.fields.items()]
    if adapted.grounded.total:
        lines.append(_row("no invented number", base.grounded, adapted.grounded))
    lines.append(_row("ended by itself", base.stopped, adapted.stopped))
    lines.append(f"| median tokens | {base.median_tokens:g} | {adapted.median_tokens:g} |")
    if adapted.tags:
        lines += ["", "| exact match by tag | rows | base | adapter |", "|---|---|---|---|"]
        for tag, share in adapted.tags.items():
            lines.append(f"| {tag} | {share.total} | {base.tags[tag].value:.1%} | {share.value:.1%} |")
    if adapted.labels:
        lines += ["", "| label | rows | precision | recall |", "|---|---|---|---|"]
        for label, found in adapted.labels.items():
            precision, recall = Share(found.both, found.given), Share(found.both, found.wanted)
            lines.append(f"| `{label}` | {found.wanted} | {_percent(precision)} | {_percent(recall)} |")
    return "\n".join(lines)


def _row(title: str, base: Share, adapted: Share) -> str:
    low, high = adapted.interval
    return f"| {title} | {_percent(base)} | {_percent(adapted)} ({low:.1%} to {high:.1%}) |"


def _percent(share: Share) -> str:
    return f"{share.value:.1%}" if share.total else "none"


def write_card(path: Path, block: str) -> None:
    """Replace what stands between the result markers of a model card. Raises ConfigError if it has none."""
    text = path.read_text() if path.is_file() else ""
    head, begin, rest = text.partition(CARD_BEGIN)
    _, end, tail = rest.partition(CARD_END)
    if not begin or not end:
        raise ConfigError(f"{path} has no {CARD_BEGIN} ... {CARD_END} to write the results between")
    path.write_text(f"{head}{CARD_BEGIN}\n{block}\n{CARD_END}{tail}")
