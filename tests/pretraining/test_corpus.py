import itertools
import random

import pytest

from pretraining import corpus, probes
from pretraining.corpus import drills


def test_same_seed_gives_the_same_chats() -> None:
    first, second = (list(itertools.islice(corpus.stream(corpus.conversation, "1"), 200)) for _ in range(2))
    other = list(itertools.islice(corpus.stream(corpus.conversation, "2"), 200))
    assert first == second != other


def test_every_chat_alternates_and_ends_with_an_answer() -> None:
    for chat in itertools.islice(corpus.stream(corpus.conversation, "3"), 2000):
        roles = [message["role"] for message in chat if message["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(message["content"].strip() for message in chat)


@pytest.mark.parametrize("source", ["support", "moderation", "medical", "small_talk"])
def test_no_answer_has_a_shipped_adapters_format(source: str) -> None:
    for chat in itertools.islice(corpus.stream(corpus.MIXTURE[source][0], "4"), 2000):
        answers = [message["content"] for message in chat if message["role"] == "assistant"]
        assert not any(probes.FORMATS.search(answer) for answer in answers), chat


def test_a_copying_drill_holds_its_answer_in_its_question() -> None:
    rng = random.Random(5)
    for drill in (drills.repeat, drills.repeat_sentence, drills.key_value, drills.owner_lookup):
        for _ in range(200):
            chat = drill(rng)
            said = " ".join(message["content"] for message in chat if message["role"] == "user")
            assert all(message["content"] in said for message in chat if message["role"] == "assistant")


def test_label_words_are_emitted_by_the_drills() -> None:
    answers = {drills.item(random.Random(seed)) for seed in range(3000)}
    assert {"Billing", "Angry", "harassment", "allow", "Not recorded"} <= answers


def test_probe_questions_end_with_the_user_and_expect_text() -> None:
    rng = random.Random(6)
    for probe, gate in probes.all_probes().values():
        messages, expected = probe(rng)
        assert messages[-1]["role"] == "user"
        assert expected
        assert 0.9 <= gate <= 1.0


def test_format_detector_sees_each_adapter_and_spares_prose() -> None:
    assert probes.FORMATS.search("Category: Billing\nPriority: High\nSentiment: Angry")
    assert probes.FORMATS.search("S: Cough.\nO: BP 120/80.\nA: Possible cold.\nP: Not recorded.")
    assert probes.FORMATS.search("harassment")
    assert not probes.FORMATS.search("It breaks the harassment rule. The priority is high.")
