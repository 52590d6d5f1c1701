"""A scheduler in simulated time: a step lasts `step_seconds`, an upload `upload_seconds`, and nothing is computed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from adapterd.core import (
    AdapterDigest,
    AdapterId,
    AdapterMix,
    Batch,
    Request,
    RequestId,
    SamplingParams,
    Sequence,
    SequenceState,
    alone,
)
from adapterd.engine.blocks import BlockPool
from adapterd.engine.scheduler import Scheduler, SchedulerLimits
from adapterd.engine.slots import AdapterSlots

BLOCK_SIZE = 4


def adapter(name: str) -> AdapterId:
    return AdapterId(AdapterDigest(name), name)


def mix(*names: str) -> AdapterMix:
    return tuple((adapter(name), 1.0) for name in names)


@dataclass
class Simulation:
    """`pages` of each adapter, `num_pages` in all. `started` and `added` say when, by sequence number."""

    pages: Mapping[str, int]
    num_pages: int
    limits: SchedulerLimits
    step_seconds: float = 0.05
    upload_seconds: float = 0.2
    num_blocks: int = 10_000
    now: float = 0.0
    sequences: list[Sequence] = field(default_factory=list)
    added: list[float] = field(default_factory=list)
    started: dict[int, float] = field(default_factory=dict)
    batches: list[Batch] = field(default_factory=list)
    on_finish: Callable[[Sequence], None] = lambda sequence: None

    def __post_init__(self) -> None:
        self.blocks = BlockPool(self.num_blocks, BLOCK_SIZE)
        self.slots = AdapterSlots(self.num_pages, self._pages_of)
        self.scheduler = Scheduler(self.blocks, self.slots, self.limits, lambda: self.now)
        self._arrivals: list[tuple[float, AdapterId]] = []

    def _pages_of(self, adapter_id: AdapterId) -> int:
        assert not self.slots.is_booked(alone(adapter_id)), "its weights may have left host memory"
        return self.pages[adapter_id.digest]

    def add(self, adapter_mix: AdapterMix, num_answer_tokens: int, num_prompt_tokens: int = 3) -> Sequence:
        number = len(self.sequences)
        prompt = tuple(1000 * number + position for position in range(num_prompt_tokens))
        params = SamplingParams(max_tokens=num_answer_tokens)
        request = Request(RequestId(str(number)), prompt, params, adapter_mix, frozenset(), self.now)
        sequence = Sequence(request, index=0, seed=number, token_ids=list(prompt))
        self.sequences.append(sequence)
        self.added.append(self.now)
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> Batch:
        for arrival in [a for a in self._arrivals if a[0] <= self.now]:
            self._arrivals.remove(arrival)
            self.slots.arrived(arrival[1])
        batch = self.scheduler.schedule()
        assert batch is not None
        self._arrivals += [(self.now + self.upload_seconds, adapter_id) for adapter_id in batch.uploads]
        for item in batch.scheduled:
            self.started.setdefault(item.sequence.seed, self.now)
            assert self.slots.is_ready(item.sequence.mix)
        assert not set(batch.evictions) & {i for item in batch.scheduled for i, _ in item.sequence.mix}
        assert not set(batch.evictions) & set(self.slots.pinned)
        finished = []
        for item in batch.scheduled:
            if item.samples:
                item.sequence.token_ids.append(7)
                if item.sequence.num_output_tokens == item.sequence.request.params.max_tokens:
                    finished.append(item.sequence)
        self.now += self.step_seconds
        self.scheduler.update(batch, finished)
        if len(self.batches) % 10 == 0:
            self.scheduler.check_integrity()
        for sequence in finished:
            self.on_finish(sequence)
        self.batches.append(batch)
        return batch

    def waited(self, sequence: Sequence) -> float:
        """From its coming to its first step."""
        return self.started[sequence.seed] - self.added[sequence.seed]

    def run_dry(self, max_seconds: float) -> None:
        end = self.now + max_seconds
        while self.scheduler.running or self.scheduler.waiting:
            assert self.now < end, "somebody was never served"
            self.step()
        assert all(sequence.state is SequenceState.FINISHED for sequence in self.sequences)
        self.scheduler.check_integrity()
        assert (self.blocks.num_held, self.slots.num_held_pages) == (0, 0)
