"""Counts kept as tokens come are those that are counted from the beginning."""

import random
from collections import Counter
from collections.abc import Sequence

from adapterd.token_counts import TokenCounts


class Reads(Sequence[int]):
    """Tokens of a sequence, and how many of them have been read."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.num_reads = 0

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, place: int | slice) -> int:  # type: ignore[override]
        assert isinstance(place, int)
        self.num_reads += 1
        return self.tokens[place]


def test_counts_are_those_of_the_whole_sequence() -> None:
    generator = random.Random(0)
    prompt = [generator.randrange(20) for _ in range(12)]
    counts, tokens = TokenCounts(), list(prompt)
    for _ in range(60):
        counts.update(tokens, len(prompt))
        counts.update(tokens, len(prompt))  # a step that is run again counts nothing twice
        found = dict(zip(counts.token_ids, counts.num_outputs, strict=True))
        once = Counter(tokens[len(prompt) :])
        assert found == {token: once[token] for token in tokens}
        assert len(counts.token_ids) == len(found)
        tokens += [generator.randrange(40) for _ in range(generator.randrange(3))]


def test_rows_are_found_by_token() -> None:
    counts = TokenCounts()
    counts.update([7, 5, 7], 2)
    assert [counts.token_ids[row] for token in (5, 7) if (row := counts.row(token)) is not None] == [5, 7]
    assert counts.row(6) is None


def test_every_token_is_read_once() -> None:
    """Regression: each step read them all."""

    def num_reads(num_steps: int) -> int:
        counts, reads = TokenCounts(), Reads()
        for step in range(num_steps):
            reads.tokens.append(step % 50)
            counts.update(reads, 0)
        return reads.num_reads

    assert (num_reads(300), num_reads(600)) == (300, 600)
