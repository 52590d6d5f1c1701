from adapterd.composition import ResolvedModel
from adapterd.evaluation.arms import Prompting, choose_shots, prompted_arms
from adapterd.evaluation.scoring import Task
from adapterd.training.data import Row

BASE = ResolvedModel((), "mini", "base", None, frozenset(), {}, ())


def row(line: int, prompt: str, answer: str, system: str | None = None) -> Row:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return Row(line, tuple(messages), tuple(m["role"] == "assistant" for m in messages), ())


LABELLED = [row(i, f"q{i}", label) for i, label in enumerate(["a"] * 8 + ["b"] * 3 + ["c"])]
TASK = Task.of([one.answer for one in LABELLED] * 2)


def roles(prompting: Prompting, of: Row) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in prompting.messages(of)]


def test_without_a_prompt_a_row_is_asked_as_it_is() -> None:
    asked = row(1, "hi", "yo", system="own")
    assert Prompting().messages(asked) == asked.prompt


def test_our_system_message_comes_before_the_rows_own_in_one_message() -> None:
    assert roles(Prompting("ours"), row(1, "hi", "yo", system="own")) == [
        ("system", "ours\nown"),
        ("user", "hi"),
    ]


def test_examples_are_earlier_turns_without_their_system_messages() -> None:
    shots = (row(1, "one", "1", system="s"), row(2, "two", "2"))
    assert roles(Prompting(None, shots), row(3, "three", "3")) == [
        ("user", "one"), ("assistant", "1"), ("user", "two"), ("assistant", "2"), ("user", "three"),
    ]  # fmt: skip


def test_each_label_is_shown_before_any_twice_and_always_the_same() -> None:
    shots = choose_shots(LABELLED, TASK, number=4, apart_from=())
    assert [shot.answer for shot in shots] == ["a", "b", "c", "a"]
    assert choose_shots(LABELLED, TASK, number=4, apart_from=()) == shots
    assert len(choose_shots(LABELLED, TASK, number=99, apart_from=())) == 12


def test_what_is_asked_is_never_shown() -> None:
    held_out = [row(99, "Q11 ", "c")]
    assert "c" not in [shot.answer for shot in choose_shots(LABELLED, TASK, number=12, apart_from=held_out)]


def test_arms_are_prompt_examples_and_both() -> None:
    arms, notes = prompted_arms(BASE, system="s", shots=LABELLED[:2], fit=lambda prompting: True)
    assert [(arm.key, arm.title) for arm in arms] == [
        ("prompt", "mini + prompt"),
        ("shots", "mini + 2 shots"),
        ("prompt+shots", "mini + prompt + 2 shots"),
    ]
    assert notes == []
    assert prompted_arms(BASE, system=None, shots=(), fit=lambda prompting: True) == ([], [])


def test_examples_are_dropped_until_they_fit() -> None:
    arms, notes = prompted_arms(BASE, system="s", shots=LABELLED[:3], fit=lambda p: len(p.shots) < 2)
    assert [arm.title for arm in arms] == ["mini + prompt", "mini + 1 shot", "mini + prompt + 1 shot"]
    assert notes[0].startswith("Only 1 of 3 examples fit")
    arms, notes = prompted_arms(
        BASE, system="s", shots=LABELLED[:3], fit=lambda p: not p.system and not p.shots
    )
    assert arms == []
    assert "The system prompt does not fit" in notes[0]


def test_what_is_asked_is_not_shown_in_an_earlier_turn_either() -> None:
    first = row(20, "Where is it?", "a")
    later = ({"role": "user", "content": "Thanks"}, {"role": "assistant", "content": "b"})
    held_out = [row(99, "where is it?", "a")]
    for trained in (True, False):
        both = Row(21, (*first.messages, *later), (False, trained, False, True), ())
        assert choose_shots([both], TASK, number=5, apart_from=held_out) == []
    assert choose_shots([both], TASK, number=5, apart_from=[row(99, "Thanks", "b")]) == [both]
