"""The line of sequences that wait: each keeps its place, and all of one mix stand together. No torch."""

from collections import deque
from collections.abc import Iterator

from adapterd.core import AdapterMix, Sequence


class Line:
    """Waiting sequences of one mix, oldest first. `place` is the first one's; lower came earlier."""

    def __init__(self, mix: AdapterMix) -> None:
        self.mix = mix
        self.entries: deque[tuple[int, Sequence]] = deque()

    @property
    def place(self) -> int:
        return self.entries[0][0]

    @property
    def first(self) -> Sequence:
        return self.entries[0][1]


class WaitingLines:
    """All that wait. In order as a whole, and by mix for whoever asks which adapters come next."""

    def __init__(self) -> None:
        self._by_mix: dict[AdapterMix, Line] = {}
        self._ordered: list[Line] | None = []
        self._first_place = 0
        self._next_place = 0
        self._num_sequences = 0

    def __len__(self) -> int:
        return self._num_sequences

    def __iter__(self) -> Iterator[Sequence]:
        entries = [entry for line in self._by_mix.values() for entry in line.entries]
        return (sequence for _, sequence in sorted(entries, key=lambda entry: entry[0]))

    def append(self, sequence: Sequence) -> None:
        """At the end."""
        self._line(sequence.mix).entries.append((self._next_place, sequence))
        self._next_place += 1

    def append_first(self, sequence: Sequence) -> None:
        """Before everyone: it has run already, and whoever runs on came before it."""
        self._first_place -= 1
        self._line(sequence.mix).entries.appendleft((self._first_place, sequence))

    def pop(self, line: Line) -> Sequence:
        """The first of a line."""
        _, sequence = line.entries.popleft()
        self._removed(line)
        return sequence

    def remove(self, sequence: Sequence) -> None:
        line = self._by_mix[sequence.mix]
        line.entries.remove(next(entry for entry in line.entries if entry[1] is sequence))
        self._removed(line)

    def lines(self) -> list[Line]:
        """The lines, in the order in which their first sequences came."""
        if self._ordered is None:
            self._ordered = sorted(self._by_mix.values(), key=lambda line: line.place)
        return self._ordered

    def num_by_mix(self) -> tuple[tuple[AdapterMix, int], ...]:
        """How many wait for each mix."""
        return tuple((mix, len(line.entries)) for mix, line in self._by_mix.items())

    def _line(self, mix: AdapterMix) -> Line:
        self._num_sequences += 1
        self._ordered = None
        line = self._by_mix.get(mix)
        if line is None:
            line = self._by_mix[mix] = Line(mix)
        return line

    def _removed(self, line: Line) -> None:
        self._num_sequences -= 1
        self._ordered = None
        if not line.entries:
            del self._by_mix[line.mix]
