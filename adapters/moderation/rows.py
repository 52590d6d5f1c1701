"""Write train.jsonl and heldout.jsonl of the moderation adapter from the hand-written posts beside this file.

    python -m adapters.moderation.rows

train_posts.txt and heldout_posts.txt hold frames by label, edge_posts.txt one-off posts by split and label; the
training rows take the frames of the pre-training corpus as well. Every
run gives the same bytes. No two posts, within a file or across both, share half or more of their word 3-grams.
"""

import json
import random
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from adapters.near import Seen
from pretraining.corpus.moderation_posts import LABELS, Label, kinds
from pretraining.corpus.moderation_words import fill, parse, sentence_case

HERE = Path(__file__).parent
QUOTA: dict[str, dict[Label, int]] = {
    "train": {"allow": 1500, "spam": 700, "harassment": 700, "threat": 700, "privacy": 700},
    "heldout": {"allow": 50, "spam": 25, "harassment": 25, "threat": 25, "privacy": 25},
}
EARLIER = {"train": 40, "heldout": 5}  # posts that are only the earlier turn of a two-turn row

SYSTEMS = {
    "train": (
        "You are a content moderator. Answer with one label: allow, spam, harassment, threat or privacy.",
        "Label the post: allow, spam, harassment, threat or privacy.",
        "You moderate a neighbourhood forum.",
    ),
    "heldout": ("Moderate the messages of a local group. One label each.",),
}
LEADS = {
    "train": ("Moderate this post: ", "Moderate: ", "Label this comment: ", "Post: ", "Is this allowed? "),
    "heldout": ("Please moderate this comment: ", "What label does this post get? "),
}
ASIDES = {
    "train": (
        "Hi all.",
        "Good morning from {street}.",
        "It is {day}, finally.",
        "I do not write here often.",
        "The coffee at the {event} was strong.",
        "My {thing} is still at {place}.",
        "We had {food} {past}.",
        "Have a nice {day}.",
    ),
    "heldout": ("Greetings from {place}.", "Back from {hobby} at last.", "{day} again, how time flies."),
}

Row = dict[str, object]


@dataclass(frozen=True)
class Post:
    """A post with its label, and "edge" for a one-off or "new-phrasing" for one drawn from a frame."""

    text: str
    label: Label
    tag: str


def read_sections(name: str) -> dict[tuple[str, str], list[str]]:
    """`== a | b` sections of a text file: (a, b) -> its lines."""
    sections: dict[tuple[str, str], list[str]] = {}
    for section in (HERE / name).read_text(encoding="utf-8").split("== ")[1:]:
        header, *lines = section.splitlines()
        first, second = (part.strip() for part in header.split("|"))
        sections[first, second] = [line for line in lines if line.strip()]
    return sections


def capitalised(text: str) -> str:
    """The text with every sentence's first letter upper case; an internet name keeps its case."""
    return re.sub(r"([.!?] )([a-z])(?![\w/]*\.\w)", lambda m: m[1] + m[2].upper(), sentence_case(text))


def roughened(rng: random.Random, split: str, text: str) -> str:
    """As people write: some posts with an aside, some all lower case, some without the last stop."""
    roll = rng.random()
    if roll < 0.1 and text[-1] in ".!?" and len(text.split()) > 3:
        aside = capitalised(fill(rng, parse(rng.choice(ASIDES[split])), {}))
        return f"{aside} {text}" if roll < 0.06 else f"{text} {aside}"
    if 0.1 <= roll < 0.18:
        return text.lower()
    return text.rstrip(".") if 0.18 <= roll < 0.26 else text


def draw_posts(rng: random.Random, split: str, label: Label, seen: Seen) -> list[Post]:
    """The posts that fill a quota: the one-off posts, then the frames, each once before any twice.

    Raises ValueError if a one-off post is a near-duplicate or the frames cannot fill the quota.
    """
    drawn: list[Post] = []
    for text in read_sections("edge_posts.txt")[split, label]:
        if not seen.add(text):
            raise ValueError(f"the one-off post {text!r} is too near to another post")
        drawn.append(Post(text, label, "edge"))
    frames = [parse(line) for line in read_sections(f"{split}_posts.txt")["frames", label]]
    if split == "train":  # the corpus words its posts in other ways again
        frames += [frame for kind in kinds() if kind.label == label for frame in kind.frames]
    for _ in range(20):
        rng.shuffle(frames)
        for frame in frames:
            if len(drawn) == QUOTA[split][label] + EARLIER[split] // len(LABELS):
                return drawn
            text = capitalised(fill(rng, frame, {}))
            if seen.add(text):
                drawn.append(Post(roughened(rng, split, text), label, "new-phrasing"))
    raise ValueError(f"the frames of {split} {label} gave {len(drawn)} posts, too few for the quota")


def as_row(rng: random.Random, split: str, post: Post, earlier: Post | None) -> Row:
    """A chat row: the post bare, after a lead or under a system message; after an earlier post if there is one."""
    roll = rng.random()
    messages: list[dict[str, str]] = []
    if roll < 0.1:
        messages.append({"role": "system", "content": rng.choice(SYSTEMS[split])})
    if earlier is not None:
        messages.append({"role": "user", "content": earlier.text})
        messages.append({"role": "assistant", "content": earlier.label})
    lead = rng.choice(LEADS[split]) if earlier is None and 0.1 <= roll < 0.25 else ""
    messages.append({"role": "user", "content": lead + post.text})
    messages.append({"role": "assistant", "content": post.label})
    return {"messages": messages, "tags": [post.tag]} if split == "heldout" else {"messages": messages}


def split_rows(split: str, seen: Seen) -> list[Row]:
    """All rows of a split, shuffled. Some posts serve only as the earlier turn of another's row."""
    rng = random.Random(f"moderation {split}")
    last: list[Post] = []
    earlier: list[Post | None] = []
    for label in LABELS:
        drawn = draw_posts(rng, split, label, seen)
        last += drawn[: QUOTA[split][label]]
        earlier += drawn[QUOTA[split][label] :]
    earlier += [None] * (len(last) - len(earlier))
    rng.shuffle(last)
    rng.shuffle(earlier)
    return [as_row(rng, split, post, before) for post, before in zip(last, earlier, strict=True)]


def main() -> None:
    """Write both files and print how many rows each label has."""
    seen = Seen()
    for split in ("heldout", "train"):
        rows = split_rows(split, seen)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (HERE / f"{split}.jsonl").write_text(lines, encoding="utf-8")
        labels = Counter(json.loads(line)["messages"][-1]["content"] for line in lines.splitlines())
        print(f"{split}.jsonl: {len(rows)} rows {dict(labels)}")


if __name__ == "__main__":
    main()
