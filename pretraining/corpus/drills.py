"""Drills in chat form: exact copying, lists, key-value look-up, and small talk.

Copying from the prompt (induction) is what a small model learns last and what every adapter needs, so these chats
train it densely: most of their tokens are answers that stand word for word in the question. No drill uses the output
format of a shipped adapter; the label words occur here as plain words only, so that the base learns to emit them.
"""

import random
from collections.abc import Callable, Sequence

from pretraining.corpus.words import CONSONANTS, KEYS, LABELS, NAMES, THINGS, VOWELS, WORDS

Message = dict[str, str]
Drill = Callable[[random.Random], list[Message]]

UNITS = ("days", "weeks", "hours", "months", "mg", "mcg", "minutes", "years")
ROUND_NUMBERS = (5, 10, 20, 25, 40, 50, 75, 100, 125, 150, 200, 250, 300, 400, 500, 600, 750, 800, 1000)


def chat(question: str, answer: str) -> list[Message]:
    """One question and one answer as chat messages."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def syllable_word(rng: random.Random) -> str:
    """A word of one to three random syllables, of no meaning."""
    return "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(rng.randint(1, 3)))


def number(rng: random.Random) -> str:
    """A number as it stands in business text: a count, a pressure, a decimal, a code, an amount, a time."""
    kind = rng.randrange(9)
    if kind == 0:
        return f"{rng.randint(90, 190)}/{rng.randint(50, 110)}"
    if kind == 1:
        return f"{rng.randint(34, 41)}.{rng.randint(0, 9)}"
    if kind == 2:
        return f"{rng.choice('ABCDEFGHKLMNPRSTW')}{rng.choice(['', '-'])}{rng.randint(100, 99999)}"
    if kind == 3:
        return f"${rng.randint(1, 999)}.{rng.randint(0, 99):02d}"
    if kind == 4:
        return f"{rng.randint(1, 9)}{rng.randint(0, 9)}:{rng.randint(0, 59):02d}"
    if kind == 5:
        return f"#{rng.randint(1000, 999999)}"
    if kind == 6:
        return f"{rng.randint(1, 30)} {rng.choice(UNITS)}"
    if kind == 7:
        return str(rng.choice(ROUND_NUMBERS))
    return str(rng.randint(0, 10 ** rng.randint(1, 6)))


def item(rng: random.Random) -> str:
    """One thing to copy: a real word, a number, a label word, a name or a random word."""
    kind = rng.random()
    if kind < 0.30:
        return rng.choice(WORDS)
    if kind < 0.62:
        return number(rng)
    if kind < 0.72:
        return rng.choice(LABELS)
    if kind < 0.80:
        return rng.choice(NAMES)
    return syllable_word(rng)


def sequence(rng: random.Random, low: int, high: int) -> list[str]:
    """`low` to `high` items, often all of one kind (kinds mixed by chance make copying too easy)."""
    length = rng.randint(low, high)
    kind = rng.random()
    if kind < 0.25:
        return [syllable_word(rng) for _ in range(length)]
    if kind < 0.40:
        return [rng.choice(WORDS) for _ in range(length)]
    if kind < 0.55:
        return [number(rng) for _ in range(max(1, length // 2))]
    if kind < 0.65:
        return [str(rng.randint(0, 9)) for _ in range(length)]
    return [item(rng) for _ in range(length)]


REPEAT = (
    "Repeat: {}", "Repeat this: {}", "Say this again: {}", "Copy: {}", "Copy this text: {}", "Please repeat: {}",
    "Echo: {}", "Write exactly this: {}", "Say: {}", "{}\nRepeat the line above.", "{}\nSay that again.",
    "Repeat after me: {}", "Copy the following. {}", "Return this unchanged: {}", "Write this down: {}",
)  # fmt: skip


def repeat(rng: random.Random, low: int = 2, high: int = 10) -> list[Message]:
    """Say it again, word for word."""
    text = rng.choice((" ", " ", ", ", " - ")).join(sequence(rng, low, high))
    return chat(rng.choice(REPEAT).format(text), text)


def repeat_sentence(rng: random.Random) -> list[Message]:
    """Say a short made-up sentence again."""
    text = rng.choice((
        f"The {rng.choice(THINGS)} of {rng.choice(NAMES)} is {item(rng)}.",
        f"{rng.choice(NAMES)} has {number(rng)} and {rng.choice(NAMES)} has {number(rng)}.",
        f"{rng.choice(WORDS)} {rng.choice(WORDS)} for {number(rng)} and {rng.choice(WORDS)}.",
        f"My {rng.choice(THINGS)} {syllable_word(rng)} came with {number(rng)}.",
        f"{rng.choice(NAMES)} asked about the {rng.choice(THINGS)} {number(rng)}.",
    ))  # fmt: skip
    return chat(rng.choice(REPEAT).format(text), text)


ORDINALS = ("first", "second", "third", "fourth", "fifth")


def list_lookup(rng: random.Random) -> list[Message]:
    """Which item stands where in a list; which comes after another; the last one."""
    items = list(dict.fromkeys(sequence(rng, 3, 5)))
    if len(items) < 2:
        items = [syllable_word(rng) + "a", syllable_word(rng) + "o"]
    items = items[:5]
    text = f"{rng.choice(('List', 'Items', 'Here is a list', 'The list'))}: {', '.join(items)}."
    kind = rng.random()
    if kind < 0.4:
        at = rng.randrange(len(items))
        return chat(
            f"{text} {rng.choice(('What is the', 'Name the', 'Give the'))} {ORDINALS[at]} item?", items[at]
        )
    if kind < 0.6:
        return chat(f"{text} {rng.choice(('What is the last item?', 'Name the last one.'))}", items[-1])
    if kind < 0.8:
        at = rng.randrange(len(items) - 1)
        return chat(f"{text} What comes after {items[at]}?", items[at + 1])
    return chat(f"{text} Repeat the list.", ", ".join(items))


LOOKUP = (
    "What is {}?",
    "What is the value of {}?",
    "{}?",
    "Give me {}.",
    "Which value has {}?",
    "Tell me {}.",
)


def key_value(rng: random.Random) -> list[Message]:
    """key: value pairs; one to three of the keys are asked for, turn by turn."""
    keys = rng.sample(KEYS, rng.randint(2, 5)) if rng.random() < 0.6 else []
    while len(keys) < 3 and len(keys) < 5:
        word = syllable_word(rng) + rng.choice(CONSONANTS)
        if word not in keys:
            keys.append(word)
    values = [item(rng) if rng.random() < 0.8 else f"{rng.choice(WORDS)} {rng.choice(WORDS)}" for _ in keys]
    link, gap = rng.choice(
        ((": ", "\n"), (" = ", ", "), (" is ", ". "), (": ", "; "), (" ", ", "), (" -> ", "\n"))
    )
    facts = gap.join(f"{key}{link}{value}" for key, value in zip(keys, values, strict=True))
    asked = rng.sample(range(len(keys)), rng.randint(1, min(3, len(keys))))
    messages: list[Message] = []
    for turn, at in enumerate(asked):
        question = rng.choice(LOOKUP).format(keys[at])
        if turn == 0:
            question = f"{facts}\n{question}" if rng.random() < 0.7 else f"{question}\n{facts}"
        messages += chat(question, values[at])
    return messages


def owner_lookup(rng: random.Random) -> list[Message]:
    """Who has what, in sentences; the answer is a copied thing or a copied name."""
    names = rng.sample(NAMES, 3)
    things = list(dict.fromkeys(item(rng) for _ in range(3)))
    while len(things) < 3:
        things.append(syllable_word(rng) + str(len(things)))
    verb = rng.choice(("has", "ordered", "wrote", "needs", "takes", "found", "sent"))
    text = " ".join(f"{name} {verb} {thing}." for name, thing in zip(names, things, strict=True))
    at = rng.randrange(3)
    if rng.random() < 0.6:
        ask = {"has": "have", "ordered": "order", "wrote": "write", "needs": "need", "takes": "take", "found": "find",
               "sent": "send"}[verb]  # fmt: skip
        tense = "does" if verb in ("has", "needs", "takes") else "did"
        return chat(f"{text} What {tense} {names[at]} {ask}?", things[at])
    return chat(f"{text} Who {verb} {things[at]}?", names[at])


def capitalise(rng: random.Random) -> list[Message]:
    """Case: the same words with a capital first letter, or in small letters."""
    words = " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 5)))
    upper = words[0].upper() + words[1:]
    if rng.random() < 0.7:
        frame = rng.choice(("Start with a capital: {}", "Capitalise: {}", "Write as a sentence: {}"))
        return chat(frame.format(words), upper + ("." if "sentence" in frame else ""))
    return chat(f"Write in small letters: {upper}", words)


def join_parts(rng: random.Random) -> list[Message]:
    """Copy two or three marked parts, in the order asked, into one line."""
    parts = {key: item(rng) for key in rng.sample(KEYS, 3)}
    keys = list(parts)
    order = rng.sample(keys, 2)
    facts = ". ".join(f"{key} {value}" for key, value in parts.items())
    return chat(f"{facts}. Write {order[0]} and {order[1]}.", f"{parts[order[0]]} and {parts[order[1]]}")


def lines(rng: random.Random) -> list[Message]:
    """A list in one line becomes one item a line, or the other way round."""
    items = [item(rng) for _ in range(rng.randint(2, 5))]
    if rng.random() < 0.6:
        return chat(f"One item a line: {', '.join(items)}", "\n".join(items))
    return chat("In one line:\n" + "\n".join(items), ", ".join(items))


def is_there(rng: random.Random) -> list[Message]:
    """Is it in the list? Yes or no."""
    items = list(dict.fromkeys(item(rng) for _ in range(4)))
    inside = rng.random() < 0.5
    asked = rng.choice(items) if inside else syllable_word(rng) + "x"
    return chat(f"List: {', '.join(items)}. Is {asked} in the list?", "Yes." if inside else "No.")


def repeat_bare(rng: random.Random, words: Sequence[str]) -> list[Message]:
    """Three to fourteen of `words`, or syllables and digits, said again with no instruction around them.

    The first lesson: nothing to read but the copying itself. It brought induction heads about within 200 steps, where
    the drills with their instructions needed several times as many.
    """
    length = rng.randint(3, 14)
    if rng.random() < 0.7:
        text = " ".join(rng.choice(words) for _ in range(length))
    else:
        text = " ".join(
            str(rng.randint(0, 9)) if rng.random() < 0.5 else syllable_word(rng) for _ in range(length)
        )
    return chat(text, text)


INDUCTION: tuple[tuple[Drill, float], ...] = (
    (repeat, 8),
    (key_value, 3),
    (list_lookup, 2),
    (repeat_sentence, 2),
)
DRILLS: tuple[tuple[Drill, float], ...] = (
    (repeat, 4), (repeat_sentence, 2), (key_value, 5), (list_lookup, 3), (owner_lookup, 2), (capitalise, 2),
    (join_parts, 2), (lines, 2), (is_there, 1),
)  # fmt: skip


def induction(rng: random.Random) -> list[Message]:
    """One chat of the first phase: nothing but copying."""
    return rng.choices([drill for drill, _ in INDUCTION], [weight for _, weight in INDUCTION])[0](rng)


def drill(rng: random.Random) -> list[Message]:
    """One drill of any kind."""
    return rng.choices([drill for drill, _ in DRILLS], [weight for _, weight in DRILLS])[0](rng)


def probe_repeat(rng: random.Random) -> tuple[list[Message], str]:
    """A fresh sequence of four to eight items to say again."""
    messages = repeat(rng, 4, 8)
    return messages[:-1], messages[-1]["content"]


def probe_sentence(rng: random.Random) -> tuple[list[Message], str]:
    """A fresh sentence to say again."""
    messages = repeat_sentence(rng)
    return messages[:-1], messages[-1]["content"]


def probe_key_value(rng: random.Random) -> tuple[list[Message], str]:
    """A fresh table and one key to look up."""
    messages = key_value(rng)
    return messages[:1], messages[1]["content"]


PROBES = {"copy": probe_repeat, "copy_sentence": probe_sentence, "lookup": probe_key_value}
