"""The hand-over between the engine's thread and all others: what they ask of it, and whether it is taken.

Whoever asks is answered at once. What was taken waits for the engine's thread, which does it between two steps, in
its order. All of the engine that a lock guards is here. No torch.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from adapterd.core import AdapterId, AdapterMix, Request, alone
from adapterd.engine.checks import RequestChecks
from adapterd.engine.seams import HostWeights
from adapterd.errors import AdapterdError, InvalidRequest, Overloaded, Unavailable

Wish = Callable[[], None]
"""What the engine's thread is to do."""


class Inbox:
    """Holds the weights of what it takes; from then on they are the engine's to release.

    `max_queue` is how many sequences may wait beside those that could start: while fewer than `max_num_seqs` run, so
    many more are taken.
    """

    def __init__(
        self, checks: RequestChecks, weights: HostWeights, *, max_queue: int, max_num_seqs: int
    ) -> None:
        self._checks = checks
        self._weights = weights
        self._max_queue = max_queue
        self._max_num_seqs = max_num_seqs
        self._changed = threading.Condition()  # guards all below
        self._wishes: deque[Wish] = deque()
        self._pinned_pages: dict[AdapterId, int] = {}
        self._num_submitted = 0
        self._num_waiting = 0
        self._num_running = 0
        self._is_stopping = False
        self._failed: str | None = None

    # What other threads call.

    def submit(self, request: Request, begin: Wish) -> None:
        """Take a request whose adapters the caller has leased. Raises what `Engine.submit` raises."""
        self._checks.check_length(request)
        self._checks.check_token_ids(request)
        if request.num_sequences > self._max_queue + self._max_num_seqs:
            raise InvalidRequest(
                f"{request.num_sequences} answers are asked for and at most {self._max_queue + self._max_num_seqs} may"
                " run and wait at once; ask for fewer, or start with a larger --max-queue",
                param="n",
            )
        with self._held(request.mix, request.num_sequences):
            pages = self._checks.pages_of(request.mix)
            with self._changed:
                self._check_alive()
                self._checks.check_beside_pinned(pages, self._pinned_pages)
                num_waiting = self._num_waiting + self._num_submitted
                num_free = self._max_num_seqs - self._num_running
                if num_waiting + request.num_sequences > self._max_queue + num_free:
                    raise Overloaded(
                        f"{num_waiting} sequences are waiting and the queue holds {self._max_queue}; "
                        "try again in a moment"
                    )
                self._num_submitted += request.num_sequences
                self.post(begin)

    def bring(self, adapter_id: AdapterId, wish: Wish, *, pinned: bool) -> None:
        """Take a wish for an adapter that the caller has leased. Raises what `Engine.pin` raises."""
        mix = alone(adapter_id)
        with self._held(mix, 1):
            pages = self._checks.pages_of(mix)
            with self._changed:
                self._check_alive()
                self._checks.check_beside_pinned(pages, self._pinned_pages)
                if pinned:
                    self._pinned_pages |= pages
                self.post(wish)

    @contextmanager
    def _held(self, mix: AdapterMix, num_holders: int) -> Iterator[None]:
        """Weights are held before they are asked for their size, and given back by what is refused."""
        for _ in range(num_holders):
            self._weights.hold(mix)
        try:
            yield
        except AdapterdError:
            for _ in range(num_holders):
                self._weights.release(mix)
            raise

    def _check_alive(self) -> None:
        if self._failed is not None:
            raise Unavailable(f"the engine has stopped: {self._failed}")
        if self._is_stopping:
            raise Unavailable("the engine is stopping")

    def unpin(self, adapter_id: AdapterId) -> None:
        """Its pages count as pinned no more. Harmless if they do not."""
        with self._changed:
            self._pinned_pages.pop(adapter_id, None)

    def post(self, wish: Wish) -> None:
        with self._changed:
            self._wishes.append(wish)
            self._changed.notify()

    def stop(self) -> None:
        """Take no more requests, pins and prefetches, and wake the engine's thread."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()

    # What the engine's own thread calls.

    @property
    def is_empty(self) -> bool:
        return not self._wishes

    @property
    def is_stopping(self) -> bool:
        return self._is_stopping

    @property
    def failed(self) -> str | None:
        """Why the engine has ended, if it has."""
        return self._failed

    def wait(self, timeout_seconds: float) -> None:
        """Until something is asked or the engine is to stop; at once if that is so already."""
        with self._changed:
            if not self._wishes and not self._is_stopping:
                self._changed.wait(timeout_seconds)

    def take(self) -> tuple[deque[Wish], int]:
        """What was asked, and how many sequences were submitted with it, which `seen` is to be told."""
        with self._changed:
            wishes, self._wishes = self._wishes, deque()
            return wishes, self._num_submitted

    def seen(self, num_waiting: int, num_running: int, *, num_taken: int) -> None:
        """So many sequences wait and run in the engine, those that were taken among them."""
        with self._changed:
            self._num_waiting, self._num_running = num_waiting, num_running
            self._num_submitted -= num_taken

    def fail(self, reason: str) -> None:
        """Take no more, as `stop`: the engine has ended. What was taken before is still there."""
        with self._changed:
            self._failed = reason
