import math

import pytest

from adapterd.scoring import Answer, Share, find_labels, kind_of, parse_fields, score

TICKET = "Category: Refund\nPriority: High\nSentiment: Angry"
NOTE = "S: Dry cough for 3 days.\nO: BP 132/84, HR 88.\nA: Possible bronchitis.\nP: Not recorded."


def answer(
    reference: str, text: str, *, prompt: str = "", tags: tuple[str, ...] = (), stopped: bool = True
) -> Answer:
    return Answer(prompt, reference, text, num_tokens=len(text), stopped=stopped, tags=tags)


def test_fields_are_scored_key_by_key() -> None:
    scores = score(
        [
            answer(TICKET, TICKET),
            answer(TICKET, "Category: Refund\nPriority: Low\nSentiment: Angry"),
            answer(TICKET, "Category: Billing"),
            answer(TICKET, "I am sorry to hear that."),
        ]
    )
    assert scores.exact == Share(1, 4)
    assert scores.well_formed == Share(2, 4)
    assert scores.fields == {"Category": Share(2, 4), "Priority": Share(1, 4), "Sentiment": Share(2, 4)}
    assert scores.kinds == {"fields": Share(1, 4)}


def test_slots_of_a_note_are_equal_up_to_white_space_only() -> None:
    spaced = NOTE.replace("for 3", "for  3").replace("\nO:", "\n\nO: ")
    changed = NOTE.replace("3 days", "4 days").replace("Possible", "possible")
    scores = score([answer(NOTE, spaced), answer(NOTE, changed)])
    assert scores.exact == Share(1, 2)
    assert scores.fields == {"S": Share(1, 2), "O": Share(2, 2), "A": Share(1, 2), "P": Share(2, 2)}


def test_keys_out_of_order_twice_or_too_many_are_not_well_formed() -> None:
    lines = TICKET.split("\n")
    bad = [
        "\n".join(reversed(lines)),
        TICKET + "\nMood: Bad",
        TICKET + "\n" + lines[0],
        TICKET + "\nBye.",
        "",
    ]
    assert score([answer(TICKET, text) for text in bad]).well_formed == Share(0, 5)


def test_numbers_must_stand_in_the_prompt_or_the_reference() -> None:
    prompt = "cough three days, BP 132 over 84, HR 88"
    invented = NOTE.replace("88", "90")
    scores = score(
        [answer(NOTE, NOTE, prompt=prompt), answer(NOTE, invented, prompt=prompt), answer("Hi.", "7")]
    )
    assert scores.grounded == Share(1, 2)  # the third reference holds no number, so it says nothing


def test_labels_have_a_table_and_unknown_ones_are_not_well_formed() -> None:
    pairs = [("allow", "allow")] * 3 + [
        ("spam", "allow"),
        ("spam", "spam"),
        ("threat", "THREAT"),
        ("threat", "oh no"),
    ]
    scores = score([answer(wanted, given) for wanted, given in pairs])
    assert scores.exact == Share(4, 7)
    assert scores.well_formed == Share(5, 7)
    table = {label: (s.wanted, s.given, s.both) for label, s in scores.labels.items()}
    assert table == {"allow": (3, 4, 3), "spam": (2, 1, 1), "threat": (2, 0, 0)}


def test_free_text_is_well_formed_with_its_shared_opening_and_closing() -> None:
    replies = [
        f"Thanks for reaching out. We will {verb} it. We are here to help."
        for verb in ("mend", "send", "find")
    ]
    texts = [
        replies[0],
        "Thanks for reaching out. We are here to help.",
        "We will find it. We are here to help.",
    ]
    scores = score([answer(reply, text) for reply, text in zip(replies, texts, strict=True)])
    assert scores.kinds == {"text": Share(1, 3)}
    assert scores.well_formed == Share(2, 3)


def test_a_set_may_mix_fields_and_text() -> None:
    reply = "Thanks for reaching out. We will look. We are here to help."
    scores = score([answer(TICKET, TICKET), answer(reply, reply), answer(reply, "no")])
    assert scores.kinds == {"fields": Share(1, 1), "text": Share(1, 2)}
    assert scores.labels == {}


def test_tags_stop_rate_and_median() -> None:
    scores = score(
        [
            answer(TICKET, TICKET, tags=("edge", "new")),
            answer(TICKET, "x", tags=("edge",), stopped=False),
            answer(TICKET, "xyz"),
        ]
    )
    assert scores.tags == {"edge": Share(1, 2), "new": Share(1, 1)}
    assert scores.stopped == Share(2, 3)
    assert scores.median_tokens == 3


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


def test_wilson_interval_against_known_values() -> None:
    low, high = Share(18, 20).interval
    assert (low, high) == (pytest.approx(0.6990, abs=1e-4), pytest.approx(0.9721, abs=1e-4))
    assert Share(0, 20).interval[0] == pytest.approx(0.0)
    assert Share(20, 20).interval[1] == pytest.approx(1.0)
    assert math.isnan(Share(0, 0).value)


def test_nothing_to_score_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to score"):
        score([])
