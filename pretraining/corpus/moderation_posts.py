"""Posts for the pre-training corpus: frames by kind, and what the rules of moderation say about each kind.

The frames are in moderation_posts.txt: a header `== name | label | what it does` and one frame a line. The
label of a kind follows adapters/moderation/policy.md; the adapter's own rows use other frames.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, get_args

from .moderation_words import Frame, parse

Label = Literal["allow", "spam", "harassment", "threat", "privacy"]
LABELS: tuple[Label, ...] = get_args(Label)


@dataclass(frozen=True)
class Kind:
    """A kind of post: its label, what it does (a verb phrase after "it"), and its frames."""

    name: str
    label: Label
    does: str
    frames: tuple[Frame, ...]


def read_kinds(text: str) -> tuple[Kind, ...]:
    """Kinds from a text of headers and frames. Raises ValueError for an unknown label or slot."""
    kinds: list[Kind] = []
    for section in text.split("== ")[1:]:
        header, *lines = section.splitlines()
        name, label, does = (field.strip() for field in header.split("|"))
        if label not in LABELS:
            raise ValueError(f"kind {name!r} has the label {label!r}; allowed are {', '.join(LABELS)}")
        kinds.append(Kind(name, label, does, tuple(parse(line.strip()) for line in lines if line.strip())))
    return tuple(kinds)


@cache
def kinds() -> tuple[Kind, ...]:
    """All kinds of post of the corpus."""
    return read_kinds(Path(__file__).with_name("moderation_posts.txt").read_text(encoding="utf-8"))
