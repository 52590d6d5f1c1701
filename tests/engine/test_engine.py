"""The crank and the hand-over between threads, over a runner that computes nothing."""

import threading
import time
from dataclasses import replace

import pytest

from adapterd.core import RequestId, SamplingParams
from adapterd.engine.engine import Engine
from adapterd.engine.offline import collect
from adapterd.engine.scheduler import SchedulerLimits
from adapterd.errors import ContextLengthExceeded, InvalidRequest, Overloaded, Unavailable
from tests.engine.fake_runner import (
    PARAMS,
    PATIENCE_SECONDS,
    FakeRunner,
    Mailbox,
    answers,
    make_engine,
    make_request,
    mix,
)


def test_every_step_is_delivered_once_and_by_the_engines_thread(engine: Engine, runner: FakeRunner) -> None:
    mailbox = Mailbox()
    for number in range(4):
        engine.submit(make_request(f"r{number}"))
    engine.start(mailbox)
    mailbox.wait_for_end("r0", "r1", "r2", "r3")
    engine.stop()
    assert mailbox.threads == {"adapterd-engine"}
    assert [len(outputs) for outputs in mailbox.deliveries] == [4] * 5
    assert len(runner.batches) == 5
    assert engine.stats().num_steps == 5
    engine.check_integrity()


def test_requests_from_many_threads_are_all_answered(engine: Engine) -> None:
    mailbox = Mailbox()
    engine.start(mailbox)
    names = [f"{thread}-{number}" for thread in range(4) for number in range(20)]

    def work(thread: int) -> None:
        for number in range(20):
            engine.submit(make_request(f"{thread}-{number}", adapters=mix("abc"[number % 3])))
            assert engine.stats().kv_blocks_held <= engine.stats().kv_blocks_total

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    mailbox.wait_for_end(*names)
    engine.stop()
    assert all(sum(len(o.token_ids) for o in mailbox.outputs(name)) == 5 for name in names)
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    assert (stats.kv_blocks_held, stats.adapter_bytes_held) == (0, 0)
    assert stats.num_tokens_computed >= len(names) * 5
    engine.check_integrity()


def test_abort_frees_memory_within_one_step_and_says_nothing_more(engine: Engine) -> None:
    engine.submit(make_request("stays", params=replace(PARAMS, max_tokens=9)))
    engine.submit(make_request("leaves", prompt=range(20), adapters=mix("a"), num_sequences=2))
    engine.step()
    engine.step()
    held = engine.stats()
    assert held.adapter_bytes_held == 2 << 20
    engine.abort(RequestId("leaves"))
    engine.abort(RequestId("nobody"))
    outputs = engine.step()
    assert {output.request_id for output in outputs} == {"stays"}
    stats = engine.stats()
    assert (stats.num_running, stats.kv_blocks_held, stats.adapter_bytes_held) == (1, 2, 0)
    engine.check_integrity()
    assert {key for key, _ in collect(engine)} == {"stays"}


def test_request_aborted_before_it_began_never_runs(engine: Engine, runner: FakeRunner) -> None:
    engine.submit(make_request("r"))
    engine.abort(RequestId("r"))
    assert engine.step() == []
    assert runner.batches[0].scheduled == ()
    assert not engine.has_work()


def test_runner_that_raises_fails_every_request_and_the_engine_says_so(runner: FakeRunner) -> None:
    """Running, waiting and just submitted alike; nobody is left without an answer."""
    engine = make_engine(runner, limits=SchedulerLimits(32, 1))
    runner.gate, runner.error = threading.Event(), RuntimeError("device lost")
    mailbox = Mailbox()
    for name in ("running", "waiting"):
        engine.submit(make_request(name))
    engine.start(mailbox)
    assert runner.entered.wait(PATIENCE_SECONDS)
    engine.submit(make_request("submitted", num_sequences=2))
    runner.gate.set()
    mailbox.wait_for_end("running", "waiting", "submitted")
    (outputs,) = mailbox.deliveries
    assert sorted((o.request_id, o.index) for o in outputs) == [
        ("running", 0), ("submitted", 0), ("submitted", 1), ("waiting", 0),
    ]  # fmt: skip
    assert {(o.finish_reason, o.error) for o in outputs} == {("error", "RuntimeError in the engine")}
    assert engine.stats().failed == "RuntimeError in the engine"
    with pytest.raises(Unavailable, match="RuntimeError in the engine"):
        engine.submit(make_request("late"))
    engine.abort(RequestId("running"))
    engine.stop()


def test_failed_engine_says_so_and_tells_everyone_although_its_books_refuse_a_wish(
    engine: Engine, runner: FakeRunner
) -> None:
    """Regression: what was asked behind a wish that raised was lost, and with it the news that the engine had ended."""
    runner.tell(mix("a")[0][0], None)  # an upload that nobody booked
    engine.submit(make_request("first"))
    runner.tell(mix("b")[0][0], None)
    engine.submit(make_request("second", num_sequences=2))
    mailbox = Mailbox()
    engine.start(mailbox)
    mailbox.wait_for_end("first", "second")
    assert [len(outputs) for outputs in mailbox.deliveries] == [3]
    assert engine.stats().failed == "KeyError in the engine"


def test_full_queue_is_overloaded_and_has_room_again_later() -> None:
    runner = FakeRunner()
    engine = make_engine(runner, max_queue=3, limits=SchedulerLimits(32, 1))
    engine.submit(make_request("one"))
    engine.submit(make_request("two", num_sequences=3))
    with pytest.raises(Overloaded, match="4 sequences are waiting and the queue holds 3"):
        engine.submit(make_request("three"))
    engine.step()
    with pytest.raises(Overloaded, match="3 sequences are waiting and the queue holds 3"):
        engine.submit(make_request("three"))
    for _ in range(PARAMS.max_tokens - 1):
        engine.step()  # to the end of the first
    engine.submit(make_request("three"))
    with pytest.raises(Overloaded):
        engine.submit(make_request("four"))
    assert len(collect(engine)) == 4


def test_queue_keeps_its_bound_while_a_long_step_runs(engine: Engine, runner: FakeRunner) -> None:
    """Regression: between the inbox and the end of a step nobody counted those who had just come in."""
    engine = make_engine(runner, max_queue=2, limits=SchedulerLimits(32, 1))
    runner.gate = threading.Event()
    engine.submit(make_request("runs"))
    engine.submit(make_request("waits"))
    engine.start(Mailbox())
    assert runner.entered.wait(PATIENCE_SECONDS)
    engine.submit(make_request("waits too"))
    with pytest.raises(Overloaded, match="2 sequences are waiting"):
        engine.submit(make_request("too many"))
    runner.gate.set()
    engine.stop()


def test_stop_joins_and_nothing_can_be_submitted_after(engine: Engine) -> None:
    """Regression: a request that came during shutdown was taken and never answered."""
    others = set(threading.enumerate())
    engine.start(Mailbox())
    engine.stop()
    assert not any(thread.name == "adapterd-engine" for thread in set(threading.enumerate()) - others)
    with pytest.raises(Unavailable, match="stopping"):
        engine.submit(make_request("late"))


@pytest.mark.parametrize(
    ("num_prompt_tokens", "max_tokens", "fits"),
    [(60, 4, True), (60, 5, False), (64, 0, True), (0, 4, False)],
)
def test_prompt_and_answer_must_fit_the_context(
    engine: Engine, num_prompt_tokens: int, max_tokens: int, fits: bool
) -> None:
    request = make_request("r", prompt=[1] * num_prompt_tokens, params=SamplingParams(max_tokens=max_tokens))
    if fits:
        engine.submit(request)
        assert collect(engine)[RequestId("r"), 0].finish_reason == "length"
    else:
        with pytest.raises(ContextLengthExceeded, match="64 tokens"):
            engine.submit(request)


@pytest.mark.parametrize(
    ("prompt", "params", "param", "wrong"),
    [
        ([1, 50], SamplingParams(max_tokens=1), "messages", 50),
        ([-1], SamplingParams(max_tokens=1), "messages", -1),
        ([1], SamplingParams(max_tokens=1, stop_token_ids=(3, 50)), "stop_token_ids", 50),
        ([1], SamplingParams(max_tokens=1, logit_bias=((-1, 1.0), (50, 1.0))), "logit_bias", -1),
    ],
)
def test_token_ids_that_are_none_fail_their_request_and_not_the_step(
    engine: Engine, prompt: list[int], params: SamplingParams, param: str, wrong: int
) -> None:
    request = replace(make_request("r", prompt=prompt, params=params), prompt_field="messages")
    with pytest.raises(InvalidRequest, match=f"token id {wrong} is outside the vocabulary of 50") as refused:
        engine.submit(request)
    assert refused.value.param == param
    assert not engine.has_work()


def test_context_is_what_kv_memory_holds_if_that_is_less() -> None:
    engine = make_engine(FakeRunner(), num_kv_blocks=5)
    assert engine.max_model_len == 20
    engine.submit(make_request("r", prompt=range(10), params=replace(PARAMS, max_tokens=10)))
    assert len(collect(engine)[RequestId("r"), 0].token_ids) == 10


def test_same_seed_gives_the_same_answers_whatever_the_company() -> None:
    """Alone, in a crowd, in chunks of another size, and preempted."""
    seeded = make_request(
        "seeded", prompt=range(9), params=SamplingParams(max_tokens=8, seed=7), num_sequences=3
    )
    alone = make_engine(FakeRunner())
    alone.submit(seeded)
    expected = answers(alone, "seeded")
    assert len(set(expected)) == 3
    crowded = make_engine(FakeRunner(), num_kv_blocks=12, limits=SchedulerLimits(11, 6))
    for number in range(9):
        crowded.submit(make_request(f"r{number}", prompt=range(number + 1), adapters=mix("abc"[number % 3])))
        if number == 4:
            crowded.submit(seeded)
    assert answers(crowded, "seeded") == expected
    assert crowded.stats().num_preemptions > 0


def test_requests_without_a_seed_differ_and_first_of_several_is_the_single_answer(engine: Engine) -> None:
    for name in ("one", "two"):
        engine.submit(make_request(name, params=replace(PARAMS, max_tokens=12)))
    first, second = answers(engine, "one", "two")
    assert first != second
    seeded = replace(PARAMS, seed=-3)
    engine.submit(make_request("single", params=seeded))
    engine.submit(make_request("several", params=seeded, num_sequences=2))
    single, first, second = answers(engine, "single", "several")
    assert single == first != second


def test_heartbeat_of_an_idle_engine_goes_on(engine: Engine) -> None:
    engine.start(Mailbox())
    before = engine.stats().heartbeat_seconds
    deadline = time.monotonic() + PATIENCE_SECONDS
    while engine.stats().heartbeat_seconds <= before:
        assert time.monotonic() < deadline
        time.sleep(0.05)
