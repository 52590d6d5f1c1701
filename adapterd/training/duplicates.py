"""Which rows ask the same, or nearly the same. MinHash finds candidates, the true overlap decides. No torch."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from adapterd.training.messages import message_text
from adapterd.training.rows import Row, fold, fold_turns

NEAR = 0.8
"""Rows are near-duplicates if their texts share this part of their shingles (Jaccard)."""

_SHINGLE = 5
_NUM_PERMUTATIONS = 128
_CANDIDATE = 0.55
"""Where MinHash begins to look. Well below NEAR, so that it misses next to none of those that count."""

_MIN_ROWS_FOR_FRAME = 20
_MIN_FRAME = 20


@dataclass(frozen=True)
class NearPair:
    """Two rows by their place in the list, the first before the second, and what they share, 0 to 1."""

    first: int
    second: int
    overlap: float


def near_pairs(rows: Sequence[Row]) -> Iterator[NearPair]:
    """Pairs of near-duplicate prompts that are not equal after folding; not every pair of a group of them.

    What most rows have in common does not count: system messages, and an instruction that more than half of
    the prompts begin or end with.
    """
    from datasketch import MinHash, MinHashLSH  # half a second, for scipy

    texts: dict[str, int] = {}
    for index, row in enumerate(rows):
        texts.setdefault(fold(row), index)
    shingles = [_shingles(text) for text in _without_frame([_own_text(rows[i]) for i in texts.values()])]
    places = list(texts.values())
    index = MinHashLSH(threshold=_CANDIDATE, num_perm=_NUM_PERMUTATIONS)
    groups = _Groups(len(places))
    empty = MinHash(num_perm=_NUM_PERMUTATIONS, seed=1)
    for number, own in enumerate(shingles):
        sketch = empty.copy()
        sketch.update_batch([shingle.encode("utf-8", "replace") for shingle in own])
        for other in sorted(index.query(sketch)):
            if groups.root(other) == groups.root(number):
                continue
            overlap = len(own & shingles[other]) / len(own | shingles[other])
            if overlap >= NEAR:
                groups.join(other, number)
                yield NearPair(places[other], places[number], overlap)
        index.insert(number, sketch)


def near_groups(
    rows: Sequence[Row], pairs: Iterable[NearPair] | None = None, *, every_turn: bool = False
) -> list[int]:
    """For each row the first row of its group: all that are equal or near-duplicates, over however many steps.

    pairs: what `near_pairs` found in the same rows, if somebody has asked it already. every_turn: rows are of one
    group too if they share the prompt of any trained turn, not of the last one alone.
    """
    groups = _Groups(len(rows))
    first: dict[str, int] = {}
    for index, row in enumerate(rows):
        for prompt in fold_turns(row) if every_turn else [fold(row)]:
            groups.join(first.setdefault(prompt, index), index)
    for pair in near_pairs(rows) if pairs is None else pairs:
        groups.join(pair.first, pair.second)
    return [groups.root(index) for index in range(len(rows))]


def _own_text(row: Row) -> str:
    """What is particular to a prompt: not its system message."""
    said = [message_text(message) for message in row.prompt if message["role"] != "system"]
    return " ".join(re.findall(r"\w+", "\n".join(said).casefold()))


def _shingles(text: str) -> frozenset[str]:
    """Every run of five characters: words need no spaces between them in every script."""
    return frozenset(text[at : at + _SHINGLE] for at in range(max(1, len(text) - _SHINGLE + 1)))


def _without_frame(texts: Sequence[str]) -> list[str]:
    """The texts without the beginning and the end that more than half of them share, if those are long."""
    if len(texts) < _MIN_ROWS_FOR_FRAME:
        return list(texts)
    for is_end in (False, True):
        ordered = sorted(text[::-1] if is_end else text for text in texts)
        half = len(ordered) // 2
        # In sorted order whoever shares a beginning stands together.
        shared = max(
            (_shared_start(ordered[at], ordered[at + half]) for at in range(len(ordered) - half)), key=len
        )
        if len(shared) >= _MIN_FRAME:
            frame = shared[::-1] if is_end else shared
            texts = [text.removesuffix(frame) if is_end else text.removeprefix(frame) for text in texts]
    return list(texts)


def _shared_start(one: str, other: str) -> str:
    length = next(
        (at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
    return one[:length]


class _Groups:
    """Union by smallest member."""

    def __init__(self, size: int) -> None:
        self._parent = list(range(size))

    def root(self, index: int) -> int:
        while self._parent[index] != index:
            self._parent[index] = self._parent[self._parent[index]]
            index = self._parent[index]
        return index

    def join(self, one: int, other: int) -> None:
        low, high = sorted((self.root(one), self.root(other)))
        self._parent[high] = low
