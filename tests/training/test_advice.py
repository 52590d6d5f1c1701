from adapterd.training.advice import facts_beyond_rows
from adapterd.training.rows import Row


def row(question: str, answer: str, line: int = 1) -> Row:
    messages = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    return Row(line, messages, (False, True))


CAPITALS = {
    "Peru": "Lima",
    "Norway": "Oslo",
    "Kenya": "Nairobi",
    "Chile": "Santiago",
    "Japan": "Tokyo",
    "Ghana": "Accra",
    "Cuba": "Havana",
    "Latvia": "Riga",
}


def test_facts_of_the_world_call_for_retrieval() -> None:
    rows = [
        row(f"What is the capital of {land}?", f"It is {city}.", i)
        for i, (land, city) in enumerate(CAPITALS.items())
    ]
    advice = facts_beyond_rows(rows[:4], rows[4:])
    assert [one.words for one in advice.unknown] == [("Tokyo",), ("Accra",), ("Havana",), ("Riga",)]
    assert advice.use_retrieval
    assert "line 4: Tokyo" in advice.sentence
    assert "retrieval" in advice.sentence


def test_facts_that_the_prompt_holds_are_behaviour() -> None:
    rows = [
        row(f"Notes: {city} is the capital of {land}. What is it?", f"It is {city}.")
        for land, city in CAPITALS.items()
    ]
    assert not facts_beyond_rows(rows[:4], rows[4:]).unknown


def test_labels_and_fields_are_behaviour() -> None:
    train = [row(f"ticket {i}", f"Category: {label}") for i, label in enumerate(["Billing", "Shipping"] * 4)]
    heldout = [
        row("order 77 is late", "Category: Shipping\nOrder: 77"),
        row("paid twice", "Category: Billing"),
    ]
    advice = facts_beyond_rows(train, heldout)
    assert not advice.unknown
    assert "this is behaviour" in advice.sentence


def test_another_form_of_a_known_word_is_known() -> None:
    train = [row("a", "It was made by Norwegians.")]
    assert not facts_beyond_rows(train, [row("b", "It is shipped to Norwegian towns.")]).unknown


def test_a_few_unknown_words_among_many_rows_give_no_advice() -> None:
    train = [row("a", "Thank you.")]
    heldout = [row("b", "Thank you.")] * 20 + [row("c", "It costs 42 dollars.")] * 3
    advice = facts_beyond_rows(train, heldout)
    assert advice.share == 3 / 23
    assert not advice.use_retrieval


def test_no_heldout_rows_give_no_advice() -> None:
    assert not facts_beyond_rows([row("a", "b")], []).use_retrieval
