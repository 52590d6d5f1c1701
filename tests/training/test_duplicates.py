import random

from adapterd.training.duplicates import near_groups, near_pairs
from adapterd.training.rows import Row

ANSWER = {"role": "assistant", "content": "ok"}
WORDS = [
    *("parcel", "invoice", "lamp", "street", "refund", "password", "garden", "phone"),
    *("late", "blue", "order", "box", "shop", "paid", "twice", "broken"),
]


def row(question: str, line: int, *, system: str = "") -> Row:
    before = ({"role": "system", "content": system},) if system else ()
    messages = (*before, {"role": "user", "content": question}, ANSWER)
    return Row(line, messages, tuple(message is ANSWER for message in messages))


def questions(count: int) -> list[str]:
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=14)) for _ in range(count)]


def test_texts_that_differ_in_little_are_near_and_others_are_not() -> None:
    rows = [row(text, line) for line, text in enumerate(questions(50))]
    assert list(near_pairs(rows)) == []
    rows.append(row(questions(50)[7] + "!? please", 50))
    (pair,) = near_pairs(rows)
    assert (pair.first, pair.second) == (7, 50)
    assert 0.8 <= pair.overlap < 1


def test_copies_are_in_one_group_but_no_pair() -> None:
    rows = [row("Where is it?", 1), row("where  is it?", 2), row("Something else entirely", 3)]
    assert list(near_pairs(rows)) == []
    assert near_groups(rows) == [0, 0, 2]


def test_what_all_rows_share_makes_none_of_them_near() -> None:
    instruction = "Read the following ticket with care and say in one word which team should look at it. " * 3
    asked = questions(40)
    assert list(near_pairs([row(instruction + text[:20], line) for line, text in enumerate(asked)])) == []
    assert list(near_pairs([row(text[:20] + instruction, line) for line, text in enumerate(asked)])) == []
    with_system = [row(text[:20], line, system=instruction) for line, text in enumerate(asked)]
    assert list(near_pairs(with_system)) == []


def test_groups_reach_over_several_steps() -> None:
    (text,) = questions(1)
    rows = [row(text + " " + " ".join(WORDS[:n]), n) for n in range(6)]
    assert set(near_groups(rows)) == {0}


def test_scripts_without_spaces_are_compared_too() -> None:
    chinese = "我的包裹还没有到请帮我看看它现在在哪里谢谢你们的帮助"
    rows = [row(chinese, 1), row(chinese + "了", 2), row("今天天气很好我们去公园散步吧然后回家吃饭", 3)]
    assert near_groups(rows) == [0, 0, 2]


def test_rows_that_share_an_earlier_turn_are_of_one_group_only_if_told_so() -> None:
    one, other, apart = (row(text, line) for line, text in enumerate(questions(3)))
    longer = Row(3, (*one.messages, *other.messages), (False, True, False, True), ())
    rows = [one, other, apart, longer]
    assert near_groups(rows, []) == [0, 1, 2, 3]
    assert near_groups(rows, [], every_turn=True) == [0, 1, 2, 0]
