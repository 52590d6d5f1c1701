"""The crank and the hand-over between threads, over a runner that computes nothing."""

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import pytest

from adapterd.core import (
    BASE_MIX,
    AdapterDigest,
    AdapterId,
    AdapterMix,
    BaseSpec,
    Batch,
    Output,
    Request,
    RequestId,
    SampledToken,
    SamplingParams,
)
from adapterd.engine.detokenizer import Vocabulary
from adapterd.engine.engine import Engine, PinFailed
from adapterd.engine.offline import collect
from adapterd.engine.scheduler import SchedulerLimits
from adapterd.engine.seams import EngineMemory, Uploaded
from adapterd.errors import AdapterRefused, ContextLengthExceeded, InvalidRequest, Overloaded, Unavailable
from adapterd.token_table import TokenTable

VOCAB_SIZE = 50
PAGES = {"a": 2, "b": 2, "c": 3}
SPEC = BaseSpec("fake", "fake", "Fake", "float32", VOCAB_SIZE, 64, {}, frozenset())
VOCABULARY = Vocabulary(
    TokenTable(tuple(f"<{i}>".encode() for i in range(VOCAB_SIZE)), strips_leading_space=False), frozenset()
)
PARAMS = SamplingParams(max_tokens=5)
PATIENCE_SECONDS = 20.0


class CountedWeights:
    """How often each adapter's weights are held."""

    def __init__(self) -> None:
        self.held: Counter[AdapterId] = Counter()
        self._lock = threading.Lock()

    def hold(self, adapter_mix: AdapterMix) -> None:
        with self._lock:
            self.held.update(adapter_id for adapter_id, _ in adapter_mix)

    def release(self, adapter_mix: AdapterMix) -> None:
        with self._lock:
            for adapter_id, _ in adapter_mix:
                self.held[adapter_id] -= 1
                assert self.held[adapter_id] >= 0

    def num_pages(self, adapter_id: AdapterId) -> int:
        with self._lock:
            assert self.held[adapter_id]
        return PAGES[adapter_id.digest]


@dataclass(frozen=True)
class Computed:
    results: list[SampledToken]

    def collect(self) -> list[SampledToken]:
        return self.results


@dataclass
class FakeRunner:
    """A token is a hash of seed, mix and all tokens before it; a gate may keep a step waiting.

    Uploads have ended when the step that began them has, unless `uploads_by_hand`.
    """

    batches: list[Batch] = field(default_factory=list)
    error: Exception | None = None
    weights: CountedWeights = field(default_factory=CountedWeights)
    gate: threading.Event | None = None
    entered: threading.Event = field(default_factory=threading.Event)
    num_steps_with_edits: int = 0
    max_in_flight: int = 0
    uploads_by_hand: bool = False
    tell: Uploaded = lambda adapter_id, error: None

    def on_uploaded(self, tell: Uploaded) -> None:
        self.tell = tell

    def launch(self, batch: Batch) -> "Computed":
        self.batches.append(batch)
        for adapter_id in batch.uploads:
            assert self.weights.held[adapter_id]
            if not self.uploads_by_hand:
                self.tell(adapter_id, None)
        self.entered.set()
        if self.gate is not None:
            assert self.gate.wait(PATIENCE_SECONDS)
        if self.error is not None:
            raise self.error
        return Computed(
            [SampledToken(self._token(item.sequence) if item.samples else None) for item in batch.scheduled]
        )

    def _token(self, sequence: object) -> int:
        said = f"{sequence.seed} {sequence.mix} {sequence.token_ids}"  # type: ignore[attr-defined]
        return hashlib.sha256(said.encode()).digest()[0] % VOCAB_SIZE


def make_engine(
    runner: FakeRunner,
    *,
    num_kv_blocks: int = 64,
    max_queue: int = 100,
    limits: SchedulerLimits = SchedulerLimits(32, 8),  # noqa: B008
    on_pin_failed: PinFailed = lambda adapter_id, error: None,
) -> Engine:
    memory = EngineMemory(
        num_kv_blocks=num_kv_blocks,
        kv_block_size=4,
        num_adapter_pages=4,
        adapter_page_bytes=1 << 20,
    )
    return Engine(
        runner,
        runner.weights,
        SPEC,
        VOCABULARY,
        memory,
        limits,
        max_queue=max_queue,
        on_pin_failed=on_pin_failed,
    )


def mix(*names: str) -> AdapterMix:
    return tuple((AdapterId(AdapterDigest(name), name), 1.0) for name in names)


def make_request(
    name: str,
    *,
    prompt: Sequence[int] = (1, 2, 3),
    params: SamplingParams = PARAMS,
    adapters: AdapterMix = BASE_MIX,
    num_sequences: int = 1,
) -> Request:
    return Request(RequestId(name), tuple(prompt), params, adapters, frozenset(), 0.0, num_sequences)


class Mailbox:
    """What the engine's thread delivers, and in which threads it did."""

    def __init__(self) -> None:
        self.deliveries: list[list[Output]] = []
        self.threads: set[str] = set()
        self._arrived = threading.Condition()

    def __call__(self, outputs: list[Output]) -> None:
        with self._arrived:
            self.deliveries.append(outputs)
            self.threads.add(threading.current_thread().name)
            self._arrived.notify_all()

    def outputs(self, name: str) -> list[Output]:
        return [o for outputs in self.deliveries for o in outputs if o.request_id == name]

    def wait_for_end(self, *names: str) -> None:
        with self._arrived:
            assert self._arrived.wait_for(
                lambda: all(any(o.finish_reason for o in self.outputs(name)) for name in names),
                PATIENCE_SECONDS,
            )


@pytest.fixture
def runner() -> FakeRunner:
    return FakeRunner()


@pytest.fixture
def engine(runner: FakeRunner) -> Iterator[Engine]:
    engine = make_engine(runner)
    yield engine
    if runner.gate is not None:
        runner.gate.set()
    engine.stop()


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


def test_mix_that_can_never_be_resident_is_refused_at_once(engine: Engine) -> None:
    """Regression: it was queued, waited for ever, and after a second nobody was admitted any more."""
    with pytest.raises(
        AdapterRefused, match=r"'a' and 'c' need 5\.0 MiB of adapter memory at once .* 4\.0 MiB"
    ):
        engine.submit(make_request("r", adapters=mix("a", "c")))
    engine.submit(make_request("r", adapters=mix("a", "b")))
    twice = tuple((adapter_id, factor) for adapter_id, _ in mix("c") for factor in (0.5, 0.7))
    engine.submit(make_request("s", adapters=twice))
    assert len(collect(engine)) == 2


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


def test_weights_are_held_from_submit_until_the_last_sequence_ends_however_it_ends(
    engine: Engine, runner: FakeRunner
) -> None:
    held = runner.weights.held
    for name in ("ends", "leaves early", "leaves late"):
        engine.submit(make_request(name, adapters=mix("a", "b"), num_sequences=2))
    with pytest.raises(AdapterRefused):
        engine.submit(make_request("refused", adapters=mix("a", "c")))
    assert set(held.values()) == {6, 0}
    engine.abort(RequestId("leaves early"))
    engine.step()
    assert set(held.values()) == {4, 0}
    engine.abort(RequestId("leaves late"))
    collect(engine)
    assert set(held.values()) == {0}


def test_adapter_whose_weights_nobody_holds_any_more_makes_room_for_another(engine: Engine) -> None:
    """Regression: its size was asked of weights that might have gone from host memory long ago."""
    for name in "abca":
        engine.submit(make_request(name, adapters=mix(name)))
        assert len(collect(engine)) == 1
    assert engine.stats().num_evictions == 3


def test_context_is_what_kv_memory_holds_if_that_is_less() -> None:
    engine = make_engine(FakeRunner(), num_kv_blocks=5)
    assert engine.max_model_len == 20
    engine.submit(make_request("r", prompt=range(10), params=replace(PARAMS, max_tokens=10)))
    assert len(collect(engine)[RequestId("r"), 0].token_ids) == 10


def test_retired_adapter_leaves_when_its_last_sequence_ends(engine: Engine) -> None:
    (old, _), (idle, _) = mix("a", "b")
    engine.submit(make_request("other", adapters=mix("b"), params=replace(PARAMS, max_tokens=1)))
    engine.submit(make_request("r", adapters=mix("a")))
    engine.step()
    engine.step()
    assert set(engine.stats().resident) == {old, idle}
    engine.retire(old)
    engine.retire(idle)
    engine.step()
    assert engine.stats().resident == (old,)
    collect(engine)
    stats = engine.stats()
    assert (stats.resident, stats.adapter_bytes_resident) == ((), 0)
    engine.step()
    engine.check_integrity()


def test_idle_engine_carries_out_an_eviction_without_being_asked_for_work(
    engine: Engine, runner: FakeRunner
) -> None:
    engine.submit(make_request("r", adapters=mix("a")))
    collect(engine)
    engine.retire(mix("a")[0][0])
    assert engine.has_work()
    engine.step()
    assert [adapter_id.name for batch in runner.batches for adapter_id in batch.evictions] == ["a"]


def test_step_that_can_compute_nothing_waits_for_the_upload_and_not_longer(
    engine: Engine, runner: FakeRunner
) -> None:
    runner.uploads_by_hand = True
    mailbox = Mailbox()
    engine.start(mailbox)
    engine.submit(make_request("r", adapters=mix("a")))
    until(lambda: engine.stats().num_uploading == 1)
    before = len(runner.batches)
    time.sleep(0.2)
    assert len(runner.batches) - before < 10  # it does not spin
    runner.tell(mix("a")[0][0], None)
    mailbox.wait_for_end("r")
    until(lambda: engine.stats().adapter_bytes_held == 0)


def test_others_go_on_while_an_adapter_is_on_its_way(engine: Engine, runner: FakeRunner) -> None:
    runner.uploads_by_hand = True
    engine.submit(make_request("waits", adapters=mix("a")))
    engine.submit(make_request("runs"))
    for _ in range(5):
        engine.step()
    assert engine.stats().num_running == 0
    assert engine.stats().num_waiting == 1
    runner.tell(mix("a")[0][0], None)
    assert len(answers(engine, "waits")[0]) == 5


def test_upload_that_fails_ends_who_waited_for_it_and_nobody_else(engine: Engine, runner: FakeRunner) -> None:
    runner.uploads_by_hand = True
    for name, adapters in (("lost", mix("a")), ("lost too", mix("a", "b")), ("other", mix("b"))):
        engine.submit(make_request(name, adapters=adapters))
    engine.step()
    runner.tell(mix("a")[0][0], "no such matrix")
    runner.tell(mix("b")[0][0], None)
    outputs = engine.step()
    refused = {output.request_id: output for output in outputs if output.error is not None}
    assert set(refused) == {"lost", "lost too"}
    assert refused[RequestId("lost")].error == "the adapter 'a' could not be uploaded: no such matrix"
    assert len(collect(engine)[RequestId("other"), 0].token_ids) == 4
    assert set(runner.weights.held.values()) == {0}
    engine.check_integrity()
    runner.uploads_by_hand = False
    engine.submit(make_request("again", adapters=mix("a")))
    assert len(answers(engine, "again")[0]) == 5


def test_who_pinned_is_told_of_an_upload_that_fails_and_nobody_else_is(runner: FakeRunner) -> None:
    told: list[tuple[str, str]] = []
    engine = make_engine(
        runner, on_pin_failed=lambda adapter_id, error: told.append((adapter_id.name, error))
    )
    runner.uploads_by_hand = True
    engine.pin(mix("a")[0][0])
    engine.prefetch(mix("b")[0][0])
    engine.step()
    for name in ("a", "b"):
        runner.tell(mix(name)[0][0], "no such matrix")
    engine.step()
    assert told == [("a", "no such matrix")]
    assert engine.stats().pinned == engine.stats().resident == ()
    engine.submit(make_request("r", adapters=mix("c")))
    engine.check_integrity()


def test_pinned_adapter_comes_without_a_request_and_stays(engine: Engine, runner: FakeRunner) -> None:
    ((pinned, _),) = mix("a")
    engine.start(Mailbox())
    engine.pin(pinned)
    engine.pin(pinned)
    until(lambda: pinned in engine.stats().resident)
    assert engine.stats().pinned == (pinned,)
    engine.prefetch(mix("b")[0][0])
    until(lambda: mix("b")[0][0] in engine.stats().resident)
    until(lambda: set(runner.weights.held.values()) == {0})
    engine.unpin(pinned)
    until(lambda: engine.stats().pinned == ())
    mailbox = Mailbox()
    engine.submit(make_request("r", adapters=mix("c")))
    engine.stop()
    assert mailbox.deliveries == []


def test_request_that_pinned_adapters_leave_no_room_is_told_to_come_back_later(engine: Engine) -> None:
    engine.pin(mix("a")[0][0])
    with pytest.raises(
        Overloaded, match=r"no adapter memory for 'c': 3\.0 MiB .* take 2\.0 MiB of 4\.0 MiB"
    ) as found:
        engine.submit(make_request("r", adapters=mix("c")))
    assert found.value.retry_after_seconds == 10
    with pytest.raises(Overloaded, match="'c'"):
        engine.pin(mix("c")[0][0])
    with pytest.raises(Overloaded, match="'c'"):
        engine.prefetch(mix("c")[0][0])
    engine.submit(make_request("beside", adapters=mix("a", "b")))
    engine.submit(make_request("base"))
    assert len(collect(engine)) == 2
    engine.unpin(mix("a")[0][0])
    engine.submit(make_request("r", adapters=mix("c")))
    assert len(collect(engine)) == 1


def test_request_that_waits_while_its_room_is_pinned_away_is_told_so_and_not_left_hanging(
    engine: Engine, runner: FakeRunner
) -> None:
    engine.submit(make_request("runs", adapters=mix("b"), params=replace(PARAMS, max_tokens=20)))
    for _ in range(3):
        engine.step()
    engine.submit(make_request("waits", adapters=mix("c")))
    engine.step()
    engine.pin(mix("a")[0][0])
    found = collect(engine)
    assert found[RequestId("waits"), 0].finish_reason == "overloaded"
    assert len(found[RequestId("runs"), 0].token_ids) == 17
    assert engine.stats().resident[-1] == mix("a")[0][0]
    assert set(runner.weights.held.values()) == {0}


def test_retired_version_is_no_longer_pinned(engine: Engine) -> None:
    ((old, _),) = mix("a")
    engine.pin(old)
    collect(engine)
    engine.retire(old)
    engine.submit(make_request("r", adapters=mix("c")))
    collect(engine)
    assert engine.stats().pinned == ()
    assert old not in engine.stats().resident


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.005)


def answers(engine: Engine, *names: str) -> list[tuple[int, ...]]:
    found = collect(engine)
    return [found[key].token_ids for name in names for key in sorted(found) if key[0] == name]


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
