"""The engine: one thread that turns the crank.

`step` is the table of contents. Other threads only put requests and wishes into the inbox (`inbox.py`) and read the
stats; everything else belongs to the thread that steps.

Where the runner lets a step be in flight, the next one is decided and launched before its tokens are known, so that
the device never waits for what happens here. Whatever hangs on those tokens is put right once they are read: a
sequence that stopped has by then at most one row too many, whose result is thrown away.
"""

import hashlib
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from adapterd.core import (
    AdapterEvents,
    AdapterId,
    BaseSpec,
    Batch,
    EngineStats,
    FinishReason,
    Output,
    Request,
    RequestId,
    Sequence,
    alone,
)
from adapterd.engine.blocks import BlockPool
from adapterd.engine.checks import RequestChecks
from adapterd.engine.detokenizer import Vocabulary
from adapterd.engine.inbox import Inbox, Wish
from adapterd.engine.outputs import OutputBuilder, ended
from adapterd.engine.scheduler import Scheduler, SchedulerLimits
from adapterd.engine.seams import BatchRunner, EngineMemory, HostWeights, LaunchedStep
from adapterd.engine.slots import AdapterSlots

logger = logging.getLogger(__name__)

Deliver = Callable[[list[Output]], None]
PinFailed = Callable[[AdapterId, str], None]
"""Told, in the engine's thread, that a pinned version could not be uploaded, and why: it is pinned no more."""

_UPLOAD_POLL_SECONDS = 0.05


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
        on_pin_failed: PinFailed = lambda adapter_id, error: None,
    ) -> None:
        self._runner = runner
        self._weights = weights
        self._memory = memory
        self._clock = clock
        self.max_model_len = min(spec.max_model_len, memory.num_kv_blocks * memory.kv_block_size)
        checks = RequestChecks(memory, weights, vocab_size=spec.vocab_size, max_model_len=self.max_model_len)
        self._inbox = Inbox(checks, weights, max_queue=max_queue, max_num_seqs=limits.max_num_seqs)
        self._blocks = BlockPool(memory.num_kv_blocks, memory.kv_block_size)
        self._slots = AdapterSlots(memory.num_adapter_pages, weights.num_pages, events=events)
        self._scheduler = Scheduler(self._blocks, self._slots, limits, clock)
        self._outputs = OutputBuilder(vocabulary, self.max_model_len)
        self._on_pin_failed = on_pin_failed
        self._asked: deque[Wish] = deque()  # taken from the inbox, and still to be done
        self._wished: list[AdapterId] = []  # their weights are held until they are uploaded
        self._in_flight: deque[tuple[Batch, LaunchedStep]] = deque()
        self._to_deliver: list[Output] = []
        self._thread: threading.Thread | None = None
        self._num_steps = 0
        self._num_tokens_computed = 0
        self._stats = self._snapshot()
        runner.on_uploaded(
            lambda adapter_id, error: self._inbox.post(lambda: self._uploaded(adapter_id, error))
        )

    # What other threads call.

    def submit(self, request: Request) -> None:
        """Queue a request whose adapters the caller has leased; from here on the engine holds their weights.

        Raises ContextLengthExceeded, InvalidRequest (token ids that are none, or more sequences than may ever be
        here), AdapterRefused (adapter memory cannot hold its adapters together), Overloaded (queue full, or adapter
        memory full of pinned ones) or Unavailable (engine dead or stopping).
        """
        self._inbox.submit(request, lambda: self._begin(request))

    def abort(self, request_id: RequestId) -> None:
        """Free a request's sequences before the next step. Finished and unknown ids are harmless."""
        self._inbox.post(lambda: self._abort(request_id))

    def retire(self, adapter_id: AdapterId) -> None:
        """A version nobody will ask for again, pinned or not: free its device memory as soon as nothing runs it."""
        self._inbox.unpin(adapter_id)
        self._inbox.post(lambda: self._scheduler.residency.retire(adapter_id))

    def pin(self, adapter_id: AdapterId) -> None:
        """Upload a version that the caller has leased before all others, and keep it in adapter memory.

        Returns at once; the stats tell when it is there. Pinning twice is harmless. Raises AdapterRefused (larger
        than all adapter memory), Overloaded (too little is left beside what is pinned) or Unavailable (engine dead
        or stopping).
        """
        pin = self._scheduler.residency.pin
        self._inbox.bring(adapter_id, lambda: self._wish(adapter_id, pin), pinned=True)

    def unpin(self, adapter_id: AdapterId) -> None:
        """From now on the version may leave like any other. Harmless if it is not pinned."""
        self._inbox.unpin(adapter_id)
        self._inbox.post(lambda: self._scheduler.residency.unpin(adapter_id))

    def prefetch(self, adapter_id: AdapterId) -> None:
        """Upload a version that the caller has leased, if there is room that no waiting sequence needs.

        Raises what `pin` does.
        """
        prefetch = self._scheduler.residency.prefetch
        self._inbox.bring(adapter_id, lambda: self._wish(adapter_id, prefetch), pinned=False)

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
        """End the thread after the steps it is in. Unfinished requests get no more outputs."""
        self._inbox.stop()
        if self._thread is not None:
            self._thread.join()

    # What the engine's own thread does.

    def step(self) -> list[Output]:
        """One turn of the crank: launch the next step, then read the one before it, or itself on a CPU."""
        batch = self._schedule()
        is_idle = not batch.scheduled and not self._in_flight
        self._launch(batch)
        self._collect(max_left=self._runner.max_in_flight if batch.scheduled else 0)
        self._release_wished()
        self._publish_stats()
        outputs, self._to_deliver = self._to_deliver, []
        if is_idle and not outputs:
            self._wait_for_uploads()
        return outputs

    def has_work(self) -> bool:
        return bool(
            self._in_flight
            or self._scheduler.running
            or self._scheduler.waiting
            or self._slots.num_uploading
            or not self._inbox.is_empty
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
            self._collect(max_left=0)
        except BaseException as error:
            # The step may have left device and books apart, so nothing more is computed: every sequence is
            # told, and /livez turns red so that the process is replaced. Panics of native code are no Exception,
            # and a thread that dies of one in silence would look busy for as long as a step may take.
            logger.exception("the engine failed")
            deliver(self._fail(f"{type(error).__name__} in the engine"))

    def _wait_for_work(self) -> bool:
        while not self._inbox.is_stopping and not self.has_work():
            # Woken at times without work, so that the heartbeat shows a living thread.
            self._inbox.wait(1.0)
            self._publish_stats()
        return not self._inbox.is_stopping

    def _wait_for_uploads(self) -> None:
        """Nothing could be computed: sleep until an adapter has come, for a bounded time, since waits have ends."""
        if self.has_work():
            self._inbox.wait(_UPLOAD_POLL_SECONDS)

    def _wish(self, adapter_id: AdapterId, tell: Callable[[AdapterId], None]) -> None:
        """An adapter's weights are held until it is uploaded, or the wish for it is void."""
        self._wished.append(adapter_id)
        tell(adapter_id)

    def _release_wished(self) -> None:
        """The runner has taken the weights of whatever was to be uploaded; pins that found no room go on waiting."""
        waiting = [wished for wished in self._wished if self._scheduler.residency.is_wanted(wished)]
        for adapter_id in self._wished:
            if adapter_id not in waiting:
                self._weights.release(alone(adapter_id))
        self._wished = waiting

    def _uploaded(self, adapter_id: AdapterId, error: str | None) -> None:
        if error is None:
            self._slots.arrived(adapter_id)
            return
        self._inbox.unpin(adapter_id)
        if self._slots.is_pinned(adapter_id):
            self._on_pin_failed(adapter_id, error)
        for sequence in self._scheduler.upload_failed(adapter_id):
            self._refuse(sequence, "error", f"the adapter {adapter_id.name!r} could not be uploaded: {error}")

    def _refuse(self, sequence: Sequence, reason: FinishReason, error: str) -> None:
        """End a sequence that cannot run; said with the outputs of this step."""
        self._forget(sequence)
        self._to_deliver.append(ended(sequence, reason, error))

    def _schedule(self) -> Batch:
        num_taken = self._do_what_was_asked()
        batch = self._scheduler.schedule()
        if batch is None:
            self._collect(max_left=0)
            batch = self._scheduler.schedule()
            assert batch is not None
        for sequence in self._scheduler.take_refused():
            self._refuse(
                sequence, "overloaded", "pinned adapters take the memory that this request's adapter needs"
            )
        # From here on the stats say who waits: a long step must not hide anyone from the queue's bound.
        self._publish_stats(num_taken=num_taken)
        return batch

    def _launch(self, batch: Batch) -> None:
        self._in_flight.append((batch, self._runner.launch(batch)))

    def _collect(self, *, max_left: int) -> None:
        """Read the oldest steps until so many are left in flight: what they came to, and what that ends."""
        while len(self._in_flight) > max_left:
            batch, launched = self._in_flight.popleft()
            built = self._outputs.build(batch, launched.collect())
            finished = [sequence for sequence, output in built if output.finish_reason is not None]
            spoiled = [sequence for sequence, output in built if output.finish_reason == "error"]
            self._scheduler.update(batch, finished, spoiled)
            for sequence in finished:
                self._forget(sequence)
            self._to_deliver += [output for _, output in built]
            self._num_steps += 1
            self._num_tokens_computed += batch.num_tokens

    def _publish_stats(self, *, num_taken: int = 0) -> None:
        self._stats = self._snapshot()
        self._inbox.seen(self._stats.num_waiting, self._stats.num_running, num_taken=num_taken)

    def _do_what_was_asked(self) -> int:
        """Returns how many sequences were submitted with it. Where a wish raises, those behind it stay asked."""
        wishes, num_taken = self._inbox.take()
        self._asked += wishes
        while self._asked:
            wish = self._asked.popleft()
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
        self._inbox.fail(reason)
        # Before all that may go wrong here, for it is what has the process replaced.
        self._stats = replace(self._stats, failed=reason)
        while self._asked or not self._inbox.is_empty:
            try:
                self._do_what_was_asked()
            except Exception:
                # Books that are apart may refuse one wish; the next may be a request, which is to be told.
                logger.exception("the failed engine could not do what it was asked")
        sequences = [*self._scheduler.running, *self._scheduler.waiting]
        # What had been read by then stands, the ends of those that run no more among it.
        return [*self._to_deliver, *(ended(sequence, "error", reason) for sequence in sequences)]

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
            failed=self._inbox.failed,
            pinned=self._slots.pinned,
            num_uploading=self._slots.num_uploading,
        )


def _sequence_seed(seed: int, index: int) -> int:
    """The seed of a request's index-th answer: the request's own for the first, others far apart."""
    if index == 0:
        return seed & (2**63 - 1)
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
