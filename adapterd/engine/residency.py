"""Which adapters come into adapter memory next, which leave it for them, and who makes room in the end. No torch.

The line of waiting sequences says what is needed and in which order, so eviction need not guess:

- What waits is uploaded in its order, ahead of its turn, into free pages or those of idle adapters that are needed
  later than it, or by nobody (of these the longest unused first).
- While there is no room, sequences whose adapters are in memory go first: a batch stays full, and an adapter that is
  in memory serves all that wait for it.
- That has an end. Who has been passed by for `max_wait_seconds` is next: no adapter comes before its own, and of the
  held adapters those whose sequences will soonest be done take no new ones until it has its pages. If they are not
  done after `max_drain_seconds`, they are set back and go to the end of the line: so each who waits has at most one
  such turn of everyone before them to wait for. Everyone else starts and runs on meanwhile.
- What is pinned never leaves.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf

from adapterd.core import AdapterId, AdapterMix, alone
from adapterd.core import Sequence as RunningSequence
from adapterd.engine.slots import AdapterSlots
from adapterd.engine.waiting import Line


@dataclass(frozen=True)
class Plan:
    """set_back: running sequences that make room now and go to the end of the line. hopeless: lines that fit no more
    beside what is pinned.
    """

    set_back: list[RunningSequence]
    hopeless: list[Line]


class Residency:
    """The decisions; the books are those of `slots`. Only the first `lookahead` lines are looked at."""

    def __init__(
        self,
        slots: AdapterSlots,
        clock: Callable[[], float],
        *,
        max_wait_seconds: float,
        max_drain_seconds: float,
        lookahead: int,
    ) -> None:
        self._slots = slots
        self._clock = clock
        self._max_wait_seconds = max_wait_seconds
        self._max_drain_seconds = max_drain_seconds
        self._lookahead = lookahead
        self._pins_to_load: list[AdapterId] = []
        self._wishes: list[AdapterId] = []
        # Who makes room (since when), and for which mix.
        self._closing: dict[AdapterId, float] = {}
        self._closing_for: AdapterMix | None = None

    def may_start(self, mix: AdapterMix) -> bool:
        """Whether a waiting sequence of this mix may begin now, as far as adapters are concerned."""
        if self._closing and any(adapter_id in self._closing for adapter_id, _ in mix):
            return False
        return self._slots.is_ready(mix)

    def pin(self, adapter_id: AdapterId) -> None:
        """Bring an adapter before all others and keep it. It must fit beside what is pinned."""
        self._slots.pin(adapter_id)
        if not self._slots.is_booked(alone(adapter_id)) and adapter_id not in self._pins_to_load:
            self._pins_to_load.append(adapter_id)

    def unpin(self, adapter_id: AdapterId) -> None:
        self._slots.unpin(adapter_id)
        if adapter_id in self._pins_to_load:
            self._pins_to_load.remove(adapter_id)

    def prefetch(self, adapter_id: AdapterId) -> None:
        """Bring an adapter if, when `plan` is next asked, there is room that no waiting sequence needs."""
        self._wishes.append(adapter_id)

    def retire(self, adapter_id: AdapterId) -> None:
        """A version that nobody will ask for again: wishes for it are void, and what there is of it leaves."""
        self.unpin(adapter_id)
        self._wishes = [wished for wished in self._wishes if wished != adapter_id]
        self._slots.retire(adapter_id)

    def is_wanted(self, adapter_id: AdapterId) -> bool:
        """Whether a pin still waits to be uploaded."""
        return adapter_id in self._pins_to_load

    def plan(self, lines: Sequence[Line], running: Sequence[RunningSequence]) -> Plan:
        """Book and evict for those who wait, and say what that asks of the sequences."""
        lines = lines[: self._lookahead]
        needed_by = _Needed(lines)
        hopeless: list[Line] = []
        wishes, self._wishes = self._wishes, []
        self._pins_to_load = [i for i in self._pins_to_load if not self._try_to_load(alone(i), -1, needed_by)]
        if self._pins_to_load:
            return Plan(self._close(alone(self._pins_to_load[0]), -1, needed_by, running), hopeless)
        for position, line in enumerate(lines):
            if self._try_to_load(line.mix, position, needed_by):
                continue
            if not self._slots.can_ever_hold(line.mix):
                hopeless.append(line)
            elif self._is_overdue(line.first):
                return Plan(self._close(line.mix, position, needed_by, running), hopeless)
        self._closing, self._closing_for = {}, None
        for adapter_id in wishes:
            self._try_to_load(alone(adapter_id), len(lines), needed_by)
        return Plan([], hopeless)

    def _try_to_load(self, mix: AdapterMix, position: int, needed_by: "_Needed") -> bool:
        """Book a mix that may take the pages of idle adapters needed later than `position`; False: no room yet."""
        if self._slots.is_booked(mix):
            return True
        missing = self._slots.num_missing_pages(mix) - self._slots.num_free_pages
        if missing > 0:
            leaving = _enough(self._idle_for(mix, position, needed_by), missing, self._slots.size)
            if leaving is None:
                return False
            for adapter_id in leaving:
                self._slots.evict(adapter_id)
        self._slots.load(mix)
        return True

    def _idle_for(self, mix: AdapterMix, position: int, needed_by: "_Needed") -> list[AdapterId]:
        """Idle adapters that would leave for a mix, those needed last before the others."""
        own = {adapter_id for adapter_id, _ in mix}
        idle = [i for i in self._slots.idle() if i not in own and needed_by.position(i) > position]
        # Sorting is stable: of those needed equally late, the longest unused first.
        idle.sort(key=needed_by.position, reverse=True)
        return idle

    def _is_overdue(self, sequence: RunningSequence) -> bool:
        since = sequence.passed_by_since_seconds
        return since is not None and self._clock() - since > self._max_wait_seconds

    def _close(
        self, mix: AdapterMix, position: int, needed_by: "_Needed", running: Sequence[RunningSequence]
    ) -> list[RunningSequence]:
        """Let as many held adapters take nobody new as `mix` needs the pages of; who has had too long for that."""
        slots, now = self._slots, self._clock()
        if mix != self._closing_for:
            self._closing, self._closing_for = {}, mix
        own = {adapter_id for adapter_id, _ in mix}
        # What somebody earlier waits for is theirs first.
        held = [i for i in slots.held() if i not in own and needed_by.position(i) > position]
        idle = self._idle_for(mix, position, needed_by)
        self._closing = {i: since for i, since in self._closing.items() if i in held or i in idle}
        missing = slots.num_missing_pages(mix) - slots.num_free_pages
        missing -= sum(slots.size(adapter_id) for adapter_id in {*idle, *self._closing})
        if missing > 0:
            left = _tokens_left(running)
            still_open = [adapter_id for adapter_id in held if adapter_id not in self._closing]
            still_open.sort(key=lambda adapter_id: left.get(adapter_id, 0))
            # Too little, where other pages are on their way to somebody: more is closed once they are there.
            closed = _enough(still_open, missing, slots.size) or still_open
            self._closing |= dict.fromkeys(closed, now)
        late = {i for i, since in self._closing.items() if now - since > self._max_drain_seconds}
        return [s for s in running if late and any(adapter_id in late for adapter_id, _ in s.mix)]


class _Needed:
    """How far in front of the line an adapter is needed first; worked out when it is first asked."""

    def __init__(self, lines: Sequence[Line]) -> None:
        self._lines = lines
        self._positions: Mapping[AdapterId, int] | None = None

    def position(self, adapter_id: AdapterId) -> float:
        """Infinite for an adapter that nobody near the front waits for."""
        if self._positions is None:
            positions: dict[AdapterId, int] = {}
            for position, line in enumerate(self._lines):
                for needed, _ in line.mix:
                    positions.setdefault(needed, position)
            self._positions = positions
        return self._positions.get(adapter_id, inf)


def _enough(
    adapter_ids: Iterable[AdapterId], num_pages: int, size: Callable[[AdapterId], int]
) -> list[AdapterId] | None:
    """The first of `adapter_ids` that have so many pages together, or None."""
    found: list[AdapterId] = []
    for adapter_id in adapter_ids:
        if num_pages <= 0:
            break
        found.append(adapter_id)
        num_pages -= size(adapter_id)
    return found if num_pages <= 0 else None


def _tokens_left(running: Iterable[RunningSequence]) -> dict[AdapterId, int]:
    """For each adapter the most steps that a sequence of it may still take."""
    left: dict[AdapterId, int] = {}
    for sequence in running:
        remaining = sequence.request.params.max_tokens - sequence.num_output_tokens
        for adapter_id, _ in sequence.mix:
            left[adapter_id] = max(left.get(adapter_id, 0), remaining)
    return left
