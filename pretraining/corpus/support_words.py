"""The vocabulary of the support domain: labels, kinds of matter, slot words, and the filling of frames.

Shared by the pre-training corpus (`support.py`) and by the rows of the shipped adapter
(`adapters/support/rows.py`), so that both speak with the same words and judge by the same rules. No sentence
lives here: the two write their own.
"""

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

Category = Literal["Billing", "Shipping", "Account", "Technical", "Refund", "Other"]
Priority = Literal["High", "Medium", "Low"]
Sentiment = Literal["Angry", "Worried", "Neutral", "Happy"]

CATEGORIES: tuple[Category, ...] = ("Billing", "Shipping", "Account", "Technical", "Refund", "Other")
PRIORITIES: tuple[Priority, ...] = ("High", "Medium", "Low")
SENTIMENTS: tuple[Sentiment, ...] = ("Angry", "Worried", "Neutral", "Happy")


@dataclass(frozen=True)
class Kind:
    """One kind of matter a customer writes about.

    `priority` is what the matter weighs by itself; a deadline, a standstill or a danger makes any ticket High.
    `reason` says why. `gist` names it after "the"; `step` follows "we will"; `link` joins a product to it.
    """

    category: Category
    priority: Priority
    reason: str
    gist: str
    step: str
    link: str = "with your"


MONEY = "money was taken wrongly"
UNUSABLE = "the service cannot be used"
SAFETY = "it is a matter of safety"
DEADLINE = "there is a deadline"
PROBLEM = "it is a problem that can wait a little"
QUESTION = "it is only a question"
PRAISE = "it is only praise"

KINDS: Mapping[str, Kind] = {
    # Billing: money charged, invoices, means of payment, prices of plans.
    "double_charge": Kind("Billing", "High", MONEY, "double charge", "cancel the second payment", "for your"),
    "unknown_charge": Kind("Billing", "High", MONEY, "unknown charge", "trace the payment", "for your"),
    "cancelled_charge": Kind(
        "Billing", "High", MONEY, "charge after cancelling", "stop the plan today", "for your"
    ),
    "wrong_amount": Kind("Billing", "Medium", PROBLEM, "wrong amount", "compare the prices", "for your"),
    "declined": Kind("Billing", "Medium", PROBLEM, "declined payment", "test the payment page", "for your"),
    "invoice_error": Kind("Billing", "Medium", PROBLEM, "invoice error", "send a new invoice", "for your"),
    "discount": Kind("Billing", "Medium", PROBLEM, "discount code", "add the discount", "for your"),
    "invoice_copy": Kind("Billing", "Low", QUESTION, "invoice copy", "email the invoice", "for your"),
    "payment_options": Kind(
        "Billing", "Low", QUESTION, "payment options", "send the list of cards", "for your"
    ),
    "plan_price": Kind("Billing", "Low", QUESTION, "plan price", "send the price list", "for your"),
    # Refund: money back, however the customer came to want it.
    "late_refund": Kind("Refund", "Medium", PROBLEM, "late refund", "ask the bank", "for your"),
    "short_refund": Kind("Refund", "Medium", PROBLEM, "partial refund", "pay the rest", "for your"),
    "faulty_refund": Kind(
        "Refund", "Medium", PROBLEM, "faulty item refund", "send a return label", "for your"
    ),
    "unwanted_refund": Kind("Refund", "Medium", PROBLEM, "return", "send a return label", "of your"),
    "refused_refund": Kind(
        "Refund", "Medium", PROBLEM, "refused refund", "look at the decision again", "for your"
    ),
    "cancelled_refund": Kind(
        "Refund", "Medium", PROBLEM, "cancelled order refund", "return the money", "for your"
    ),
    "refund_rules": Kind("Refund", "Low", QUESTION, "refund rules", "send the refund rules", "for your"),
    "refund_time": Kind("Refund", "Low", QUESTION, "refund time", "send the refund dates", "for your"),
    # Shipping: the parcel, its way, its state on arrival.
    "late_parcel": Kind("Shipping", "Medium", PROBLEM, "late parcel", "ask the courier"),
    "lost_parcel": Kind("Shipping", "Medium", PROBLEM, "lost parcel", "search for the parcel"),
    "damaged_parcel": Kind("Shipping", "Medium", PROBLEM, "damaged parcel", "send a new one"),
    "wrong_item": Kind("Shipping", "Medium", PROBLEM, "wrong item", "send the right item", "for your"),
    "missing_part": Kind("Shipping", "Medium", PROBLEM, "missing part", "send the missing part", "of your"),
    "new_address": Kind("Shipping", "Medium", PROBLEM, "delivery address", "change the address", "for your"),
    "tracking": Kind("Shipping", "Low", QUESTION, "tracking link", "send the tracking link", "for your"),
    "delivery_time": Kind("Shipping", "Low", QUESTION, "delivery time", "send the delivery date", "for your"),
    "delivery_cost": Kind(
        "Shipping", "Low", QUESTION, "delivery cost", "send the delivery prices", "for your"
    ),
    # Account: login, password, profile, who may enter.
    "locked_out": Kind("Account", "High", UNUSABLE, "locked account", "open the account again"),
    "stranger": Kind("Account", "High", SAFETY, "strange login", "lock the account now"),
    "password_reset": Kind("Account", "Medium", PROBLEM, "password reset", "send a new reset link"),
    "login_code": Kind("Account", "Medium", PROBLEM, "login code", "send a new code"),
    "email_change": Kind("Account", "Medium", PROBLEM, "email change", "change the email"),
    "close_account": Kind("Account", "Medium", PROBLEM, "account closing", "close the account"),
    "profile_error": Kind("Account", "Medium", PROBLEM, "profile error", "correct the profile"),
    "second_user": Kind("Account", "Low", QUESTION, "second user", "send the steps"),
    "profile_question": Kind("Account", "Low", QUESTION, "profile settings", "send the steps"),
    # Technical: a fault of an app, a page or a device.
    "app_down": Kind("Technical", "High", UNUSABLE, "app that will not open", "repair the app", "for your"),
    "dead_device": Kind("Technical", "High", UNUSABLE, "dead device", "test the power", "for your"),
    "hot_device": Kind("Technical", "High", SAFETY, "hot device", "call you at once", "for your"),
    "crash": Kind("Technical", "Medium", PROBLEM, "app crash", "read the error report", "for your"),
    "slow": Kind("Technical", "Medium", PROBLEM, "slow app", "check the speed", "for your"),
    "sync": Kind("Technical", "Medium", PROBLEM, "sync error", "repair the sync", "for your"),
    "noise": Kind("Technical", "Medium", PROBLEM, "strange noise", "send a repair guide", "of your"),
    "screen": Kind("Technical", "Medium", PROBLEM, "screen fault", "send a repair guide", "of your"),
    "update": Kind("Technical", "Medium", PROBLEM, "failed update", "send a new update", "of your"),
    "compatible": Kind(
        "Technical", "Low", QUESTION, "compatible devices", "send the list of devices", "for your"
    ),
    "set_up": Kind("Technical", "Low", QUESTION, "set-up", "send the set-up guide", "of your"),
    # Other: everything else.
    "praise": Kind("Other", "Low", PRAISE, "kind words", "share them with the team", "about your"),
    "hours": Kind("Other", "Low", QUESTION, "opening hours", "send the opening hours"),
    "job": Kind("Other", "Low", QUESTION, "open jobs", "send the list of jobs"),
    "stock": Kind("Other", "Low", QUESTION, "stock", "check the stock", "of the"),
    "size": Kind("Other", "Low", QUESTION, "size", "send the sizes", "of the"),
    "partner": Kind("Other", "Low", QUESTION, "partner offer", "pass it to the sales team"),
    "idea": Kind("Other", "Low", QUESTION, "idea", "pass it to the product team", "for the"),
    "newsletter": Kind("Other", "Medium", PROBLEM, "newsletter", "take you off the list"),
    "staff": Kind("Other", "Medium", PROBLEM, "staff complaint", "speak with the manager"),
    "left_behind": Kind("Other", "Medium", PROBLEM, "lost property", "look in the store"),
}
KINDS_OF: Mapping[Category, tuple[str, ...]] = {
    category: tuple(name for name, kind in KINDS.items() if kind.category == category)
    for category in CATEGORIES
}

QUALITIES = (
    "black", "blue", "green", "red", "white", "grey", "yellow", "brown", "silver", "golden", "small", "large",
    "wooden", "steel", "glass", "folding", "travel", "garden", "kitchen", "winter", "leather", "cotton",
)  # fmt: skip
GOODS = (
    "kettle", "lamp", "desk", "chair", "jacket", "backpack", "blanket", "pillow", "mirror", "clock", "table",
    "shelf", "bottle", "mug", "pan", "knife set", "rug", "curtain", "suitcase", "bag", "coat", "sweater",
    "scarf", "hat", "tent", "bicycle", "helmet", "puzzle", "notebook", "pen set", "vase", "bench", "ladder",
    "basket", "umbrella", "wallet", "belt", "shirt", "dress", "teapot", "cushion", "drill", "hammer",
    "plant pot", "candle", "frame", "mattress", "sofa", "stool", "toy train", "doll house", "guitar",
    "yoga mat", "water filter",
)  # fmt: skip
DEVICES = (
    "tablet", "printer", "router", "speaker", "headset", "camera", "monitor", "keyboard", "laptop", "phone",
    "charger", "blender", "toaster", "heater", "fan", "vacuum", "coffee machine", "washing machine", "fridge",
    "oven", "scanner", "smart watch", "doorbell", "thermostat", "projector", "microphone", "radio",
    "game console", "air purifier", "hair dryer", "electric kettle", "robot mower",
)  # fmt: skip
NAMES = (
    "Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Iris", "Jack", "Karen", "Leo",
    "Maria", "Noah", "Olga", "Paul", "Rita", "Sam", "Tina", "Victor", "Wendy", "Yusuf", "Zoe", "Amir",
    "Bella", "Carlos", "Diana", "Erik", "Fatima", "George", "Hana", "Ivan", "Julia", "Kofi", "Lena", "Mark",
    "Nina", "Oscar", "Petra", "Ravi",
)  # fmt: skip
CITIES = (
    "Berlin", "Lyon", "Leeds", "Porto", "Graz", "Turin", "Ghent", "Malmo", "Cork", "Basel", "Split", "Brno",
)  # fmt: skip
APPS = ("app", "web page", "website", "program", "mobile app", "desktop app", "dashboard", "web shop")
FEATURES = (
    "calendar", "search", "export", "report", "upload", "chat", "map", "photo album", "task list",
    "print dialog", "invoice page", "file list", "video call", "address book", "backup", "login page",
    "settings page", "basket",
)  # fmt: skip
PLANS = (
    "basic plan", "family plan", "team plan", "yearly plan", "monthly plan", "student plan", "business plan",
)  # fmt: skip
CARDS = ("credit card", "debit card", "bank card", "bank account", "gift card", "company card")
SPANS = (
    "two days", "three days", "four days", "five days", "a week", "ten days", "two weeks", "three weeks",
    "a month",
)  # fmt: skip
PAST = (
    "yesterday", "last week", "on Monday", "on Tuesday", "on Friday", "last month", "in March", "in May",
    "in June",
)  # fmt: skip
SOON = (
    "today", "tomorrow", "tonight", "this evening", "this afternoon", "later today", "at noon today",
    "tomorrow morning", "tomorrow evening", "tomorrow at noon", "in one hour", "in two hours",
)  # fmt: skip
LATER = (
    "next week", "next month", "in the spring", "in the autumn", "in two weeks", "next year",
    "after the holidays",
)  # fmt: skip
PARTS = (
    "lid", "cable", "handle", "screw", "battery", "manual", "cover", "plug", "strap", "wheel", "remote",
    "key",
)  # fmt: skip


def order_number(rng: random.Random) -> str:
    """An order number in one of the four shapes that customers of the corpus use."""
    letters = "ABCDEFGHKLMNPRSTUVWXYZ"  # without those that are read as digits
    shape = rng.randrange(4)
    if shape == 0:
        return str(rng.randint(10000, 99999))
    if shape == 1:
        return f"{rng.choice(letters)}-{rng.randint(1000, 9999)}"
    if shape == 2:
        return f"{rng.choice(letters)}{rng.choice(letters)}{rng.randint(100, 9999)}"
    return str(rng.randint(100000, 999999))


def amount(rng: random.Random) -> str:
    """A sum of money as customers write it."""
    whole = rng.randint(4, 480)
    cents = rng.randint(10, 99)
    return rng.choice((f"{whole} euros", f"${whole}", f"{whole}.{cents} euros", f"{whole} dollars"))


def _one_of(words: tuple[str, ...]) -> Callable[[random.Random], str]:
    return lambda rng: rng.choice(words)


def _described(words: tuple[str, ...]) -> Callable[[random.Random], str]:
    return lambda rng: (f"{rng.choice(QUALITIES)} " if rng.random() < 0.6 else "") + rng.choice(words)


SLOTS: Mapping[str, Callable[[random.Random], str]] = {
    "product": _described(GOODS + DEVICES),
    "device": _one_of(DEVICES),
    "other_product": _one_of(GOODS),
    "order": order_number,
    "amount": amount,
    "name": _one_of(NAMES),
    "city": _one_of(CITIES),
    "app": _one_of(APPS),
    "feature": _one_of(FEATURES),
    "plan": _one_of(PLANS),
    "card": _one_of(CARDS),
    "span": _one_of(SPANS),
    "past": _one_of(PAST),
    "soon": _one_of(SOON),
    "later": _one_of(LATER),
    "part": _one_of(PARTS),
}

_HOLE = re.compile(r"\[([^\]]*)\]|\{(\w+)\}")


@cache
def _alternatives(text: str) -> tuple[str, ...]:
    return tuple(text.split("|"))


def fill(rng: random.Random, frame: str, slots: dict[str, str]) -> str:
    """Write one sentence from a frame: `[a|b]` is one of its wordings (with slots or not), `{slot}` a value.

    A slot keeps its value through a ticket: `slots` holds those already drawn and is added to in place, so
    that an answer can copy what the ticket said. Raises KeyError for a slot that does not exist.
    """

    def hole(match: re.Match[str]) -> str:
        words, slot = match.groups()
        if words is not None:
            word = rng.choice(_alternatives(words))
            return _HOLE.sub(hole, word) if "{" in word else word
        if slot not in slots:
            slots[slot] = SLOTS[slot](rng)
        return slots[slot]

    return _HOLE.sub(hole, frame)


def product_of(slots: Mapping[str, str]) -> str | None:
    """The product a ticket named, or None."""
    return slots.get("product") or slots.get("device")


def matter(kind: Kind, slots: Mapping[str, str]) -> str:
    """The matter in plain words with the concrete thing copied: "the late parcel for order 48213".

    An order number goes before a product; a ticket that names neither gets the gist alone.
    """
    product = product_of(slots)
    if "order" in slots:
        return f"the {kind.gist} for order {slots['order']}"
    return f"the {kind.gist}" if product is None else f"the {kind.gist} {kind.link} {product}"
