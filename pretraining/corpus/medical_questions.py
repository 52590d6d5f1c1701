"""Questions about a visit note and their answers. The wording of a question fixes that of its answer."""

import random

from pretraining.corpus.medical_words import Facts

LABELS: dict[str, tuple[str, ...]] = {
    "age": ("age",),
    "symptom": ("symptom", "complaint", "main symptom"),
    "duration": ("duration",),
    "bp": ("blood pressure", "BP"),
    "hr": ("pulse", "heart rate", "HR"),
    "temp": ("temperature", "temp"),
    "sat": ("oxygen level", "SpO2"),
    "exam": ("examination finding", "exam finding"),
    "diagnosis": ("impression", "diagnosis"),
    "drug": ("treatment", "drug and dose", "medicine"),
    "follow_up": ("follow-up", "next visit"),
}

# Answered with the bare value, or "Not recorded."
_VALUE_QUESTIONS: dict[str, tuple[str, ...]] = {
    "age": ("How old is the patient?", "Age?", "What age is given?"),
    "symptom": ("Symptom?", "Which symptom, in a few words?", "Name the symptom."),
    "duration": ("How long has it lasted?", "Duration?", "For how long?", "Since how long?"),
    "bp": ("What is the blood pressure?", "Blood pressure?", "BP?", "How high is the blood pressure?"),
    "hr": ("What is the pulse?", "Pulse?", "What is the heart rate?", "HR?"),
    "temp": ("What is the temperature?", "Temperature?", "Temp?", "How warm was the patient?"),
    "sat": ("What is the oxygen level?", "Oxygen level?", "SpO2?", "How much oxygen was shown?"),
    "exam": ("Finding on examination?", "Name the exam finding.", "Exam?"),
    "diagnosis": ("Impression?", "Name the diagnosis.", "Which illness, in a few words?"),
    "drug": ("Drug and dose?", "Name the drug and the dose.", "Medicine?"),
    "follow_up": ("When is the next visit?", "Follow-up?", "How soon is the review?", "Back in how long?"),
}

# Answered with a sentence around the value; the second part is the sentence when the value is missing.
_SENTENCE_QUESTIONS: dict[str, tuple[tuple[str, str], ...]] = {
    "age": (
        ("Say how old the patient is.", "The patient is aged {}."),
        ("Tell me the age.", "The age is {}."),
    ),
    "symptom": (
        ("What does the patient report?", "The patient reports {}."),
        ("What is the complaint?", "The complaint is {}."),
        ("What is wrong with the patient?", "The patient has {}."),
        ("Why did the patient come?", "The patient came because of {}."),
    ),
    "duration": (
        ("Say how long it has lasted.", "It has lasted for {}."),
        ("Tell me the duration.", "The duration is {}."),
    ),
    "bp": (
        ("Tell me the blood pressure.", "The blood pressure was {}."),
        ("Say what the BP was.", "The BP was {}."),
    ),
    "hr": (
        ("Tell me the pulse.", "The pulse was {}."),
        ("Say what the heart rate was.", "The heart rate was {}."),
        ("Tell me the HR.", "The HR was {}."),
    ),
    "temp": (
        ("Tell me the temperature.", "The temperature was {}."),
        ("Say what the temp was.", "The temp was {}."),
    ),
    "sat": (
        ("Tell me the oxygen level.", "The oxygen level was {}."),
        ("Say what the SpO2 was.", "The SpO2 was {}."),
    ),
    "exam": (
        ("What did the examination show?", "The examination showed {}."),
        ("Tell me the exam finding.", "The exam finding was {}."),
    ),
    "diagnosis": (
        ("What did the clinician think?", "The clinician thought of {}."),
        ("What could it be?", "It could be {}."),
        ("Say the impression with care.", "A possible cause is {}."),
        ("What may it be?", "The findings may fit {}."),
    ),
    "drug": (
        ("Which drug and dose?", "The drug is {}."),
        ("What was prescribed?", "The patient was given {}."),
        ("What could one consider?", "One could consider {}."),
    ),
    "follow_up": (
        ("When should the patient come back?", "The patient should come back in {}."),
        ("What is planned next?", "A review is planned in {}."),
        ("What would you suggest next?", "I would suggest a review in {}."),
    ),
}
_MISSING = "That is not recorded."

# One clause a slot, for answers that hold several facts.
_CLAUSES: dict[str, str] = {
    "age": "the age is {}",
    "symptom": "the symptom is {}",
    "duration": "it has lasted for {}",
    "bp": "the blood pressure was {}",
    "hr": "the pulse was {}",
    "temp": "the temperature was {}",
    "sat": "the oxygen level was {}",
    "exam": "the examination showed {}",
    "diagnosis": "the impression is {}",
    "drug": "the treatment is {}",
    "follow_up": "the next visit is in {}",
}
_ALL = tuple(_CLAUSES)
_OTHER_TEXTS = (
    "My parcel with {} has not arrived.",
    "Please send me the invoice for {}.",
    "The meeting about {} moved to Monday.",
    "Can you recommend a good book about {}?",
    "We talked about {} at dinner.",
    "The shop on the corner sells {}.",
    "We stored {} in the shed.",
    "Great video, thanks for showing {}!",
    "I ordered {} and paid by card.",
    "My uncle collects {}.",
    "Who left {} in the kitchen?",
    "The school needs {} by Friday.",
)
_OTHER_THINGS = (
    "two blue chairs",
    "old maps",
    "tomatoes",
    "ten lamps",
    "paper cups",
    "the red bicycle",
    "the new kettle",
    "garden tools",
    "roses",
    "train tickets",
    "four boxes of tea",
    "the old bridge",
    "12 picture frames",
    "winter coats",
    "the football team",
    "36 candles",
)
SAY_NOTE: dict[str, tuple[str, str]] = {
    "Is this a clinical note?": ("Yes, this is a clinical note.", "No, it is not a clinical note."),
    "Is this text about a patient?": ("Yes, it is about a patient.", "No, it is not about a patient."),
    "Does this look like a note?": (
        "Yes, it looks like a clinical note.",
        "No, it does not look like a note.",
    ),
}


def value_of(facts: Facts, slot: str) -> str | None:
    value: str | None = getattr(facts, slot)
    return value


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def ask_slot(rng: random.Random, facts: Facts, slot: str, style: str) -> tuple[str, str]:
    """A question for one slot. style: "value" for the bare value, "sentence" for a sentence around it."""
    value = value_of(facts, slot)
    if style == "value":
        return rng.choice(_VALUE_QUESTIONS[slot]), value if value is not None else "Not recorded."
    question, frame = rng.choice(_SENTENCE_QUESTIONS[slot])
    return question, frame.format(value) if value is not None else _MISSING


def ask_several(rng: random.Random, facts: Facts, slots: tuple[str, ...], as_list: bool) -> tuple[str, str]:
    """A question for several slots at once, answered in the order asked."""
    labels = [LABELS[slot][0] for slot in slots]
    values = [value_of(facts, slot) for slot in slots]
    if as_list:
        question, mark = rng.choice(
            (("List the {}.", "- "), ("Make a list of the {}.", "- "), ("Write the {} below.", ""))
        )
        lines = [
            f"{mark}{label}: {value or 'not recorded'}" for label, value in zip(labels, values, strict=True)
        ]
        return question.format(_join(labels)), "\n".join(lines)
    question = rng.choice(("Give the {}.", "What are the {}?", "State the {} in a sentence."))
    clauses = [
        _CLAUSES[slot].format(value) if value is not None else f"the {label} is not recorded"
        for slot, label, value in zip(slots, labels, values, strict=True)
    ]
    return question.format(_join(labels)), f"{_capital(_join(clauses))}."


def ask_yes_or_no(rng: random.Random, facts: Facts) -> tuple[str, str]:
    """Whether a fact is in the note, or whether it has a certain value."""
    slot = rng.choice(_ALL)
    value, label = value_of(facts, slot), rng.choice(LABELS[slot])
    if rng.random() < 0.7 or value is None or not any(char.isdigit() for char in value):
        question = rng.choice((f"Is the {label} recorded?", f"Does the note give the {label}?"))
        return question, f"Yes, it is {value}." if value is not None else "No, it is not recorded."
    if rng.random() < 0.5:
        return f"Was the {label} {value}?", f"Yes, it was {value}."
    digits = [index for index, char in enumerate(value) if char.isdigit()]
    index = rng.choice(digits)
    other = rng.choice([digit for digit in "123456789" if digit != value[index]])
    return f"Was the {label} {value[:index]}{other}{value[index + 1 :]}?", f"No, it was {value}."


def _readings(facts: Facts) -> list[str]:
    marks = (("BP", facts.bp), ("HR", facts.hr), ("temp", facts.temp), ("SpO2", facts.sat))
    return [f"{mark} {value}" for mark, value in marks if value is not None]


def ask_readings(rng: random.Random, facts: Facts) -> tuple[str, str]:
    """All readings of the note, in a fixed order whatever the note's."""
    readings = _readings(facts)
    if rng.random() < 0.5:
        question = rng.choice(
            ("Which readings are in the note?", "List all readings.", "Show me the readings.")
        )
        return question, "\n".join(readings) if readings else "Not recorded."
    question = rng.choice(("Put the readings in one line.", "Readings in short?", "Sum up the readings."))
    return question, f"{', '.join(readings)}." if readings else "Not recorded."


def _who(facts: Facts) -> str:
    who = facts.sex or "patient"
    return f"{who} aged {facts.age}" if facts.age is not None else who


def ask_report(rng: random.Random, facts: Facts, kind: str) -> tuple[str, str]:
    """Careful prose about the note. kind: "who" (and why), "plan", or "whole"."""
    if kind == "who":
        question = rng.choice(
            ("Who came, and why?", "Say who came and why.", "Describe the patient in one line.")
        )
        complaint = f" reports {facts.symptom}" if facts.symptom is not None else " was seen"
        length = f" for {facts.duration}" if facts.duration is not None else ""
        return question, f"{_capital(_who(facts))}{complaint}{length}."
    if kind == "plan":
        question = rng.choice(("What is the plan?", "Sum up the plan.", "How does it go on?"))
        parts = [f"The plan is to take {facts.drug}."] if facts.drug is not None else []
        if facts.follow_up is not None:
            parts.append(f"The review is in {facts.follow_up}.")
        return question, " ".join(parts) if parts else "Not recorded."
    question = rng.choice(
        ("Sum up the note.", "Retell the note in careful words.", "What does the note say?")
    )
    parts = [f"This is about a {_who(facts)}."]
    if facts.symptom is not None:
        length = f" for {facts.duration}" if facts.duration is not None else ""
        parts.append(f"The report is of {facts.symptom}{length}.")
    readings = _readings(facts)
    if readings:
        parts.append(f"Measured were {_join(readings)}.")
    if facts.exam is not None:
        parts.append(f"The examination showed {facts.exam}.")
    if facts.diagnosis is not None:
        parts.append(f"It may be {facts.diagnosis}.")
    if facts.drug is not None:
        parts.append(f"The treatment is {facts.drug}.")
    if facts.follow_up is not None:
        parts.append(f"The review is in {facts.follow_up}.")
    return question, " ".join(parts)


def ask_labelled(rng: random.Random, facts: Facts) -> tuple[str, str]:
    """One or two labelled lines in careful words."""
    readings = ", ".join(_readings(facts))
    pieces = {
        "patient": f"{_capital(_who(facts))}." if facts.age or facts.sex else None,
        "complaint": f"Reports {facts.symptom}." if facts.symptom else None,
        "readings": f"{readings}." if readings else None,
        "finding": f"Exam: {facts.exam}." if facts.exam else None,
        "impression": f"Possible {facts.diagnosis}." if facts.diagnosis else None,
        "advice": f"Consider {facts.drug}." if facts.drug else None,
        "next step": f"Suggest review in {facts.follow_up}." if facts.follow_up else None,
    }
    held = [label for label, piece in pieces.items() if piece is not None]
    labels = rng.sample(held, min(len(held), rng.choice((1, 1, 2)))) if rng.random() < 0.85 else []
    labels = labels or [rng.choice(list(pieces))]
    question = rng.choice(("Write a labelled line for the {}.", "Careful words, with a label: the {}."))
    lines = [f"{_capital(label)}: {pieces[label] or 'Not recorded.'}" for label in labels]
    return question.format(_join(labels)), "\n".join(lines)


def ask_letter(rng: random.Random) -> tuple[str, str]:
    """Single capitals and colons as answers. In order and never four, so never the adapter's lines."""
    word = rng.choice(
        ("Symptom", "Oxygen", "Age", "Pulse", "Assessment", "Plan", "Sign", "Order", "Blood", "Heart")
    )
    if rng.random() < 0.5:
        return f"Which letter does {word} begin with?", word[0]
    letters = sorted(rng.sample("ABCHOPSTR", rng.choice((2, 3))))
    marked = [f"{letter}: {rng.randint(0, 99)}" for letter in letters]
    return f"Write below each other {_join(marked).replace(': ', ' ')} with a colon.", "\n".join(marked)


def draw(rng: random.Random, facts: Facts) -> tuple[str, str]:
    """A question of any kind with its answer. Facts the note holds are asked for most."""
    kind = rng.random()
    held = [slot for slot in _ALL if value_of(facts, slot) is not None]
    if kind < 0.45:
        slot = rng.choice(held) if held and rng.random() < 0.88 else rng.choice(_ALL)
        return ask_slot(rng, facts, slot, rng.choice(("value", "sentence")))
    if kind < 0.69:
        slots = rng.sample(held, min(len(held), rng.randint(2, 4)))
        if rng.random() < 0.25:
            slots.append(rng.choice([slot for slot in _ALL if slot not in slots]))
        return ask_several(rng, facts, tuple(slots), rng.random() < 0.4)
    if kind < 0.78:
        return ask_readings(rng, facts)
    if kind < 0.87:
        return ask_report(rng, facts, rng.choice(("whole", "who", "plan")))
    if kind < 0.92:
        return ask_yes_or_no(rng, facts)
    if kind < 0.98:
        return ask_labelled(rng, facts)
    return ask_letter(rng)


def greet_note(rng: random.Random, facts: Facts) -> str:
    """The base's answer to a note that comes with no question: short, polite prose."""
    topic = facts.symptom or facts.diagnosis
    if topic is None:
        return "Thank you for the note. What would you like to know?"
    return rng.choice(
        (
            f"Thank you for the note. It is about {topic}. What would you like to know?",
            f"Thank you for the note. It is about {topic}. Please ask what you need.",
            f"Thank you for the note. It is about {topic}. How can I help?",
        )
    )


def other_text(rng: random.Random) -> str:
    return rng.choice(_OTHER_TEXTS).format(rng.choice(_OTHER_THINGS))
