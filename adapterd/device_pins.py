"""Pinned names and device memory: the version that a pinned name means now is kept there, whatever it will be.

The registry says which versions are pinned, the engine keeps them; this moves the one to the other, in a thread of
its own, because weights may have to be read and the engine may say no.
"""

import logging
import threading
from collections.abc import Callable
from typing import Protocol

from adapterd.core import AdapterId, AdapterMix, alone
from adapterd.errors import AdapterdError, Unavailable

_logger = logging.getLogger(__name__)


class Engine(Protocol):
    """What of `engine.engine.Engine` is needed. All return at once; `pin` and `prefetch` raise AdapterRefused,
    Overloaded or Unavailable."""

    def pin(self, adapter_id: AdapterId) -> None: ...
    def unpin(self, adapter_id: AdapterId) -> None: ...
    def prefetch(self, adapter_id: AdapterId) -> None: ...


class Lease(Protocol):
    def release(self) -> None: ...


class DevicePins:
    """`wanted` says which versions are to be pinned now; `read` brings a version's weights into host memory, and
    `lease` holds them there until the engine has them."""

    def __init__(
        self,
        engine: Callable[[], Engine],
        wanted: Callable[[], frozenset[AdapterId]],
        read: Callable[[AdapterId], object],
        lease: Callable[[AdapterMix], Lease],
    ) -> None:
        self._engine = engine
        self._wanted_now = wanted
        self._read = read
        self._lease = lease
        self._changed = threading.Condition()  # guards all below
        self._wanted: frozenset[AdapterId] = frozenset()
        self._pinned: set[AdapterId] = set()
        self._dropped: set[AdapterId] = set()
        self._errors: dict[AdapterId, AdapterdError] = {}
        self._stopping = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="adapter-pins", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Harmless if never started."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def follow(self) -> None:
        """What is wanted may have changed. Returns at once; before `start` there is nobody to be told."""
        if self._thread is None:
            return
        with self._changed:
            wanted = self._wanted_now()
            if wanted != self._wanted:
                # Whoever was refused for want of room may find some now.
                self._wanted, self._errors = wanted, {}
            self._changed.notify_all()

    def dropped(self, adapter_id: AdapterId) -> None:
        """The engine was just told to give a version up. A name may mean it again by now: then it is pinned anew."""
        with self._changed:
            if adapter_id in self._wanted:
                self._dropped.add(adapter_id)
                self._changed.notify_all()

    def failed(self, adapter_id: AdapterId, reason: str) -> None:
        """A version that the engine had agreed to keep could not be uploaded: it is tried again only when
        what is wanted changes."""
        with self._changed:
            if adapter_id in self._wanted:
                self._errors[adapter_id] = Unavailable(
                    f"adapter {adapter_id.name!r} could not be uploaded: {reason}"
                )
                self._dropped.add(adapter_id)
                self._changed.notify_all()

    def prefetch(self, adapter_id: AdapterId) -> None:
        """Have a version uploaded if there is room for it. Raises what the engine does."""
        self._with_weights(adapter_id, self._engine().prefetch)

    def wait(self, adapter_id: AdapterId, timeout: float) -> None:
        """Wait until the engine has agreed to keep a version, or it is wanted no more. Raises why it has not, and
        Unavailable where that takes longer than `timeout` seconds."""
        with self._changed:
            is_settled = self._changed.wait_for(lambda: self._is_settled(adapter_id), timeout)
            if adapter_id in self._errors:
                raise self._errors[adapter_id]
            if not is_settled:
                raise Unavailable(
                    f"adapter {adapter_id.name!r} is not pinned after {timeout:g} s: weights are still being read, its"
                    " own or those of others pinned before it; try again"
                )

    def _is_settled(self, adapter_id: AdapterId) -> bool:
        return adapter_id in self._pinned or adapter_id in self._errors or adapter_id not in self._wanted

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or self._due())
                if self._stopping:
                    return
                gone = self._gone()
                self._pinned -= gone
                new = self._wanted - self._pinned - self._errors.keys()
                self._dropped.clear()
            # What leaves goes first: its room may be what the others need.
            for adapter_id in gone:
                self._engine().unpin(adapter_id)
            for adapter_id in new:
                self._pin(adapter_id)

    def _due(self) -> bool:
        return bool(self._gone() or self._wanted - self._pinned - self._errors.keys())

    def _gone(self) -> set[AdapterId]:
        """What is wanted no more, or was dropped since it was pinned."""
        return (self._pinned - self._wanted) | (self._pinned & self._dropped)

    def _pin(self, adapter_id: AdapterId) -> None:
        error: AdapterdError | None = None
        try:
            self._with_weights(adapter_id, self._engine().pin)
        except AdapterdError as refusal:
            error = refusal
            _logger.warning(
                "adapter %s is pinned, but not in device memory: %s", adapter_id.name, refusal.message
            )
        except Exception as failure:  # of a disk, say: later pins are followed all the same
            error = Unavailable(
                f"adapter {adapter_id.name!r} could not be read: {type(failure).__name__}, of which the log says more"
            )
            _logger.exception("adapter %s is pinned, but could not be read", adapter_id.name)
        with self._changed:
            if error is None:
                self._pinned.add(adapter_id)
            else:
                self._errors[adapter_id] = error
            self._changed.notify_all()

    def _with_weights(self, adapter_id: AdapterId, call: Callable[[AdapterId], None]) -> None:
        """Make a call of the engine's with a version's weights held on the host."""
        kept = self._read(adapter_id)  # memory may be too small to keep it for nobody
        lease = self._lease(alone(adapter_id))
        del kept
        try:
            call(adapter_id)
        finally:
            lease.release()
