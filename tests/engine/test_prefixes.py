"""Who finds whose prefix: of the same mix alone, from the step on that computes it, and never what came to nothing."""

from adapterd.core import SequenceState
from adapterd.engine.scheduler import SchedulerLimits
from tests.engine.turned import BLOCK_SIZE, Bench, counts, mix


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


def test_same_prefix_is_reused_within_its_scope_alone() -> None:
    tokens = list(range(14))
    for first, second, hit in ((b"1", b"1", 12), (b"1", b"2", 0), (b"1", b"", 0), (b"", b"1", 0)):
        bench = Bench()
        bench.add(0, tokens=tokens, prefix_scope=first)
        bench.run_dry()
        again = bench.add(0, tokens=tokens, prefix_scope=second)
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
