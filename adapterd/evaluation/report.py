"""The result as Markdown, for a terminal and for a model card, and as JSON."""

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from adapterd.evaluation.compare import ArmResult, Comparison
from adapterd.evaluation.result import Result
from adapterd.evaluation.scoring import TITLES
from adapterd.evaluation.statistics import Difference, Estimate
from adapterd.training.forms import squeeze

OTHER_LABEL = "(none of them)"

_KIND_TITLES = {
    "fields": "exact match, fields",
    "label": "exact match, labels",
    "text": "exact match, free text",
}
_MAX_EXAMPLES = 12
_MAX_EXAMPLE_CHARACTERS = 240


def as_markdown(results: Sequence[Result]) -> str:
    """The whole report: what a card holds, then times, notes and rows that differ."""
    return "\n\n".join(
        "\n".join(
            [
                f"# {result.name}",
                "",
                card_block(result),
                "",
                *_times(result),
                *_notes(result),
                *_examples(result),
            ]
        ).rstrip()
        for result in results
    )


def card_block(result: Result) -> str:
    """What a model card shows: all that is the same each time it is measured, so nothing about time."""
    lines = [
        f"{len(result.lines)} held-out rows of `{result.data}`, greedy; base `{result.base_name}`, adapter version"
        f" `{result.digest[:12]}`. In brackets: 95 % interval.",
        "",
        *(f"**{sentence}**" if first else sentence for first, sentence in _first(result.verdict.sentences)),
        "",
        *_arms_table(result),
        "",
        *_pairs_table(result),
    ]
    for table in (_tags_table(result), _confusion_table(result)):
        lines += ["", *table] if table else []
    return "\n".join(lines)


def as_json(results: Sequence[Result]) -> str:
    """A list, one object an adapter; shares as value, low, high and n. What there is none of is absent."""
    return json.dumps([_plain(result) for result in results], indent=2, ensure_ascii=False) + "\n"


def table_rows(result: Result) -> Iterator[tuple[str, list[Estimate | None]]]:
    """(title, one estimate an arm) of every metric that some arm has."""
    kinds = dict.fromkeys(result.adapter.scores.kinds)
    for metric, title in TITLES.items():
        if metric == "exact" and set(kinds) == {"label"}:
            continue  # it is the label accuracy
        found = [arm.estimate(metric) for arm in result.arms]
        if not any(one is not None and one.n for one in found):
            continue
        yield title, found
        if metric == "exact" and len(kinds) > 1:
            for kind in kinds:
                yield _KIND_TITLES[kind], [arm.kind(kind) for arm in result.arms]
        if metric == "label_accuracy":
            yield "macro F1", [arm.estimate("macro_f1") for arm in result.arms]
        if metric == "slots":
            for name in result.adapter.scores.by_slot:
                yield f"`{name}` right", [arm.slot(name) for arm in result.arms]


def number_rows(result: Result) -> Iterator[tuple[str, list[str]]]:
    """(title, one cell an arm) of what is no share."""
    yield "loss of the references, nats a token", [_nats(arm.loss) for arm in result.arms]
    if any(arm.general_loss is not None and arm.general_loss.n for arm in result.arms):
        yield "loss on general text, nats a token", [_nats(arm.general_loss) for arm in result.arms]
    per_row = len(result.lines)
    yield "prompt tokens a row", [f"{arm.cost.num_prompt_tokens / per_row:.0f}" for arm in result.arms]
    yield (
        "answer tokens, median",
        [f"{statistics.median(answer.num_tokens for answer in arm.answers):g}" for arm in result.arms],
    )


def time_rows(result: Result) -> Iterator[tuple[str, list[str]]]:
    """(title, one cell an arm) of what another run would measure differently."""
    yield (
        "one request alone, median",
        [f"{1000 * arm.cost.latency_seconds:.0f} ms" for arm in result.arms],
    )
    yield (
        "all rows in a batch",
        ["" if arm.cost.seconds is None else f"{arm.cost.seconds:.1f} s" for arm in result.arms],
    )
    if any(arm.cost.money is not None for arm in result.arms):
        yield (
            "money for 1,000 rows",
            [
                "" if arm.cost.money is None else f"{arm.cost.money / len(result.lines) * 1000:.4f}"
                for arm in result.arms
            ],
        )


def pair_rows(result: Result) -> Iterator[tuple[str, Difference]]:
    """(against what, difference) of every comparison, by tag where the best without training is concerned."""
    if result.against_base is not None:
        yield f"`{result.base.arm.title}`", result.against_base.overall
    if result.best.other is not result.base:
        yield f"`{result.best.other.arm.title}`, the best without training", result.best.overall
    yield from (
        (f"`{result.best.other.arm.title}`, rows `{tag}`", difference)
        for tag, difference in result.best.by_tag.items()
    )
    yield from ((f"`{peer.other.arm.title}`", peer.overall) for peer in result.peers)


def confusion(result: Result) -> tuple[list[str], list[list[int]]]:
    """The labels, and the adapter's counts [wanted][given]; the last column is any answer that is no label."""
    pairs = [pair for pair in result.adapter.scores.labels if pair is not None]
    labels = sorted({wanted for wanted, _ in pairs})
    counts = [[0] * (len(labels) + 1) for _ in labels]
    for wanted, given in pairs:
        counts[labels.index(wanted)][labels.index(given) if given in labels else len(labels)] += 1
    return labels, counts


def differing_rows(result: Result) -> list[int]:
    """Rows where the adapter and the best without training say different things: those that the adapter mends,
    then those it breaks, then those that are wrong either way."""
    ours, theirs = result.adapter, result.best.other
    rows = [
        row
        for row in range(len(result.lines))
        if squeeze(ours.answers[row].text) != squeeze(theirs.answers[row].text)
    ]

    def order(row: int) -> int:
        gain = _of(ours, result.metric, row) - _of(theirs, result.metric, row)
        return 0 if gain > 0 else 1 if gain < 0 else 2

    return sorted(rows, key=order)


def share(found: Estimate | None) -> str:
    return "" if found is None or not found.n else f"{found.value:.1%}"


def share_with_interval(found: Estimate | None) -> str:
    return share(found) and f"{share(found)} ({found.low:.1%} to {found.high:.1%})"  # type: ignore[union-attr]


def p_value(difference: Difference) -> str:
    return f"{'<0.001' if difference.p < 0.001 else f'{difference.p:.3f}'} ({difference.test})"


def _arms_table(result: Result) -> list[str]:
    lines = [
        "| | " + " | ".join(f"`{arm.arm.title}`" for arm in result.arms) + " |",
        "|---|" + "---|" * len(result.arms),
    ]
    for title, found in table_rows(result):
        cells = [
            share_with_interval(one) if arm is result.adapter else share(one)
            for arm, one in zip(result.arms, found, strict=True)
        ]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    lines += [f"| {title} | " + " | ".join(cells) + " |" for title, cells in number_rows(result)]
    return lines


def _pairs_table(result: Result) -> list[str]:
    lines = [
        f"| adapter against, {_metric_title(result)} | rows | gain, points | 95 % interval | better / worse rows | p |",
        "|---|---|---|---|---|---|",
    ]
    for title, d in pair_rows(result):
        low, high = f"{100 * d.low:+.1f}", f"{100 * d.high:+.1f}"
        lines.append(
            f"| {title} | {d.n} | {100 * d.value:+.1f} | {low} to {high} | {d.better} / {d.worse} | {p_value(d)} |"
        )
    return lines


def _tags_table(result: Result) -> list[str]:
    tags = sorted({tag for tags in result.adapter.scores.tags for tag in tags})
    if not tags:
        return []
    header = " | ".join(f"`{arm.arm.title}`" for arm in result.arms)
    lines = [f"| {_metric_title(result)} by tag | rows | {header} |", "|---|---|" + "---|" * len(result.arms)]
    for tag in tags:
        found = [arm.tag(tag, result.metric) for arm in result.arms]
        cells = [
            share_with_interval(one) if arm is result.adapter else share(one)
            for arm, one in zip(result.arms, found, strict=True)
        ]
        rows = sum(tag in tags for tags in result.adapter.scores.tags)
        lines.append(f"| {tag} | {rows} | " + " | ".join(cells) + " |")
    return lines


def _confusion_table(result: Result) -> list[str]:
    labels, counts = confusion(result)
    if not labels:
        return []
    lines = [
        "| wanted, down; given by the adapter, across | "
        + " | ".join([*labels, OTHER_LABEL])
        + " | recall |",
        "|---|" + "---|" * (len(labels) + 2),
    ]
    for row, label in enumerate(labels):
        wanted = sum(counts[row])
        cells = [str(count) if count else "" for count in counts[row]]
        lines.append(f"| `{label}` | " + " | ".join(cells) + f" | {counts[row][row] / wanted:.1%} |")
    given = [sum(line[column] for line in counts) for column in range(len(labels))]
    precision = [f"{counts[i][i] / total:.1%}" if total else "none" for i, total in enumerate(given)]
    lines.append("| precision | " + " | ".join(precision) + " | | |")
    return lines


def _times(result: Result) -> list[str]:
    titles = " | ".join(f"`{arm.arm.title}`" for arm in result.arms)
    lines = [f"| on this machine | {titles} |", "|---|" + "---|" * len(result.arms)]
    lines += [f"| {title} | " + " | ".join(cells) + " |" for title, cells in time_rows(result)]
    return [*lines, ""]


def _notes(result: Result) -> list[str]:
    return [*(f"* {note}" for note in result.notes), ""] if result.notes else []


def _examples(result: Result) -> list[str]:
    rows = differing_rows(result)
    if not rows:
        return []
    lines = [
        f"Rows where the adapter and `{result.best.other.arm.title}` differ: {len(rows)}"
        + (f", of which {_MAX_EXAMPLES} are shown." if len(rows) > _MAX_EXAMPLES else "."),
        "",
        f"| line | asked | wanted | `{result.best.other.arm.title}` | `{result.adapter.arm.title}` |",
        "|---|---|---|---|---|",
    ]
    for row in rows[:_MAX_EXAMPLES]:
        ours, theirs = result.adapter.answers[row], result.best.other.answers[row]
        cells = [_cell(text) for text in (ours.prompt, ours.reference, theirs.text, ours.text)]
        lines.append(f"| {result.lines[row]} | " + " | ".join(cells) + " |")
    return lines


def _cell(text: str) -> str:
    """A text in a table: shortened, and nothing in it ends the cell or the line."""
    short = text if len(text) <= _MAX_EXAMPLE_CHARACTERS else text[: _MAX_EXAMPLE_CHARACTERS - 1] + "…"
    return "<br>".join(short.strip().replace("|", "\\|").splitlines())


def _metric_title(result: Result) -> str:
    return TITLES[result.metric]


def _nats(found: Estimate | None) -> str:
    return "" if found is None or not found.n else f"{found.value:.3f}"


def _of(arm: ArmResult, metric: str, row: int) -> float:
    return arm.values(metric)[row] or 0.0


def _first(sentences: Sequence[str]) -> Iterator[tuple[bool, str]]:
    return ((index == 0, sentence) for index, sentence in enumerate(sentences))


def _plain(result: Result) -> dict[str, Any]:
    labels, counts = confusion(result)
    plain: dict[str, Any] = {
        "adapter": result.name,
        "digest": result.digest,
        "base": result.base_name,
        "data": result.data,
        "num_rows": len(result.lines),
        "metric": result.metric,
        "outcome": result.verdict.outcome,
        "verdict": list(result.verdict.sentences),
        "notes": list(result.notes),
        "arms": {arm.arm.key: _plain_arm(arm) for arm in result.arms},
        "best_without_training": result.best.other.arm.key,
        "against": {
            comparison.other.arm.key: _plain_comparison(comparison)
            for comparison in (result.against_base, result.best, *result.peers)
            if comparison is not None
        },
        "rows": [
            {
                "line": line,
                "prompt": result.adapter.answers[row].prompt,
                "reference": result.adapter.answers[row].reference,
                "tags": list(result.adapter.answers[row].tags),
                "answers": {arm.arm.key: arm.answers[row].text for arm in result.arms},
            }
            for row, line in enumerate(result.lines)
        ],
    }
    if labels:
        plain["confusion"] = {"labels": [*labels, OTHER_LABEL], "counts": counts}
    return plain


def _plain_arm(arm: ArmResult) -> dict[str, Any]:
    scores = {metric: arm.estimate(metric) for metric in (*arm.scores.values, "macro_f1")}
    tags = sorted({tag for tags in arm.scores.tags for tag in tags})
    return {
        "title": arm.arm.title,
        "kind": arm.arm.kind,
        "system_prompt": arm.arm.prompting.system,
        "shots": [shot.line for shot in arm.arm.prompting.shots],
        "scores": {name: _plain_estimate(one) for name, one in scores.items() if one is not None},
        "slots": {name: _plain_estimate(arm.slot(name)) for name in arm.scores.by_slot},
        "tags": {
            tag: {metric: _plain_estimate(arm.tag(tag, metric)) for metric in arm.scores.values}
            for tag in tags
        },
        "loss": _plain_estimate(arm.loss),
        "general_loss": _plain_estimate(arm.general_loss),
        "cost": {
            "prompt_tokens": arm.cost.num_prompt_tokens,
            "answer_tokens": arm.cost.num_answer_tokens,
            "seconds": arm.cost.seconds,
            "latency_seconds": arm.cost.latency_seconds,
            "money": arm.cost.money,
        },
    }


def _plain_estimate(found: Estimate | None) -> dict[str, float] | None:
    # JSON has no NaN: of nothing there is no share.
    if found is None or not found.n or math.isnan(found.value):
        return None
    return {"value": found.value, "low": found.low, "high": found.high, "n": found.n}


def _plain_comparison(comparison: Comparison) -> dict[str, Any]:
    def plain(d: Difference) -> dict[str, Any]:
        return {
            "value": d.value,
            "low": d.low,
            "high": d.high,
            "n": d.n,
            "better": d.better,
            "worse": d.worse,
            "p": d.p,
            "test": d.test,
        }

    return {
        "metric": comparison.metric,
        **plain(comparison.overall),
        "tags": {tag: plain(difference) for tag, difference in comparison.by_tag.items()},
    }
