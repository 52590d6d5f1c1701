"""The engine: one thread that turns the crank, and the hand-over between it and everyone else.

`step` is the table of contents. Other threads only put requests and wishes into the inbox and read the stats;
everything else belongs to the thread that steps.
"""

import hashlib
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from adapterd.core import (
    AdapterEvents,
    AdapterId,
    AdapterMix,
    BaseSpec,
    Batch,
    EngineStats,
    FinishReason,
    Output,
    Request,
    RequestId,
    SampledToken,
    Sequence,
)
from adapterd.engine.blocks import BlockPool
from adapterd.engine.detokenizer import Vocabulary
from adapterd.engine.outputs import OutputBuilder
from adapterd.engine.scheduler import Scheduler, SchedulerLimits
from adapterd.engine.slots import AdapterSlots
from adapterd.errors import AdapterRefused, ContextLengthExceeded, InvalidRequest, Overloaded, Unavailable

logger = logging.getLogger(__name__)

Deliver = Callable[[list[Output]], None]

PINNED_RETRY_SECONDS = 10
"""What clients are told to wait where all adapter memory is pinned: until an operator has done something."""

_UPLOAD_POLL_SECONDS = 0.05


Uploaded = Callable[[AdapterId, str | None], None]
"""Told, from any thread, that an upload has ended, and why it came to nothing if it did."""


class BatchRunner(Protocol):
    """The seam to the device; `model.runner.Runner` is the real one.

    `run` begins the batch's uploads and does not wait for them; each is told once to what `on_uploaded` was given.

    `num_steps_with_edits` counts steps whose adapters change more than linears: no graph and no fast layer holds them.
    """

    @property
    def num_steps_with_edits(self) -> int: ...

    def run(self, batch: Batch) -> list[SampledToken]: ...

    def on_uploaded(self, tell: Uploaded) -> None: ...


class HostWeights(Protocol):
    """Keeps adapters' weights on the host while sequences may need them; see `engine.build.WeightsInUse`."""

    def hold(self, mix: AdapterMix) -> None: ...

    def release(self, mix: AdapterMix) -> None: ...


@dataclass(frozen=True)
class EngineMemory:
    """What the runner has set aside. `pages_of` tells what an adapter version takes of `num_adapter_pages`."""

    num_kv_blocks: int
    kv_block_size: int
    num_adapter_pages: int
    adapter_page_bytes: int
    pages_of: Callable[[AdapterId], int]


class Engine:
    """Requests in, outputs out. `start` runs it in a thread; `step` turns it by hand."""

    def __init__(
        self,
        runner: BatchRunner,
        weights: HostWeights,
        spec: BaseSpec,
        vocabulary: Vocabulary,
        memory: EngineMemory,
        limits: SchedulerLimits,
        *,
        max_queue: int = 1024,
        clock: Callable[[], float] = time.monotonic,
        events: AdapterEvents | None = None,
    ) -> None:
        self._runner = runner
        self._weights = weights
        self._memory = memory
        self._max_queue = max_queue
        self._vocab_size = spec.vocab_size
        self._clock = clock
        self.max_model_len = min(spec.max_model_len, memory.num_kv_blocks * memory.kv_block_size)
        self._blocks = BlockPool(memory.num_kv_blocks, memory.kv_block_size)
        self._slots = AdapterSlots(memory.num_adapter_pages, memory.pages_of, events=events)
        self._scheduler = Scheduler(self._blocks, self._slots, limits, clock)
        self._outputs = OutputBuilder(vocabulary, self.max_model_len)
        self._wished: list[
            AdapterMix
        ] = []  # pins and prefetches whose weights are held until they are uploaded
        self._refused: list[Output] = []
        self._upload_began: dict[AdapterId, float] = {}
        self._upload_seconds = 0.0
        runner.on_uploaded(lambda adapter_id, error: self._post(lambda: self._uploaded(adapter_id, error)))

        self._changed = threading.Condition()
        self._inbox: deque[Callable[[], None]] = deque()  # guarded by _changed, as all below
        self._pinned_pages: dict[AdapterId, int] = {}
        self._num_submitted = 0
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._failed: str | None = None
        self._num_steps = 0
        self._num_tokens_computed = 0
        self._stats = self._snapshot()

    # What other threads call.

    def submit(self, request: Request) -> None:
        """Queue a request whose adapters the caller has leased; from here on the engine holds their weights.

        Raises ContextLengthExceeded, InvalidRequest (token ids that are none), AdapterRefused (adapter memory
        cannot hold its adapters together), Overloaded (queue full, or adapter memory full of pinned ones) or
        Unavailable (engine dead or stopping).
        """
        self.check_length(len(request.prompt_token_ids), request.params.max_tokens)
        self._check_token_ids(request)
        pages = self._pages_of(request.mix)
        with self._changed:
            self._check_beside_pinned(pages)
            if self._failed is not None:
                raise Unavailable(f"the engine has stopped: {self._failed}")
            if self._stopping:
                raise Unavailable("the engine is stopping")
            num_waiting = self._stats.num_waiting + self._num_submitted
            if num_waiting + request.num_sequences > self._max_queue:
                raise Overloaded(
                    f"{num_waiting} sequences are waiting and the queue holds {self._max_queue}; "
                    "try again in a moment"
                )
            for _ in range(request.num_sequences):
                self._weights.hold(request.mix)
            self._num_submitted += request.num_sequences
            self._inbox.append(lambda: self._begin(request))
            self._changed.notify()

    def check_length(self, num_prompt_tokens: int, max_tokens: int) -> None:
        """Raise ContextLengthExceeded unless prompt and answer fit the context together."""
        if num_prompt_tokens + max_tokens > self.max_model_len or num_prompt_tokens == 0:
            raise ContextLengthExceeded(
                f"the prompt has {num_prompt_tokens} tokens and max_tokens is {max_tokens}; together they must "
                f"be within the context of {self.max_model_len} tokens, and the prompt must not be empty",
                param="max_tokens" if 0 < num_prompt_tokens < self.max_model_len else "messages",
            )

    def _check_token_ids(self, request: Request) -> None:
        """An id beyond the embedding would not fail its request but the step, and everyone in it."""
        params = request.params
        ids = (*request.prompt_token_ids, *params.stop_token_ids, *(token for token, _ in params.logit_bias))
        if min(ids) < 0 or max(ids) >= self._vocab_size:
            raise InvalidRequest(
                f"token ids must be from 0 to {self._vocab_size - 1}; the request has {min(ids)} to {max(ids)}",
                param="prompt",
            )

    def _pages_of(self, mix: AdapterMix) -> dict[AdapterId, int]:
        """What each adapter of a leased mix takes. A mix that can never be resident at once would wait for ever."""
        memory = self._memory
        self._weights.hold(mix)
        pages = {adapter_id: memory.pages_of(adapter_id) for adapter_id, _ in mix}
        self._weights.release(mix)
        if sum(pages.values()) > memory.num_adapter_pages:
            names = " and ".join(f"'{adapter_id.name}'" for adapter_id in pages)
            raise AdapterRefused(
                f"{names} need {self._mib(sum(pages.values()))} of adapter memory at once and the budget is "
                f"{self._mib(memory.num_adapter_pages)}; start with a larger --adapter-memory",
                param="model",
            )
        return pages

    def _check_beside_pinned(self, pages: dict[AdapterId, int]) -> None:
        """Raise Overloaded where pinned adapters leave too little; called with the lock held."""
        if not pages or not self._pinned_pages:
            return
        others = sum(count for pinned, count in self._pinned_pages.items() if pinned not in pages)
        if others + sum(pages.values()) > self._memory.num_adapter_pages:
            names = " and ".join(f"'{adapter_id.name}'" for adapter_id in pages)
            raise Overloaded(
                f"no adapter memory for {names}: {self._mib(sum(pages.values()))} are needed, and pinned adapters "
                f"take {self._mib(others)} of {self._mib(self._memory.num_adapter_pages)}; unpin one, or start with "
                "a larger --adapter-memory",
                retry_after_seconds=PINNED_RETRY_SECONDS,
            )

    def _mib(self, num_pages: int) -> str:
        return f"{num_pages * self._memory.adapter_page_bytes / 2**20:.1f} MiB"

    def abort(self, request_id: RequestId) -> None:
        """Free a request's sequences before the next step. Finished and unknown ids are harmless."""
        self._post(lambda: self._abort(request_id))

    def retire(self, adapter_id: AdapterId) -> None:
        """A version nobody will ask for again, pinned or not: free its device memory as soon as nothing runs it."""
        with self._changed:
            self._pinned_pages.pop(adapter_id, None)
        self._post(lambda: self._scheduler.residency.retire(adapter_id))

    def pin(self, adapter_id: AdapterId) -> None:
        """Upload a version that the caller has leased before all others, and keep it in adapter memory.

        Returns at once; `wait_resident` waits. Pinning twice is harmless. Raises AdapterRefused (larger than all
        adapter memory) or Overloaded (too little is left beside what is pinned).
        """
        mix = ((adapter_id, 1.0),)
        pages = self._pages_of(mix)
        with self._changed:
            self._check_beside_pinned(pages)
            self._pinned_pages |= pages
        self._wish(mix, lambda: self._scheduler.residency.pin(adapter_id))

    def unpin(self, adapter_id: AdapterId) -> None:
        """From now on the version may leave like any other. Harmless if it is not pinned."""
        with self._changed:
            self._pinned_pages.pop(adapter_id, None)
        self._post(lambda: self._scheduler.residency.unpin(adapter_id))

    def prefetch(self, adapter_id: AdapterId) -> None:
        """Upload a version that the caller has leased, if there is room that no waiting sequence needs.

        Raises AdapterRefused or Overloaded as `pin` does.
        """
        mix = ((adapter_id, 1.0),)
        pages = self._pages_of(mix)
        with self._changed:
            self._check_beside_pinned(pages)
        self._wish(mix, lambda: self._scheduler.residency.prefetch(adapter_id))

    def wait_resident(self, adapter_id: AdapterId, timeout: float) -> bool:
        """Wait until a version is in adapter memory, at most `timeout` seconds; whether that came about."""
        with self._changed:
            return self._changed.wait_for(lambda: adapter_id in self._stats.resident, timeout)

    def stats(self) -> EngineStats:
        """The counters as of the last step."""
        return self._stats

    def start(self, deliver: Deliver) -> None:
        """Turn the crank in a thread; `deliver` is called there, once a step, with all its outputs."""
        self._thread = threading.Thread(
            target=self._run, args=(deliver,), name="adapterd-engine", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the step it is in. Unfinished requests get no more outputs."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    # What the engine's own thread does.

    def step(self) -> list[Output]:
        """One turn of the crank."""
        batch = self._schedule()
        sampled = self._runner.run(batch)
        built = self._outputs.build(batch, sampled)
        finished = [sequence for sequence, output in built if output.finish_reason is not None]
        spoiled = [sequence for sequence, output in built if output.finish_reason == "error"]
        self._scheduler.update(batch, finished, spoiled)
        for sequence in finished:
            self._forget(sequence)
        self._release_wished()
        self._num_steps += 1
        self._num_tokens_computed += batch.num_tokens
        self._publish_stats()
        refused, self._refused = self._refused, []
        if not batch.scheduled and not refused:
            self._wait_for_uploads()
        return [*refused, *(output for _, output in built)]

    def has_work(self) -> bool:
        return bool(
            self._inbox or self._scheduler.running or self._scheduler.waiting or self._slots.num_uploading
        )

    def check_integrity(self) -> None:
        """Books balance. Only between steps."""
        self._scheduler.check_integrity()

    def _run(self, deliver: Deliver) -> None:
        try:
            while self._wait_for_work():
                outputs = self.step()
                if outputs:
                    deliver(outputs)
        except BaseException as error:
            # The step may have left device and books apart, so nothing more is computed: every sequence is
            # told, and /livez turns red so that the process is replaced. Panics of native code are no Exception,
            # and a thread that dies of one in silence would look busy for as long as a step may take.
            logger.exception("the engine failed")
            deliver(self._fail(f"{type(error).__name__} in the engine"))

    def _wait_for_work(self) -> bool:
        with self._changed:
            while not self._stopping and not self.has_work():
                # Woken at times without work, so that the heartbeat shows a living thread.
                self._changed.wait(timeout=1.0)
                self._stats = self._snapshot()
            return not self._stopping

    def _wait_for_uploads(self) -> None:
        """Nothing could be computed: sleep until an adapter has come, for a bounded time, since waits have ends."""
        with self._changed:
            if not self._inbox and not self._stopping and self.has_work():
                self._changed.wait(timeout=_UPLOAD_POLL_SECONDS)

    def _post(self, wish: Callable[[], None]) -> None:
        with self._changed:
            self._inbox.append(wish)
            self._changed.notify()

    def _wish(self, mix: AdapterMix, wish: Callable[[], None]) -> None:
        """Post a wish for a leased adapter, whose weights are held until it is uploaded or the wish is void."""

        def take() -> None:
            self._wished.append(mix)
            wish()

        with self._changed:
            self._weights.hold(mix)
            self._inbox.append(take)
            self._changed.notify()

    def _release_wished(self) -> None:
        """The runner has taken the weights of whatever was to be uploaded; pins that found no room go on waiting."""
        residency = self._scheduler.residency
        waiting = [mix for mix in self._wished if residency.is_wanted(mix[0][0])]
        for mix in self._wished:
            if mix not in waiting:
                self._weights.release(mix)
        self._wished = waiting

    def _uploaded(self, adapter_id: AdapterId, error: str | None) -> None:
        self._upload_seconds += self._clock() - self._upload_began.pop(adapter_id)
        if error is None:
            self._slots.arrived(adapter_id)
            return
        with self._changed:
            self._pinned_pages.pop(adapter_id, None)
        for sequence in self._scheduler.upload_failed(adapter_id):
            self._refuse(sequence, "error", f"the adapter {adapter_id.name!r} could not be uploaded: {error}")

    def _refuse(self, sequence: Sequence, reason: FinishReason, error: str) -> None:
        """End a sequence that cannot run; said with the outputs of this step."""
        self._forget(sequence)
        self._refused.append(_ended(sequence, reason, error))

    def _schedule(self) -> Batch:
        num_taken = self._take_inbox()
        batch = self._scheduler.schedule()
        self._upload_began |= dict.fromkeys(batch.uploads, self._clock())
        for sequence in self._scheduler.take_refused():
            self._refuse(
                sequence, "overloaded", "pinned adapters take the memory that this request's adapter needs"
            )
        with self._changed:
            # From here on the stats say who waits: a long step must not hide anyone from the queue's bound.
            self._num_submitted -= num_taken
            self._stats = self._snapshot()
        return batch

    def _publish_stats(self) -> None:
        stats = self._snapshot()
        with self._changed:
            has_moved = stats.resident != self._stats.resident
            self._stats = stats
            if has_moved:
                self._changed.notify_all()  # whoever waits for an adapter

    def _take_inbox(self) -> int:
        """Do what other threads asked for; returns how many sequences they had submitted."""
        with self._changed:
            wishes, self._inbox = self._inbox, deque()
            num_taken = self._num_submitted
        for wish in wishes:
            wish()
        return num_taken

    def _begin(self, request: Request) -> None:
        seed = secrets.randbits(63) if request.params.seed is None else request.params.seed
        for index in range(request.num_sequences):
            sequence = Sequence(request, index, _sequence_seed(seed, index), list(request.prompt_token_ids))
            self._outputs.begin(sequence)
            self._scheduler.add(sequence)

    def _abort(self, request_id: RequestId) -> None:
        for sequence in self._scheduler.abort(request_id):
            self._forget(sequence)

    def _forget(self, sequence: Sequence) -> None:
        self._outputs.forget(sequence)
        self._weights.release(sequence.mix)

    def _fail(self, reason: str) -> list[Output]:
        with self._changed:
            self._failed = reason
        self._take_inbox()
        sequences = [*self._scheduler.running, *self._scheduler.waiting]
        self._stats = self._snapshot()
        return [_ended(sequence, "error", reason) for sequence in sequences]

    def _snapshot(self) -> EngineStats:
        page_bytes = self._memory.adapter_page_bytes
        resident_pages = self._slots.num_pages - self._slots.num_free_pages
        return EngineStats(
            num_waiting=len(self._scheduler.waiting),
            num_running=len(self._scheduler.running),
            kv_blocks_total=self._blocks.num_blocks,
            kv_blocks_held=self._blocks.num_held,
            kv_blocks_cached=self._blocks.num_cached,
            kv_block_size=self._blocks.block_size,
            adapter_bytes_total=self._slots.num_pages * page_bytes,
            adapter_bytes_resident=resident_pages * page_bytes,
            adapter_bytes_held=self._slots.num_held_pages * page_bytes,
            resident=self._slots.resident,
            resident_bytes=tuple(pages * page_bytes for pages in self._slots.resident_pages),
            waiting=self._scheduler.waiting.num_by_mix(),
            num_steps=self._num_steps,
            num_tokens_computed=self._num_tokens_computed,
            num_preemptions=self._scheduler.num_preemptions,
            num_prefix_hit_tokens=self._scheduler.num_prefix_hit_tokens,
            num_prefix_query_tokens=self._scheduler.num_prefix_query_tokens,
            num_uploads=self._slots.num_uploads,
            num_evictions=self._slots.num_evictions,
            num_steps_with_edits=self._runner.num_steps_with_edits,
            heartbeat_seconds=self._clock(),
            failed=self._failed,
            pinned=self._slots.pinned,
            num_uploading=self._slots.num_uploading,
            upload_seconds=self._upload_seconds,
        )


def _ended(sequence: Sequence, reason: FinishReason, error: str) -> Output:
    """The last output of a sequence that ends without an answer of its own."""
    return Output(
        request_id=sequence.request.id,
        index=sequence.index,
        token_ids=(),
        text="",
        logprobs=(),
        num_prompt_tokens=sequence.num_prompt_tokens,
        num_cached_tokens=0,
        num_output_tokens=sequence.num_output_tokens,
        finish_reason=reason,
        error=error,
    )


def _sequence_seed(seed: int, index: int) -> int:
    """The seed of a request's index-th answer: the request's own for the first, others far apart."""
    if index == 0:
        return seed & (2**63 - 1)
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
