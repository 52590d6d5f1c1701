import math

import pytest

from adapterd.evaluation.formats import RegexFormat
from adapterd.evaluation.scoring import (
    Answer,
    Scores,
    Task,
    kind_of,
    macro_f1,
    score,
)
from adapterd.training.forms import find_labels, parse_fields

TICKET = "Category: Refund\nPriority: High\nSentiment: Angry"
NOTE = "S: Dry cough for 3 days.\nO: BP 132/84, HR 88.\nA: Possible bronchitis.\nP: Not recorded."


def answer(
    reference: str, text: str, *, prompt: str = "", tags: tuple[str, ...] = (), stopped: bool = True
) -> Answer:
    return Answer(prompt, reference, text, num_tokens=len(text), stopped=stopped, tags=tags)


def scored(answers: list[Answer], patterns: tuple[str, ...] = ()) -> Scores:
    form = RegexFormat(patterns) if patterns else None
    return score(Task.of([one.reference for one in answers], form), answers)


def test_fields_are_scored_key_by_key() -> None:
    scores = scored(
        [
            answer(TICKET, TICKET),
            answer(TICKET, "Category: Refund\nPriority: Low\nSentiment: Angry"),
            answer(TICKET, "Category: Billing"),
            answer(TICKET, "I am sorry to hear that."),
        ]
    )
    assert scores.values["exact"] == (1, 0, 0, 0)
    assert scores.values["valid"] == (1, 1, 0, 0)
    assert scores.by_slot == {
        "Category": (1, 1, 0, 0),
        "Priority": (1, 0, 0, 0),
        "Sentiment": (1, 1, 0, 0),
    }
    assert scores.values["slots"] == pytest.approx((1, 2 / 3, 0, 0))
    assert scores.kinds == ("fields",) * 4
    assert not {"label_accuracy", "chrf", "grounded"} & scores.values.keys()


def test_slots_of_a_note_are_equal_up_to_white_space_only() -> None:
    spaced = NOTE.replace("for 3", "for  3").replace("\nO:", "\n\nO: ")
    changed = NOTE.replace("3 days", "4 days").replace("Possible", "possible")
    scores = scored([answer(NOTE, spaced), answer(NOTE, changed)])
    assert scores.values["exact"] == (1, 0)
    assert scores.by_slot == {"S": (1, 0), "O": (1, 1), "A": (1, 0), "P": (1, 1)}


def test_keys_out_of_order_twice_or_too_many_are_not_valid() -> None:
    lines = TICKET.split("\n")
    bad = [
        "\n".join(reversed(lines)),
        TICKET + "\nMood: Bad",
        TICKET + "\n" + lines[0],
        TICKET + "\nBye.",
        "",
    ]
    assert scored([answer(TICKET, text) for text in bad]).values["valid"] == (0,) * 5


def test_numbers_must_stand_in_the_prompt_or_the_reference() -> None:
    prompt = "cough three days, BP 132 over 84, HR 88"
    invented = NOTE.replace("88", "90")
    scores = scored(
        [answer(NOTE, NOTE, prompt=prompt), answer(NOTE, invented, prompt=prompt), answer("Hi.", "7")]
    )
    assert scores.values["grounded"] == (
        1,
        0,
        None,
    )  # the third reference holds no number, so it says nothing


def test_unknown_labels_are_not_valid() -> None:
    pairs = [("allow", "allow")] * 3 + [
        ("spam", "allow"),
        ("spam", "spam"),
        ("threat", "THREAT"),
        ("threat", "oh no"),
    ]
    scores = scored([answer(wanted, given) for wanted, given in pairs])
    assert scores.values["label_accuracy"] == scores.values["exact"] == (1, 1, 1, 0, 1, 0, 0)
    assert scores.values["valid"] == (1, 1, 1, 1, 1, 0, 0)
    assert scores.labels == tuple(pairs)


def test_macro_f1_is_the_mean_over_the_wanted_labels() -> None:
    pairs = [("a", "a")] * 3 + [("b", "a"), ("b", "b"), ("c", "x")]
    # a: 6/7, b: 2/3, c: 0; the answer x is a miss of c and no class of its own.
    assert macro_f1(pairs) == pytest.approx((6 / 7 + 2 / 3 + 0) / 3)
    assert math.isnan(macro_f1([]))


def test_free_text_is_valid_with_its_shared_opening_and_closing() -> None:
    replies = [
        f"Thanks for reaching out. We will {verb} it. We are here to help."
        for verb in ("mend", "send", "find")
    ]
    texts = [
        replies[0],
        "Thanks for reaching out. We are here to help.",
        "We will find it. We are here to help.",
    ]
    scores = scored([answer(reply, text) for reply, text in zip(replies, texts, strict=True)])
    assert scores.kinds == ("text",) * 3
    assert scores.values["exact"] == (1, 0, 0)
    assert scores.values["valid"] == (1, 1, 0)
    chrf, rouge = scores.values["chrf"], scores.values["rouge_l"]
    assert chrf[0] == rouge[0] == 1
    assert rouge[1] == pytest.approx(2 * (9 / 9) * (9 / 13) / (9 / 9 + 9 / 13))
    assert all(value is not None and 0 < value < 1 for value in (*chrf[1:], *rouge[1:]))


def test_a_set_may_mix_fields_and_text() -> None:
    reply = "Thanks for reaching out. We will look. We are here to help."
    scores = scored([answer(TICKET, TICKET), answer(reply, reply), answer(reply, "no")])
    assert scores.kinds == ("fields", "text", "text")
    assert scores.values["chrf"] == (None, 1, pytest.approx(scores.values["chrf"][2]))
    assert scores.values["slots"] == (1, None, None)
    assert scores.labels == (None, None, None)


def test_a_given_form_says_what_is_valid_and_what_the_slots_are() -> None:
    form = (r"(?P<who>\w+) reports (?P<what>[a-z ]+?)(?: for (?P<time>\w+))?\.", r"Not a note\.")
    asked = "She reports a cough for days."
    scores = scored(
        [
            answer(asked, asked),
            answer(asked, "He reports a cough for weeks."),
            answer("She reports pain.", "She reports pain for days."),  # a slot that is to be left out
            answer("She reports pain.", "Not a note."),
            answer("Not a note.", "not a note"),
        ],
        form,
    )
    assert scores.values["valid"] == (1, 1, 1, 1, 0)
    assert scores.by_slot["time"] == (1, 0, 0, 0, None)
    assert scores.values["slots"] == pytest.approx((1, 1 / 3, 2 / 3, 0, None))


def test_tags_and_stops_are_kept_by_row() -> None:
    scores = scored(
        [
            answer(TICKET, TICKET, tags=("edge", "new")),
            answer(TICKET, "x", tags=("edge",), stopped=False),
        ]
    )
    assert scores.tags == (("edge", "new"), ("edge",))
    assert scores.values["stopped"] == (1, 0)


def test_labels_are_found_only_where_most_references_are_labels() -> None:
    assert find_labels(["allow", "spam", "allow", "spam"]) == {"allow", "spam"}
    assert (
        find_labels(["allow", "A whole sentence of its own.", "Another one that is long."] * 1) == frozenset()
    )
    assert find_labels([f"word{i}" for i in range(30)]) == frozenset()
    assert kind_of("allow", frozenset({"allow"})) == "label"


@pytest.mark.parametrize("text", ["", "Note: one line", "no colon\nat all", "A: 1\nA: 2", "A: 1\nthen text"])
def test_what_is_no_set_of_fields(text: str) -> None:
    assert parse_fields(text) is None


def test_nothing_to_score_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to score"):
        Task.of([])
    with pytest.raises(ValueError, match="nothing to score"):
        score(Task.of(["x"]), [])
