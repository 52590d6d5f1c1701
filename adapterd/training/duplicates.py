"""Which rows ask the same, or nearly the same. MinHash finds candidates, the true overlap decides. No torch."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from adapterd.training.messages import message_text
from adapterd.training.rows import Row, fold

NEAR = 0.8
"""Rows are near-duplicates if their texts share this part of their shingles (Jaccard)."""

_SHINGLE = 5
_NUM_PERMUTATIONS = 64
_COMMON_SHARE = 0.5
_MIN_ROWS_FOR_COMMON = 20


@dataclass(frozen=True)
class NearPair:
    """Two rows by their place in the list, the first before the second, and what they share, 0 to 1."""

    first: int
    second: int
    overlap: float


def near_pairs(rows: Sequence[Row]) -> Iterator[NearPair]:
    """Pairs of near-duplicate prompts that are not equal after folding; not every pair of a group of them.

    What most rows have in common (a system prompt, an instruction around each question) does not count:
    shingles of more than half of the different prompts are left out, and system messages altogether.
    """
    from datasketch import MinHash, MinHashLSH  # half a second, for scipy

    texts: dict[str, int] = {}
    for index, row in enumerate(rows):
        texts.setdefault(fold(row), index)
    shingles = _telling([_shingles(_own_text(rows[index])) for index in texts.values()])
    places = list(texts.values())
    index = MinHashLSH(threshold=NEAR, num_perm=_NUM_PERMUTATIONS)
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


def near_groups(rows: Sequence[Row], pairs: Iterable[NearPair] | None = None) -> list[int]:
    """For each row the first row of its group: all that are equal or near-duplicates, over however many steps.

    pairs: what `near_pairs` found in the same rows, if somebody has asked it already.
    """
    groups = _Groups(len(rows))
    first: dict[str, int] = {}
    for index, row in enumerate(rows):
        groups.join(first.setdefault(fold(row), index), index)
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


def _telling(texts: Sequence[frozenset[str]]) -> list[frozenset[str]]:
    """The shingles that tell rows apart. A row that has no others keeps all."""
    if len(texts) < _MIN_ROWS_FOR_COMMON:
        return list(texts)
    counts = Counter(shingle for text in texts for shingle in text)
    limit = _COMMON_SHARE * len(texts)
    kept = [frozenset(shingle for shingle in text if counts[shingle] <= limit) for text in texts]
    return [own if own else whole for own, whole in zip(kept, texts, strict=True)]


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
