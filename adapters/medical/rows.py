"""Write the adapter's training and held-out rows: python -m adapters.medical.rows

A row is a note and its answer. The answer is a function of the facts the note states and of nothing else: a row
can be scored slot by slot, and a slot that the note lacks reads "Not recorded." The wordings stand in the
text files beside this one. Running it twice writes the same bytes.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from string import Formatter
from typing import Any, Literal

from adapters.medical.cases import Case, draw_facts, load_cases
from pretraining.corpus.medical_words import Facts

HERE = Path(__file__).parent
# "soap": four lines with every fact. "hedged": two careful sentences without a number, for a base that cannot
# copy values faithfully.
VARIANT: Literal["soap", "hedged"] = "soap"
NOT_A_NOTE = "This does not look like a clinical note."
NUM_TRAIN_FROM_FRAMES = 620
NUM_HELDOUT_FROM_FRAMES = 104
NUM_TRAIN_CORRECTIONS, NUM_HELDOUT_CORRECTIONS = 14, 6
MAX_SHARED_TRIGRAMS = 0.5  # Jaccard of the word 3-grams of two notes; above it they count as near-duplicates

_ASKS = {
    "train": (
        "SOAP please: {note}",
        "Make a SOAP note:\n{note}",
        "Structure this note: {note}",
        "{note}\nAs SOAP, please.",
        "Turn into SOAP: {note}",
    ),
    "heldout": ("Can you SOAP this? {note}", "{note}\nPlease structure the note.", "New note:\n{note}"),
}
_SYSTEM_PROMPTS = {
    "train": ("You write SOAP notes.", "Turn clinical notes into SOAP.", "You help a clinic with its notes."),
    "heldout": ("You structure notes as SOAP.",),
}
_CORRECTIONS = {
    "train": (
        "Correction: the {label} is {value}.",
        "Sorry, {label} should be {value}.",
        "{label} was {value}.",
    ),
    "heldout": ("I made a mistake, the {label} is {value}.", "Change the {label} to {value} please."),
}
_LABELS = {"bp": "BP", "hr": "pulse", "temp": "temp", "follow_up": "review time"}  # what gets corrected

Row = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """A note, what it states (None: it is no clinical note), and the tags of a held-out row."""

    note: str
    facts: Facts | None
    tags: tuple[str, ...]


def answer(facts: Facts | None) -> str:
    """The expected answer for a note that states `facts`."""
    if facts is None:
        return NOT_A_NOTE
    return _soap(facts) if VARIANT == "soap" else _hedged(facts)


def _soap(facts: Facts) -> str:
    who = (facts.sex or "patient").capitalize()
    subjective = f"{who} aged {facts.age}" if facts.age is not None else who
    if facts.symptom is not None:
        subjective += f" reports {facts.symptom}"
        if facts.duration is not None:
            subjective += f" {_after(facts.duration, 'for', ('since',))}"
    readings = [
        f"{mark} {value}"
        for mark, value in (("BP", facts.bp), ("HR", facts.hr), ("temp", facts.temp), ("SpO2", facts.sat))
        if value is not None
    ]
    objective = [", ".join(readings)] if readings else []
    objective += [f"Exam: {facts.exam}"] if facts.exam is not None else []
    plan = [f"Consider {facts.drug}"] if facts.drug is not None else []
    if facts.follow_up is not None:
        plan.append(f"Suggest review {_after(facts.follow_up, 'in', ('if', 'tomorrow'))}")
    return "\n".join(
        (
            f"S: {_sentences([] if subjective == 'Patient' else [subjective])}",
            f"O: {_sentences(objective)}",
            f"A: {_sentences([f'Possible {facts.diagnosis}'] if facts.diagnosis is not None else [])}",
            f"P: {_sentences(plan)}",
        )
    )


def _hedged(facts: Facts) -> str:
    who = f"The {facts.sex or 'patient'}"
    first = f"{who} reports {facts.symptom}." if facts.symptom is not None else f"{who} was seen."
    if facts.diagnosis is None:
        return f"{first} The cause is not recorded."
    return f"{first} The findings may fit {facts.diagnosis}, but this is not certain."


def _after(value: str, word: str, without: tuple[str, ...]) -> str:
    """`value` after a preposition, unless its own first word already serves as one."""
    return value if value.split(" ")[0] in without else f"{word} {value}"


def _sentences(parts: list[str]) -> str:
    return " ".join(f"{part}." for part in parts) if parts else "Not recorded."


def read_frames(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line.replace("\\n", "\n") for line in lines if line and not line.startswith("#")]


def read_one_offs(path: Path) -> list[Sample]:
    """Read N:/F: pairs and X: lines. Raises ValueError for a line that is none of these."""
    samples: list[Sample] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        kind, _, rest = line.partition(": ")
        if kind == "N":
            note = rest.replace("\\n", "\n")
        elif kind == "F":
            slots = dict(cell.split(" ", 1) for cell in rest.split(" | "))
            samples.append(Sample(note, Facts(**slots), ("edge", "new-phrasing")))
        elif kind == "X":
            samples.append(Sample(rest, None, ("off-topic",)))
        elif line and not line.startswith("#"):
            raise ValueError(f"{path.name}: line {line!r} begins with none of 'N: ', 'F: ', 'X: ', '#'")
    return samples


def fill_frame(frame: str, facts: Facts) -> tuple[str, Facts]:
    """The note that `frame` makes of `facts`, and the facts that are left in it."""
    names = {name for _, name, _, _ in Formatter().parse(frame) if name is not None}
    male = facts.sex in ("man", "boy")
    age = facts.age or ""
    article = "an" if age in ("8", "11", "18") or (len(age) == 2 and age[0] == "8") else "a"
    words = {slot: str(value) for slot, value in vars(facts).items()}
    words |= {slot.capitalize(): word[0].upper() + word[1:] for slot, word in words.items()}
    words |= {"M": "M" if male else "F", "an": article, "An": article.capitalize()}
    words |= {"He": "He" if male else "She", "him": "him" if male else "her"}
    stated = {name.lower() for name in names} | ({"sex"} if names & {"M", "He", "him"} else set())
    kept = {slot: value if slot in stated else None for slot, value in vars(facts).items()}
    return frame.format_map(words), Facts(**kept)


def from_frames(
    rng: random.Random, frames: list[str], cases: tuple[Case, ...], count: int, seen: list[set[str]]
) -> Iterator[Sample]:
    """`count` notes that take the frames in turn; a near-duplicate of a note in `seen` is drawn again."""
    for index in range(count):
        frame = frames[index % len(frames)]
        while True:
            facts = draw_facts(rng, cases, child=_fits_child(frame) and rng.random() < _child_share(frame))
            if rng.random() < 0.08:
                facts = _with_second_symptom(rng, facts, cases)
            note, stated = fill_frame(frame, facts)
            if rng.random() < 0.08:
                note = note.lower()
            if is_new(note, seen):
                break
        yield Sample(note, stated, ("new-phrasing",))


def _fits_child(frame: str) -> bool:
    return "{M}" not in frame


def _child_share(frame: str) -> float:
    return (
        1.0 if any(word in frame for word in ("parent", "Parent", "Child", "School", "Mum", "mum")) else 0.06
    )


def _with_second_symptom(rng: random.Random, facts: Facts, cases: tuple[Case, ...]) -> Facts:
    """Another complaint of the same impression, where there is one."""
    others = [
        case.symptom for case in cases if facts.diagnosis in case.diagnoses and case.symptom != facts.symptom
    ]
    return replace(facts, symptom=f"{facts.symptom} and {rng.choice(others)}") if others else facts


def trigrams(text: str) -> set[str]:
    words = "".join(char if char.isalnum() else " " for char in text.lower()).split()
    return {" ".join(words[index : index + 3]) for index in range(max(1, len(words) - 2))}


def is_new(note: str, seen: list[set[str]]) -> bool:
    """Whether no note in `seen` shares too many 3-grams with `note`; a new note is added to `seen`."""
    own = trigrams(note)
    if any(len(own & other) >= MAX_SHARED_TRIGRAMS * len(own | other) for other in seen):
        return False
    seen.append(own)
    return True


def to_row(rng: random.Random, sample: Sample, split: Literal["train", "heldout"]) -> Row:
    """A chat row; one note in eight stands in a request, one in sixteen comes after a system message."""
    content = sample.note
    if rng.random() < 0.125:
        content = rng.choice(_ASKS[split]).format(note=content)
    messages = [_message("user", content), _message("assistant", answer(sample.facts))]
    if rng.random() < 0.0625:
        messages.insert(0, _message("system", rng.choice(_SYSTEM_PROMPTS[split])))
    return {"messages": messages} if split == "train" else {"messages": messages, "tags": list(sample.tags)}


def to_correction(
    rng: random.Random, sample: Sample, other: Facts, split: Literal["train", "heldout"]
) -> Row:
    """A chat in which one fact is corrected after the first answer. `other` gives the new value."""
    assert sample.facts is not None, "a correction needs a clinical note"
    slot = rng.choice([slot for slot in _LABELS if getattr(sample.facts, slot) is not None])
    value = getattr(other, slot)
    fixed = replace(sample.facts, **{slot: value})
    follow_up = rng.choice(_CORRECTIONS[split]).format(label=_LABELS[slot], value=value)
    messages = [_message("user", sample.note), _message("assistant", answer(sample.facts))]
    messages += [_message("user", follow_up[0].upper() + follow_up[1:]), _message("assistant", answer(fixed))]
    return {"messages": messages} if split == "train" else {"messages": messages, "tags": ["correction"]}


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def make_rows() -> dict[str, list[Row]]:
    """Both sets, held-out notes first, so that a training note near one of them is never written."""
    rng = random.Random(20)
    cases = load_cases(HERE / "cases.txt")
    seen: list[set[str]] = []
    rows: dict[str, list[Row]] = {}
    one_offs = {split: read_one_offs(HERE / f"one_offs_{split}.txt") for split in ("train", "heldout")}
    for sample in one_offs["train"] + one_offs["heldout"]:
        if not is_new(sample.note, seen):
            raise ValueError(f"the hand-written note {sample.note!r} is too close to another one")
    counts: tuple[tuple[Literal["train", "heldout"], int, int], ...] = (
        ("heldout", NUM_HELDOUT_FROM_FRAMES, NUM_HELDOUT_CORRECTIONS),
        ("train", NUM_TRAIN_FROM_FRAMES, NUM_TRAIN_CORRECTIONS),
    )
    for split, num_from_frames, num_corrections in counts:
        if VARIANT == "hedged":  # it states no number, so there is none to correct
            num_corrections = 0
        frames = read_frames(HERE / f"frames_{split}.txt")
        samples = list(from_frames(rng, frames, cases, num_from_frames, seen))
        short = [frame for frame in frames if len(frame) < 110 and "{bp}" in frame]
        corrected = list(from_frames(rng, short, cases, num_corrections, seen))
        rows[split] = [to_row(rng, sample, split) for sample in samples + one_offs[split]]
        rows[split] += [
            to_correction(rng, sample, draw_facts(rng, cases, False), split) for sample in corrected
        ]
        rng.shuffle(rows[split])
    return rows


def write_rows() -> None:
    for split, rows in make_rows().items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (HERE / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    write_rows()
