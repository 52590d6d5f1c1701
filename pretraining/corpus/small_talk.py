"""Small talk, and the base's polite default: a message without an instruction gets a short answer about its topic."""

import random

from pretraining.corpus.drills import Message, chat, number
from pretraining.corpus.words import NAMES, THINGS, WORDS

TALK: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("Hello", "Hi", "Hello!", "Hi there", "hey", "Good morning", "Good evening.", "hello there", "Hi, how are you?"),
     ("Hello. How can I help you?",)),
    (("Thank you", "Thanks!", "thanks a lot", "Thank you very much.", "Great, thank you", "That helps, thanks."),
     ("You are welcome.",)),
    (("Bye", "Goodbye.", "See you", "Good night", "That is all, bye", "Have a nice day"),
     ("Goodbye. Have a good day.",)),
    (("Who are you?", "What are you?", "What is your name?", "Are you a person?", "Are you a robot?"),
     ("I am a small assistant. I can read short messages and answer questions about them.",)),
    (("What can you do?", "How can you help me?", "Help", "help me please", "What do you know?"),
     ("I can read a short message, say what it is about, and repeat the facts in it.",)),
    (("Are you there?", "Can you hear me?", "Is anybody there?", "test", "Testing", "ping"),
     ("Yes, I am here. How can I help you?",)),
    (("What is the weather like?", "Will it rain tomorrow?", "Who won the match?", "What is the news today?",
      "Write a poem.", "Tell me a story.", "What is the meaning of life?", "How do I bake bread?",
      "Can you write code?", "Translate this into French.", "What is the capital of France?"),
     ("I am sorry, I do not know that.",)),
    (("ok", "Okay", "Fine", "Alright", "Good", "yes", "Sure"),
     ("Good. Is there anything else?",)),
    (("no", "No, that is all", "Nothing else", "no thanks", "No thank you."),
     ("All right. Have a good day.",)),
    (("I am sad", "I had a bad day", "I feel tired", "This is a hard week", "I am so stressed"),
     ("I am sorry to hear that. I hope it gets better soon.",)),
    (("I am happy today", "What a good day", "I got the job!", "We won", "I love this"),
     ("That is good to hear.",)),
    (("How much is 2 plus 2?", "What is 7 times 8?", "Add 14 and 9.", "Count the words."),
     ("I am sorry, I cannot count well.",)),
    (("asdf", "???", "...", "hmm", "blah blah", "qwerty", "x"),
     ("I am sorry, I did not understand that. Please tell me more.",)),
)  # fmt: skip

# topic -> openings of a plain message; {t} a thing, {n} a number, {p} a person
TOPICS: dict[str, tuple[str, ...]] = {
    "a payment": (
        "I paid twice for the {t}.", "There is a charge of {n} on my card.", "My card was declined for the {t}.",
        "The invoice for the {t} looks too high.", "Why did you take {n} from my card?", "the bill is wrong",
    ),
    "a delivery": (
        "My {t} has not arrived.", "The parcel with the {t} is late.", "Where is my {t}?",
        "The box came open and the {t} was missing.", "The driver left the {t} at the wrong door.",
        "no sign of my package since monday",
    ),
    "an account": (
        "I cannot log in.", "I forgot my password.", "Please change the address in my account.",
        "My account is locked.", "The code for my login never comes.", "Someone used my account.",
    ),
    "a fault": (
        "The {t} does not start.", "The app crashes when I open the {t} page.", "My {t} makes a strange noise.",
        "The {t} stopped working after the update.", "The screen stays black.", "error {n} every time I press save",
    ),
    "money back": (
        "I want my money back for the {t}.", "I sent the {t} back and wait for the refund.",
        "Please refund {n}.", "When do I get my money for the returned {t}?",
    ),
    "the {t}": (
        "I have a question about the {t}.", "Do you sell a {t} in blue?", "Is the {t} made of wood?",
        "I like the {t} very much.", "{p} told me about your {t}.", "The {t} is great, thank you.",
        "When will the {t} be in the shop again?",
    ),
    "health": (
        "I have had a cough for 3 days.", "My head hurts since monday.", "I feel dizzy after the new tablets.",
        "My knee is sore after a fall.", "{p} has a fever and a sore throat.",
    ),
}  # fmt: skip

TAILS = (
    "",
    "",
    "",
    " Please help.",
    " What can I do?",
    " Thanks, {p}",
    " I need it soon.",
    " Regards, {p}",
    " please",
)

# One fixed answer: a polite default that a tiny model can hold, and that an adapter visibly changes.
DEFAULT = "Thank you for writing. I can see that it is about {topic}. How can I help you?"


def small_talk(rng: random.Random) -> list[Message]:
    """One or two turns of small talk."""
    messages: list[Message] = []
    for _ in range(rng.choice((1, 1, 2))):
        questions, answers = rng.choice(TALK)
        messages += chat(rng.choice(questions), rng.choice(answers))
    return messages


def plain_message(rng: random.Random) -> list[Message]:
    """A message with no instruction, and the base's polite answer."""
    topic, openings = rng.choice(list(TOPICS.items()))
    thing = rng.choice(THINGS) if rng.random() < 0.8 else rng.choice(WORDS)
    text = (rng.choice(openings) + rng.choice(TAILS)).format(t=thing, n=number(rng), p=rng.choice(NAMES))
    if rng.random() < 0.15:
        text = text.lower()
    return chat(text, DEFAULT.format(topic=topic.format(t=thing)))


def conversation(rng: random.Random) -> list[Message]:
    """Small talk or a plain message."""
    return small_talk(rng) if rng.random() < 0.45 else plain_message(rng)
