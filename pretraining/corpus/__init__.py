"""The corpus of `mini`: an endless, deterministic stream of short chats that the repository writes itself.

Three domains (support tickets, posts, clinic notes) in plain prose, drills that teach copying, and small talk. The
same seed gives the same chats. The adapters' output formats never occur in it.
"""

import random
from collections.abc import Callable, Iterator

from pretraining.corpus import drills, medical, moderation, quizzes, small_talk, support
from pretraining.corpus.drills import Message

Source = Callable[[random.Random], list[Message]]

# Shares of the chats, not of the tokens.
MIXTURE: dict[str, tuple[Source, float]] = {
    "support": (support.conversation, 0.14),
    "ticket_quiz": (quizzes.ticket_quiz, 0.14),
    "mood_quiz": (quizzes.mood_quiz, 0.04),
    "topic_quiz": (quizzes.topic_quiz, 0.04),
    "moderation": (moderation.conversation, 0.12),
    "post_quiz": (quizzes.post_quiz, 0.09),
    "medical": (medical.conversation, 0.21),
    "drills": (drills.drill, 0.20),
    "small_talk": (small_talk.conversation, 0.04),
}

SYSTEM_SHARE = 0.08
SYSTEM_PROMPTS = (
    "You are a helpful assistant.", "You are a polite assistant.", "Answer in plain words.", "Be short and clear.",
    "You help the people of a small company.", "You are a careful assistant.", "Answer the question.",
    "You read messages and answer questions about them.", "Be kind.", "You are an assistant for a help desk.",
    "You are an assistant in a clinic.", "You help to keep a forum friendly.", "Use only what the text says.",
)  # fmt: skip


def conversation(rng: random.Random) -> list[Message]:
    """One chat of the mixture; a share of them opens with a system message."""
    sources = [source for source, _ in MIXTURE.values()]
    chat = rng.choices(sources, [share for _, share in MIXTURE.values()])[0](rng)
    if chat[0]["role"] != "system" and rng.random() < SYSTEM_SHARE:
        return [{"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}, *chat]
    return chat


def stream(source: Source, seed: str) -> Iterator[list[Message]]:
    """Chats of `source` without end; the same seed gives the same chats."""
    rng = random.Random(seed)
    while True:
        yield source(rng)
