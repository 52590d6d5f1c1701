import json
from dataclasses import replace

import pytest

from adapterd.composition import ResolvedModel
from adapterd.errors import ConfigError
from adapterd.evaluation.arms import Arm, ArmKind, Prompting
from adapterd.evaluation.ask import Cost, Loss
from adapterd.evaluation.compare import ArmResult
from adapterd.evaluation.gate import check_limits, failures, parse_limits
from adapterd.evaluation.html import as_html
from adapterd.evaluation.report import as_json, card_block, confusion, differing_rows
from adapterd.evaluation.result import Result, put_together
from adapterd.evaluation.scoring import Answer, Task, score

MODEL = ResolvedModel((), "mini", "base", None, frozenset(), {}, ())
COST = Cost(100, 50, 1.0, 0.01, None)
WANTED = ["a", "b"] * 20


def arm(kind: ArmKind, title: str, num_right: int, general: float = 2.0, wrong: str = "no") -> ArmResult:
    """The first `num_right` of 40 rows right; tag "first" on the first half of them."""
    answers = [
        Answer("q", wanted, wanted if row < num_right else wrong, 1, True, ("first",) if row < 20 else ())
        for row, wanted in enumerate(WANTED)
    ]
    return ArmResult(
        arm=Arm(title, title, kind, Prompting(), None if kind == "peer" else MODEL),
        answers=tuple(answers),
        scores=score(Task.of(WANTED), answers),
        cost=COST,
        losses=None if kind == "peer" else (Loss(1.0, 2),) * 40,
        general=None if kind in ("peer", "prompted") else (Loss(general * 10, 10),) * 4,
    )


def result(*arms: ArmResult, metric: str = "label_accuracy", num_rows: int = 40) -> Result:
    return put_together(
        name="x",
        digest="d" * 20,
        base_name="mini",
        data="heldout.jsonl",
        metric=metric,
        lines=range(1, num_rows + 1),
        arms=arms,
        notes=(),
    )


BASE = arm("base", "mini", 0)


def test_an_adapter_that_beats_the_best_prompt_is_better() -> None:
    found = result(BASE, arm("prompted", "mini + prompt", 10), arm("adapter", "mini:x", 36))
    assert found.verdict.outcome == "better"
    assert found.best.other.arm.title == "mini + prompt"
    assert (found.best.overall.better, found.best.overall.worse) == (26, 0)
    assert found.best.by_tag["first"].value == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("prompted", "adapter", "outcome"), [(30, 30, "prompt_is_enough"), (38, 20, "worse")]
)
def test_where_prompting_is_as_good_the_adapter_is_not_needed(
    prompted: int, adapter: int, outcome: str
) -> None:
    found = result(BASE, arm("prompted", "mini + prompt", prompted), arm("adapter", "mini:x", adapter))
    assert found.verdict.outcome == outcome
    assert found.verdict.sentences[0].startswith("You do not need this adapter")
    assert "`mini + prompt` is" in found.verdict.sentences[0]


def test_a_gain_that_few_rows_cannot_prove_is_not_proven_and_says_how_many_would() -> None:
    found = result(BASE, arm("prompted", "mini + prompt", 20), arm("adapter", "mini:x", 21))
    assert found.verdict.outcome == "not_proven"
    assert "rows would" in found.verdict.sentences[0]


@pytest.mark.parametrize("num_rows", [1, 5])
def test_rows_too_few_to_exclude_chance_prove_no_gain_though_all_of_them_gained(num_rows: int) -> None:
    def few(kind: ArmKind, text: str) -> ArmResult:
        whole = arm(kind, kind, 0)
        answers = [replace(one, text=text, reference="a") for one in whole.answers[:num_rows]]
        return replace(whole, answers=tuple(answers), scores=score(Task.of(WANTED), answers))

    found = result(few("base", "no"), few("adapter", "a"), num_rows=num_rows)
    assert found.best.overall.value == 1
    assert found.verdict.outcome == "not_proven"
    assert "some 10 rows would" in found.verdict.sentences[0]
    assert failures(found, parse_limits(["gain=0"])) == ["x: gain is 0.0000, not above 0"]


def test_a_metric_that_is_0_everywhere_says_nothing_of_the_adapter() -> None:
    found = result(BASE, arm("prompted", "mini + prompt", 0), arm("adapter", "mini:x", 0))
    assert found.verdict.outcome == "not_proven"
    assert found.verdict.sentences[0].startswith(
        "Not proven: label accuracy is 0 for the adapter and for all"
    )
    assert "--metric" in found.verdict.sentences[0]


def test_without_a_prompt_the_report_says_that_none_was_tried() -> None:
    found = result(BASE, arm("adapter", "mini:x", 36))
    assert any("No better prompt was tried" in sentence for sentence in found.verdict.sentences)


def test_what_was_forgotten_is_said() -> None:
    found = result(BASE, arm("adapter", "mini:x", 36, general=2.6))
    assert any("It forgets" in sentence and "30%" in sentence for sentence in found.verdict.sentences)
    found = result(BASE, arm("adapter", "mini:x", 36, general=2.02))
    assert any("little was forgotten" in sentence for sentence in found.verdict.sentences)


def test_a_peer_is_compared_but_is_no_prompted_base() -> None:
    found = result(BASE, arm("adapter", "mini:x", 30), arm("peer", "large", 30))
    assert found.best.other is BASE
    assert found.peers[0].overall.value == 0
    assert any("it can replace it" in sentence for sentence in found.verdict.sentences)


def test_confusion_counts_answers_that_are_no_label_apart() -> None:
    found = result(BASE, arm("adapter", "mini:x", 36))
    assert confusion(found) == (["a", "b"], [[18, 0, 2], [0, 18, 2]])
    assert "| `a` | 18 |  | 2 | 90.0% |" in card_block(found)


def test_rows_that_the_adapter_mends_come_before_those_it_breaks() -> None:
    broken = arm("adapter", "mini:x", 40)
    answers = [replace(one, text="no") if row < 5 else one for row, one in enumerate(broken.answers)]
    broken = replace(broken, answers=tuple(answers), scores=score(Task.of(WANTED), answers))
    found = result(arm("base", "mini", 10, wrong="nothing"), broken)
    assert differing_rows(found) == [*range(10, 40), *range(5)]


def test_limits_read_metrics_slots_tags_and_the_proven_gain() -> None:
    found = result(BASE, arm("adapter", "mini:x", 36))
    limits = parse_limits(
        [
            "label_accuracy=0.9",
            "macro_f1=0.9",
            "label_accuracy@first=1",
            "gain=0.7",
            "general=1",
            "valid=0.95",
        ]
    )
    assert failures(found, limits) == ["x: valid is 0.9000, under 0.95"]
    assert failures(found, parse_limits(["gain=0.95"]))[0].startswith("x: gain is 0.8")


@pytest.mark.parametrize(
    "text",
    ["exact", "exact=x", "=1", "nonsense=1", "exact:a=1", "gain@first=1", "exact=nan", "slots:a@first=1"],
)
def test_what_is_no_limit_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--fail-under"):
        parse_limits([text])


@pytest.mark.parametrize("text", ["slots=1", "slots:a=1", "label_accuracy@other=1", "chrf=1"])
def test_a_limit_on_what_the_rows_do_not_have_is_refused(text: str) -> None:
    found = result(BASE, arm("adapter", "mini:x", 36))
    with pytest.raises(ConfigError, match="have no"):
        check_limits("x", found.adapter.scores, parse_limits([text]))


def test_limits_on_what_the_rows_have_are_accepted() -> None:
    found = result(BASE, arm("adapter", "mini:x", 36))
    texts = ["macro_f1=0.9", "label_accuracy@first=1", "gain=0", "general=1", "stopped=1"]
    check_limits("x", found.adapter.scores, parse_limits(texts))


def test_a_limit_that_nothing_was_measured_for_is_missed() -> None:
    ungraded = with_values(arm("adapter", "mini:x", 36), "judge", [None] * 40)
    found = result(BASE, ungraded)
    assert failures(found, parse_limits(["judge=0"])) == ["x: there is no judge, so it is not 0 or more"]


def test_a_metric_that_the_rows_do_not_have_cannot_decide() -> None:
    with pytest.raises(ConfigError, match="have no 'chrf'"):
        result(BASE, arm("adapter", "mini:x", 36), metric="chrf")


def with_values(one: ArmResult, metric: str, values: list[float | None]) -> ArmResult:
    return replace(one, scores=one.scores.with_values(metric, values))


def test_an_arm_without_the_deciding_metric_is_left_out_and_noted() -> None:
    """A peer is not drawn from with several seeds, so it has no consistency."""
    steady = with_values(arm("adapter", "mini:x", 30), "consistency", [1.0] * 40)
    base = with_values(BASE, "consistency", [0.5] * 40)
    found = result(base, steady, arm("peer", "large", 30), metric="consistency")
    assert (found.best.other, found.peers) == (base, ())
    assert found.notes[0].startswith("`large` is not compared")
    assert "| first | 20 | 50.0% | 100.0% (" in card_block(found)
    assert list(json.loads(as_json([found]))[0]["against"]) == ["mini"]
    assert "large" in as_html([found])


def test_an_arm_that_the_judge_graded_no_common_row_of_is_left_out() -> None:
    graded: list[float | None] = [1.0] * 20 + [None] * 20
    ours = with_values(arm("adapter", "mini:x", 30), "judge", graded)
    never = with_values(BASE, "judge", [None] * 20 + [1.0] * 20)
    prompted = with_values(arm("prompted", "mini + prompt", 5), "judge", [0.0] * 40)
    found = result(never, prompted, ours, metric="judge")
    assert (found.against_base, found.best.other, found.best.overall.n) == (None, prompted, 20)
    assert found.notes[0].startswith("`mini` is not compared")
    assert "| `mini + prompt`, the best without training | 20 | +100.0 |" in card_block(found)
    assert list(json.loads(as_json([found]))[0]["against"]) == ["mini + prompt"]
    with pytest.raises(ConfigError, match=r"have no 'judge' to compare by; they have .*judge"):
        result(never, ours, metric="judge")
