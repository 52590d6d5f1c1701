"""Writes visit notes: sentences or telegram style, facts in any order, every value known to the writer.

The sentence frames belong to the pre-training corpus alone; the adapter's rows have their own.
"""

import random
from dataclasses import dataclass

from pretraining.corpus.medical_words import (
    COMPLAINTS,
    FREQUENCIES,
    Facts,
    draw_drug,
    draw_facts,
    draw_name,
)

# Who the note is about. {who} is "man", "woman", ...; the subject word of later sentences follows from it.
_OPENINGS_AGE_SEX = (
    "The patient is {an} {age}-year-old {sex}.",
    "{An} {age}-year-old {sex} came to the clinic today.",
    "A {sex} aged {age} was seen this morning.",
    "This {sex} is {age} years old.",
    "I saw a {sex} of {age} today.",
    "Today's visit was with {an} {age} year old {sex}.",
    "{name} is {an} {age}-year-old {sex}.",
    "{name}, a {sex} aged {age}, was seen in the surgery.",
    "Patient: {sex}, {age} years.",
    "{age} yo {sex} seen.",
    "{name} ({sex}, {age}) came by.",
)
_OPENINGS_SEX = ("The patient is a {sex}.", "A {sex} came in today.", "This {sex} was seen by the nurse.")
_OPENINGS_AGE = ("The patient is aged {age}.", "The patient is {age} years old.", "Age {age}.")

# Slots that one sentence states together, with its wordings. {He}, {His}, {him} follow from the opening.
_SENTENCES: dict[tuple[str, ...], tuple[str, ...]] = {
    ("symptom", "duration"): (
        "{He} has had {symptom} for {duration}.",
        "{He} reports {symptom} for {duration}.",
        "{He} complains of {symptom} that began {duration} ago.",
        "The trouble is {symptom}, going on for {duration}.",
        "{He} came because of {symptom}, present for {duration}.",
        "For {duration} {he} has noticed {symptom}.",
        "For the last {duration} there has been {symptom}.",
        "There is {symptom}; it has lasted {duration}.",
        "{He} describes {symptom} over {duration}.",
        "Main complaint {symptom}, duration {duration}.",
        "{He} has been bothered by {symptom} for about {duration}.",
        "It is {symptom} that brings {him} here. It started {duration} ago.",
        "{He} was well until {symptom} started {duration} ago.",
        "c/o {symptom} for {duration}.",
    ),
    ("symptom",): (
        "{He} reports {symptom}.",
        "{He} has {symptom}.",
        "{He} complains of {symptom}.",
        "The reason for the visit is {symptom}.",
        "{He} mentions {symptom}.",
        "{He} came in with {symptom}.",
        "The main problem is {symptom}.",
    ),
    ("bp", "hr"): (
        "{His} blood pressure was {bp} and {his} pulse was {hr}.",
        "We measured a blood pressure of {bp} with a pulse of {hr}.",
        "Pulse {hr} and blood pressure {bp} on arrival.",
        "BP was {bp}, HR was {hr}.",
        "The heart rate was {hr} and the blood pressure {bp}.",
    ),
    ("bp", "temp"): (
        "Blood pressure was {bp} and temperature {temp}.",
        "The temperature was {temp} with a BP of {bp}.",
    ),
    ("hr", "temp"): (
        "The pulse was {hr} and the temperature was {temp}.",
        "Temperature measured {temp}, heart rate {hr}.",
    ),
    ("bp", "hr", "temp"): (
        "On arrival the BP was {bp}, the HR {hr} and the temp {temp}.",
        "Readings: blood pressure {bp}, pulse {hr}, temperature {temp}.",
        "The nurse noted temperature {temp}, pulse {hr}, blood pressure {bp}.",
        "Heart rate was {hr}, temperature {temp} and blood pressure {bp}.",
    ),
    ("bp",): (
        "{His} blood pressure was {bp}.",
        "Blood pressure measured {bp}.",
        "The BP today is {bp}.",
        "The cuff showed {bp}.",
        "We found a blood pressure of {bp}.",
        "Blood pressure in the left arm was {bp}.",
    ),
    ("hr",): (
        "{His} pulse was {hr}.",
        "The heart rate was {hr}.",
        "Pulse was counted at {hr}.",
        "The HR was {hr} beats a minute.",
        "{His} heart beat {hr} times a minute.",
        "The pulse is {hr} and regular.",
    ),
    ("temp",): (
        "{His} temperature was {temp}.",
        "The thermometer read {temp}.",
        "Temperature was taken as {temp}.",
        "{He} had a temp of {temp} degrees.",
        "The temperature today is {temp}.",
    ),
    ("sat",): (
        "The oxygen level was {sat}.",
        "Oxygen was {sat} on room air.",
        "The finger probe showed {sat}.",
        "The SpO2 was {sat} at rest.",
    ),
    ("exam",): (
        "On examination there was {exam}.",
        "The doctor saw {exam}.",
        "Looking closer we found {exam}.",
        "The examination showed {exam}.",
        "Exam notes say {exam}.",
        "The finding was {exam}.",
    ),
    ("diagnosis",): (
        "This is probably {diagnosis}.",
        "The impression is {diagnosis}.",
        "The doctor thinks of {diagnosis}.",
        "It looks like {diagnosis}.",
        "We suspect {diagnosis}.",
        "The likely cause is {diagnosis}.",
        "Most likely this is {diagnosis}.",
        "I think it is {diagnosis}.",
        "The diagnosis given was {diagnosis}.",
        "The picture fits {diagnosis}.",
    ),
    ("drug",): (
        "{He} was given {drug}.",
        "We started {drug}.",
        "The doctor prescribed {drug}.",
        "{He} will take {drug}.",
        "The treatment is {drug}.",
        "A prescription for {drug} was written.",
        "{He} should use {drug}.",
        "I gave {him} {drug}.",
    ),
    ("follow_up",): (
        "{He} will come back in {follow_up}.",
        "We will see {him} again in {follow_up}.",
        "The next visit is in {follow_up}.",
        "A review was set in {follow_up}.",
        "Follow-up is planned in {follow_up}.",
        "We check again in {follow_up}.",
        "{He} was asked to return in {follow_up}.",
    ),
    ("diagnosis", "drug"): (
        "It is treated as {diagnosis} with {drug}.",
        "For {diagnosis} {he} was given {drug}.",
        "We started {drug} for what seems to be {diagnosis}.",
    ),
    ("drug", "follow_up"): (
        "{He} takes {drug} and comes back in {follow_up}.",
        "We gave {drug} and will check in {follow_up}.",
        "{He} goes home with {drug}, next visit in {follow_up}.",
    ),
}
_FILLERS = (
    "{He} feels well otherwise.",
    "{He} lives alone.",
    "No allergies are known.",
    "{He} does not smoke.",
    "The family is well.",
    "{He} works in an office.",
    "{He} slept badly.",
    "No other problems were found.",
    "We talked about rest and fluids.",
)
_SUBJECTS = {
    "man": ("He", "His", "him"),
    "boy": ("He", "His", "him"),
    "woman": ("She", "Her", "her"),
    "girl": ("She", "Her", "her"),
    None: ("The patient", "The patient's", "the patient"),
}
# Telegram style: fragments, joined by one separator.
_FRAGMENTS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("age", "sex"): ("{age} y {sex}", "{sex} {age}", "pt {sex} {age} yrs", "{age}{M}", "{M} {age}"),
    ("symptom", "duration"): (
        "sx {symptom} {duration}",
        "{duration} of {symptom}",
        "{symptom}, {duration} now",
    ),
    ("symptom",): ("sx {symptom}", "{symptom} present", "main issue {symptom}"),
    ("bp",): ("BP = {bp}", "blood pressure {bp}", "pressure {bp}", "bp read {bp}"),
    ("hr",): ("HR = {hr}", "pulse {hr}", "heart {hr}/min", "hr read {hr}"),
    ("temp",): ("temp = {temp}", "temperature {temp}", "T = {temp}", "temp read {temp}"),
    ("sat",): ("oxygen {sat}", "SpO2 = {sat}", "O2 read {sat}"),
    ("exam",): ("exam shows {exam}", "seen: {exam}", "on exam: {exam}"),
    ("diagnosis",): (
        "maybe {diagnosis}",
        "thought: {diagnosis}",
        "working diagnosis {diagnosis}",
        "prob. {diagnosis}",
    ),
    ("drug",): ("given {drug}", "tx {drug}", "started on {drug}", "meds now {drug}"),
    ("follow_up",): ("again in {follow_up}", "next look in {follow_up}", "seen again in {follow_up}"),
}
_SEPARATORS = (", ", "; ", ". ", " / ", "\n", " - ")
_SLOTS = ("symptom", "duration", "bp", "hr", "temp", "sat", "exam", "diagnosis", "drug", "follow_up")
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeio"
_DRUG_ENDINGS = ("mol", "pril", "zol", "tin", "cin", "dine", "xan", "vir", "mide", "lone")
_DOSE_UNITS = ("mg", "mg", "mg", "ml", "drops", "units")


@dataclass(frozen=True)
class Note:
    """A written note and what it states; a slot that is None is not in the text."""

    text: str
    facts: Facts
    sentences: dict[str, str]  # slot -> the sentence that states it


def _invented_drug(rng: random.Random) -> str:
    name = "".join(
        rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(rng.randint(1, 3))
    ) + rng.choice(_DRUG_ENDINGS)
    return f"{name} {rng.randint(1, 900)} {rng.choice(_DOSE_UNITS)}"


def mixed_facts(rng: random.Random) -> dict[str, str | None]:
    """Facts whose parts often do not belong together: only reading the note gives them."""
    facts = dict(vars(draw_facts(rng)))
    if rng.random() < 0.6:
        facts["symptom"] = rng.choice(rng.choice(COMPLAINTS).symptoms)
        facts["exam"] = rng.choice(rng.choice(COMPLAINTS).exams)
        facts["diagnosis"] = rng.choice(rng.choice(COMPLAINTS).diagnoses)
        facts["drug"] = draw_drug(rng, rng.choice(COMPLAINTS))
    if rng.random() < 0.3:
        facts["drug"] = _invented_drug(rng)
    if rng.random() < 0.25:
        name = str(facts["drug"]).split(" ")[0]
        facts["drug"] = f"{name} {rng.randint(1, 990)} mg"
        if rng.random() < 0.3:
            facts["drug"] += f" {rng.choice(FREQUENCIES)}"
    if rng.random() < 0.12:
        pair = rng.sample(rng.choice(COMPLAINTS).symptoms, 2)
        facts["symptom"] = f"{pair[0]} and {pair[1]}"
    return facts


def _opening(rng: random.Random, facts: dict[str, str | None]) -> tuple[str, tuple[str, ...]]:
    """The first sentence and the slots it states."""
    draw = rng.random()
    if draw < 0.65:
        return rng.choice(_OPENINGS_AGE_SEX), ("age", "sex")
    if draw < 0.75:
        return rng.choice(_OPENINGS_SEX), ("sex",)
    if draw < 0.85:
        return rng.choice(_OPENINGS_AGE), ("age",)
    return "", ()


def _groups(
    rng: random.Random, wanted: set[str], table: dict[tuple[str, ...], tuple[str, ...]]
) -> list[tuple[str, ...]]:
    """Split the wanted slots into sentences, in a random order, the symptom often first."""
    left, groups = set(wanted), []
    candidates = [group for group in table if len(group) > 1]
    rng.shuffle(candidates)
    for group in candidates:
        if left.issuperset(group) and rng.random() < (0.9 if "duration" in group else 0.45):
            groups.append(group)
            left.difference_update(group)
    groups.extend((slot,) for slot in sorted(left) if slot != "duration")
    rng.shuffle(groups)
    if rng.random() < 0.6:
        groups.sort(key=lambda group: "symptom" not in group)
    return groups


def _fill(rng: random.Random, facts: dict[str, str | None], sex_is_stated: bool) -> dict[str, str]:
    """What the frames' braces stand for."""
    sex, age = str(facts["sex"]), str(facts["age"])
    subject, possessive, him = _SUBJECTS[sex if sex_is_stated else None]
    fill = {key: value for key, value in facts.items() if value is not None}
    fill |= {"name": draw_name(rng, sex), "He": subject, "he": subject[0].lower() + subject[1:]}
    fill |= {"His": possessive, "his": possessive[0].lower() + possessive[1:], "him": him}
    article = "an" if age in ("8", "11", "18") or (len(age) == 2 and age[0] == "8") else "a"
    return fill | {"an": article, "An": article.capitalize(), "M": "M" if sex in ("man", "boy") else "F"}


def write_note(rng: random.Random, needed: tuple[str, ...] = (), absent: tuple[str, ...] = ()) -> Note:
    """A note of two to six sentences that states every slot in `needed` and none in `absent`."""
    facts = mixed_facts(rng)
    optional = [slot for slot in _SLOTS if slot not in needed and slot not in absent]
    size = max(0, rng.choice((2, 3, 3, 4, 4, 5, 6)) - len(needed))
    wanted = set(needed).intersection(_SLOTS) | set(rng.sample(optional, min(size, len(optional))))
    if "duration" in wanted:
        wanted.add("symptom")
    opening, stated = _opening(rng, facts)
    if needed and not set(needed).difference(wanted).issubset(stated):
        opening, stated = rng.choice(_OPENINGS_AGE_SEX), ("age", "sex")
    terse = rng.random() < 0.3
    table = _FRAGMENTS if terse else _SENTENCES
    groups = _groups(rng, wanted, table)
    kept = {slot for group in groups for slot in group}.union(stated)
    if "duration" in needed and "duration" not in kept:
        groups = [group if group != ("symptom",) else ("symptom", "duration") for group in groups]
        kept.add("duration")

    fill = _fill(rng, facts, "sex" in stated)
    lines = [(group, rng.choice(table[group])) for group in groups]
    if terse and stated == ("age", "sex"):
        opening = rng.choice(_FRAGMENTS[stated])
    if opening:
        lines.insert(0, ((), opening))
    if not terse and rng.random() < 0.2:
        lines.insert(rng.randint(1, len(lines)), ((), rng.choice(_FILLERS)))
    if opening and rng.random() < 0.12:
        lines.append(lines.pop(0))

    sentences, written = {}, []
    lower = rng.random() < (0.25 if terse else 0.06)
    for group, frame in lines:
        sentence = frame.format_map(fill)
        if not terse:
            sentence = sentence[0].upper() + sentence[1:]
        sentence = sentence.lower() if lower else sentence
        written.append(sentence.rstrip(".") if terse else sentence)
        sentences.update(dict.fromkeys(group, written[-1]))
    known = {slot: value if slot in kept else None for slot, value in facts.items()}
    separator = rng.choice(_SEPARATORS) if terse else rng.choice(("\n", *[" "] * 14))
    return Note(
        separator.join(written) + ("." if terse and separator in ", . ;" else ""), Facts(**known), sentences
    )
