"""The scheduler alone: who runs, in what order, within which limits, and that nothing is lost or kept."""

import random
from dataclasses import dataclass, field

import pytest

from adapterd.core import (
    BASE_MIX,
    AdapterDigest,
    AdapterId,
    AdapterMix,
    Batch,
    Request,
    RequestId,
    SamplingParams,
    ScheduledSequence,
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


def test_long_prompt_is_computed_in_chunks_and_sampled_at_its_end() -> None:
    bench = Bench()
    sequence = bench.add(40)
    spans = []
    for _ in range(3):
        batch = bench.schedule()
        spans += [(item.start, item.end, item.samples) for item in batch.scheduled]
        bench.scheduler.update(batch, [])
    assert spans == [(0, 16, False), (16, 32, False), (32, 40, True)]
    assert sequence.num_computed_tokens == 40


def test_prompts_that_are_scored_are_cut_to_what_a_step_may_score() -> None:
    """Regression: a whole chunk's logits could take more memory than there was."""
    bench = Bench(limits=SchedulerLimits(16, 4, max_num_scored_tokens=5))
    bench.add(12, scored=True)
    bench.add(6)
    bench.add(4, scored=True)
    assert counts(bench.turn()) == {"request-0": 5, "request-1": 6}
    assert counts(bench.turn()) == {"request-0": 5, "request-1": 1}
    # The last token of a prompt predicts none of it, and so is not counted.
    assert counts(bench.turn()) == {"request-0": 2, "request-1": 1, "request-2": 4}
    bench.run_dry()


def test_answers_under_way_never_wait_behind_a_long_chunk() -> None:
    bench = Bench(num_blocks=128, limits=SchedulerLimits(16, 4))
    short = bench.add(3, num_answer_tokens=30)
    bench.turn()
    bench.add(200)
    for _ in range(10):
        before = short.num_output_tokens
        batch = bench.turn()
        assert short.num_output_tokens == before + 1
        assert batch.num_tokens == 16  # and the rest of the step goes to the chunks


def test_sequences_are_sorted_by_mix_with_the_base_first() -> None:
    bench = Bench(limits=SchedulerLimits(64, 8))
    bench.bring("a", "b")
    for names in (("b",), (), ("a",), ("b",), ()):
        bench.add(3, adapter_mix=mix(*names))
    batch = bench.turn()
    assert [item.sequence.mix for item in batch.scheduled] == [(), (), mix("a"), mix("b"), mix("b")]


def test_base_batch_moves_no_adapter() -> None:
    bench = Bench()
    bench.add(3, adapter_mix=mix("a"))
    bench.run_dry()
    bench.add(5)
    bench.add(9)
    batches = [bench.turn() for _ in range(4)]
    assert all(batch.evictions == () and batch.uploads == () for batch in batches)


def test_newest_is_preempted_and_comes_back_first() -> None:
    bench = Bench(num_blocks=6, limits=SchedulerLimits(64, 8))
    old, middle, new = (bench.add(8, num_answer_tokens=8) for _ in range(3))
    late = bench.add(8)
    batch = bench.turn()
    assert counts(batch) == {s.request.id: 8 for s in (old, middle, new)}
    batch = bench.turn()
    assert bench.scheduler.num_preemptions == 1
    assert new.state is SequenceState.WAITING
    assert list(bench.scheduler.waiting) == [new, late]
    assert set(counts(batch)) == {old.request.id, middle.request.id}
    assert new.num_computed_tokens == 0
    bench.run_dry()
    assert all(s.num_output_tokens == s.request.params.max_tokens for s in bench.sequences)


def test_oldest_is_never_preempted_while_another_runs() -> None:
    bench = Bench(num_blocks=8, limits=SchedulerLimits(64, 8))
    oldest = bench.add(8, num_answer_tokens=24)
    for _ in range(7):
        bench.add(7, num_answer_tokens=20)
    while oldest.state is not SequenceState.FINISHED:
        before = oldest.num_output_tokens
        bench.turn()
        assert oldest.num_output_tokens == before + 1
    assert oldest.num_preemptions == 0
    assert bench.scheduler.num_preemptions > 0
    bench.run_dry()


def test_same_prefix_is_reused_by_the_same_mix_alone() -> None:
    tokens = list(range(14))
    for first, second, hit in ((("a",), ("a",), 12), (("a",), (), 0), (("a",), ("b",), 0), ((), (), 12)):
        bench = Bench()
        bench.add(0, adapter_mix=mix(*first), tokens=tokens)
        bench.run_dry()
        again = bench.add(0, adapter_mix=mix(*second), tokens=tokens)
        bench.turn()
        assert again.num_cached_tokens == hit
        bench.run_dry()


def test_prefix_that_many_bring_at_once_is_computed_once() -> None:
    """Regression: it could be found only after the step, so each of those that started together computed it."""
    bench = Bench(num_blocks=8, limits=SchedulerLimits(64, 8))
    prompts = [[*range(12), 100 + number] for number in range(4)]
    together = [bench.add(0, tokens=tokens) for tokens in prompts]
    other = bench.add(0, adapter_mix=mix("a"), tokens=prompts[0])
    bench.bring("a")
    computed = counts(bench.turn())
    assert [computed[s.request.id] for s in together] == [13, 1, 1, 1]
    assert [s.num_cached_tokens for s in together] == [0, 12, 12, 12]
    assert (
        other.state is SequenceState.WAITING
    )  # seven of eight blocks are taken, and none of them is its mix's
    bench.run_dry()


def test_prefix_of_several_chunks_is_found_as_far_as_it_is_being_computed() -> None:
    bench = Bench(limits=SchedulerLimits(10, 8))
    first, second = (bench.add(0, tokens=list(range(17))) for _ in range(2))
    assert counts(bench.turn()) == {first.request.id: 10}
    # Seven tokens of the first end its prompt, and its fourth block is found by the second at once.
    assert counts(bench.turn()) == {first.request.id: 7, second.request.id: 1}
    assert second.block_table[:4] == first.block_table[:4]
    bench.run_dry()


def test_prefix_is_found_while_the_step_that_computes_it_is_in_flight_and_after_an_abort() -> None:
    bench = Bench(limits=SchedulerLimits(64, 8))
    tokens = list(range(13))
    first = bench.add(0, request_id="first", tokens=tokens)
    batch = bench.schedule()
    bench.scheduler.abort(first.request.id)
    second = bench.add(0, tokens=tokens)
    later = bench.schedule()
    assert counts(later) == {second.request.id: 1}
    bench.scheduler.update(batch, [])
    bench.scheduler.check_integrity()
    second.token_ids.append(7)
    bench.scheduler.update(later, [])
    bench.run_dry()


def test_last_prompt_token_is_computed_even_if_every_block_is_known() -> None:
    bench = Bench()
    tokens = list(range(12))
    bench.add(0, tokens=tokens)
    bench.run_dry()
    again = bench.add(0, tokens=tokens)
    batch = bench.turn()
    assert again.num_cached_tokens == 8
    assert counts(batch) == {again.request.id: 4}
    assert again.num_output_tokens == 1


def test_prompt_that_is_to_be_scored_takes_nothing_from_the_cache() -> None:
    bench = Bench()
    tokens = list(range(12))
    bench.add(0, tokens=tokens)
    bench.run_dry()
    again = bench.add(0, tokens=tokens, scored=True)
    assert counts(bench.turn()) == {again.request.id: 12}


def test_running_sequences_share_blocks_and_the_cache_gives_way_to_new_ones() -> None:
    bench = Bench(num_blocks=6, limits=SchedulerLimits(64, 8))
    tokens = list(range(13))
    first = bench.add(0, num_answer_tokens=3, tokens=tokens)
    bench.turn()
    second = bench.add(0, num_answer_tokens=3, tokens=tokens)
    bench.turn()
    assert first.block_table[:3] == second.block_table[:3]
    assert first.block_table[3] != second.block_table[3]
    bench.run_dry()
    assert bench.blocks.num_cached >= 3
    bench.add(20)
    bench.run_dry()
    late = bench.add(0, tokens=tokens)
    bench.turn()
    assert late.num_cached_tokens == 0


def test_sequence_whose_adapter_finds_no_memory_is_passed_by_for_a_bounded_time() -> None:
    """A stream of requests for the adapter that is resident cannot keep another out for ever."""
    limits = SchedulerLimits(64, 4, max_adapter_wait_seconds=1.0)
    bench = Bench(num_blocks=256, limits=limits)
    for _ in range(2):
        bench.add(3, num_answer_tokens=6, adapter_mix=mix("d"))
    starved = bench.add(3, num_answer_tokens=2, adapter_mix=mix("c"))
    overtaken_early = overtaken_late = turns = 0
    while starved.state is not SequenceState.FINISHED:
        bench.add(3, num_answer_tokens=6, adapter_mix=mix("d"))
        running = set(map(id, bench.scheduler.running))
        bench.turn()
        admitted = sum(id(s) not in running and s is not starved for s in bench.scheduler.running)
        if bench.now > 1.0:
            overtaken_late += admitted if starved.state is SequenceState.WAITING else 0
        else:
            overtaken_early += admitted
        bench.now += 0.125
        turns += 1
        assert turns < 30
    assert overtaken_early > 0
    assert overtaken_late == 0
    bench.run_dry()


def test_time_in_an_ordinary_queue_does_not_count_as_being_passed_by() -> None:
    """Regression: under load everyone is old, and each adapter miss held up the whole queue at once."""
    bench = Bench(limits=SchedulerLimits(64, 2, max_adapter_wait_seconds=1.0))
    bench.add(3, num_answer_tokens=20, adapter_mix=mix("d"))
    bench.add(3, num_answer_tokens=2)
    misses = bench.add(3, adapter_mix=mix("a"))
    behind = bench.add(3)
    bench.turn()
    bench.now = 60.0
    bench.turn()
    bench.turn()
    assert misses.state is SequenceState.WAITING
    assert behind.state is SequenceState.RUNNING
    bench.run_dry()


def test_nothing_of_a_spoiled_sequence_is_found_again() -> None:
    bench = Bench(limits=SchedulerLimits(64, 4))
    tokens = list(range(3 * BLOCK_SIZE))
    first = bench.add(0, tokens=tokens)
    batch = bench.schedule()
    bench.scheduler.update(batch, finished=[first], spoiled=[first])
    bench.scheduler.check_integrity()
    second = bench.add(0, tokens=tokens)
    bench.turn()
    assert second.num_cached_tokens == 0
    bench.run_dry()


def test_base_traffic_passes_a_sequence_that_waits_for_adapter_memory() -> None:
    bench = Bench()
    bench.add(3, num_answer_tokens=10, adapter_mix=mix("d"))
    waits = bench.add(3, adapter_mix=mix("a"))
    plain = bench.add(3)
    bench.turn()
    assert plain.state is SequenceState.RUNNING
    assert waits.state is SequenceState.WAITING
    bench.run_dry()


def test_waiting_crowd_of_one_adapter_is_asked_for_once_a_step() -> None:
    """Regression: what an adapter costs was worked out for each waiting sequence in every step."""
    asked: list[AdapterId] = []
    bench = Bench(limits=SchedulerLimits(64, 8))

    def pages_of(adapter_id: AdapterId) -> int:
        asked.append(adapter_id)
        return PAGES[adapter_id.digest]

    bench.slots = AdapterSlots(4, pages_of)
    bench.scheduler = Scheduler(bench.blocks, bench.slots, bench.limits, lambda: bench.now)
    bench.add(3, num_answer_tokens=9, adapter_mix=mix("d"))
    bench.turn()
    for _ in range(50):
        bench.add(3, adapter_mix=mix("c"))
    asked.clear()
    bench.turn()
    assert len(asked) <= 3
    assert [s.request.id for s in bench.scheduler.waiting] == [f"request-{i}" for i in range(1, 51)]
    bench.run_dry()


@pytest.mark.parametrize(
    "state", ["waiting", "passed by", "in its prompt", "answering", "preempted", "finished"]
)
def test_abort_in_any_state_frees_everything(state: str) -> None:
    bench = Bench(num_blocks=11, limits=SchedulerLimits(16, 1 if state == "waiting" else 4))
    victim_mix = mix("a")
    if state != "passed by":
        bench.bring("a")
    if state == "waiting":
        bench.add(8)
        bench.turn()
    if state == "passed by":
        bench.add(8, adapter_mix=mix("d"))
        bench.turn()
    if state == "preempted":
        for _ in range(2):
            bench.add(11, num_answer_tokens=9)
            bench.turn()
    victim = bench.add(30 if state == "in its prompt" else 15, 4, victim_mix, request_id="victim")
    for _ in range({"finished": 20, "answering": 2, "preempted": 2}.get(state, 1)):
        bench.turn()
    computed, answered = victim.num_computed_tokens, victim.num_output_tokens
    assert {
        "waiting": victim.state is SequenceState.WAITING and computed == 0,
        "passed by": victim.state is SequenceState.WAITING and computed == 0,
        "in its prompt": computed == 16 and answered == 0,
        "answering": answered == 2,
        "preempted": victim.num_preemptions == 1 and victim.state is SequenceState.WAITING,
        "finished": victim.state is SequenceState.FINISHED,
    }[state]
    bench.scheduler.abort(RequestId("victim"))
    bench.scheduler.check_integrity()
    assert victim.state is SequenceState.FINISHED
    assert victim not in bench.scheduler.running
    assert victim not in bench.scheduler.waiting
    assert bench.blocks.num_held == sum(len(s.block_table) for s in bench.scheduler.running)
    assert bench.scheduler.abort(RequestId("victim")) == []
    bench.run_dry()


def test_abort_takes_all_sequences_of_a_request_and_no_other() -> None:
    bench = Bench(limits=SchedulerLimits(64, 2))
    twins = [bench.add(5, request_id="twins") for _ in range(3)]
    other = bench.add(5)
    bench.turn()
    assert bench.scheduler.abort(RequestId("twins")) == twins
    bench.turn()
    assert bench.scheduler.running == [other]


class PoolMirror:
    """What each slot of the pool would hold: a key and value depend on the mix and on all tokens up to theirs."""

    def __init__(self) -> None:
        self._content: dict[int, tuple[AdapterMix, tuple[int, ...]]] = {}

    def write(self, item: ScheduledSequence) -> None:
        for position in range(item.start, item.end):
            self._content[self._slot(item, position)] = self._value(item, position)

    def check(self, item: ScheduledSequence) -> None:
        for position in range(item.end):
            assert self._content[self._slot(item, position)] == self._value(item, position)

    def _slot(self, item: ScheduledSequence, position: int) -> int:
        block = item.sequence.block_table[position // BLOCK_SIZE]
        return block * BLOCK_SIZE + position % BLOCK_SIZE

    def _value(self, item: ScheduledSequence, position: int) -> tuple[AdapterMix, tuple[int, ...]]:
        return item.sequence.mix, tuple(item.sequence.token_ids[: position + 1])


@pytest.mark.parametrize("seed", range(12))
def test_long_random_walk_keeps_every_limit_and_finishes_every_sequence(seed: int) -> None:
    generator = random.Random(seed)
    limits = SchedulerLimits(
        generator.choice([5, 16, 40]), generator.choice([2, 5]), max_adapter_wait_seconds=2.0
    )
    bench = Bench(num_blocks=generator.choice([9, 20]), num_pages=generator.choice([4, 6]), limits=limits)
    pool = PoolMirror()
    common = list(range(12))
    for _ in range(500):
        bench.now += generator.random()
        action = generator.random()
        if action < 0.25:
            names = generator.choice([(), (), ("a",), ("b",), ("c",), ("d",), ("a", "b")])
            length = generator.randint(1, 20)
            tokens = common[:length] + [generator.randrange(3) for _ in range(length - 12)]
            bench.add(0, generator.randint(1, 12), mix(*names), tokens=tokens)
        elif action < 0.3 and bench.sequences:
            bench.scheduler.abort(generator.choice(bench.sequences).request.id)
            bench.scheduler.check_integrity()
        batch = bench.schedule()
        assert batch.num_tokens <= limits.max_num_batched_tokens
        assert len(bench.scheduler.running) <= limits.max_num_seqs
        assert len({id(item.sequence) for item in batch.scheduled}) == len(batch.scheduled)
        for item in batch.scheduled:
            sequence = item.sequence
            assert sequence.state is SequenceState.RUNNING
            assert item.end == sequence.num_computed_tokens
            assert item.start < item.end <= min(sequence.num_tokens, len(sequence.block_table) * BLOCK_SIZE)
            assert {adapter_id for adapter_id, _ in sequence.mix} <= set(bench.slots.resident)
            pool.write(item)
        for item in batch.scheduled:
            pool.check(item)
        finished = []
        for item in batch.scheduled:
            if item.samples:
                item.sequence.token_ids.append(generator.randrange(3))
                if item.sequence.num_output_tokens == item.sequence.request.params.max_tokens:
                    finished.append(item.sequence)
        bench.scheduler.update(batch, finished)
        bench.scheduler.check_integrity()
    assert bench.scheduler.num_prefix_hit_tokens > 0
    bench.run_dry()
