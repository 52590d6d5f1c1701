"""Whether the daemon is alive, and whether it is ready for traffic: one reason each, or none.

Alive says whether only a restart helps. Ready never depends on how long the queue is or on whether some adapter
cannot be served: if it did, one bad folder or one busy minute would take every replica out at once.
"""

import time

from adapterd.server.seams import Daemon

MAX_STEP_SECONDS = 120.0
"""An engine that shows no sign of life for longer is stuck; a step over a long prompt on a CPU is not."""


class Readiness:
    """`why_dead` and `why_unready` are asked by probes, on the event loop: they wait for nothing."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._has_loaded = False

    def why_dead(self) -> str | None:
        stats = self._daemon.engine.stats()
        if stats.failed is not None:
            return "the engine failed"
        if time.monotonic() - stats.heartbeat_seconds > MAX_STEP_SECONDS:
            return "the engine hangs"
        return None

    def why_unready(self, *, is_draining: bool) -> str | None:
        if (reason := self.why_dead()) is not None:
            return reason
        if is_draining:
            return "shutting down"
        return None if self.has_loaded() else "loading adapters"

    def has_loaded(self) -> bool:
        """Whether the adapters that were there at the start are read. True from then on: what loads or fails
        later is that adapter's affair, not the server's."""
        if not self._has_loaded:
            self._has_loaded = all(entry.state != "LOADING" for entry in self._daemon.registry.list())
        return self._has_loaded
