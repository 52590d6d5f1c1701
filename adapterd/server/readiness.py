"""Whether the daemon is alive, and whether it is ready for traffic: one reason each, or none.

Alive says whether only a restart helps. Ready never depends on how long the queue is or on whether some adapter
cannot be served: if it did, one bad folder or one busy minute would take every replica out at once.
"""

import time

from adapterd.server.drain import Drain
from adapterd.server.seams import Daemon

MAX_STEP_SECONDS = 120.0
"""An engine that shows no sign of life for longer is stuck; a step over a long prompt on a CPU is not."""


class Readiness:
    """Asked by probes, on the event loop: waits for nothing. `is_warm` is set once the first forwards are done."""

    def __init__(self, daemon: Daemon, drain: Drain, *, is_warm: bool) -> None:
        self._daemon = daemon
        self._drain = drain
        self._has_loaded = False
        self.is_warm = is_warm
        self.failure: str | None = None
        """Why it will never be ready."""

    def why_dead(self) -> str | None:
        stats = self._daemon.engine.stats()
        if stats.failed is not None:
            return "the engine failed"
        if time.monotonic() - stats.heartbeat_seconds > MAX_STEP_SECONDS:
            return "the engine hangs"
        return None

    def why_unready(self) -> str | None:
        if self._drain.has_begun:
            return "shutting down"
        if (reason := self.why_dead() or self.failure) is not None:
            return reason
        if not self.has_loaded():
            return "loading adapters"
        return None if self.is_warm else "warming up"

    def has_loaded(self) -> bool:
        """Whether the adapters that were there at the start are read. True from then on: what loads or fails
        later is that adapter's affair, not the server's."""
        if not self._has_loaded:
            self._has_loaded = self._daemon.registry.stats().num_loading == 0
        return self._has_loaded
