"""Moderation conversations for the pre-training corpus: a post, and prose about it.

Teaches the distinctions (an insult or a report of one, a person or a thing, a threat or a lawful step) and
the label words as outputs; a label alone never answers a post, so that the adapter has its format to teach.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

from .moderation_posts import LABELS, Kind, Label, kinds
from .moderation_talk import (
    ADDRESS,
    CHOICE,
    DEFINITIONS,
    DOES,
    FILLERS,
    FINE,
    JOKE,
    LEADS,
    MODERATOR,
    MODERATOR_ANSWER,
    NAMED,
    PERSON,
    PHONE,
    REMARKS,
    RULE,
    RULE_ANSWER,
    SITE,
    SPEAKER,
    SYSTEMS,
    TWO,
)
from .moderation_words import Frame, fill, sentence_case

REPORTS = ("report_insult", "report_threat", "report_privacy", "discuss_spam")
FRIENDLY = ("banter", "self_mock")

Message = dict[str, str]


@dataclass(frozen=True)
class Post:
    """A drawn post: its text, its kind and the slot values that its own frame used (not those of fillers)."""

    text: str
    kind: Kind
    values: dict[str, str]

    @property
    def label(self) -> Label:
        return self.kind.label


@cache
def _frames(label: Label) -> tuple[tuple[Kind, Frame], ...]:
    return tuple((kind, frame) for kind in kinds() if kind.label == label for frame in kind.frames)


def _draw_label(rng: random.Random) -> Label:
    """`allow` in four posts of ten, the four rules alike in the others."""
    return "allow" if rng.random() < 0.4 else rng.choice(LABELS[1:])


def draw_post(rng: random.Random, label: Label) -> Post:
    """One post with this label, three in ten with a neutral sentence before or after."""
    kind, frame = rng.choice(_frames(label))
    values: dict[str, str] = {}
    text = sentence_case(fill(rng, frame, values))
    place = rng.random()
    if place < 0.3:
        filler = sentence_case(fill(rng, rng.choice(FILLERS), {}))
        text = f"{filler} {text}" if place < 0.18 else f"{text} {filler}"
    return Post(text, kind, values)


def _roughened(rng: random.Random, post: Post) -> Post:
    """One post in ten all lower case, one in ten without its last stop. Not for questions that copy."""
    roll = rng.random()
    if roll < 0.1:
        return replace(post, text=post.text.lower())
    return replace(post, text=post.text.rstrip(".")) if roll < 0.2 else post


def _ask_fine(rng: random.Random, post: Post) -> tuple[str, str]:
    return _wording(rng, FINE), "Yes, it can stay." if post.label == "allow" else f"No, it {post.kind.does}."


def _ask_rule(rng: random.Random, post: Post) -> tuple[str, str]:
    return _wording(rng, RULE), RULE_ANSWER[post.label]


def _ask_does(rng: random.Random, post: Post) -> tuple[str, str]:
    return _wording(rng, DOES), f"It {post.kind.does}."


def _ask_moderator(rng: random.Random, post: Post) -> tuple[str, str]:
    return _wording(rng, MODERATOR), MODERATOR_ANSWER[post.label]


def _ask_choice(rng: random.Random, post: Post) -> tuple[str, str]:
    pair = [post.label, rng.choice([label for label in LABELS if label != post.label])]
    rng.shuffle(pair)
    return sentence_case(_wording(rng, CHOICE) % tuple(pair)), f"{post.label} fits better."


def _ask_speaker(rng: random.Random, post: Post) -> tuple[str, str]:
    return _wording(
        rng, SPEAKER
    ), "The writer reports it." if post.kind.name in REPORTS else "The writer says it."


def _ask_joke(rng: random.Random, post: Post) -> tuple[str, str]:
    return _wording(rng, JOKE), "It is friendly fun." if post.kind.name in FRIENDLY else "It is serious."


def _ask_person(rng: random.Random, post: Post) -> tuple[str, str]:
    return _wording(rng, PERSON), "A thing." if post.kind.name == "critique" else "A person."


def _ask_copy(rng: random.Random, post: Post) -> tuple[str, str]:
    """A value that the post holds once, word for word. The caller has checked that there is one."""
    question, value = rng.choice(_copies(post))
    return _wording(rng, question), f"{value}."


def _copies(post: Post) -> list[tuple[tuple[Frame, ...], str]]:
    """The (question wordings, value) pairs of a post that have one right answer."""
    names = [value for key, value in post.values.items() if key.rstrip("2") in ("name", "man", "woman")]
    found: list[tuple[tuple[Frame, ...], str]] = []
    if len(names) == 1 and "email" not in post.values:
        found.append((NAMED, names[0]))
    if "phone" in post.values and "phone2" not in post.values:
        found.append((PHONE, post.values["phone"]))
    if "address" in post.values:
        found.append((ADDRESS, post.values["address"]))
    if "site" in post.values:
        found.append((SITE, post.values["site"]))
    return found


Ask = Callable[[random.Random, Post], tuple[str, str]]


def _questions(post: Post) -> tuple[list[Ask], list[float]]:
    """The questions that make sense for a post, with their weights."""
    asks: list[tuple[Ask, float]] = [
        (_ask_fine, 14),
        (_ask_rule, 16),
        (_ask_does, 14),
        (_ask_choice, 18),
        (_ask_moderator, 10),
    ]
    name = post.kind.name
    if name in REPORTS or post.label in ("harassment", "threat", "spam"):
        asks.append((_ask_speaker, 14 if name in REPORTS else 5))
    if name in FRIENDLY or post.label in ("harassment", "threat"):
        asks.append((_ask_joke, 14 if name in FRIENDLY else 5))
    if name == "critique" or post.label == "harassment":
        asks.append((_ask_person, 12 if name == "critique" else 5))
    if _copies(post):
        asks.append((_ask_copy, 12))
    return [ask for ask, _ in asks], [weight for _, weight in asks]


def _wording(rng: random.Random, wordings: Sequence[Frame]) -> str:
    return sentence_case(fill(rng, rng.choice(wordings), {}))


def _shown(rng: random.Random, post: Post) -> str:
    """The post as a user shows it: bare, after a lead, or in quotation marks."""
    lead = rng.choice(LEADS)
    return (
        f'{lead}"{post.text}"' if lead and '"' not in post.text and rng.random() < 0.3 else lead + post.text
    )


def _with_question(rng: random.Random, shown: str, question: str) -> str:
    roll = rng.random()
    if roll < 0.6:
        return f"{shown}\n{question}"
    if roll < 0.75:
        return f"{question} {shown}"
    return f"{question}\n{shown}"


def _turn(user: str, assistant: str) -> list[Message]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def _remark_chat(rng: random.Random) -> list[Message]:
    """A bare post gets a short polite remark; a third of the chats go on with a question."""
    post = draw_post(rng, _draw_label(rng))
    asks = rng.choices(*_questions(post)) if rng.random() < 0.33 else []
    if _ask_copy not in asks:
        post = _roughened(rng, post)
    messages = _turn(_shown(rng, post), rng.choice(REMARKS[post.kind.name]))
    for ask in asks:
        messages += _turn(*ask(rng, post))
    return messages


def _question_chat(rng: random.Random) -> list[Message]:
    """One to three questions about one post."""
    post = draw_post(rng, _draw_label(rng))
    asks = rng.choices(*_questions(post), k=rng.choice((1, 1, 1, 2, 2, 3)))
    if _ask_copy not in asks:
        post = _roughened(rng, post)
    question, answer = asks[0](rng, post)
    messages = _turn(_with_question(rng, _shown(rng, post), question), answer)
    for ask in asks[1:]:
        messages += _turn(*ask(rng, post))
    return messages


def _two_posts(rng: random.Random) -> tuple[str, str]:
    broken = draw_post(rng, rng.choice(LABELS[1:]))
    fine = draw_post(rng, "allow")
    first_breaks = rng.random() < 0.5
    posts = (broken, fine) if first_breaks else (fine, broken)
    user = f"First: {posts[0].text}\nSecond: {posts[1].text}\n{_wording(rng, TWO)}"
    return user, f"The {'first' if first_breaks else 'second'} one: it {broken.kind.does}."


def _definition_chat(rng: random.Random) -> list[Message]:
    pairs = rng.sample([pair for label in LABELS for pair in DEFINITIONS[label]], rng.choice((1, 1, 2)))
    return [message for question, answer in pairs for message in _turn(question, answer)]


def _label_drill(rng: random.Random) -> list[Message]:
    """The label words as outputs after every sort of neighbour: line start, comma, quotation mark."""
    words = rng.sample(LABELS, rng.choice((2, 3, 4, 5)))
    listed = ", ".join(words)
    tasks = (
        (f"Sort these words: {listed}", ", ".join(sorted(words))),
        (f"Write each word on its own line: {listed}", "\n".join(words)),
        (f"Put these words in quotation marks: {listed}", ", ".join(f'"{word}"' for word in words)),
        (f"Say {words[0]} twice.", f"{words[0]} {words[0]}"),
        (f"Which word comes first? {listed}", f"{words[0]} comes first."),
        (
            f"Write these words with a capital letter: {listed}",
            ", ".join(word.capitalize() for word in words),
        ),
        (f"Repeat: {listed}", listed),
    )
    return _turn(*rng.choice(tasks))


def conversation(rng: random.Random) -> list[Message]:
    """One pre-training chat of 2 to 7 messages about posts; every answer is prose or a copied value."""
    roll = rng.random()
    if roll < 0.22:
        messages = _remark_chat(rng)
    elif roll < 0.84:
        messages = _question_chat(rng)
    elif roll < 0.91:
        messages = _turn(*_two_posts(rng))
    elif roll < 0.95:
        messages = _definition_chat(rng)
    else:
        messages = _label_drill(rng)
    if rng.random() < 0.08:
        messages.insert(0, {"role": "system", "content": rng.choice(SYSTEMS)})
    return messages


Probe = Callable[[random.Random], tuple[list[Message], str]]


def _probe(ask: Ask, accepts: Callable[[Post], bool]) -> Probe:
    """A probe that draws posts until one fits and asks one question about it."""

    def probe(rng: random.Random) -> tuple[list[Message], str]:
        while True:
            post = draw_post(rng, rng.choice(LABELS))
            if accepts(post):
                break
        question, answer = ask(rng, post)
        return [{"role": "user", "content": f"{post.text}\n{question}"}], answer

    return probe


def _probe_two(rng: random.Random) -> tuple[list[Message], str]:
    user, answer = _two_posts(rng)
    return [{"role": "user", "content": user}], answer


PROBES: dict[str, Probe] = {
    "moderation_rule": _probe(_ask_rule, lambda post: True),
    "moderation_fine": _probe(_ask_fine, lambda post: True),
    "moderation_word": _probe(_ask_choice, lambda post: True),
    "moderation_speaker": _probe(
        _ask_speaker, lambda post: post.kind.name in REPORTS or post.label in ("harassment", "threat", "spam")
    ),
    "moderation_copy": _probe(_ask_copy, lambda post: bool(_copies(post))),
    "moderation_two": _probe_two,
}
"""Name -> (messages that end with the user, the exact answer expected of the base)."""
