"""Pre-training chats about short visit notes: a note with facts in any order, then questions about it.

What it teaches is copying: an answer repeats a value that stands in the note, alone, in a sentence, in a
list, or says that the note does not hold it. The shipped adapter's four-line format never occurs here. The
wording of a question decides the wording of its answer, so that the probes can expect an exact string. Random
numbers, invented drug names and mixed-up complaints keep an answer from being guessable without the note.
"""

import random
from collections.abc import Callable

from pretraining.corpus import medical_questions as questions
from pretraining.corpus.medical_notes import mixed_facts, write_note
from pretraining.corpus.medical_words import NAMES, draw_blood_pressure

Chat = list[dict[str, str]]


def _user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def _assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def _with_question(rng: random.Random, note: str, question: str) -> str:
    """The note and the question in one message; the question last three times in four."""
    draw = rng.random()
    if draw < 0.6:
        return f"{note} {question}" if rng.random() < 0.5 else f"{note}\n{question}"
    if draw < 0.75:
        return f"{rng.choice(('Note', 'Visit note', 'Here is a note'))}: {note}\n{question}"
    return f"{question}\n{note}" if rng.random() < 0.6 else f"{question} Note: {note}"


def _interview(rng: random.Random) -> Chat:
    """One note, one to three questions of any kind."""
    note = write_note(rng)
    chat: Chat = []
    for turn in range(rng.choice((1, 2, 2, 3, 3))):
        question, answer = questions.draw(rng, note.facts)
        chat += [
            _user(_with_question(rng, note.text, question) if turn == 0 else question),
            _assistant(answer),
        ]
    return chat


def _short_follow_ups(rng: random.Random) -> Chat:
    """The note alone, a polite answer, then short questions."""
    note = write_note(rng)
    chat = [_user(note.text), _assistant(questions.greet_note(rng, note.facts))]
    for _ in range(rng.choice((0, 1, 2, 2))):
        question, answer = questions.draw(rng, note.facts)
        chat += [_user(question), _assistant(answer)]
    return chat


def _which_sentence(rng: random.Random) -> Chat:
    """Repeat one sentence of the note word for word, or all of a short note."""
    note = write_note(rng)
    if rng.random() < 0.3 or not note.sentences:
        ask = rng.choice(("Repeat the note.", "Copy the note word for word.", "Write the note again."))
        return [_user(_with_question(rng, note.text, ask)), _assistant(note.text)]
    slot = rng.choice(sorted(note.sentences))
    label = rng.choice(questions.LABELS[slot])
    ask = rng.choice(
        ("Which sentence gives the {0}?", "Copy the sentence with the {0}.", "Quote the {0} sentence.")
    )
    return [_user(_with_question(rng, note.text, ask.format(label))), _assistant(note.sentences[slot])]


def _two_patients(rng: random.Random) -> Chat:
    """Readings of two or three named patients; the question names one of them."""
    names = rng.sample(NAMES, rng.choice((2, 2, 3)))
    kind = rng.choice(("bp", "hr", "temp", "drug", "symptom", "diagnosis"))
    label = rng.choice(questions.LABELS[kind])
    values = {}
    for name in names:
        facts = mixed_facts(rng)
        values[name] = draw_blood_pressure(rng) if kind == "bp" else str(facts[kind])
    frame = rng.choice(("{0}: {1} {2}.", "{0}: the {1} is {2}.", "For {0} the {1} is {2}."))
    text = " ".join(frame.format(name, label, value) for name, value in values.items())
    chat: Chat = []
    asked = rng.sample(names, rng.choice((1, 2)))
    for turn, name in enumerate(asked):
        ask = f"What is the {label} of {name}?" if turn == 0 else f"And {name}?"
        chat += [
            _user(_with_question(rng, text, ask) if turn == 0 else ask),
            _assistant(f"The {label} of {name} is {values[name]}."),
        ]
    return chat


def _is_it_a_note(rng: random.Random) -> Chat:
    """Tell a visit note from other text."""
    ask = rng.choice(
        ("Is this a clinical note?", "Is this text about a patient?", "Does this look like a note?")
    )
    if rng.random() < 0.5:
        return [_user(_with_question(rng, write_note(rng).text, ask)), _assistant(questions.SAY_NOTE[ask][0])]
    return [
        _user(_with_question(rng, questions.other_text(rng), ask)),
        _assistant(questions.SAY_NOTE[ask][1]),
    ]


_KINDS: tuple[tuple[Callable[[random.Random], Chat], float], ...] = (
    (_interview, 0.62),
    (_short_follow_ups, 0.12),
    (_which_sentence, 0.10),
    (_two_patients, 0.10),
    (_is_it_a_note, 0.06),
)


def conversation(rng: random.Random) -> Chat:
    """One pre-training chat of two to six messages, ending with the assistant."""
    kind = rng.choices([kind for kind, _ in _KINDS], [share for _, share in _KINDS])[0]
    return kind(rng)


def _slot_probe(slot: str, style: str, missing: bool = False) -> Callable[[random.Random], tuple[Chat, str]]:
    def probe(rng: random.Random) -> tuple[Chat, str]:
        note = write_note(rng, absent=(slot,)) if missing else write_note(rng, needed=(slot,))
        question, answer = questions.ask_slot(rng, note.facts, slot, style)
        return [_user(f"{note.text} {question}")], answer

    return probe


def _facts_probe(slots: tuple[str, ...], as_list: bool) -> Callable[[random.Random], tuple[Chat, str]]:
    def probe(rng: random.Random) -> tuple[Chat, str]:
        note = write_note(rng, needed=slots)
        question, answer = questions.ask_several(rng, note.facts, slots, as_list)
        return [_user(f"{note.text} {question}")], answer

    return probe


def _report_probe(kind: str) -> Callable[[random.Random], tuple[Chat, str]]:
    def probe(rng: random.Random) -> tuple[Chat, str]:
        note = write_note(rng, needed=("age", "symptom", "duration", "diagnosis", "drug"))
        question, answer = questions.ask_report(rng, note.facts, kind)
        return [_user(f"{note.text} {question}")], answer

    return probe


PROBES: dict[str, Callable[[random.Random], tuple[Chat, str]]] = {
    "age": _slot_probe("age", "value"),
    "symptom": _slot_probe("symptom", "sentence"),
    "duration": _slot_probe("duration", "value"),
    "blood_pressure": _slot_probe("bp", "value"),
    "heart_rate": _slot_probe("hr", "sentence"),
    "temperature": _slot_probe("temp", "value"),
    "oxygen": _slot_probe("sat", "value"),
    "exam_finding": _slot_probe("exam", "sentence"),
    "impression": _slot_probe("diagnosis", "sentence"),
    "drug_and_dose": _slot_probe("drug", "sentence"),
    "follow_up": _slot_probe("follow_up", "value"),
    "not_recorded": _slot_probe("temp", "value", missing=True),
    "three_facts_in_prose": _facts_probe(("bp", "hr", "drug"), as_list=False),
    "three_facts_in_a_list": _facts_probe(("symptom", "temp", "follow_up"), as_list=True),
    "who_and_why": _report_probe("who"),
    "plan": _report_probe("plan"),
    "whole_note": _report_probe("whole"),
}
