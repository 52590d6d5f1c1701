"""The words of the moderation domain and the little grammar that its frames are written in.

A frame is a sentence with choices: `[a|b|]` picks one alternative (nested choices are allowed) and `{slot}`
one value of a slot. A slot that occurs twice in a frame keeps its value; `{name2}` is a second, different
`{name}`. Shared by the corpus and by the adapter's rows, which share words but never frames. Language is
mild; telephone numbers are 555-01xx and all internet names lie below example.com.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

MEN = (
    "Tom", "Sam", "Peter", "David", "Mark", "Leo", "Paul", "Ben", "Omar", "Ivan", "Luis", "Karl", "Hugo",
    "Adam", "Noah", "Felix", "Victor", "Daniel", "Oscar", "Martin",
)  # fmt: skip
WOMEN = (
    "Anna", "Maria", "Julia", "Lena", "Sara", "Nina", "Emma", "Clara", "Rosa", "Helen", "Alice", "Mia",
    "Laura", "Grace", "Nora", "Eva", "Paula", "Ruth", "Carla", "Irene",
)  # fmt: skip
STREETS = (
    "Oak Street", "Mill Lane", "Park Road", "Hill Street", "River Road", "Church Lane", "Station Road",
    "Garden Street", "Lake Avenue", "Bridge Street", "School Lane", "Cedar Avenue", "North Road",
    "Market Street", "Forest Lane", "King Street",
)  # fmt: skip
SLOTS: dict[str, tuple[str, ...]] = {
    "man": MEN,
    "woman": WOMEN,
    "name": MEN + WOMEN,
    "a_fool": (
        "a fool", "an idiot", "a clown", "a loser", "a liar", "a coward", "a pest", "a nobody", "a cheat",
        "a snake", "a failure", "a waste of space", "a joke of a person", "a complete fool",
        "a total clown", "a sad little person", "an utter idiot", "a pathetic loser", "a disgrace",
        "a rat",
    ),
    "fools": (
        "fools", "idiots", "clowns", "losers", "liars", "cowards", "pests", "nobodies", "cheats",
        "failures",
    ),
    "dumb": (
        "stupid", "dumb", "pathetic", "useless", "worthless", "ridiculous", "ugly", "disgusting",
        "brainless", "hopeless", "clueless", "thick", "ignorant", "lazy and stupid", 
        
    ),
    "group": (
        "people from your street", "new members", "people like you", "your friends", "your whole family",
        "the members from the south side", "beginners like you", "the people on your team",
        "old folks like you",
    ),
    "hurt": (
        "hurt you", "beat you up", "break your nose", "break your arm", "make you bleed", "knock you out",
        "punch you", "put you in hospital", "make you pay for this", "make you suffer", "come after you",
        "kick your teeth in", "teach you a painful lesson", "slap you hard",
    ),
    "hurt_him": (
        "hurt him", "beat him up", "break his nose", "break his arm", "knock him out", "punch him",
        "put him in hospital", "make him suffer", "come after him", "kick his teeth in",
    ),
    "damage": (
        "burn your car", "smash your windows", "slash your tyres", "wreck your bike",
        "set fire to your shed", "break your door down", "trash your shop", "poison your dog",
        "smash your phone", "burn your house down",
    ),
    "regret": (
        "you will regret it", "you will be sorry", "you will pay for it", "you will get hurt",
        "something bad will happen to you", "you will end up in hospital", "you will not walk home",
        "it will end badly for you", "we will come for you", "I will find you",
    ),
    "goods": (
        "watches", "handbags", "phones", "sunglasses", "sports shoes", "headphones", "perfume", "diet tea",
        "vitamin pills", "garden lights", "phone cases", "kitchen knives", "software keys", "followers",
        "gift cards", "face cream", "car parts", "rings",
    ),
    "prize": (
        "a free phone", "a gift card", "a new car", "a free holiday", "a laptop", "a cash prize",
        "a big screen", "a free tablet", "1000 dollars", "a weekend trip", "free tickets",
        "a coffee machine",
    ),
    "scheme": (
        "crypto", "trading", "this secret system", "online surveys", "my money course", "this app",
        "our coin", "my trading group", "our investment plan", "typing at home", "a simple trick",
    ),
    "site": (
        "deals.example.com", "win.example.com", "shop.example.com", "example.com/offer",
        "cash.example.com", "promo.example.com", "example.com/free", "best.example.com",
        "example.com/sale", "gift.example.com",
    ),
    "act": (
        "Buy now", "Click here", "Order today", "Sign up now", "Click the link", "Call now", "Join now",
        "Claim it now", "Do not miss it", "Hurry", "Act fast", "Tap the link",
    ),
    "doing": (
        "post here again", "report me", "tell the manager", "show up at the game", "park there again",
        "talk to her again", "come to my street", "call the police", "delete my comment",
        "touch my things", "write one more word", "sell that bike", "say my name again", "come back here",
        "ban me",
    ),
    "place": (
        "the park", "the library", "the station", "the school", "the market", "the gym", "the bakery",
        "the swimming pool", "the town hall", "the bus stop", "the new cafe", "the cinema", "the clinic",
        "the sports hall", "the post office",
    ),
    "job": (
        "the bakery", "the bank on the corner", "the petrol station", "the school kitchen", "the car wash",
        "the flower shop", "the hotel", "the clinic", "the hardware store", "the supermarket",
    ),
    "thing": (
        "bike", "phone", "laptop", "printer", "sofa", "camera", "tent", "guitar", "heater", "kettle",
        "lamp", "radio", "washing machine", "vacuum cleaner", "desk", "chair", "coat", "backpack",
        "umbrella", "router",
    ),
    "work": (
        "film", "book", "song", "update", "article", "report", "plan", "design", "speech", "recipe", "app",
        "show", "poster", "website", "course", "menu", "schedule", "game",
    ),
    "bad": (
        "terrible", "awful", "boring", "weak", "slow", "stupid", "useless",
        "badly made", "disappointing", "ugly", "overpriced", "ridiculous",
    ),
    "good": (
        "great", "lovely", "very good", "wonderful", "clear", "useful", "excellent", "really nice", "fun",
        "helpful", "well made", "perfect",
    ),
    "shop": (
        "restaurant", "hotel", "garage", "bakery", "hairdresser", "gym", "dentist", "shoe shop",
        "book shop", "pizza place", "phone shop", "bike shop", "cafe", "dry cleaner",
    ),
    "game": (
        "chess", "tennis", "cards", "football", "table tennis", "darts", "bowling", "the quiz", "golf",
        "the board game", "mini golf", "pool", "badminton", "the video game",
    ),
    "pet": (
        "cat", "dog", "rabbit", "parrot", "kitten", "puppy", "hamster",
    ),
    "colour": (
        "grey", "black", "white", "brown", "orange", "spotted", "small", "old", "young",
    ),
    "food": (
        "soup", "bread", "apple cake", "rice", "pancakes", "salad", "curry", "pasta", "cheese", "lentils",
    ),
    "hobby": (
        "gardening", "running", "painting", "knitting", "fishing", "cooking", "singing", "hiking",
        "cycling", "photography", "swimming", "pottery",
    ),
    "event": (
        "meeting", "concert", "market", "party", "match", "workshop", "picnic", "training", "quiz night",
        "fair",
    ),
    "day": (
        "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday",
    ),
    "when": (
        "today", "tonight", "tomorrow", "this week", "next week", "this morning", "on Friday", "on Sunday",
        "after work", "soon", "at the weekend",
    ),
    "past": (
        "yesterday", "last night", "this morning", "last week", "on Monday", "an hour ago", "two days ago",
    ),
    "body": (
        "knee", "back", "ankle", "shoulder", "wrist", "foot", "elbow", "hip",
    ),
    "ill": (
        "a cold", "a cough", "a fever", "a headache", "a sore throat", "a rash", "back pain", "an allergy",
    ),
    "role": (
        "neighbour", "teacher", "driver", "manager", "coach", "landlord", "nurse", "waiter", "cashier",
        "moderator", "classmate", "colleague", "boss",
    ),
    "secret": (
        "pay slip", "exam results", "medical report", "passport", "bank statement", "private messages",
        "test results", "diary", "tax letter", "divorce papers", "sick note", "home photos",
    ),
    "clock": (
        "6", "7", "8", "9", "10", "noon", "3", "4", "5",
    ),
    "street": STREETS,
}  # fmt: skip

_FAMILY = ("miller", "lane", "reed", "stone", "wood", "field", "hill", "brook")


def _phone(rng: random.Random) -> str:
    return f"555-01{rng.randrange(100):02d}"


def _address(rng: random.Random) -> str:
    return f"{rng.randrange(1, 100)} {rng.choice(STREETS)}"


def _email(rng: random.Random) -> str:
    return f"{rng.choice(MEN + WOMEN).lower()}.{rng.choice(_FAMILY)}@example.com"


def _percent(rng: random.Random) -> str:
    return f"{rng.randrange(2, 10)}0%"


def _price(rng: random.Random) -> str:
    return f"{rng.randrange(5, 100)} dollars"


def _cash(rng: random.Random) -> str:
    return f"{rng.randrange(2, 90)}00 dollars"


def _count(rng: random.Random) -> str:
    return str(rng.randrange(2, 12))


DRAWN: dict[str, Callable[[random.Random], str]] = {
    "phone": _phone,
    "address": _address,
    "email": _email,
    "percent": _percent,
    "price": _price,
    "cash": _cash,
    "count": _count,
}
"""Slots whose values are drawn rather than listed."""

Choice = tuple["Part", ...]


@dataclass(frozen=True)
class Slot:
    """A `{slot}` of a frame; `key` is the name as written, `base` the same without its digit."""

    key: str
    base: str


@dataclass(frozen=True)
class Part:
    """One piece of a parsed frame: literal text, a slot, or a choice between sequences of pieces."""

    text: str = ""
    slot: Slot | None = None
    choices: tuple[Choice, ...] = ()


Frame = Choice
_TOKEN = re.compile(r"[\[\]|]|\{\w+\}|[^\[\]|{}]+")


def parse(frame: str) -> Frame:
    """Parse a frame. Raises ValueError if a bracket is open or a slot is unknown."""
    stack: list[list[list[Part]]] = [[[]]]
    for token in _TOKEN.findall(frame):
        if token == "[":
            stack.append([[]])
        elif token == "|" and len(stack) > 1:
            stack[-1].append([])
        elif token == "]" and len(stack) > 1:
            choices = tuple(tuple(parts) for parts in stack.pop())
            stack[-1][-1].append(Part(choices=choices))
        elif token.startswith("{"):
            key = token[1:-1]
            base = key.rstrip("0123456789")
            if base not in SLOTS and base not in DRAWN:
                raise ValueError(
                    f"frame {frame!r} names the slot {key!r}, which is in neither SLOTS nor DRAWN"
                )
            stack[-1][-1].append(Part(slot=Slot(key, base)))
        else:
            stack[-1][-1].append(Part(text=token))
    if len(stack) != 1:
        raise ValueError(f"frame {frame!r} has an open bracket")
    return tuple(stack[0][0])


def parse_all(frames: str) -> tuple[Frame, ...]:
    """Parse a block of text with one frame a line; blank lines are skipped."""
    return tuple(parse(line.strip()) for line in frames.splitlines() if line.strip())


def fill(rng: random.Random, frame: Sequence[Part], values: dict[str, str]) -> str:
    """Draw one sentence from a frame; the slot values drawn are added to `values` and reused from it."""
    out: list[str] = []
    for part in frame:
        if part.slot is not None:
            out.append(values.get(part.slot.key) or _draw(rng, part.slot, values))
        elif part.choices:
            out.append(fill(rng, rng.choice(part.choices), values))
        else:
            out.append(part.text)
    return "".join(out)


def _draw(rng: random.Random, slot: Slot, values: dict[str, str]) -> str:
    """A new value for a slot, different from that of its sibling (`name2` from `name`)."""
    while True:
        drawn = DRAWN[slot.base](rng) if slot.base in DRAWN else rng.choice(SLOTS[slot.base])
        if drawn not in (value for key, value in values.items() if key.rstrip("0123456789") == slot.base):
            values[slot.key] = drawn
            return drawn


def sentence_case(text: str) -> str:
    """The text with its first letter upper case and runs of white space made one space."""
    text = " ".join(text.split())
    return text[:1].upper() + text[1:]
