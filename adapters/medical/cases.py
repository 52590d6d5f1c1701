"""Which finding, impression and drug may stand beside which complaint in the adapter's rows.

The words are those of pretraining/corpus/medical_words.py, put together in cases.txt so that a note reads as
one visit. For language practice only: nothing here says how anyone should be treated.
"""

import random
from dataclasses import dataclass, replace
from pathlib import Path

from pretraining.corpus.medical_words import COMPLAINTS, Facts, draw_blood_pressure, draw_duration

# What a child's note may hold: common complaints, small doses.
_CHILD_SYMPTOMS = ("sore throat", "left ear pain", "fever", "runny nose", "dry cough", "vomiting", "hives")
_CHILD_DRUGS = ("paracetamol 250 mg", "paracetamol 120 mg", "ibuprofen 100 mg")
# Complaints counted in hours and days, and complaints counted in weeks and months; others take any unit.
_SHORT = (
    "fever, chills, body aches, fever and headache, vomiting, loose stools, watery diarrhea, nausea, "
    "toothache, swollen jaw, burn on the hand, cut on the finger, infected insect bite, red warm shin, "
    "twisted ankle, hives, swollen ankle, back pain after lifting, red eye, sticky eye, sore left eye, "
    "swollen eyelid, painful big toe, swollen toe, burning on passing urine, cloudy urine, flank pain, "
    "runny nose, sore throat, scratchy throat, left ear pain, right ear pain, pain on swallowing, cough "
    "with yellow sputum, wet cough, stiff neck"
)
_LONG = (
    "weight loss, tiredness, numb feet, hair loss, constant thirst, low mood, poor sleep, early waking, "
    "hip pain, constant worry, stiff knees in the morning, breathless on stairs, flaky scalp, dry skin, "
    "ringing in the ear, numb fingers, frequent urination, bloating after meals, acid taste in the "
    "mouth, heartburn, swollen ankles"
)
_HOT = ("fever", "chills", "body aches", "night sweats", "fever and headache", "cough with yellow sputum")
_FREQUENCY_OF = {
    "amoxicillin": "three times daily",
    "penicillin": "every 6 hours",
    "doxycycline": "once daily",
    "trimethoprim": "twice daily",
    "nitrofurantoin": "twice daily",
    "flucloxacillin": "every 6 hours",
    "clarithromycin": "twice daily",
    "metronidazole": "three times daily",
    "paracetamol": "as needed",
    "ibuprofen": "with food",
    "naproxen": "twice daily",
    "celecoxib": "once daily",
    "cetirizine": "daily",
    "loratadine": "daily",
    "fexofenadine": "once daily",
    "omeprazole": "once daily",
    "lansoprazole": "once daily",
    "montelukast": "at night",
    "sertraline": "once daily",
    "citalopram": "once daily",
    "melatonin": "at night",
    "amitriptyline": "at night",
    "metformin": "twice daily",
    "ferrous sulfate": "once daily",
    "furosemide": "daily",
    "bisoprolol": "daily",
    "loperamide": "as needed",
    "senna": "at night",
    "betahistine": "three times daily",
}

_SINCE = (
    "since Monday, since Tuesday, since Thursday, since Friday, since Sunday, since yesterday, since last week, "
    "since the weekend, since this morning, since last month, since March, since June"
)
_WHEN = "tomorrow, if worse, if no better, if not better, if needed, if no change, if it comes back"
_ADVICE = (
    "rest, fluids, fluids and rest, heat and rest, ice and rest, blood test, chest film, urine test, ear drops, "
    "salt water rinse, daily walks, less salt, warm drinks"
)


@dataclass(frozen=True)
class Case:
    """One line of cases.txt."""

    symptom: str
    exams: tuple[str, ...]
    diagnoses: tuple[str, ...]
    drugs: tuple[str, ...]  # names alone; the doses are in medical_words.py


def load_cases(path: Path) -> tuple[Case, ...]:
    """Read "symptom | a / b | a / b | a / b" lines; lines that begin with # are comments."""
    cases = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            symptom, *cells = (cell.strip() for cell in line.split("|"))
            exams, diagnoses, drugs = (tuple(part.strip() for part in cell.split("/")) for cell in cells)
            cases.append(Case(symptom, exams, diagnoses, drugs))
    return tuple(cases)


def draw_facts(rng: random.Random, cases: tuple[Case, ...], child: bool) -> Facts:
    """One visit with every slot filled; callers keep what their frame states."""
    doses = {name: strengths for complaint in COMPLAINTS for name, strengths in complaint.drugs}
    case = rng.choice([case for case in cases if not child or case.symptom in _CHILD_SYMPTOMS])
    name = rng.choice(case.drugs)
    drug = rng.choice(_CHILD_DRUGS) if child else f"{name} {rng.choice(doses[name])}"
    if not child and name in _FREQUENCY_OF and rng.random() < 0.3:
        drug = f"{drug} {_FREQUENCY_OF[name]}"
    systolic = rng.randint(88, 116) if child else rng.randint(102, 172)
    hot = case.symptom in _HOT or rng.random() < 0.15
    temperatures = (377, 394) if hot else (361, 375)
    return Facts(
        age=str(rng.randint(3, 14) if child else rng.randint(18, 91)),
        sex=rng.choice(("boy", "girl") if child else ("man", "woman")),
        symptom=case.symptom,
        duration=_draw_duration(rng, case.symptom),
        bp=f"{systolic}/{round(systolic * rng.uniform(0.54, 0.68))}",
        hr=str(rng.randint(78, 126) if child else rng.randint(54, 116)),
        temp=f"{rng.randint(*temperatures) / 10}",
        sat=f"{rng.randint(91, 99)}%",
        exam=rng.choice(case.exams),
        diagnosis=rng.choice(case.diagnoses),
        drug=drug,
        follow_up=_draw_follow_up(rng),
    )


def draw_mixed_facts(rng: random.Random, cases: tuple[Case, ...], child: bool) -> Facts:
    """One visit for training, with every slot filled.

    In half of the draws symptom, finding, impression and drug come from unrelated visits: a value must then be
    copied from where the note states it, for it cannot be guessed from the others. A slot sometimes holds "x and y".
    """
    facts = draw_facts(rng, cases, child)
    if rng.random() < 0.5:
        finding, thought, plan = (draw_facts(rng, cases, child) for _ in range(3))
        facts = replace(facts, exam=finding.exam, diagnosis=thought.diagnosis, drug=plan.drug)
    if rng.random() < 0.3:
        facts = replace(facts, bp=draw_blood_pressure(rng), duration=draw_duration(rng))
    other = draw_facts(rng, cases, child)
    for slot, joints, share in (
        ("symptom", (" and ", " and ", " with "), 0.22),
        ("exam", (" and ", ", "), 0.12),
        ("diagnosis", (" or ", " and "), 0.05),
        ("drug", (" and ",), 0.05),
    ):
        first, second = getattr(facts, slot), getattr(other, slot)
        if rng.random() < share and first.split(" ")[0] != second.split(" ")[0]:
            facts = replace(facts, **{slot: f"{first}{rng.choice(joints)}{second}"})
    return facts


def draw_since(rng: random.Random) -> str:
    """A duration that names its beginning: "since Monday"."""
    return rng.choice(_SINCE.split(", "))


def draw_when(rng: random.Random) -> str:
    """A follow-up without a number: "if worse"."""
    return rng.choice(_WHEN.split(", "))


def draw_advice(rng: random.Random) -> str:
    """A plan without a drug: "rest", "blood test"."""
    return rng.choice(_ADVICE.split(", "))


def _draw_duration(rng: random.Random, symptom: str) -> str:
    days = (
        *[f"{rng.randint(2, 12)} days"] * 6,
        f"{rng.randint(5, 30)} hours",
        "two days",
        "three days",
        "a few days",
    )
    weeks = (
        *[f"{rng.randint(2, 9)} weeks"] * 4,
        *[f"{rng.randint(2, 11)} months"] * 2,
        "two weeks",
        "a month",
    )
    if symptom in _SHORT.split(", "):
        return rng.choice(days)
    return (
        rng.choice(weeks)
        if symptom in _LONG.split(", ")
        else rng.choice(days + weeks + ("a week", "a fortnight"))
    )


def _draw_follow_up(rng: random.Random) -> str:
    draw = rng.random()
    if draw < 0.45:
        return f"{rng.randint(2, 14)} days"
    if draw < 0.75:
        return f"{rng.randint(2, 8)} weeks"
    if draw < 0.85:
        return f"{rng.randint(2, 6)} months"
    return rng.choice(("a week", "two weeks", "one week", "a month", "48 hours", "a fortnight"))
