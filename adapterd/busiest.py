"""Which of any number of names have a label of their own in the metrics: those busiest of late.

A name that loses its label begins again from nothing should it get one later, and what it did in between is
counted under the label that all others share: so no counter ever falls except by starting anew, which is what
Prometheus understands.
"""

import heapq
import math
import time
from collections.abc import Callable

OTHER = "other"

_HALF_LIFE_SECONDS = 600.0
_REVIEW_SECONDS = 10.0
_MAX_HALF_LIVES = 200.0
_FORGOTTEN = 2.0**-20
"""Twenty half-lives after its only request, a name is forgotten."""


class Busiest:
    """At most `size` names. The caller locks."""

    def __init__(self, size: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._size = size
        self._clock = clock
        self._chosen: set[str] = set()
        # Requests, each of half the weight of one that comes a half-life later.
        self._scores: dict[str, float] = {}
        self._epoch_seconds = self._reviewed_seconds = clock()

    @property
    def chosen(self) -> frozenset[str]:
        return frozenset(self._chosen)

    def label(self, name: str) -> str:
        return name if name in self._chosen else OTHER

    def count(self, name: str) -> list[str]:
        """One more request for `name`; the names that have just lost their label."""
        if name == OTHER:
            return []
        weight = self._weight()
        self._scores[name] = self._scores.get(name, 0.0) + weight
        if len(self._chosen) < self._size:
            self._chosen.add(name)
        elif self._clock() - self._reviewed_seconds > _REVIEW_SECONDS:
            self._reviewed_seconds = self._clock()
            return self._review(weight)
        return []

    def _review(self, weight: float) -> list[str]:
        self._scores = {
            name: score
            for name, score in self._scores.items()
            if name in self._chosen or score > weight * _FORGOTTEN
        }
        others = {name: score for name, score in self._scores.items() if name not in self._chosen}
        challengers = heapq.nlargest(self._size, others, key=others.__getitem__)
        lost = []
        for loser, winner in zip(
            sorted(self._chosen, key=self._scores.__getitem__), challengers, strict=False
        ):
            # Twice as busy and a little more, or two alike would take turns for ever.
            if others[winner] <= 2 * self._scores[loser] + weight:
                break
            self._chosen.remove(loser)
            self._chosen.add(winner)
            lost.append(loser)
        return lost

    def _weight(self) -> float:
        half_lives = (self._clock() - self._epoch_seconds) / _HALF_LIFE_SECONDS
        if half_lives > _MAX_HALF_LIVES:  # before numbers grow too large for a float, however long all slept
            fade = math.exp2(-min(half_lives, 1000))
            self._scores = {name: score * fade for name, score in self._scores.items()}
            self._epoch_seconds = self._clock()
            return 1.0
        return math.exp2(half_lives)
