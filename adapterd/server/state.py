"""What the endpoints share: the rooms beside the server, and whether it is up, draining or done."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace

from adapterd.core import ServerStats
from adapterd.errors import BeingRead, Unavailable
from adapterd.server.readiness import Readiness
from adapterd.server.render_pool import RenderPool
from adapterd.server.seams import Daemon, ResolvedModel
from adapterd.server.streams import OutputStreams

DRAIN_RETRY_SECONDS = 5
READING_SECONDS = 30.0
"""How long a request waits for weights that have to be read first."""


class Drain:
    """Counts running generations; once begun, takes no new ones. Event loop only."""

    def __init__(self) -> None:
        self.has_begun = False
        self.num_running = 0

    def begin(self) -> None:
        self.has_begun = True

    @property
    def is_complete(self) -> bool:
        return self.has_begun and self.num_running == 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Raises Unavailable while draining."""
        if self.has_begun:
            raise Unavailable("the server is shutting down", retry_after_seconds=DRAIN_RETRY_SECONDS)
        self.num_running += 1
        try:
            yield
        finally:
            self.num_running -= 1


class ServerState:
    """`streams` and `render_pool` live between start and stop of the app, on its event loop."""

    def __init__(self, daemon: Daemon, *, max_queue: int = 1024) -> None:
        self.daemon = daemon
        self.spec = replace(daemon.spec, max_model_len=daemon.engine.max_model_len)
        self.metrics = daemon.metrics
        self.metrics.server_stats = self.stats
        self.drain = Drain()
        self.readiness = Readiness(daemon)
        self.created_unix = int(time.time())
        self.streams: OutputStreams
        self.render_pool: RenderPool
        self._max_queue = max_queue
        self._num_reading: Counter[str] = Counter()  # requests that wait for weights, by adapter

    async def resolve(self, model: str) -> ResolvedModel:
        """What `model` names now; waits, off the engine's thread and for a bounded time, where weights are read."""
        deadline_seconds = time.monotonic() + READING_SECONDS
        while True:
            try:
                return self.daemon.registry.resolve(model)
            except BeingRead as reading:
                # Shielded, for others wait for the same reading. The result is held until it is resolved, since
                # host memory may be too small to keep it for nobody.
                done = asyncio.shield(asyncio.wrap_future(reading.done))
                with self._reading(reading.name):
                    try:
                        kept = await asyncio.wait_for(done, deadline_seconds - time.monotonic())
                    except TimeoutError:
                        raise reading from None
                assert kept is not None

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        self._num_reading[name] += 1
        try:
            yield
        finally:
            self._num_reading[name] -= 1
            if not self._num_reading[name]:
                del self._num_reading[name]

    def model_names(self) -> list[str]:
        """The base, then the adapters that are ready, as a request's `model` says them."""
        entries = self.daemon.registry.list()
        return [self.spec.name, *(f"{self.spec.name}:{e.name}" for e in entries if e.id is not None)]

    def why_unready(self) -> str | None:
        """Why /readyz is red, if it is."""
        return self.readiness.why_unready(is_draining=self.drain.has_begun)

    def stats(self) -> ServerStats:
        return ServerStats(
            reading=tuple(sorted(self._num_reading.items())),
            is_ready=self.why_unready() is None,
            is_draining=self.drain.has_begun,
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Start the rooms and stop them again: the registry reads adapters, the engine turns its crank."""
        self.streams = OutputStreams(asyncio.get_running_loop())
        self.render_pool = RenderPool(max_waiting=max(1, self._max_queue))
        self.daemon.registry.start()
        self.daemon.engine.start(self.streams.deliver)
        try:
            yield
        finally:
            await asyncio.to_thread(self.daemon.engine.stop)
            await asyncio.to_thread(self.daemon.registry.stop)
            await asyncio.to_thread(self.render_pool.close)
