"""Which tokens of which sequences the next step computes. Plain bookkeeping; no torch.

There is no prefill or decode: a step computes some of `num_tokens - num_computed_tokens`. A prompt cut into
chunks, a prefix found in the cache and a sequence that lost its memory are the same case.

A step is in flight from `schedule` to `update`, and the next may be scheduled meanwhile, on the count of its tokens
alone. A sequence that ends while it is in flight keeps its blocks and adapters until those steps have been read.

What a step computes of prompts can be found from its scheduling on, even by who starts in the same step: each layer
of a step writes all keys and values before it reads any. So a prefix that many bring at once is computed once.
"""

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from adapterd.core import AdapterId, Batch, RequestId, ScheduledSequence, Sequence, SequenceState
from adapterd.engine.blocks import BlockPool, hash_blocks
from adapterd.engine.residency import Residency
from adapterd.engine.slots import AdapterSlots
from adapterd.engine.step_room import StepRoom
from adapterd.engine.waiting import Line, WaitingLines


@dataclass(frozen=True)
class SchedulerLimits:
    """max_num_batched_tokens: in one step; max_num_seqs: running at once. max_num_scored_tokens: those of a step whose
    prompts' own log probabilities are asked for, which take a row of logits each; None for no limit of their own.

    max_adapter_wait_seconds: a sequence whose adapter finds no memory is passed by for so long; then the adapters that
    will soonest be done take no new sequences until there is room for it. max_adapter_drain_seconds: after so long
    those sequences are set back instead of waited for.
    """

    max_num_batched_tokens: int
    max_num_seqs: int
    max_adapter_wait_seconds: float = 1.0
    max_adapter_drain_seconds: float = 10.0
    max_num_scored_tokens: int | None = None


class _ResultsNeeded(Exception):
    """Of steps in flight, before this step can be decided."""


class Scheduler:
    """Waiting and running sequences, first come first served as far as their adapters are in memory."""

    def __init__(
        self, blocks: BlockPool, slots: AdapterSlots, limits: SchedulerLimits, clock: Callable[[], float]
    ) -> None:
        self._blocks = blocks
        self._slots = slots
        self._limits = limits
        self._clock = clock
        self.residency = Residency(
            slots,
            clock,
            max_wait_seconds=limits.max_adapter_wait_seconds,
            max_drain_seconds=limits.max_adapter_drain_seconds,
            lookahead=limits.max_num_seqs,
        )
        self.waiting = WaitingLines()
        self.running: list[Sequence] = []  # oldest first
        self._leaving: list[Sequence] = []  # finished, and still in flight
        self._refused: list[Sequence] = []
        self.num_preemptions = 0
        self.num_prefix_hit_tokens = 0
        self.num_prefix_query_tokens = 0

    def add(self, sequence: Sequence) -> None:
        """Put a new sequence at the end of the queue."""
        self.waiting.append(sequence)
        self._slots.want(sequence.mix)

    def schedule(self) -> Batch | None:
        """The next step's batch: running sequences first, then as many waiting ones as fit. In flight from here on.

        None: that depends on what steps in flight come to. Once `update` has been told of them all, ask again.
        """
        chosen: dict[int, ScheduledSequence] = {}
        limits = self._limits
        room = StepRoom(
            limits.max_num_batched_tokens, limits.max_num_scored_tokens or limits.max_num_batched_tokens
        )
        try:
            self._plan_adapters()
            self._schedule_running(chosen, room)
        except _ResultsNeeded:
            # What has been done by now, blocks taken or sequences set back, the next call would do as well.
            return None
        for item in chosen.values():
            if item.num_tokens > 1:  # single tokens fill few blocks, which nobody else looks for yet
                self._publish(item)
        self._admit(chosen, room)
        evictions, uploads = self._slots.take_moves()
        # Neighbours of one mix become one segment; the base's empty mix sorts first.
        scheduled = sorted(chosen.values(), key=lambda item: item.sequence.mix)
        for item in scheduled:
            item.sequence.num_computed_tokens = item.end
            item.sequence.num_in_flight += 1
            item.sequence.num_pending += item.samples
        return Batch(tuple(scheduled), evictions, uploads)

    def take_refused(self) -> list[Sequence]:
        """Sequences taken out since last asked, since what is pinned leaves their adapters no room."""
        refused, self._refused = self._refused, []
        return refused

    def upload_failed(self, adapter_id: AdapterId) -> list[Sequence]:
        """Forget an adapter whose upload came to nothing; the sequences that waited for it, taken out."""
        waited = [s for s in self.waiting if any(adapter_id == other for other, _ in s.mix)]
        for sequence in waited:
            self._finish(sequence)
        self._slots.arrived(adapter_id)
        self.residency.retire(adapter_id)
        return waited

    def update(self, batch: Batch, finished: Iterable[Sequence], spoiled: Iterable[Sequence] = ()) -> None:
        """The oldest batch in flight has been read: publish the blocks that it filled, free what is finished.

        `spoiled`, some of `finished`, came to numbers that are none: no prefix of theirs may be found again.
        """
        for item in batch.scheduled:
            sequence = item.sequence
            sequence.num_in_flight -= 1
            sequence.num_pending -= item.samples
            if sequence.state is SequenceState.FINISHED:
                continue  # ended before this step was read: its row is thrown away
            self._publish(item)
        for sequence in spoiled:
            self._blocks.forget(sequence.block_table)
        for sequence in finished:
            self._finish(sequence)
        for sequence in [s for s in self._leaving if not s.num_in_flight]:
            self._leaving.remove(sequence)
            self._give_back(sequence)

    def abort(self, request_id: RequestId) -> list[Sequence]:
        """Take all sequences of a request out, memory included once it is not in flight. Unknown ids are harmless."""
        found = [s for s in (*self.running, *self.waiting) if s.request.id == request_id]
        for sequence in found:
            self._finish(sequence)
        return found

    def _schedule_running(self, chosen: dict[int, ScheduledSequence], room: StepRoom) -> None:
        # Answers under way come before prompts: one token each never waits behind somebody's long chunk.
        for sequence in sorted(self.running, key=lambda s: s.num_tokens - s.num_computed_tokens > 1):
            if sequence.state is not SequenceState.RUNNING or room.num_tokens == 0:
                continue
            if sequence.num_pending and not self._goes_on(sequence):
                continue
            count = room.fit(sequence)
            if count == 0:
                continue
            while not self._grow(sequence, sequence.num_computed_tokens + count):
                victim = self.running[-1]
                returned = chosen.pop(id(victim), None)
                if returned is not None:
                    room.give_back(returned)
                self._preempt(victim)
                self.waiting.append_first(victim)
                if victim is sequence:
                    break
            else:
                item = ScheduledSequence(sequence, sequence.num_computed_tokens, count)
                chosen[id(sequence)] = item
                room.take(item)

    def _goes_on(self, sequence: Sequence) -> bool:
        """Whether a sequence with a pending token computes that one too: not if it is known to be the last."""
        params = sequence.request.params
        if sequence.num_tokens - sequence.num_prompt_tokens >= params.max_tokens:
            return False
        if params.has_penalties:
            raise _ResultsNeeded
        return True

    def _plan_adapters(self) -> None:
        plan = self.residency.plan(self.waiting.lines(), self.running)
        for line in plan.hopeless:
            for _, sequence in tuple(line.entries):
                self._finish(sequence)
                self._refused.append(sequence)
        for sequence in plan.set_back:
            self._preempt(sequence)
            self.waiting.append(sequence)

    def _admit(self, chosen: dict[int, ScheduledSequence], room: StepRoom) -> None:
        """Sequences whose adapters are in memory start in the order in which they came, and pass the others by."""
        lines = self.waiting.lines()
        if not lines or room.num_tokens == 0 or len(self.running) >= self._limits.max_num_seqs:
            return
        ready = [(line.place, line) for line in lines if self.residency.may_start(line.mix)]
        heapq.heapify(ready)
        last: int | None = None
        while ready and room.num_tokens > 0 and len(self.running) < self._limits.max_num_seqs:
            place, line = ready[0]
            sequence = line.first
            if room.fit(sequence) == 0:
                # No rows of logits are left for its prompt: its line waits for the next step.
                heapq.heappop(ready)
                continue
            cached = self._cached_prefix(sequence)
            needed = -(-sequence.num_tokens // self._blocks.block_size) - len(cached)
            if needed > self._blocks.num_free - self._blocks.num_free_among(cached):
                break
            self.waiting.pop(line)
            self._start(sequence, cached, needed)
            last = place
            if line.entries:
                heapq.heapreplace(ready, (line.place, line))
            else:
                heapq.heappop(ready)
            item = ScheduledSequence(sequence, sequence.num_computed_tokens, room.fit(sequence))
            chosen[id(sequence)] = item
            self._publish(item)
            room.take(item)
        has_room = not ready and room.num_tokens > 0 and len(self.running) < self._limits.max_num_seqs
        self._note_passed_by(lines, last, everyone=has_room)

    def _note_passed_by(self, lines: list[Line], last: int | None, *, everyone: bool) -> None:
        """From when on a sequence waits for its adapter alone: somebody behind it has started, or could have."""
        for line in lines:
            if not line.entries or line.first.passed_by_since_seconds is not None:
                continue
            if (everyone or (last is not None and line.place < last)) and not self._slots.is_ready(line.mix):
                line.first.passed_by_since_seconds = self._clock()

    def _publish(self, item: ScheduledSequence) -> None:
        """Let others find the blocks that an item fills, as far as its tokens are known."""
        sequence, size = item.sequence, self._blocks.block_size
        end = min(item.end, len(sequence.token_ids))
        first, full = item.start // size, end // size
        if full > first:
            scope, known = sequence.request.prefix_scope, sequence.block_hashes
            hash_blocks(sequence.mix, scope, sequence.token_ids[:end], size, known)
        for index in range(first, full):
            self._blocks.publish(sequence.block_table[index], sequence.block_hashes[index])

    def _cached_prefix(self, sequence: Sequence) -> list[int]:
        """Cached blocks of a waiting sequence. Its last token is always computed: it predicts the next."""
        if sequence.request.params.prompt_logprobs is not None:
            return []  # every prompt token must be predicted, so every one must run
        size = self._blocks.block_size
        scope, known = sequence.request.prefix_scope, sequence.block_hashes
        hash_blocks(sequence.mix, scope, sequence.token_ids, size, known)
        return self._blocks.match(sequence.block_hashes[: (sequence.num_tokens - 1) // size])

    def _start(self, sequence: Sequence, cached: list[int], num_new_blocks: int) -> None:
        self._slots.hold(sequence.mix)
        self._blocks.hold(cached)
        sequence.block_table = cached + self._blocks.take(num_new_blocks)
        sequence.num_computed_tokens = len(cached) * self._blocks.block_size
        if sequence.num_preemptions == 0:
            sequence.num_cached_tokens = sequence.num_computed_tokens
            self.num_prefix_query_tokens += sequence.num_prompt_tokens
            self.num_prefix_hit_tokens += sequence.num_computed_tokens
        sequence.state = SequenceState.RUNNING
        sequence.passed_by_since_seconds = None
        self.running.append(sequence)

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give a running sequence the blocks for so many tokens, or nothing."""
        missing = -(-num_tokens // self._blocks.block_size) - len(sequence.block_table)
        if missing > self._blocks.num_free:
            return False
        sequence.block_table += self._blocks.take(max(missing, 0))
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's memory; it computes its tokens again when it comes back."""
        if sequence.num_in_flight:
            raise _ResultsNeeded
        self.running.remove(sequence)
        self._give_back(sequence)
        sequence.num_computed_tokens = 0
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        sequence.state = SequenceState.WAITING

    def _finish(self, sequence: Sequence) -> None:
        if sequence.state is SequenceState.RUNNING:
            self.running.remove(sequence)
            if sequence.num_in_flight:
                self._leaving.append(sequence)
            else:
                self._give_back(sequence)
        elif sequence.state is SequenceState.WAITING:
            self.waiting.remove(sequence)
        sequence.state = SequenceState.FINISHED

    def _give_back(self, sequence: Sequence) -> None:
        self._blocks.release(sequence.block_table)
        self._slots.release(sequence.mix)
        sequence.block_table = []

    def check_integrity(self) -> None:
        """Every held block is in the table of a sequence that runs or leaves, and the books below balance."""
        self._blocks.check_integrity()
        self._slots.check_integrity()
        held = {block for sequence in (*self.running, *self._leaving) for block in sequence.block_table}
        assert len(held) == self._blocks.num_held
        assert all(sequence.num_in_flight for sequence in self._leaving)
        assert not any(sequence.num_in_flight or sequence.num_pending for sequence in self.waiting)
