"""An engine over a runner that computes nothing, and what hears of its outputs."""

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

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


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.005)


def answers(engine: Engine, *names: str) -> list[tuple[int, ...]]:
    found = collect(engine)
    return [found[key].token_ids for name in names for key in sorted(found) if key[0] == name]
