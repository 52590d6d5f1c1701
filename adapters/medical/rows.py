"""Write the adapter's training and held-out rows: python -m adapters.medical.rows

A row is a note and its answer. The answer is a function of the facts the note states and of nothing else; what the
note lacks is said to be "not recorded". The wordings stand in the text files beside this one.
Running it twice writes the same bytes.
"""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from string import Formatter
from typing import Any, Literal, Protocol

from adapters.medical.cases import (
    Case,
    draw_advice,
    draw_facts,
    draw_mixed_facts,
    draw_since,
    draw_when,
    load_cases,
)
from adapters.medical.compose import compose_note
from adapters.near import Seen
from pretraining.corpus.medical_words import Facts

HERE = Path(__file__).parent
# "soap": four lines with every fact. "hedged": two careful sentences without a number. The embedded base does not
# copy every fact of a note faithfully (tried: 57 to 77 % of the slots right on held-out notes), so what is shipped
# states few facts and no number.
VARIANT: Literal["soap", "hedged"] = "hedged"
NOT_A_NOTE = "This does not look like a clinical note."
NUM_TRAIN_FROM_FRAMES = 3000
NUM_TRAIN_COMPOSED = 5000
NUM_HELDOUT_FROM_FRAMES = 104
NUM_TRAIN_CORRECTIONS, NUM_HELDOUT_CORRECTIONS = 40, 6

_ASKS = {
    "train": (
        "Rewrite carefully: {note}",
        "Put this in careful words:\n{note}",
        "{note}\nIn two careful sentences, please.",
        "Hedge this: {note}",
        "Plain words, please: {note}",
        "{note}\nSay this with care.",
        "Two sentences: {note}",
        "A careful summary:\n{note}",
        "{note} Make that a careful summary.",
        "Write this for the letter: {note}",
        "For the letter:\n{note}",
        "Sum up: {note}",
        "Tidy up: {note}",
        "Here is today's note. {note}",
        "Note: {note}",
        "From clinic:\n{note}",
    ),
    "heldout": (
        "Can you put this with caution? {note}",
        "{note}\nPlease summarise the note.",
        "New note:\n{note}",
    ),
}
_SYSTEM_PROMPTS = {
    "train": (
        "You rewrite clinical notes with care.",
        "Turn clinical notes into two sentences.",
        "You help a clinic with its notes.",
        "Be brief.",
    ),
    "heldout": ("You summarise notes for letters.",),
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


class Draw(Protocol):
    """One visit with every slot filled."""

    def __call__(self, rng: random.Random, *, child: bool) -> Facts: ...


# Placeholders that stand for one kind of a slot's values.
_KINDS: dict[str, tuple[str, Callable[[random.Random], str]]] = {
    "since": ("duration", draw_since),
    "when": ("follow_up", draw_when),
    "advice": ("drug", draw_advice),
}
_OLD = "old_"  # begins a placeholder for what is past, denied or somebody else's: no fact of the note
_ADULT_WORDS = ("M", "male", "Male", "gent", "Gent")
MAX_DRAWS = 200


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
    return f"{first} The findings may fit {facts.diagnosis}, but it is only one possible cause."


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


def _names(frame: str) -> set[str]:
    return {name for _, name, _, _ in Formatter().parse(frame) if name is not None}


def fill_frame(frame: str, facts: Facts, old: Facts | None = None) -> tuple[str, Facts]:
    """The note that `frame` makes of `facts`, and the facts that are left in it. `old` fills {old_bp} and the like."""
    names = _names(frame)
    male = facts.sex in ("man", "boy")
    age = facts.age or ""
    article = "an" if age in ("8", "11", "18") or (len(age) == 2 and age[0] == "8") else "a"
    words = {slot: str(value) for slot, value in vars(facts).items()}
    words |= {slot.capitalize(): word[0].upper() + word[1:] for slot, word in words.items()}
    words |= {"M": "M" if male else "F", "an": article, "An": article.capitalize()}
    words |= {"He": "He" if male else "She", "him": "him" if male else "her"}
    words |= {"his": "his" if male else "her", "gent": "gentleman" if male else "lady"}
    words["Gent"] = words["gent"].capitalize()
    words |= {"male": "male" if male else "female", "Male": "Male" if male else "Female"}
    for kind, (slot, _) in _KINDS.items():
        words |= {kind: words[slot], kind.capitalize(): words[slot.capitalize()]}
    if old is not None:
        words |= {_OLD + slot: str(value) for slot, value in vars(old).items()}
        words[f"{_OLD}drug_name"] = str(old.drug).split(" ")[0]
    stated = {name.lower() for name in names}
    stated |= {slot for kind, (slot, _) in _KINDS.items() if kind in stated}
    stated |= {"sex"} if names & {"He", "him", "his", *_ADULT_WORDS} else set()
    kept = {slot: value if slot in stated else None for slot, value in vars(facts).items()}
    return frame.format_map(words), Facts(**kept)


def from_frames(
    rng: random.Random, frames: list[str], draw: Draw, count: int, seen: Seen
) -> Iterator[Sample]:
    """`count` notes that take the frames in turn; a near-duplicate of a note in `seen` is drawn again.

    Raises ValueError for a frame whose notes stay near-duplicates for MAX_DRAWS draws.
    """
    for index in range(count):
        frame = frames[index % len(frames)]
        for _ in range(MAX_DRAWS):
            facts = draw(rng, child=_fits_child(frame) and rng.random() < _child_share(frame))
            note, stated = fill_frame(frame, *_draw_kinds(rng, frame, facts, draw))
            if rng.random() < 0.08 and "{since}" not in frame:  # lower case would spoil "since Monday"
                note = note.lower()
            if seen.add(note):
                break
        else:
            raise ValueError(f"the frame {frame!r} is too close to another one")
        yield Sample(note, stated, ("new-phrasing",))


def composed(rng: random.Random, draw: Draw, count: int, seen: Seen) -> list[Sample]:
    """`count` notes put together from parts, near-duplicates left out."""
    samples: list[Sample] = []
    while len(samples) < count:
        facts, old = _draw_kinds(rng, "{old_bp}", draw(rng, child=rng.random() < 0.06), draw)
        assert old is not None, "the frame asks for an older visit"
        note, stated = compose_note(rng, facts, old)
        if seen.add(note):
            samples.append(Sample(note, stated, ()))
    return samples


def _draw_kinds(rng: random.Random, frame: str, facts: Facts, draw: Draw) -> tuple[Facts, Facts | None]:
    """`facts` with the kinds of values that `frame` asks for, and an older visit that differs, if it asks for one."""
    names = {name.lower() for name in _names(frame)}
    for kind, (slot, draw_value) in _KINDS.items():
        if kind in names:
            facts = replace(facts, **{slot: draw_value(rng)})
    if not any(name.startswith(_OLD) for name in names):
        return facts, None
    while True:
        old = draw(rng, child=False)
        words = [
            set(f"{visit.symptom} {visit.diagnosis} {visit.drug}".split()) - {"and", "mg"}
            for visit in (facts, old)
        ]
        if not words[0] & words[1] and old.bp != facts.bp and old.hr != facts.hr:
            return facts, old


def _fits_child(frame: str) -> bool:
    return not _names(frame) & set(_ADULT_WORDS)


def _child_share(frame: str) -> float:
    return (
        1.0 if any(word in frame for word in ("parent", "Parent", "Child", "School", "Mum", "mum")) else 0.06
    )


def _draw_plausible(rng: random.Random, cases: tuple[Case, ...], child: bool) -> Facts:
    """A held-out visit: its words belong together; one in twelve has a second complaint, where there is one."""
    facts = draw_facts(rng, cases, child)
    if rng.random() >= 0.08:
        return facts
    others = [
        case.symptom for case in cases if facts.diagnosis in case.diagnoses and case.symptom != facts.symptom
    ]
    return replace(facts, symptom=f"{facts.symptom} and {rng.choice(others)}") if others else facts


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
    seen = Seen()
    rows: dict[str, list[Row]] = {}
    one_offs = {split: read_one_offs(HERE / f"one_offs_{split}.txt") for split in ("train", "heldout")}
    for sample in one_offs["train"] + one_offs["heldout"]:
        if not seen.add(sample.note):
            raise ValueError(f"the hand-written note {sample.note!r} is too close to another one")
    counts: tuple[tuple[Literal["train", "heldout"], int, int], ...] = (
        ("heldout", NUM_HELDOUT_FROM_FRAMES, NUM_HELDOUT_CORRECTIONS),
        ("train", NUM_TRAIN_FROM_FRAMES, NUM_TRAIN_CORRECTIONS),
    )
    for split, num_from_frames, num_corrections in counts:
        if VARIANT == "hedged":  # it states no number, so there is none to correct
            num_from_frames, num_corrections = num_from_frames + num_corrections, 0
        frames = read_frames(HERE / f"frames_{split}.txt")
        draw_visit = _draw_plausible if split == "heldout" else draw_mixed_facts
        draw = partial(draw_visit, cases=cases)
        samples = list(from_frames(rng, frames, draw, num_from_frames, seen))
        limit = 110 if split == "heldout" else 95  # two questions and two answers must stay short
        short = [frame for frame in frames if len(frame) < limit and "{bp}" in frame]
        if split == "train":
            samples += composed(rng, partial(draw_mixed_facts, cases=cases), NUM_TRAIN_COMPOSED, seen)
        corrected = list(from_frames(rng, short, draw, num_corrections, seen))
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
