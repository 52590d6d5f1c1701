"""Many short questions on one message, or on many short messages: the densest lesson in telling things apart.

A chat of the domains asks one or two questions of some twenty about a message, so a question such as "What is the
mood?" comes up in few of them. Here each message is asked all that sets it apart, in any order and wording.
"""

import random

from pretraining.corpus import moderation, support
from pretraining.corpus.drills import Message, chat
from pretraining.corpus.support_frames import FRAMES, MOODS
from pretraining.corpus.support_tickets import ticket, tidy
from pretraining.corpus.support_words import CATEGORIES, KINDS_OF, fill

# Each ticket is asked one question of every group.
GROUPS = (
    ("topic", "topic_word"),
    ("urgency", "urgency_word"),
    ("mood", "mood_word"),
    ("matter", "reason", "product"),
)
RULES = ("moderation_rule", "moderation_fine", "moderation_word")


def ticket_quiz(rng: random.Random) -> list[Message]:
    """One ticket, and four questions about it."""
    drawn = ticket(rng)
    messages: list[Message] = []
    for group in rng.sample(GROUPS, len(GROUPS)):
        wordings, answer = support.QUESTIONS[rng.choice(group)]
        question = rng.choice(wordings)
        messages += chat(question if messages else f"{drawn.text}\n{question}", answer(drawn))
    return messages


def mood_quiz(rng: random.Random) -> list[Message]:
    """Two to five single sentences, each with the mood it speaks."""
    messages: list[Message] = []
    for _ in range(rng.randint(2, 5)):
        mood = rng.choice(("Angry", "Worried", "Happy"))
        sentence = tidy(fill(rng, rng.choice(MOODS[mood]), {}))
        messages += chat(f"{rng.choice(('Which mood?', 'Mood?', 'How does this sound?'))} {sentence}", mood)
    return messages


def topic_quiz(rng: random.Random) -> list[Message]:
    """Two to four single sentences, each with its topic."""
    messages: list[Message] = []
    for _ in range(rng.randint(2, 4)):
        category = rng.choice(CATEGORIES)
        sentence = tidy(fill(rng, rng.choice(FRAMES[rng.choice(KINDS_OF[category])]), {}))
        messages += chat(f"{rng.choice(('Which topic?', 'Topic?', 'Which team?'))} {sentence}", category)
    return messages


def post_quiz(rng: random.Random) -> list[Message]:
    """Two to four posts, each with the rule it breaks, if any."""
    messages: list[Message] = []
    for _ in range(rng.randint(2, 4)):
        question, answer = moderation.PROBES[rng.choice(RULES)](rng)
        messages += [*question, {"role": "assistant", "content": answer}]
    return messages
