"""The scheduler alone: who runs, in what order, within which limits, and that nothing is lost or kept."""

import random

import pytest

from adapterd.core import (
    AdapterId,
    AdapterMix,
    RequestId,
    ScheduledSequence,
    SequenceState,
)
from adapterd.engine.scheduler import Scheduler, SchedulerLimits
from adapterd.engine.slots import AdapterSlots
from tests.engine.turned import BLOCK_SIZE, PAGES, Bench, counts, mix


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
