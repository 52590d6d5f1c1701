"""Draws a customer's ticket for the corpus: its text, and what is true of it.

Labels follow `support_words`: the category by the thing asked; High for money taken wrongly, a standstill, a
danger, or a deadline today or tomorrow; Low for a question or praise; else Medium.
"""

import random
import re
from dataclasses import dataclass

from pretraining.corpus.support_frames import (
    CALM,
    DANGERS,
    DEADLINES,
    FRAMES,
    GREETING,
    MOODS,
    ORDER_NOTES,
    SIGN_OFFS,
    STANDSTILLS,
)
from pretraining.corpus.support_words import (
    CATEGORIES,
    DEADLINE,
    KINDS,
    KINDS_OF,
    PRAISE,
    SAFETY,
    SENTIMENTS,
    UNUSABLE,
    Kind,
    Priority,
    Sentiment,
    fill,
    matter,
    product_of,
)


@dataclass(frozen=True)
class Ticket:
    """One customer's message and what is true of it. None marks a fact the message does not give."""

    text: str
    kind: Kind
    priority: Priority
    reason: str
    sentiment: Sentiment
    order: str | None
    product: str | None
    amount: str | None
    name: str | None
    matter: str
    """The matter in plain words with the order or product: "the late parcel for order 48213"."""


def tidy(text: str) -> str:
    """The text without the gaps that empty alternatives leave."""
    return re.sub(r" (?=[.?!,])", "", " ".join(text.split()))


def _typed(rng: random.Random, text: str) -> str:
    """The text as hurried people type it: now and then without capitals or without the last full stop."""
    roll = rng.random()
    if roll < 0.08:
        # Order numbers keep their capitals, so that a copied number stays the number that was typed.
        return re.sub(r"\b[A-Z][a-z]*\b(?![-\d])", lambda word: word.group().lower(), text)
    if roll < 0.14:
        return text.rstrip(".")
    return text


def _urgency(rng: random.Random, kind: Kind) -> tuple[str, str] | None:
    """A clause that raises the matter to High, with its reason; None when the ticket has none."""
    if kind.reason == PRAISE or rng.random() > 0.22:
        return None
    roll = rng.random()
    if kind.category == "Technical" and kind.priority != "Low":
        if roll < 0.4:
            return rng.choice(STANDSTILLS), UNUSABLE
        if roll < 0.55:
            return rng.choice(DANGERS), SAFETY
    if kind.category == "Account" and kind.priority != "Low" and roll < 0.35:
        return rng.choice(STANDSTILLS), UNUSABLE
    return rng.choice(DEADLINES), DEADLINE


def ticket(rng: random.Random, with_order: bool = False) -> Ticket:
    """Draw a ticket, categories equally often; `with_order` makes it give an order number."""
    category = rng.choice(CATEGORIES)
    kind_name = rng.choice(KINDS_OF[category])
    kind = KINDS[kind_name]
    slots: dict[str, str] = {}
    core = fill(rng, rng.choice(FRAMES[kind_name]), slots)
    if with_order or (category in ("Billing", "Shipping", "Refund") and rng.random() < 0.35):
        core += " " + fill(rng, rng.choice(ORDER_NOTES), slots) if "order" not in slots else ""
    sentiment: Sentiment = "Happy" if kind.reason == PRAISE else rng.choice(SENTIMENTS)
    mood = fill(rng, rng.choice(MOODS[sentiment]), slots)
    priority, reason = kind.priority, kind.reason
    clauses = [core]
    urgency = _urgency(rng, kind)
    if urgency is not None:
        clause, reason = urgency[0], urgency[1] if kind.priority != "High" else kind.reason
        priority = "High"
        clauses.insert(rng.randrange(2), fill(rng, clause, slots))
    elif kind.reason != PRAISE and rng.random() < 0.15:
        clauses.append(fill(rng, rng.choice(CALM), slots))
    clauses.insert(rng.randrange(len(clauses) + 1), mood)
    if rng.random() < 0.2:
        clauses.insert(0, fill(rng, GREETING, slots) + rng.choice((",", ".", "!")))
    name: str | None = None
    # A frame that speaks of another person leaves no doubt who wrote: it stays unsigned.
    if "name" not in slots and rng.random() < 0.25:
        clauses.append(fill(rng, rng.choice(SIGN_OFFS), slots))
        name = slots["name"]
    text = tidy(" ".join(clauses))
    typed = _typed(rng, text)
    if typed != text and typed == typed.lower() and name is not None:
        name = name.lower()
    return Ticket(
        text=typed,
        kind=kind,
        priority=priority,
        reason=reason,
        sentiment=sentiment,
        order=slots.get("order"),
        product=product_of(slots),
        amount=slots.get("amount"),
        name=name,
        matter=matter(kind, slots),
    )
