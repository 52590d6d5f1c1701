"""A scheduler that is turned by hand, a step at a time, with a clock that stands still until it is set."""

from dataclasses import dataclass, field

from adapterd.core import (
    BASE_MIX,
    AdapterDigest,
    AdapterId,
    AdapterMix,
    Batch,
    Request,
    RequestId,
    SamplingParams,
    Sequence,
    SequenceState,
)
from adapterd.engine.blocks import BlockPool
from adapterd.engine.scheduler import Scheduler, SchedulerLimits
from adapterd.engine.slots import AdapterSlots

BLOCK_SIZE = 4
PAGES = {"a": 2, "b": 2, "c": 3, "d": 4}


def mix(*names: str) -> AdapterMix:
    return tuple((AdapterId(AdapterDigest(name), name), 1.0) for name in names)


@dataclass
class Bench:
    """A scheduler with a clock that is turned by hand. `turn` is one step, as the engine takes it.

    An upload that a step begins has ended when the next one is decided.
    """

    num_blocks: int = 32
    num_pages: int = 4
    limits: SchedulerLimits = SchedulerLimits(max_num_batched_tokens=16, max_num_seqs=4)  # noqa: RUF009
    now: float = 0.0
    sequences: list[Sequence] = field(default_factory=list)
    on_their_way: tuple[AdapterId, ...] = ()

    def __post_init__(self) -> None:
        self.blocks = BlockPool(self.num_blocks, BLOCK_SIZE)
        self.slots = AdapterSlots(self.num_pages, lambda adapter_id: PAGES[adapter_id.digest])
        self.scheduler = Scheduler(self.blocks, self.slots, self.limits, lambda: self.now)

    def add(
        self,
        num_prompt_tokens: int,
        num_answer_tokens: int = 4,
        adapter_mix: AdapterMix = BASE_MIX,
        *,
        request_id: str | None = None,
        tokens: list[int] | None = None,
        scored: bool = False,
        prefix_scope: bytes = b"",
    ) -> Sequence:
        number = len(self.sequences)
        prompt = tokens or [1000 * number + position for position in range(num_prompt_tokens)]
        params = SamplingParams(max_tokens=num_answer_tokens, prompt_logprobs=0 if scored else None)
        request = Request(
            id=RequestId(request_id or f"request-{number}"),
            prompt_token_ids=tuple(prompt),
            params=params,
            mix=adapter_mix,
            eos_token_ids=frozenset(),
            arrival_seconds=self.now,
            prefix_scope=prefix_scope,
        )
        sequence = Sequence(request, index=0, seed=number, token_ids=list(prompt))
        self.sequences.append(sequence)
        self.scheduler.add(sequence)
        return sequence

    def bring(self, *names: str) -> None:
        """Have adapters in memory before anyone asks."""
        for adapter_id, _ in mix(*names):
            self.slots.load(((adapter_id, 1.0),))
            self.slots.take_moves()
            self.slots.arrived(adapter_id)

    def schedule(self) -> Batch:
        for adapter_id in self.on_their_way:
            self.slots.arrived(adapter_id)
        batch = self.scheduler.schedule()
        assert batch is not None
        self.on_their_way = batch.uploads
        return batch

    def turn(self) -> Batch:
        batch = self.schedule()
        finished = []
        for item in batch.scheduled:
            if item.samples:
                item.sequence.token_ids.append(7)
                if item.sequence.num_output_tokens == item.sequence.request.params.max_tokens:
                    finished.append(item.sequence)
        self.scheduler.update(batch, finished)
        self.scheduler.check_integrity()
        return batch

    def run_dry(self, max_turns: int = 2000) -> None:
        for _ in range(max_turns):
            if not (self.scheduler.running or self.scheduler.waiting):
                break
            self.turn()
        assert all(sequence.state is SequenceState.FINISHED for sequence in self.sequences)
        assert self.blocks.num_held == 0
        assert self.slots.num_held_pages == 0


def counts(batch: Batch) -> dict[str, int]:
    return {item.sequence.request.id: item.num_tokens for item in batch.scheduled}
