"""Support tickets and talk about them: topic, urgency, mood, copied facts, summaries, replies.

Answers are prose or single words, never the three lines or the house tone of the `support` adapter: the base
learns what a ticket says, the adapter how to put it.
"""

import random
from collections.abc import Callable, Mapping

from pretraining.corpus.support_frames import FRAMES, MOODS
from pretraining.corpus.support_tickets import Ticket, ticket, tidy
from pretraining.corpus.support_words import (
    CATEGORIES,
    KINDS,
    KINDS_OF,
    PRAISE,
    PRIORITIES,
    SENTIMENTS,
    Category,
    Priority,
    Sentiment,
    fill,
    matter,
)

Message = dict[str, str]

_TOPIC: Mapping[Category, str] = {
    "Billing": "billing",
    "Shipping": "shipping",
    "Account": "the account",
    "Technical": "a technical matter",
    "Refund": "a refund",
    "Other": "another matter",
}
_TEAM: Mapping[Category, str] = {
    **{category: f"the {category.lower()} team" for category in CATEGORIES},
    "Other": "the front desk",
}
_WAIT: Mapping[Priority, str] = {
    "High": "No, it needs an answer now.",
    "Medium": "For a short while, but not for long.",
    "Low": "Yes, it can wait.",
}
_CUSTOMER: Mapping[Sentiment, str] = {
    "Angry": "An angry customer",
    "Worried": "A worried customer",
    "Neutral": "A customer",
    "Happy": "A happy customer",
}

QUESTIONS: Mapping[str, tuple[tuple[str, ...], Callable[[Ticket], str]]] = {
    "topic": (
        ("What is this message about?", "What is the topic?", "What does the customer write about?"),
        lambda t: f"It is about {_TOPIC[t.kind.category]}.",
    ),
    "topic_word": (
        ("Name the topic in one word.", "Which topic is it, in one word?", "One word: what is the topic?"),
        lambda t: t.kind.category,
    ),
    "team": (
        ("Which team should take it?", "Who should answer this?", "Where does this message belong?"),
        lambda t: f"It is for {_TEAM[t.kind.category]}.",
    ),
    "urgency": (
        ("How urgent is it?", "What priority does it have?", "How fast must we be?", "Is this urgent?"),
        lambda t: f"This is {t.priority.lower()} priority.",
    ),
    "urgency_word": (
        ("High, medium or low?", "Give the priority in one word.", "One word: how urgent is it?"),
        lambda t: t.priority,
    ),
    "wait": (("Can it wait?", "Can we answer this another day?"), lambda t: _WAIT[t.priority]),
    "reason": (
        ("What makes it urgent, or not?", "Why does it have that priority?", "Give the reason for that."),
        lambda t: f"Because {t.reason}.",
    ),
    "mood": (
        ("How does the customer feel?", "What is the mood?", "In what mood is the customer?"),
        lambda t: f"The customer is {t.sentiment.lower()}.",
    ),
    "mood_word": (
        ("Name the mood in one word.", "One word: what is the mood?", "Which mood is it, in one word?"),
        lambda t: t.sentiment,
    ),
    "order": (
        ("Which order does it mention?", "What is the order number?", "Give me the order number."),
        lambda t: t.order or "It names no order.",
    ),
    "product": (
        ("Which product does it mention?", "Which product is it about?", "Name the product."),
        lambda t: t.product or "It names no product.",
    ),
    "amount": (
        ("Which sum does it mention?", "How much money is it about?"),
        lambda t: t.amount or "It names no sum.",
    ),
    "name": (
        ("Who wrote it?", "What is the customer's name?", "Who signed it?"),
        lambda t: t.name or "It gives no name.",
    ),
    "matter": (
        ("What exactly is the matter?", "Name the matter.", "What is the matter, in plain words?"),
        lambda t: f"It is about {t.matter}.",
    ),
    "summary": (
        ("Sum it up in one sentence.", "Give me a short summary.", "Summarise this message."),
        lambda t: f"{_CUSTOMER[t.sentiment]} writes about {t.matter}.",
    ),
    "step": (
        ("What should we do?", "What is the next step?", "What comes next?"),
        lambda t: f"We should {t.kind.step}.",
    ),
}
# Labels and copied facts come most often: they are what the adapter builds on.
_ASKED = (
    "topic", "topic", "topic", "topic_word", "topic_word", "team", "urgency", "urgency", "urgency_word",
    "urgency_word", "wait", "reason", "mood", "mood", "mood_word", "mood_word", "order", "order", "product",
    "product", "amount", "name", "matter", "matter", "matter", "summary", "summary", "step",
)  # fmt: skip

_SYSTEM = (
    "You are a support assistant.", "You help a support team.", "You read messages from customers.",
    "Answer in short, plain sentences.", "You work for a web shop.",
)  # fmt: skip
_INTRODUCTIONS = (
    "", "", "", "A customer wrote: ", "Ticket: ", "New message: ", "Here is a ticket: ",
    "Message from a customer: ", "This came in: ", "Please look at this ticket: ", "Sort this ticket: ",
    "A new ticket to triage: ",
)  # fmt: skip
_REPLY_REQUESTS = (
    "Write back to the customer.", "Answer this customer.", "Draft a polite answer.",
    "What would you write back?", "Write a kind answer to this message.", "Please answer the customer.",
    "Help me to answer this.",
)  # fmt: skip

_FORMAT_WORDS = (
    *CATEGORIES, *PRIORITIES, *SENTIMENTS, "Category", "Priority", "Sentiment", "Thanks", "help", "out",
)  # fmt: skip


def acknowledge(rng: random.Random, t: Ticket) -> str:
    """The base's answer to a ticket without a question: polite prose that names the topic or the matter."""
    closing = rng.choice(("How can I help?", "What would you like to know?", "What shall I do with it?"))
    topic = _TOPIC[t.kind.category]
    opening = rng.choice(
        (
            f"Thank you for writing. I can see that it is about {topic}.",
            f"Thank you for your message. It is about {topic}, namely {t.matter}.",
            f"I have read it. It is about {t.matter}, so it is for {_TEAM[t.kind.category]}.",
        )
    )
    return f"{opening} {closing}"


def letter(rng: random.Random, t: Ticket) -> str:
    """The base's own way to write back: a small letter, with the matter and the next step."""
    if t.kind.reason == PRAISE:
        feeling = f"we are glad about {t.matter}"
    elif t.kind.priority == "Low":
        feeling = f"we are happy to help with {t.matter}"
    else:
        feeling = f"we are sorry about {t.matter}"
    body = rng.choice(
        (
            f"{feeling}. We will {t.kind.step}.",
            f"{feeling}. We will {t.kind.step} and let you know.",
            f"{feeling}. Next, we will {t.kind.step}. Our team is here and glad to help.",
            f"{feeling}. Your note is reaching our people. We will {t.kind.step} and find out more.",
        )
    )
    addressee = t.name.capitalize() if t.name else "customer"
    return f"Dear {addressee}, {body} Kind regards, {_TEAM[t.kind.category]}"


def _ask(rng: random.Random, t: Ticket) -> tuple[str, str]:
    """One question about the ticket, with its answer."""
    roll = rng.random()
    if roll < 0.07:
        mood = rng.choice(SENTIMENTS)
        yes = "Yes" if mood == t.sentiment else "No"
        return f"Is the customer {mood.lower()}?", f"{yes}, the customer is {t.sentiment.lower()}."
    if roll < 0.16:
        topic = rng.choice(CATEGORIES[:-1])
        yes = "Yes" if topic == t.kind.category else "No"
        return f"Is this about {topic.lower()}?", f"{yes}, it is about {_TOPIC[t.kind.category]}."
    wordings, answer = QUESTIONS[rng.choice(_ASKED)]
    return rng.choice(wordings), answer(t)


def _with_ticket(rng: random.Random, t: Ticket, request: str) -> str:
    introduction = rng.choice(_INTRODUCTIONS)
    if rng.random() < 0.55:
        return f"{introduction}{t.text}{rng.choice((chr(10), chr(10), ' '))}{request}"
    return f"{request}{rng.choice((chr(10), ' '))}{introduction}{t.text}"


def _word_talk(rng: random.Random) -> list[Message]:
    """The words the adapter's answers are made of, alone or in two lines; who looks after which matter.

    An adapter can hardly make the base say a word it never had to say: the output embedding stays frozen.
    """
    roll = rng.random()
    first, second = rng.sample(_FORMAT_WORDS, 2)
    if roll < 0.25:
        return _turn(rng.choice((f"Say the word {first}.", f"Write {first}.", f"Repeat: {first}")), first)
    if roll < 0.4:
        return _turn(f"Write {first} and {second} on two lines.", f"{first}\n{second}")
    if roll < 0.5:
        return _turn(f"Write {first} with a colon.", f"{first}:")
    if roll < 0.6:
        return _turn("Which topics are there?", "Billing, Shipping, Account, Technical, Refund and Other.")
    if roll < 0.7:
        return _turn("Which priorities are there?", "High, Medium and Low.")
    if roll < 0.8:
        return _turn("Which moods are there?", "Angry, Worried, Neutral and Happy.")
    kind = KINDS[rng.choice(tuple(KINDS))]
    if roll < 0.9:
        return _turn(f"Who looks after the {kind.gist}?", f"It is for {_TEAM[kind.category]}.")
    return _turn(f"What do we do about the {kind.gist}?", f"We {kind.step}.")


def _clause_talk(rng: random.Random) -> list[Message]:
    """One sentence alone and what it tells: the shortest road from a wording to a label."""
    if rng.random() < 0.5:
        mood = rng.choice(("Angry", "Worried", "Happy"))
        sentence = tidy(fill(rng, rng.choice(MOODS[mood]), {}))
        return _turn(f"How does this sound? {sentence}", f"{mood}.")
    kind_name = rng.choice(KINDS_OF[rng.choice(CATEGORIES)])
    slots: dict[str, str] = {}
    sentence = tidy(fill(rng, rng.choice(FRAMES[kind_name]), slots))
    return _turn(f"What is the matter here? {sentence}", f"It is about {matter(KINDS[kind_name], slots)}.")


def _turn(user: str, assistant: str) -> list[Message]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def conversation(rng: random.Random) -> list[Message]:
    """One chat of two to seven messages about a customer's ticket."""
    roll = rng.random()
    if roll < 0.07:
        return _word_talk(rng)
    if roll < 0.17:
        return _clause_talk(rng)
    t = ticket(rng)
    messages: list[Message] = []
    if rng.random() < 0.12:
        messages.append({"role": "system", "content": rng.choice(_SYSTEM)})
    if roll < 0.32:
        messages += _turn(rng.choice(_INTRODUCTIONS) + t.text, acknowledge(rng, t))
    elif roll < 0.45:
        messages += _turn(_with_ticket(rng, t, rng.choice(_REPLY_REQUESTS)), letter(rng, t))
    else:
        question, answer = _ask(rng, t)
        messages += _turn(_with_ticket(rng, t, question), answer)
    for _ in range(rng.choice((0, 1, 1, 2))):
        question, answer = _ask(rng, t)
        messages += _turn(question, answer)
    return messages


def _probe(name: str) -> Callable[[random.Random], tuple[list[Message], str]]:
    """Fresh tickets with the question `name`; products and order numbers are asked for where one is given."""
    wordings, answer = QUESTIONS[name]

    def probe(rng: random.Random) -> tuple[list[Message], str]:
        t = ticket(rng, with_order=name in ("order", "matter", "summary"))
        while name == "product" and t.product is None:
            t = ticket(rng)
        return [{"role": "user", "content": f"{t.text}\n{rng.choice(wordings)}"}], answer(t)

    return probe


PROBES: Mapping[str, Callable[[random.Random], tuple[list[Message], str]]] = {
    name: _probe(name)
    for name in (
        "topic",
        "topic_word",
        "urgency",
        "urgency_word",
        "mood",
        "mood_word",
        "order",
        "product",
        "matter",
        "summary",
    )
}
