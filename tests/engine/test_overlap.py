"""Steps in flight: the next is launched before the last one's tokens are known, and nobody can tell by the answers."""

import hashlib
import random
import threading
from collections import Counter, deque
from collections.abc import Iterator, Sequence
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
    ScheduledSequence,
)
from adapterd.core import Sequence as Running
from adapterd.engine.detokenizer import Vocabulary
from adapterd.engine.engine import Engine
from adapterd.engine.offline import Finished, collect
from adapterd.engine.scheduler import SchedulerLimits
from adapterd.engine.seams import EngineMemory, Uploaded
from adapterd.token_table import TokenTable

VOCAB_SIZE = 40
BLOCK_SIZE = 4
PAGES = {"a": 2, "b": 2, "c": 3}
SPEC = BaseSpec("fake", "fake", "Fake", "float32", VOCAB_SIZE, 64, {}, frozenset())
VOCABULARY = Vocabulary(
    TokenTable(tuple(f"<{i}>".encode() for i in range(VOCAB_SIZE)), strips_leading_space=False), frozenset()
)
PARAMS = SamplingParams(max_tokens=6, seed=1)
PENALISED = replace(PARAMS, presence_penalty=0.5)


class NoWeights:
    def hold(self, adapter_mix: AdapterMix) -> None: ...

    def release(self, adapter_mix: AdapterMix) -> None: ...

    def num_pages(self, adapter_id: AdapterId) -> int:
        return PAGES[adapter_id.digest]


@dataclass
class Step:
    """Told when it is collected; never out of turn."""

    device: "Device"
    number: int
    results: list[SampledToken]

    def collect(self) -> list[SampledToken]:
        if self.device.error is not None:
            raise self.device.error
        self.device.log.append(f"collect {self.number}")
        assert self.device.uncollected.popleft() is self
        return self.results


@dataclass
class Device:
    """A runner that computes at launch and tells at collection, and a pool that remembers what was written where.

    A token is a hash of seed, mix and all tokens before it; some rows come to no number. Only the step launched last
    can say what a pending token is.
    """

    max_in_flight: int
    num_steps_with_edits: int = 0
    error: Exception | None = None
    fails_at: int | None = None
    log: list[str] = field(default_factory=list)
    batches: list[Batch] = field(default_factory=list)
    uncollected: deque[Step] = field(default_factory=deque)
    num_rows: Counter[RequestId] = field(default_factory=Counter)
    tell: Uploaded = lambda adapter_id, error: None

    def __post_init__(self) -> None:
        self._last: dict[int, int] = {}
        self._pool: dict[int, tuple[AdapterMix, tuple[int, ...]]] = {}
        self._resident: set[AdapterId] = set()

    def on_uploaded(self, tell: Uploaded) -> None:
        self.tell = tell

    def launch(self, batch: Batch) -> Step:
        assert len(self.uncollected) <= self.max_in_flight
        if len(self.batches) == self.fails_at:
            raise RuntimeError("device lost")
        flying = {
            i for step in self.batches[len(self.batches) - len(self.uncollected) :] for i in ids_of(step)
        }
        assert not flying & set(batch.evictions), "an adapter leaves while a step in flight may read it"
        self._resident -= set(batch.evictions)
        for adapter_id in batch.uploads:
            self._resident.add(adapter_id)
            self.tell(adapter_id, None)
        rows = [(item, self._tokens(item)) for item in batch.scheduled]
        for item, tokens in rows:
            assert {adapter_id for adapter_id, _ in item.sequence.mix} <= self._resident
            for position in range(item.start, item.end):
                self._pool[slot(item, position)] = item.sequence.mix, tuple(tokens[: position + 1])
        for item, tokens in rows:
            for position in range(item.end):
                assert self._pool[slot(item, position)] == (item.sequence.mix, tuple(tokens[: position + 1]))
        if batch.scheduled:
            self.log.append(f"launch {len(self.batches)}")
        self._last = {}
        results = [self._sample(item, tokens) for item, tokens in rows]
        step = Step(self, len(self.batches), results)
        self.batches.append(batch)
        self.uncollected.append(step)
        return step

    def _tokens(self, item: ScheduledSequence) -> list[int]:
        known = item.sequence.token_ids[: item.end]
        if len(known) == item.end:
            return known
        assert not item.sequence.request.params.has_penalties
        return [*known, self._last[id(item.sequence)]]

    def _sample(self, item: ScheduledSequence, tokens: Sequence[int]) -> SampledToken:
        if not item.samples:
            return SampledToken(None)
        self.num_rows[item.sequence.request.id] += 1
        said = f"{item.sequence.seed} {item.sequence.mix} {tokens}"
        digest = hashlib.sha256(said.encode()).digest()
        self._last[id(item.sequence)] = digest[0] % VOCAB_SIZE
        if digest[1] == 0:
            return SampledToken(None, error="none of these is a number")
        return SampledToken(digest[0] % VOCAB_SIZE)


def ids_of(batch: Batch) -> set[AdapterId]:
    return {adapter_id for item in batch.scheduled for adapter_id, _ in item.sequence.mix}


def slot(item: ScheduledSequence, position: int) -> int:
    return item.sequence.block_table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE


def make_engine(
    device: Device,
    num_kv_blocks: int = 64,
    limits: SchedulerLimits = SchedulerLimits(32, 8),  # noqa: B008
) -> Engine:
    memory = EngineMemory(num_kv_blocks, BLOCK_SIZE, 4, 1 << 20)
    return Engine(device, NoWeights(), SPEC, VOCABULARY, memory, limits)


def mix(*names: str) -> AdapterMix:
    return tuple((AdapterId(AdapterDigest(name), name), 1.0) for name in names)


def make_request(
    name: str,
    *,
    prompt: Sequence[int] = (1, 2, 3),
    params: SamplingParams = PARAMS,
    adapters: AdapterMix = BASE_MIX,
    eos: frozenset[int] = frozenset(),
    num_sequences: int = 1,
) -> Request:
    return Request(RequestId(name), tuple(prompt), params, adapters, eos, 0.0, num_sequences)


@pytest.fixture
def device() -> Device:
    return Device(max_in_flight=1)


@pytest.fixture
def engine(device: Device) -> Iterator[Engine]:
    engine = make_engine(device)
    yield engine
    engine.stop()


def answer(request: Request) -> Finished:
    """What it gets alone, with no step in flight."""
    engine = make_engine(Device(max_in_flight=0))
    engine.submit(request)
    return collect(engine)[request.id, 0]


def test_step_is_launched_before_the_last_ones_tokens_are_read(engine: Engine, device: Device) -> None:
    engine.submit(make_request("r", params=replace(PARAMS, max_tokens=3)))
    collect(engine)
    assert device.log[:5] == ["launch 0", "launch 1", "collect 0", "launch 2", "collect 1"]


def test_without_steps_in_flight_each_is_read_before_the_next_is_decided() -> None:
    device = Device(max_in_flight=0)
    engine = make_engine(device)
    engine.submit(make_request("r", params=replace(PARAMS, max_tokens=3)))
    collect(engine)
    assert device.log == ["launch 0", "collect 0", "launch 1", "collect 1", "launch 2", "collect 2"]


@pytest.mark.parametrize("max_tokens", [0, 1, 2, 7])
def test_no_row_is_launched_past_the_length_asked_for(
    engine: Engine, device: Device, max_tokens: int
) -> None:
    request = make_request("r", params=replace(PARAMS, max_tokens=max_tokens), num_sequences=3)
    engine.submit(request)
    collect(engine)
    assert device.num_rows[request.id] == 3 * max(max_tokens, 1)


def test_stop_found_late_costs_one_row_and_holds_its_memory_until_that_is_read(
    engine: Engine, device: Device
) -> None:
    request = make_request("r", adapters=mix("a"), params=replace(PARAMS, max_tokens=20))
    full = answer(request)
    stop = next(token for token in full.token_ids if token not in full.token_ids[:3])
    num_tokens = full.token_ids.index(stop) + 1
    assert 3 < num_tokens < 20
    request = replace(request, eos_token_ids=frozenset({stop}))
    engine.submit(request)
    outputs: list[Output] = []
    while not (outputs and outputs[-1].finish_reason):
        outputs += engine.step()
        engine.check_integrity()
    assert tuple(token for output in outputs for token in output.token_ids) == full.token_ids[:num_tokens]
    assert device.num_rows[request.id] == num_tokens + 1
    held = engine.stats()
    assert held.num_running == 0
    assert held.kv_blocks_held == -(-(3 + num_tokens) // BLOCK_SIZE)
    assert held.adapter_bytes_held == 2 << 20
    assert engine.has_work()
    assert engine.step() == []
    engine.check_integrity()
    assert (engine.stats().kv_blocks_held, engine.stats().adapter_bytes_held) == (0, 0)
    assert not engine.has_work()


def test_version_retired_while_a_step_reads_it_leaves_once_that_step_is_read(
    engine: Engine, device: Device
) -> None:
    engine.submit(make_request("r", adapters=mix("a"), params=replace(PARAMS, max_tokens=30)))
    for _ in range(4):
        engine.step()
    engine.retire(mix("a")[0][0])
    engine.abort(RequestId("r"))
    assert engine.step() == []  # what was in flight is thrown away, and then the adapter may go
    engine.check_integrity()
    assert mix("a")[0][0] not in engine.stats().resident
    engine.submit(make_request("next", adapters=mix("c")))
    assert len(collect(engine)[RequestId("next"), 0].token_ids) == 6
    assert [batch.evictions for batch in device.batches if batch.evictions] == [(mix("a")[0][0],)]


def test_abort_in_flight_throws_the_row_away_and_its_neighbours_go_on(engine: Engine) -> None:
    stays = make_request("stays", params=replace(PARAMS, max_tokens=9))
    engine.submit(stays)
    engine.submit(make_request("leaves", prompt=range(20), num_sequences=2))
    outputs = engine.step() + engine.step() + engine.step()
    assert "leaves" in {output.request_id for output in outputs}
    engine.abort(RequestId("leaves"))
    later = engine.step()
    engine.check_integrity()
    assert {output.request_id for output in later} == {"stays"}
    rest = collect(engine)[stays.id, 0].token_ids
    said = tuple(t for o in [*outputs, *later] if o.request_id == "stays" for t in o.token_ids)
    assert said + rest == answer(stays).token_ids


def test_penalised_rows_are_launched_when_their_tokens_are_known_and_only_then(
    engine: Engine, device: Device
) -> None:
    """Device._tokens refuses them pending; beside them nobody is in flight either, and afterwards everyone is."""
    requests = [
        make_request("penalised", params=PENALISED),
        make_request("plain", params=replace(PARAMS, max_tokens=12)),
    ]
    for request in requests:
        engine.submit(request)
    found = collect(engine)
    assert [found[request.id, 0] for request in requests] == [answer(request) for request in requests]
    assert device.log[:6] == [f"{what} {i}" for i in range(3) for what in ("launch", "collect")]
    assert device.log[-4:-2] == ["launch 11", "collect 10"]


def test_last_chunk_of_a_prompt_waits_for_nothing(engine: Engine, device: Device) -> None:
    engine = make_engine(device, limits=SchedulerLimits(8, 8))
    request = make_request("r", prompt=range(30), params=replace(PENALISED, max_tokens=2))
    engine.submit(request)
    assert collect(engine)[request.id, 0] == answer(request)
    assert device.log[:5] == ["launch 0", "launch 1", "collect 0", "launch 2", "collect 1"]


def test_device_that_fails_late_fails_every_request(engine: Engine, device: Device) -> None:
    told: list[Output] = []
    arrived = threading.Event()

    def deliver(outputs: list[Output]) -> None:
        told.extend(outputs)
        arrived.set()

    device.error = RuntimeError("device lost")
    engine.submit(make_request("r", num_sequences=2))
    engine.start(deliver)
    assert arrived.wait(20)
    assert [(output.index, output.finish_reason) for output in told] == [(0, "error"), (1, "error")]
    assert engine.stats().failed == "RuntimeError in the engine"


def test_answer_that_ended_before_the_device_failed_is_delivered(engine: Engine, device: Device) -> None:
    """Regression: its end had been read in the very step whose launch failed, and nobody was told."""
    told: list[Output] = []
    arrived = threading.Event()

    def deliver(outputs: list[Output]) -> None:
        told.extend(outputs)
        if outputs[-1].finish_reason == "error":
            arrived.set()

    # A penalised row has the last step read before the next is launched: with the short answer's end.
    engine.submit(make_request("short", params=replace(PARAMS, max_tokens=2)))
    engine.submit(make_request("long", params=replace(PENALISED, max_tokens=9)))
    device.fails_at = 2
    engine.start(deliver)
    assert arrived.wait(20)
    ends = {output.request_id: output.finish_reason for output in told if output.finish_reason}
    assert ends == {"short": "length", "long": "error"}


def test_engine_that_stops_leaves_nothing_in_flight(engine: Engine, device: Device) -> None:
    begun = threading.Event()
    engine.submit(make_request("r", params=replace(PARAMS, max_tokens=60)))
    engine.start(lambda outputs: begun.set())
    assert begun.wait(20)
    engine.stop()
    assert not device.uncollected
    engine.check_integrity()


@dataclass(frozen=True)
class Traffic:
    """Requests by the step before which they come, and aborts likewise."""

    requests: list[tuple[int, Request]]
    aborts: list[tuple[int, RequestId]]


def make_traffic(seed: int) -> Traffic:
    generator = random.Random(seed)
    requests, aborts = [], []
    prefixes = [tuple(range(12)), tuple(range(5, 20))]
    for number in range(60):
        step = generator.randrange(120)
        prompt = (
            *generator.choice(prefixes)[: generator.randint(1, 15)],
            *(generator.randrange(VOCAB_SIZE) for _ in range(generator.randrange(4))),
        )
        params = SamplingParams(
            max_tokens=generator.choice([0, 1, 5, 20]),
            seed=number,
            min_tokens=generator.choice([0, 0, 1]),
            stop=generator.choice([(), (), ("<7>", "9><")]),
            stop_token_ids=generator.choice([(), (3, 4)]),
            presence_penalty=generator.choice([0.0, 0.0, 0.0, 0.5]),
        )
        if params.max_tokens == 0:
            params = replace(params, min_tokens=0)
        request = make_request(
            f"r{number}",
            prompt=prompt,
            params=params,
            adapters=mix(*generator.choice([(), (), ("a",), ("b",), ("c",), ("a", "b")])),
            eos=frozenset(generator.choice([(), (11,)])),
            num_sequences=generator.choice([1, 1, 2]),
        )
        requests.append((step, request))
        if generator.random() < 0.15:
            aborts.append((step + generator.randrange(12), request.id))
    return Traffic(requests, aborts)


def run_traffic(traffic: Traffic, engine: Engine) -> dict[tuple[RequestId, int], list[Output]]:
    found: dict[tuple[RequestId, int], list[Output]] = {}
    step = 0
    while step < 140 or engine.has_work():
        for when, request in traffic.requests:
            if when == step:
                engine.submit(request)
        for when, request_id in traffic.aborts:
            if when == step:
                engine.abort(request_id)
        for output in engine.step() if engine.has_work() else ():
            found.setdefault((output.request_id, output.index), []).append(output)
        engine.check_integrity()
        step += 1
    return found


def said(outputs: Sequence[Output]) -> tuple[object, ...]:
    last = outputs[-1]
    tokens = [token for output in outputs for token in output.token_ids]
    return tokens, "".join(o.text for o in outputs), last.finish_reason, last.stop_reason, last.error


@pytest.mark.parametrize("seed", range(10))
def test_answers_of_mixed_traffic_are_those_of_one_step_at_a_time(seed: int) -> None:
    """Stops, errors, aborts, preemptions, cached prefixes, adapters that come and go; the device checks its pool."""
    traffic = make_traffic(seed)
    # Answers that have ended go on as prompts: what was thrown away after them must not be found in the cache.
    first = run_traffic(traffic, make_engine(Device(max_in_flight=0)))
    for _, request in traffic.requests[:30]:
        tokens = said(first.get((request.id, 0), [Output(request.id, 0, (), "", (), 0, 0, 0)]))[0]
        assert isinstance(tokens, list)
        prompt = (*request.prompt_token_ids, *tokens, *range(5))
        again = replace(request, id=RequestId(f"{request.id} again"), prompt_token_ids=prompt)
        traffic.requests.append((100, again))
    limits = SchedulerLimits(*random.Random(seed).choice([(9, 4), (24, 6), (40, 12)]))
    engines = [make_engine(Device(max_in_flight=n), 18, limits) for n in (0, 1)]
    plain, overlapped = (run_traffic(traffic, engine) for engine in engines)
    aborted = {request_id for _, request_id in traffic.aborts}
    for key, outputs in plain.items():
        if key[0] not in aborted:
            assert said(overlapped[key]) == said(outputs)
    for engine in engines:
        stats = engine.stats()
        assert (stats.kv_blocks_held, stats.adapter_bytes_held, stats.num_running) == (0, 0, 0)
        assert stats.num_preemptions > 0
        assert stats.num_evictions > 0
        assert stats.num_prefix_hit_tokens > 0


def test_failed_row_ends_its_own_sequence_and_no_other(engine: Engine, device: Device) -> None:
    requests = [make_request(f"r{i}", params=replace(PARAMS, seed=i, max_tokens=30)) for i in range(40)]
    for request in requests:
        engine.submit(request)
    found = collect(engine)
    assert {finished.finish_reason for finished in found.values()} == {"error", "length"}
    assert [found[request.id, 0] for request in requests] == [answer(request) for request in requests]
    assert engine.stats().kv_blocks_held == 0


def test_sequence_knows_its_place_while_a_token_is_pending(engine: Engine, device: Device) -> None:
    engine.submit(make_request("r"))
    engine.step()
    sequence: Running = device.batches[-1].scheduled[0].sequence
    assert (sequence.num_tokens, sequence.num_pending, len(sequence.token_ids)) == (4, 1, 3)
    engine.step()
    assert (sequence.num_tokens, sequence.num_pending, len(sequence.token_ids)) == (5, 1, 4)
    collect(engine)
    assert (sequence.num_tokens, sequence.num_pending, sequence.num_in_flight) == (9, 0, 0)
