"""Write the adapter's training and held-out rows: python -m adapters.support.rows

A row is a ticket and its answer: three lines of triage, or, when the user asks for a reply, three sentences in the
house tone. The answer is a function of what the ticket was made of, or stands beside a hand-written ticket. The
wordings are in the text files beside this one; slot words and the kinds of matter are those of the pre-training
corpus, its sentences, a few short ones apart, are not. Running it twice writes the same bytes.
"""

import json
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from adapters.near import Seen
from pretraining.corpus.support_tickets import ticket as corpus_ticket
from pretraining.corpus.support_words import (
    CATEGORIES,
    DEVICES,
    GOODS,
    KINDS,
    PRAISE,
    Category,
    Kind,
    Priority,
    Sentiment,
    fill,
    matter,
    product_of,
)

Split = Literal["train", "heldout"]
Row = dict[str, list[dict[str, str]] | list[str]]

HERE = Path(__file__).parent
OPENING, CLOSING = "Thanks for reaching out.", "We are here to help."

_QUALITIES = ("black", "blue", "green", "red", "white", "grey", "yellow", "brown", "silver", "small", "large")
# How often a ticket of this kind is Angry, Worried, Neutral, Happy: few are glad about a stolen password.
_MOOD_SHARES: Mapping[Priority, tuple[int, int, int, int]] = {
    "High": (38, 36, 23, 3),
    "Medium": (34, 28, 22, 16),
    "Low": (12, 14, 48, 26),
}
_ABOUT_AN_ORDER = {
    name
    for name, kind in KINDS.items()
    if kind.category in ("Billing", "Shipping", "Refund") and kind.priority != "Low"
} | {"invoice_copy", "tracking", "delivery_time"}


@dataclass(frozen=True)
class Counts:
    """Rows drawn from frames, besides the hand-written ones."""

    triage: int
    reply: int
    two_turn: int


COUNTS: Mapping[Split, Counts] = {"train": Counts(3000, 900, 200), "heldout": Counts(78, 24, 8)}
# Besides, for training only: tickets in the words of the pre-training corpus.
CORPUS_COUNTS = Counts(1400, 480, 120)

_TRIAGE_LEADS: Mapping[Split, tuple[str, ...]] = {
    "train": (
        "Triage this ticket: ",
        "Triage: ",
        "Triage this ticket:\n",
        "Label this ticket: ",
        "Next ticket: ",
    ),
    "heldout": ("Please triage this one: ", "Triage the message below:\n", "One more for triage: "),
}
# A request for a reply says "reply", before the ticket or after it; nothing else switches the behaviour.
_REPLY_LEADS: Mapping[Split, tuple[str, ...]] = {
    "train": (
        "Reply to this customer: ",
        "Reply to this customer:\n",
        "Write a reply: ",
        "Write a reply to this ticket: ",
        "Please write our reply:\n",
        "Draft a reply: ",
        "Reply to this: ",
        "What do we reply? ",
        "A reply, please: ",
        "Send a reply to this customer: ",
    ),
    "heldout": (
        "Please reply to this customer: ",
        "Compose a reply: ",
        "Could you write the reply?\n",
        "We need a reply to this ticket: ",
    ),
}
_REPLY_TAILS: Mapping[Split, tuple[str, ...]] = {
    "train": ("\nWrite a reply.", "\nReply to this customer.", "\nPlease draft our reply."),
    "heldout": ("\nPlease compose a reply.", "\nNow a reply to it."),
}
_THEN_REPLY: Mapping[Split, tuple[str, ...]] = {
    "train": (
        "Now write a reply.",
        "Reply to this customer.",
        "And our reply?",
        "Write the reply too.",
        "Now reply.",
    ),
    "heldout": ("Please write a reply as well.", "What would our reply be?"),
}
_SYSTEM_PROMPTS: Mapping[Split, tuple[str, ...]] = {
    "train": (
        "You are the support desk.",
        "You triage tickets and write replies.",
        "You work in customer support.",
    ),
    "heldout": ("You sort tickets for a shop.", "You are a support desk assistant."),
}


@dataclass(frozen=True)
class Ticket:
    """A customer's message with the two answers it can get. None: it was written for the other one only."""

    text: str
    triage: str | None
    reply: str | None


def triage_answer(category: Category, priority: Priority, sentiment: Sentiment) -> str:
    return f"Category: {category}\nPriority: {priority}\nSentiment: {sentiment}"


def reply_answer(kind: Kind, slots: Mapping[str, str]) -> str:
    """The reply in the house tone: opening, the matter with the concrete thing copied and one next step, closing."""
    return reply_sentences(kind, matter(kind, slots))


def reply_sentences(kind: Kind, about: str) -> str:
    if kind.reason == PRAISE:
        feeling = "We are glad about"
    elif kind.priority == "Low":
        feeling = "We are happy to help with"
    else:
        feeling = "We are sorry about"
    return f"{OPENING} {feeling} {about} and will {kind.step}. {CLOSING}"


def read_sections(path: Path) -> dict[str, list[str]]:
    """The frames of each `## name` section; other lines that begin with # are comments."""
    sections: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            frames = sections.setdefault(line[3:], [])
        elif line and not line.startswith("#"):
            frames.append(line)
    return sections


class Sections:
    """The frames by section; each of a section's clauses is drawn once before any is drawn again."""

    def __init__(self, frames: Mapping[str, list[str]]) -> None:
        self.frames = frames
        self._left: dict[str, list[str]] = {}

    def draw(self, rng: random.Random, name: str) -> str:
        if not self._left.get(name):
            self._left[name] = rng.sample(self.frames[name], len(self.frames[name]))
        return self._left[name].pop()


def read_cases(path: Path) -> list[Ticket]:
    """The hand-written tickets with their answers. Raises ValueError for a line with an unknown label."""
    tickets: list[Ticket] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        cells = line.split(" | ")
        if not line or line.startswith("#"):
            continue
        if cells[0] == "Reply" and len(cells) == 3:
            tickets.append(Ticket(cells[1], None, f"{OPENING} {cells[2]} {CLOSING}"))
        elif len(cells) == 4 and _are_labels(cells[:3]):
            category, priority, sentiment, text = cells
            tickets.append(
                Ticket(text, f"Category: {category}\nPriority: {priority}\nSentiment: {sentiment}", None)
            )
        else:
            raise ValueError(
                f"{path.name}: {line!r} is neither a reply of 3 cells nor a ticket of 4 with known labels"
            )
    return tickets


def _are_labels(cells: list[str]) -> bool:
    return all(
        cell in get_args(labels) for cell, labels in zip(cells, (Category, Priority, Sentiment), strict=True)
    )


def draw_ticket(rng: random.Random, sections: Sections, kind_name: str, frame: str) -> Ticket:
    """A ticket around `frame`: the matter, perhaps an order number, a mood, and sometimes what makes it urgent."""
    kind = KINDS[kind_name]
    # Plain qualities that fit any product: the corpus may speak of a leather toaster, a ticket should not.
    quality = f"{rng.choice(_QUALITIES)} " if rng.random() < 0.6 else ""
    slots = {"product": quality + rng.choice(GOODS + DEVICES)} if "{product}" in frame else {}
    clauses = [_sentence(rng, frame, slots)]
    if kind_name in _ABOUT_AN_ORDER and "order" not in slots and rng.random() < 0.45:
        clauses[0] += " " + fill(rng, sections.draw(rng, "Order note"), slots)
    priority = kind.priority
    raising = _raising_clause(rng, kind, slots)
    if raising is not None:
        priority = "High"
        clauses.insert(rng.choice((0, 1, 1)), _sentence(rng, sections.draw(rng, raising), slots))
    elif kind.priority != "High" and kind.reason != PRAISE and rng.random() < 0.15:
        clauses.append(_sentence(rng, sections.draw(rng, "Calm"), slots))
    sentiment = _draw_sentiment(rng, kind)
    # Praise is happy by its own words, and most neutral tickets have no clause about the mood at all.
    if rng.random() < (0.4 if kind.reason == PRAISE or sentiment == "Neutral" else 1.0):
        clauses.insert(rng.randrange(len(clauses) + 1), fill(rng, sections.draw(rng, sentiment), slots))
    # Only the training frames have asides; the others must not draw a number for one.
    if "Aside" in sections.frames and rng.random() < 0.15:
        aside = _sentence(rng, sections.draw(rng, "Aside"), slots)
        clauses.insert(rng.randrange(len(clauses) + 1), aside)
    text = _typed(rng, " ".join(clauses))
    return Ticket(text, triage_answer(kind.category, priority, sentiment), reply_answer(kind, slots))


def _sentence(rng: random.Random, frame: str, slots: dict[str, str]) -> str:
    text = fill(rng, frame, slots)
    return text[0].upper() + text[1:]


def _draw_sentiment(rng: random.Random, kind: Kind) -> Sentiment:
    if kind.reason == PRAISE:
        return "Happy"
    return rng.choices(("Angry", "Worried", "Neutral", "Happy"), _MOOD_SHARES[kind.priority])[0]


def _raising_clause(rng: random.Random, kind: Kind, slots: Mapping[str, str]) -> str | None:
    """The section of a clause that makes the ticket High: for one problem in four, for one question in ten."""
    roll = rng.random()
    if kind.reason == PRAISE or roll > (0.1 if kind.priority == "Low" else 0.25):
        return None
    is_fault = kind.category in ("Technical", "Account") and kind.priority != "Low"
    if is_fault and product_of(slots) is not None and roll < 0.06:
        return "Danger"
    return "Standstill" if is_fault and roll < 0.12 else "Deadline"


def _typed(rng: random.Random, text: str) -> str:
    """As hurried people type: some tickets without capitals (order numbers keep theirs) or without the last stop."""
    roll = rng.random()
    if roll < 0.08:
        return re.sub(r"\b[A-Z][a-z]*\b(?![-\d])", lambda word: word.group().lower(), text)
    return text.rstrip(".") if roll < 0.14 else text


def draw_tickets(rng: random.Random, sections: Sections, seen: Seen) -> Iterator[Ticket]:
    """Tickets without end: the categories in turn, in each of them its frames in turn, near-duplicates left out."""
    frames: dict[Category, list[tuple[str, str]]] = {category: [] for category in CATEGORIES}
    for name, kind in KINDS.items():
        frames[kind.category] += [(name, frame) for frame in sections.frames[name]]
    for of_category in frames.values():
        rng.shuffle(of_category)
    index = 0
    while True:
        of_category = frames[CATEGORIES[index % len(CATEGORIES)]]
        kind_name, frame = of_category[index // len(CATEGORIES) % len(of_category)]
        ticket = draw_ticket(rng, sections, kind_name, frame)
        if seen.add(ticket.text):
            yield ticket
        index += 1


def corpus_tickets(rng: random.Random, seen: Seen) -> Iterator[Ticket]:
    """Tickets of the pre-training corpus without end, near-duplicates left out, with this adapter's answers."""
    while True:
        drawn = corpus_ticket(rng)
        if seen.add(drawn.text):
            triage = triage_answer(drawn.kind.category, drawn.priority, drawn.sentiment)
            yield Ticket(drawn.text, triage, reply_sentences(drawn.kind, drawn.matter))


def triage_messages(rng: random.Random, split: Split, ticket: Ticket) -> list[dict[str, str]]:
    """The bare ticket, or after a lead for two in five."""
    lead = rng.choice(_TRIAGE_LEADS[split]) if rng.random() < 0.4 else ""
    return _turn(lead + ticket.text, ticket.triage)


def reply_messages(rng: random.Random, split: Split, ticket: Ticket) -> list[dict[str, str]]:
    if rng.random() < 0.2:
        return _turn(ticket.text + rng.choice(_REPLY_TAILS[split]), ticket.reply)
    return _turn(rng.choice(_REPLY_LEADS[split]) + ticket.text, ticket.reply)


def two_turn_messages(rng: random.Random, split: Split, ticket: Ticket) -> list[dict[str, str]]:
    """Triage first, then the reply to the same ticket."""
    return triage_messages(rng, split, ticket) + _turn(rng.choice(_THEN_REPLY[split]), ticket.reply)


def _turn(user: str, assistant: str | None) -> list[dict[str, str]]:
    assert assistant is not None, "the ticket was not written for this answer"
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def make_rows() -> dict[Split, list[Row]]:
    """Both sets, the held-out one first, so that a training ticket near one of its tickets is never written.

    Raises ValueError if a hand-written ticket is too near to another one.
    """
    seen = Seen()
    cases = {split: read_cases(HERE / f"cases_{split}.txt") for split in get_args(Split)}
    for ticket in cases["train"] + cases["heldout"]:
        if not seen.add(ticket.text):
            raise ValueError(f"the hand-written ticket {ticket.text!r} is too near to another one")
    return {split: _split_rows(split, cases[split], seen) for split in ("heldout", "train")}


def _split_rows(split: Split, cases: list[Ticket], seen: Seen) -> list[Row]:
    rng = random.Random(f"support {split}")
    tickets = draw_tickets(rng, Sections(read_sections(HERE / f"frames_{split}.txt")), seen)
    counts = COUNTS[split]
    chats: list[tuple[list[dict[str, str]], list[str]]] = []
    for ticket in cases:
        if ticket.triage is not None:
            chats.append((triage_messages(rng, split, ticket), ["edge", "triage"]))
        else:
            chats.append((reply_messages(rng, split, ticket), ["edge", "reply"]))
    for _ in range(counts.triage):
        chats.append((triage_messages(rng, split, next(tickets)), ["new-phrasing", "triage"]))
    for _ in range(counts.reply):
        chats.append((reply_messages(rng, split, next(tickets)), ["new-phrasing", "reply"]))
    for _ in range(counts.two_turn):
        chats.append((two_turn_messages(rng, split, next(tickets)), ["new-phrasing", "reply", "two-turn"]))
    if split == "train":
        corpus = corpus_tickets(rng, seen)
        chats += [(triage_messages(rng, split, next(corpus)), []) for _ in range(CORPUS_COUNTS.triage)]
        chats += [(reply_messages(rng, split, next(corpus)), []) for _ in range(CORPUS_COUNTS.reply)]
        chats += [(two_turn_messages(rng, split, next(corpus)), []) for _ in range(CORPUS_COUNTS.two_turn)]
    rows: list[Row] = []
    for messages, tags in chats:
        if rng.random() < 0.06:
            messages = [{"role": "system", "content": rng.choice(_SYSTEM_PROMPTS[split])}, *messages]
        rows.append({"messages": messages, "tags": tags} if split == "heldout" else {"messages": messages})
    rng.shuffle(rows)
    return rows


def write_rows() -> None:
    for split, rows in make_rows().items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (HERE / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    write_rows()
