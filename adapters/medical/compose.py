"""Training notes put together from parts: each fact under one of many labels, in any order, joined in any way.

The frames of frames_train.txt are whole notes; a reader taught by them alone copies a fact well where it has seen
the words before it, and loses it behind a label it has not ("Verdict: tonsillitis"). Here the labels are drawn
freely, some of them made up, so that a fact must be known by what it says and not by what stands before it.
Written without frames_heldout.txt; rows.py keeps out what comes near a held-out note all the same.
"""

import random
import re
from collections.abc import Mapping
from dataclasses import replace

from pretraining.corpus.medical_words import Facts

_WHO = (
    "{age}{M}", "{M}{age}", "{M}/{age}", "{M} {age}", "{age} {M}", "pt {age}{M}",
    "{age} {sex}", "{sex} {age}", "{Sex}, {age}", "{Sex} ({age})", "{age} yo {sex}", "{age}-year-old {sex}",
    "{An} {age}-year-old {sex}", "{An} {age} year old {sex}", "patient: {sex}, {age}", "age {age}, {sex}",
    "a {sex} of {age}", "{sex} of {age} years", "{Sex}, {age} years old", "this is {an} {age} year old {sex}",
    "{age}y {sex}", "{sex} aged {age}", "seen today: {sex}, {age}", "next: {sex} {age}", "{Sex} in room 2, {age}",
)  # fmt: skip
_WHO_WITHOUT_SEX = ("aged {age}", "age {age}", "{age} years", "{age} yrs", "pt, {age}", "patient of {age}")
_SYMPTOM = (
    "{symptom}", "{Symptom}", "c/o {symptom}", "complains of {symptom}", "complaining of {symptom}",
    "presents with {symptom}", "presenting with {symptom}", "p/w {symptom}", "troubled by {symptom}",
    "bothered by {symptom}", "suffering from {symptom}", "reports {symptom}", "describes {symptom}",
    "comes for {symptom}", "here because of {symptom}", "came in about {symptom}", "problem: {symptom}",
    "issue: {symptom}", "CC: {symptom}", "HPC {symptom}", "story of {symptom}", "with {symptom}", "has {symptom}",
    "has got {symptom}", "had {symptom}", "noticed {symptom}", "worried about {symptom}", "asks about {symptom}",
    "wants something for {symptom}", "mentions {symptom}", "the main thing is {symptom}", "sx: {symptom}",
    "symptoms - {symptom}", "trouble is {symptom}", "S: {symptom}", "subjective: {symptom}", "visit for {symptom}",
    "seen for {symptom}", "in with {symptom}", "back with {symptom}", "woke up with {symptom}",
    "developed {symptom}", "now {symptom}", "today {symptom}", "reason for coming: {symptom}", "gets {symptom}",
    "feels {symptom}", "{Symptom} brings {him} here", "{Symptom} is the complaint", "referred for {symptom}",
    "rang about {symptom}", "phone call about {symptom}", "says {he} has {symptom}", "struggles with {symptom}",
    "cannot sleep for {symptom}", "off work with {symptom}", "told the nurse of {symptom}", "1) {symptom}",
    "main symptom {symptom}", "presenting problem = {symptom}", "hx: {symptom}", "complaint >> {symptom}",
)  # fmt: skip
_DURATION = (
    " for {duration}", " x {duration}", ", {duration}", " ({duration})", " {duration}", " over {duration}",
    ", going on {duration}", " lasting {duration}", ", started {duration} ago", "; {duration} now",
    ", onset {duration} ago", " of {duration}", " - {duration}", ", for about {duration}", ", some {duration}",
    " these {duration}", " in the last {duration}", ", duration {duration}", "/{duration}",
)  # fmt: skip
_VITAL = {
    "bp": ("BP {bp}", "bp {bp}", "BP: {bp}", "blood pressure {bp}", "pressure {bp}", "BP was {bp}"),
    "hr": ("HR {hr}", "P {hr}", "pulse {hr}", "pulse: {hr}", "heart rate {hr}", "PR {hr}"),
    "temp": ("T {temp}", "temp {temp}", "temperature {temp}", "T: {temp}", "temp was {temp}"),
    "sat": ("sats {sat}", "SpO2 {sat}", "O2 {sat}", "oxygen {sat}", "sat {sat} on air"),
}
_EXAM = (
    "O/E {exam}", "exam: {exam}", "found {exam}", "exam shows {exam}", "there is {exam}", "noted {exam}",
    "signs: {exam}", "ex: {exam}", "objective: {exam}", "{Exam} seen", "{Exam} on exam", "{Exam} noted",
    "{exam}", "looking at it: {exam}", "examination {exam}", "O: {exam}", "we saw {exam}", "could find {exam}",
    "physical: {exam}", "PE {exam}", "status: {exam}", "findings - {exam}", "{Exam} present", "{Exam} found",
)  # fmt: skip
_DIAGNOSIS = (
    "Dx {diagnosis}", "Dx: {diagnosis}", "dx = {diagnosis}", "diagnosis: {diagnosis}", "diagnosis {diagnosis}",
    "imp: {diagnosis}", "impression {diagnosis}", "?{diagnosis}", "? {diagnosis}", "{Diagnosis}?",
    "likely {diagnosis}", "probably {diagnosis}", "prob {diagnosis}", "most likely {diagnosis}",
    "suspect {diagnosis}", "suspected {diagnosis}", "looks like {diagnosis}", "seems to be {diagnosis}",
    "sounds like {diagnosis}", "fits {diagnosis}", "in keeping with {diagnosis}", "consistent with {diagnosis}",
    "compatible with {diagnosis}", "suggests {diagnosis}", "suggestive of {diagnosis}", "points to {diagnosis}",
    "thought to be {diagnosis}", "treated as {diagnosis}", "working diagnosis {diagnosis}",
    "assessment: {diagnosis}", "A: {diagnosis}", "A/ {diagnosis}", "conclusion: {diagnosis}",
    "opinion: {diagnosis}", "verdict: {diagnosis}", "my guess is {diagnosis}", "guess: {diagnosis}",
    "I think {diagnosis}", "I would say {diagnosis}", "must be {diagnosis}", "could be {diagnosis}",
    "may be {diagnosis}", "perhaps {diagnosis}", "query {diagnosis}", "{Diagnosis} it is",
    "{Diagnosis} most likely", "{Diagnosis} suspected", "{Diagnosis} I think", "{Diagnosis} by the look of it",
    "label: {diagnosis}", "cause: {diagnosis}", "summary: {diagnosis}", "coded as {diagnosis}", "= {diagnosis}",
    "-> {diagnosis}", "=> {diagnosis}", "so {diagnosis}", "i.e. {diagnosis}", "I call it {diagnosis}",
    "put down as {diagnosis}", "recorded as {diagnosis}", "told {him} it is {diagnosis}", "explained {diagnosis}",
    "agreed on {diagnosis}", "down to {diagnosis}", "due to {diagnosis}", "because of {diagnosis}",
    "all from {diagnosis}", "thinking of {diagnosis}", "in mind: {diagnosis}", "differential: {diagnosis}",
    "picture of {diagnosis}", "typical {diagnosis}", "{Diagnosis} presumed", "{Diagnosis} assumed",
    "{Diagnosis} in my view", "{Diagnosis} comes to mind", "first thought {diagnosis}", "theory: {diagnosis}",
    "hypothesis - {diagnosis}", "appears to be {diagnosis}", "has the look of {diagnosis}",
    "reads as {diagnosis}", "clinically {diagnosis}", "provisional: {diagnosis}", "final: {diagnosis}",
    "interpretation: {diagnosis}", "judged to be {diagnosis}", "taken for {diagnosis}", "considering {diagnosis}",
)  # fmt: skip
_DRUG = (
    "Rx {drug}", "Rx: {drug}", "plan: {drug}", "P: {drug}", "given {drug}", "started {drug}", "start {drug}",
    "prescribed {drug}", "gave {drug}", "Tx {drug}", "treat with {drug}", "try {drug}", "trial of {drug}",
    "advised {drug}", "to take {drug}", "meds: {drug}", "{Drug} prescribed", "{Drug} started", "{Drug} given",
    "on {drug}", "issued {drug}", "offered {drug}", "script for {drug}", "{drug}", "{Drug} to take home",
    "therapy: {drug}", "medication {drug}", "will have {drug}", "goes home with {drug}", "{Drug} should help",
)  # fmt: skip
_FOLLOW_UP = (
    "RV {follow_up}", "review in {follow_up}", "FU {follow_up}", "f/u in {follow_up}", "back in {follow_up}",
    "see again in {follow_up}", "recheck in {follow_up}", "return in {follow_up}", "next visit in {follow_up}",
    "again in {follow_up}", "control {follow_up}", "RTC {follow_up}", "call in {follow_up}", "look again {follow_up}",
)  # fmt: skip
# What is past, denied or somebody else's. No fact of the note.
_OTHER = (
    "PMH {old_diagnosis}", "PMHx: {old_diagnosis}", "known {old_diagnosis}", "h/o {old_diagnosis}",
    "had {old_diagnosis} last year", "had {old_diagnosis} as a child", "past: {old_diagnosis}",
    "previous {old_diagnosis}", "old {old_diagnosis}, settled", "mother had {old_diagnosis}",
    "father with {old_diagnosis}", "FH {old_diagnosis}", "brother has {old_diagnosis}", "no {old_symptom}",
    "denies {old_symptom}", "without {old_symptom}", "{Old_symptom} denied", "no sign of {old_diagnosis}",
    "not {old_diagnosis}", "{Old_diagnosis} ruled out", "no more {old_symptom}", "last visit for {old_symptom}",
    "{Old_drug} stopped", "was on {old_drug}", "{Old_drug} did not help", "wife has {old_symptom}",
    "smoker", "does not smoke", "lives alone", "works nights", "no allergies", "allergic to nuts", "well otherwise",
    "walks with a stick", "here with a friend", "busy day", "interpreter used", "seen by the locum",
)  # fmt: skip
_SEPARATORS = (". ", ". ", ". ", ". ", ", ", "; ", "\n", " - ", " / ", " | ", ".  ", " // ", " ... ")
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
_PRONOUNS = {"man": ("he", "him"), "boy": ("he", "him"), "woman": ("she", "her"), "girl": ("she", "her")}


def compose_note(rng: random.Random, facts: Facts, old: Facts) -> tuple[str, Facts]:
    """A note that states some of `facts`, and those it states. `old` is what is past, denied or somebody else's."""
    parts: list[tuple[str, str]] = []
    stated: dict[str, str | None] = dict.fromkeys(vars(facts))
    child = facts.sex in ("boy", "girl")
    roll = rng.random()
    if roll < 0.8:
        parts.append(("who", rng.choice([who for who in _WHO if not child or "{M}" not in who])))
        stated |= {"sex": facts.sex, "age": facts.age}
    elif roll < 0.9:
        parts.append(("who", rng.choice(_WHO_WITHOUT_SEX)))
        stated["age"] = facts.age
    if rng.random() < 0.93:
        text = rng.choice(_SYMPTOM)
        stated["symptom"] = facts.symptom
        if rng.random() < 0.7 and "{symptom}" in text and text.endswith("{symptom}"):
            text += rng.choice(_DURATION)
            stated["duration"] = facts.duration
        parts.append(("symptom", text))
    for slot in rng.sample(tuple(_VITAL), rng.choice((0, 1, 1, 2, 2, 3, 4))):
        parts.append((slot, rng.choice(_VITAL[slot])))
        stated[slot] = getattr(facts, slot)
    for slot, share, labels in (
        ("exam", 0.5, _EXAM),
        ("diagnosis", 0.88, _DIAGNOSIS),
        ("drug", 0.6, _DRUG),
        ("follow_up", 0.5, _FOLLOW_UP),
    ):
        if rng.random() < share:
            parts.append((slot, rng.choice(labels)))
            stated[slot] = getattr(facts, slot)
    if not {"symptom", "diagnosis"} & {name for name, _ in parts}:
        parts.append(("symptom", rng.choice(_SYMPTOM)))
        stated["symptom"] = facts.symptom
    parts = [(name, _labelled(rng, name, text)) for name, text in parts]
    for _ in range(rng.choice((0, 0, 0, 1, 1, 2))):
        parts.insert(rng.randrange(len(parts) + 1), ("other", rng.choice(_OTHER)))
    if rng.random() < 0.35:
        rng.shuffle(parts)
    elif rng.random() < 0.3:
        moved = parts.pop(rng.randrange(len(parts)))
        parts.insert(rng.randrange(len(parts) + 1), moved)
    return _write(rng, [text for _, text in parts], facts, old), replace(facts, **stated)


def _labelled(rng: random.Random, name: str, text: str) -> str:
    """Now and then a label nobody has read before."""
    if name in ("symptom", "diagnosis", "exam", "drug") and rng.random() < 0.1:
        word = "".join(rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(rng.randint(1, 3)))
        mark = rng.choice((": ", " ", " - ", ". ", " = "))
        return f"{rng.choice((word, word.capitalize(), word.upper()[:3]))}{mark}{{{name}}}"
    return text


def _write(rng: random.Random, texts: list[str], facts: Facts, old: Facts) -> str:
    he, him = _PRONOUNS[str(facts.sex)]
    age = str(facts.age)
    article = "an" if age in ("8", "11", "18") or (len(age) == 2 and age[0] == "8") else "a"
    words = {slot: str(value) for slot, value in vars(facts).items()}
    words |= {f"old_{slot}": str(value) for slot, value in vars(old).items()}
    words |= {slot.capitalize(): word[0].upper() + word[1:] for slot, word in words.items()}
    words |= {
        "M": "M" if he == "he" else "F",
        "he": he,
        "him": him,
        "an": article,
        "An": article.capitalize(),
    }
    if rng.random() < 0.12:
        texts = [_mistyped(rng, text) for text in texts]
    separator = rng.choice(_SEPARATORS)
    filled = [text.format_map(words) for text in texts]
    if separator in (". ", "\n", ".  ") and rng.random() < 0.85:
        filled = [text[0].upper() + text[1:] for text in filled]
    note = separator.join(filled)
    note = note if separator != ". " or rng.random() < 0.15 else f"{note}."
    return note.lower() if rng.random() < 0.1 else note


def _mistyped(rng: random.Random, text: str) -> str:
    """Two letters of one word swapped; the words of a slot stay as they are, since they are to be copied."""
    pieces: Mapping[int, str] = dict(enumerate(re.split(r"(\{\w+\})", text)))
    plain = [
        index
        for index, piece in pieces.items()
        if not piece.startswith("{") and re.search(r"[a-z]{4}", piece)
    ]
    if not plain:
        return text
    index = rng.choice(plain)
    match = rng.choice(list(re.finditer(r"[a-z]{4,}", pieces[index])))
    at = match.start() + rng.randint(1, len(match.group()) - 3)
    piece = pieces[index]
    changed = piece[:at] + piece[at + 1] + piece[at] + piece[at + 2 :]
    return "".join(changed if i == index else own for i, own in pieces.items())
