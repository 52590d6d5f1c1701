"""Words and values of the medical domain: what a visit note may say. Lists and draws only, no sentences.

Shared by the pre-training corpus (medical.py) and by the rows of the shipped adapter, so that the small base
has read every word the adapter meets. Every list entry is lower case, so that a value reads the same wherever
it stands in a sentence. A picture of common complaints for language practice; nothing here is medical advice.
"""

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Facts:
    """What one visit note states. None: the note does not say."""

    age: str | None = None  # "34"
    sex: str | None = None  # "man", "woman", "boy" or "girl"
    symptom: str | None = None
    duration: str | None = None  # "3 days": what can follow "for"
    bp: str | None = None  # "132/84"
    hr: str | None = None  # "88"
    temp: str | None = None  # "37.9"
    sat: str | None = None  # "96%"
    exam: str | None = None
    diagnosis: str | None = None
    drug: str | None = None  # with its dose: "ibuprofen 400 mg"
    follow_up: str | None = None  # "7 days": what can follow "in"


@dataclass(frozen=True)
class Complaint:
    """Words that go together on one visit. A drug is written as name and the doses it is drawn with."""

    symptoms: tuple[str, ...]
    exams: tuple[str, ...]
    diagnoses: tuple[str, ...]
    drugs: tuple[tuple[str, tuple[str, ...]], ...]


def _words(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _drugs(text: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Parse "name: dose | dose, name: dose" into pairs."""
    pairs = []
    for entry in text.split(","):
        name, doses = entry.split(":")
        pairs.append((name.strip(), tuple(dose.strip() for dose in doses.split("|"))))
    return tuple(pairs)


COMPLAINTS: tuple[Complaint, ...] = (
    Complaint(
        _words("dry cough, wet cough, chesty cough, cough at night, cough with yellow sputum, tight chest"),
        _words("mild wheeze on the left, coarse breath sounds, clear lungs, crackles at the right base"),
        _words("viral bronchitis, acute bronchitis, chest infection, mild pneumonia, post-viral cough"),
        _drugs("amoxicillin: 500 mg | 250 mg, doxycycline: 100 mg | 200 mg, guaifenesin: 200 mg | 400 mg"),
    ),
    Complaint(
        _words("sore throat, hoarse voice, pain on swallowing, scratchy throat, swollen glands"),
        _words("red tonsils, white spots on the tonsils, tender neck glands, red throat"),
        _words("viral sore throat, tonsillitis, strep throat, laryngitis, glandular fever"),
        _drugs("penicillin: 250 mg | 500 mg, paracetamol: 500 mg | 1000 mg, ibuprofen: 200 mg | 400 mg"),
    ),
    Complaint(
        _words("left ear pain, right ear pain, blocked ear, itchy ear, ringing in the ear, ear discharge"),
        _words("red left eardrum, red right eardrum, wax in both ears, swollen ear canal"),
        _words("middle ear infection, outer ear infection, ear wax, tinnitus, ear canal eczema"),
        _drugs("amoxicillin: 500 mg | 250 mg, cetirizine: 10 mg | 5 mg, paracetamol: 500 mg"),
    ),
    Complaint(
        _words("low back pain, stiff back, back pain after lifting, pain down the left leg, upper back pain"),
        _words("tender lower back, normal leg strength, tight back muscles, limited forward bend"),
        _words("muscle strain, lumbar strain, sciatica, mechanical back pain, slipped disc"),
        _drugs("naproxen: 250 mg | 500 mg, ibuprofen: 400 mg | 600 mg, codeine: 15 mg | 30 mg"),
    ),
    Complaint(
        _words(
            "headache, throbbing headache, one-sided headache, headache with nausea, pain behind the eyes"
        ),
        _words("normal eye movements, tender scalp, no neck stiffness, normal reflexes"),
        _words("tension headache, migraine, cluster headache, medication headache, eye strain"),
        _drugs("sumatriptan: 50 mg | 100 mg, aspirin: 300 mg | 600 mg, propranolol: 10 mg | 40 mg | 80 mg"),
    ),
    Complaint(
        _words("itchy rash, red rash on the arms, dry skin, hives, flaky scalp, rash on the hands"),
        _words("red patches on both arms, raised wheals, dry scaly skin, small blisters on the hands"),
        _words("contact dermatitis, eczema, hives, psoriasis, fungal skin infection"),
        _drugs("loratadine: 10 mg, cetirizine: 10 mg, terbinafine: 250 mg, fluconazole: 50 mg | 150 mg"),
    ),
    Complaint(
        _words("right knee pain, left knee pain, swollen knee, stiff knees in the morning, hip pain"),
        _words("small knee effusion, tender joint line, full knee movement, stiff right hip"),
        _words("knee arthritis, knee sprain, bursitis, meniscus tear, hip arthritis"),
        _drugs("celecoxib: 100 mg | 200 mg, naproxen: 250 mg | 500 mg, paracetamol: 500 mg | 1000 mg"),
    ),
    Complaint(
        _words("burning on passing urine, frequent urination, lower belly pain, cloudy urine, flank pain"),
        _words("soft tender lower belly, tender right flank, cloudy urine sample, no flank pain"),
        _words("bladder infection, urinary infection, kidney infection, kidney stone, cystitis"),
        _drugs("trimethoprim: 200 mg | 100 mg, nitrofurantoin: 50 mg | 100 mg, cefalexin: 500 mg"),
    ),
    Complaint(
        _words("loose stools, vomiting, nausea, stomach cramps, watery diarrhea, poor appetite"),
        _words("soft belly, dry mouth, active bowel sounds, mild belly tenderness"),
        _words("gastroenteritis, food poisoning, stomach flu, irritable bowel, mild dehydration"),
        _drugs("loperamide: 2 mg | 4 mg, ondansetron: 4 mg | 8 mg, metoclopramide: 10 mg, hyoscine: 10 mg"),
    ),
    Complaint(
        _words("heartburn, acid taste in the mouth, burning stomach pain, bloating after meals, belching"),
        _words("tender upper belly, soft belly, bloated belly, no belly mass"),
        _words("acid reflux, gastritis, stomach ulcer, indigestion, hiatus hernia"),
        _drugs("omeprazole: 20 mg | 40 mg, lansoprazole: 15 mg | 30 mg, famotidine: 20 mg | 40 mg"),
    ),
    Complaint(
        _words("runny nose, sneezing, blocked nose, itchy eyes, watery eyes, face pain"),
        _words("pale swollen nose lining, red eyes, tender cheeks, clear nose discharge"),
        _words("hay fever, common cold, sinusitis, dust allergy, allergic rhinitis"),
        _drugs("loratadine: 10 mg, fexofenadine: 120 mg | 180 mg, cetirizine: 10 mg | 5 mg"),
    ),
    Complaint(
        _words("wheezing, shortness of breath, breathless on stairs, wheeze at night, tightness on exercise"),
        _words("wheeze on both sides, long out-breath, quiet breath sounds, fast breathing"),
        _words("asthma flare, mild asthma, chronic bronchitis, exercise asthma, anxiety attack"),
        _drugs("prednisolone: 30 mg | 40 mg, montelukast: 10 mg | 5 mg, theophylline: 200 mg"),
    ),
    Complaint(
        _words("poor sleep, low mood, constant worry, panic at work, early waking, racing thoughts"),
        _words("calm and alert, tense and restless, tired appearance, slow speech"),
        _words("mild anxiety, insomnia, low mood, stress reaction, burnout"),
        _drugs("sertraline: 50 mg | 25 mg, melatonin: 2 mg | 3 mg, citalopram: 10 mg | 20 mg"),
    ),
    Complaint(
        _words("dizziness, spinning feeling, light head on standing, unsteady walking, fainting once"),
        _words("normal gait, drop in pressure on standing, flicker of the eyes, steady stance"),
        _words("vertigo, low blood pressure, inner ear inflammation, dehydration, simple faint"),
        _drugs("betahistine: 8 mg | 16 mg, cinnarizine: 15 mg | 30 mg, prochlorperazine: 5 mg"),
    ),
    Complaint(
        _words("palpitations, skipped beats, racing heart, swollen ankles, mild chest ache"),
        _words("irregular pulse, soft heart murmur, ankle swelling, normal heart sounds"),
        _words("high blood pressure, extra beats, heart failure, thyroid excess, atrial flutter"),
        _drugs(
            "bisoprolol: 2.5 mg | 5 mg, amlodipine: 5 mg | 10 mg, furosemide: 20 mg | 40 mg, ramipril: 5 mg"
        ),
    ),
    Complaint(
        _words("constant thirst, weight loss, tiredness, numb feet, blurred vision, hair loss"),
        _words("reduced feeling in the feet, pale skin, dry skin on the feet, slightly large thyroid"),
        _words("type 2 diabetes, low iron, thyroid deficiency, nerve pain, anemia"),
        _drugs("metformin: 500 mg | 850 mg, gliclazide: 40 mg | 80 mg, ferrous sulfate: 200 mg"),
    ),
    Complaint(
        _words("red eye, sticky eye, gritty eyes, swollen eyelid, sore left eye, sore right eye"),
        _words("red left eye, sticky discharge, swollen lower lid, clear cornea"),
        _words("conjunctivitis, dry eyes, stye, eyelid inflammation, corneal scratch"),
        _drugs("chloramphenicol: 1 drop | 2 drops, doxycycline: 100 mg, ibuprofen: 200 mg | 400 mg"),
    ),
    Complaint(
        _words(
            "swollen toe, painful big toe, sore heel, twisted ankle, pain in the left foot, swollen ankle"
        ),
        _words("red swollen big toe, bruise on the ankle, tender heel, able to bear weight"),
        _words("gout, ankle sprain, heel pain, stress fracture, tendon strain"),
        _drugs("colchicine: 0.5 mg | 1 mg, allopurinol: 100 mg | 300 mg, diclofenac: 25 mg | 50 mg"),
    ),
    Complaint(
        _words("stiff neck, right shoulder pain, left shoulder pain, wrist pain, elbow pain, numb fingers"),
        _words("limited shoulder lift, tight neck muscles, tender elbow, weak grip on the right"),
        _words("frozen shoulder, neck strain, tennis elbow, carpal tunnel, rotator cuff strain"),
        _drugs("diclofenac: 50 mg | 75 mg, gabapentin: 100 mg | 300 mg, amitriptyline: 10 mg | 25 mg"),
    ),
    Complaint(
        _words("hard stools, constipation, bleeding on wiping, belly bloating, straining at stool"),
        _words("full lower belly, small skin tag, mild bloating, no fissure seen"),
        _words("constipation, piles, anal fissure, slow bowel, low fluid intake"),
        _drugs("senna: 7.5 mg | 15 mg, bisacodyl: 5 mg | 10 mg, docusate: 100 mg | 200 mg"),
    ),
    Complaint(
        _words("fever, chills, body aches, night sweats, shivering, fever and headache"),
        _words("warm and flushed, red throat, clear lungs, no rash"),
        _words("flu, viral fever, viral illness, early pneumonia, tooth abscess"),
        _drugs("oseltamivir: 75 mg, paracetamol: 500 mg | 1000 mg, ibuprofen: 200 mg | 400 mg"),
    ),
    Complaint(
        _words(
            "red warm shin, infected insect bite, burn on the hand, cut on the finger, swollen jaw, toothache"
        ),
        _words("warm red shin, clean shallow wound, swollen gum, small blister on the hand"),
        _words("cellulitis, infected bite, minor burn, gum infection, wound infection"),
        _drugs(
            "flucloxacillin: 500 mg | 250 mg, clarithromycin: 250 mg | 500 mg, metronidazole: 400 mg | 200 mg"
        ),
    ),
)

FREQUENCIES = _words("daily, once daily, twice daily, three times daily, at night, every 8 hours, as needed")
DURATION_UNITS = (("hours", 2, 36), ("days", 2, 14), ("weeks", 2, 11), ("months", 2, 18))
DURATION_WORDS = _words(
    "a week, two days, three days, a month, two weeks, a few days, one day, a fortnight, a year"
)
FOLLOW_UPS = (("days", 2, 14), ("weeks", 2, 12), ("months", 2, 6))
FOLLOW_UP_WORDS = _words(
    "a week, two days, one week, two weeks, a month, a fortnight, three months, 48 hours"
)
MALE_NAMES = _words(
    "Ben, David, Farid, Hugo, Jonas, Kemal, Marek, Omar, Simon, Viktor, Yusuf, Amir, Bruno, Emil, Georg, Ivan"
)
FEMALE_NAMES = _words(
    "Anna, Carla, Elena, Grace, Ines, Lina, Nadia, Petra, Rosa, Tessa, Wendy, Zoe, Clara, Dina, Fiona, Hana"
)
NAMES = MALE_NAMES + FEMALE_NAMES
MEN_AND_WOMEN = ("man", "woman")
CHILDREN = ("boy", "girl")


def draw_duration(rng: random.Random) -> str:
    if rng.random() < 0.2:
        return rng.choice(DURATION_WORDS)
    unit, low, high = rng.choice(DURATION_UNITS)
    return f"{rng.randint(low, high)} {unit}"


def draw_follow_up(rng: random.Random) -> str:
    if rng.random() < 0.2:
        return rng.choice(FOLLOW_UP_WORDS)
    unit, low, high = rng.choice(FOLLOW_UPS)
    return f"{rng.randint(low, high)} {unit}"


def draw_drug(rng: random.Random, complaint: Complaint, frequency_share: float = 0.2) -> str:
    """A drug of the complaint with a dose it is commonly sold in; sometimes with how often."""
    name, doses = rng.choice(complaint.drugs)
    drug = f"{name} {rng.choice(doses)}"
    return f"{drug} {rng.choice(FREQUENCIES)}" if rng.random() < frequency_share else drug


def draw_blood_pressure(rng: random.Random) -> str:
    systolic = rng.randint(92, 188)
    return f"{systolic}/{round(systolic * rng.uniform(0.5, 0.72))}"


def draw_name(rng: random.Random, sex: str) -> str:
    return rng.choice(MALE_NAMES if sex in ("man", "boy") else FEMALE_NAMES)


def draw_facts(rng: random.Random) -> Facts:
    """Every fact of one visit, from words that go together. Callers drop what their sentence leaves out."""
    complaint = rng.choice(COMPLAINTS)
    child = rng.random() < 0.1
    return Facts(
        age=str(rng.randint(3, 15) if child else rng.randint(18, 94)),
        sex=rng.choice(CHILDREN if child else MEN_AND_WOMEN),
        symptom=rng.choice(complaint.symptoms),
        duration=draw_duration(rng),
        bp=draw_blood_pressure(rng),
        hr=str(rng.randint(48, 128)),
        temp=f"{rng.randint(358, 398) / 10}",
        sat=f"{rng.randint(89, 100)}%",
        exam=rng.choice(complaint.exams),
        diagnosis=rng.choice(complaint.diagnoses),
        drug=draw_drug(rng, complaint),
        follow_up=draw_follow_up(rng),
    )
