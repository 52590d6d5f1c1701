"""When what has failed is tried again: after a rest, and after twice that each time it fails once more. No thread."""

import threading
import time
from collections.abc import Callable, Hashable, Set
from dataclasses import dataclass

_POLLS = (5, 300)


@dataclass(frozen=True)
class _Failures:
    num: int
    rests_until: float


class Retries:
    """Failures by key, of which each rests by itself. Every method may be called from any thread."""

    def __init__(
        self, first_seconds: float, most_seconds: float, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._first_seconds = first_seconds
        self._most_seconds = most_seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._failures: dict[Hashable, _Failures] = {}

    @classmethod
    def between_polls(cls, poll_seconds: float) -> "Retries":
        """For what is looked at every so many seconds: a failure is let rest for a few looks, and at most for many."""
        first, most = (polls * poll_seconds for polls in _POLLS)
        return cls(first, most)

    def failed(self, key: Hashable) -> float:
        """It has failed, perhaps once more: for how many seconds it rests now."""
        with self._lock:
            before = self._failures.get(key)
            num = 1 if before is None else before.num + 1
            # The exponent is bounded: what fails for years would be too large for a float.
            seconds = min(self._first_seconds * 2.0 ** min(num - 1, 64), self._most_seconds)
            self._failures[key] = _Failures(num, self._clock() + seconds)
        return seconds

    def num_failures(self, key: Hashable) -> int:
        """How often it has failed in a row."""
        with self._lock:
            failures = self._failures.get(key)
        return 0 if failures is None else failures.num

    def is_resting(self, key: Hashable) -> bool:
        with self._lock:
            failures = self._failures.get(key)
        return failures is not None and self._clock() < failures.rests_until

    def forget(self, key: Hashable) -> None:
        """It has succeeded, or is wanted no more. Harmless if it never failed."""
        with self._lock:
            self._failures.pop(key, None)

    def forget_others(self, keys: Set[Hashable]) -> None:
        """All but these are wanted no more."""
        with self._lock:
            self._failures = {key: failures for key, failures in self._failures.items() if key in keys}

    def forget_all(self) -> None:
        with self._lock:
            self._failures.clear()
