"""What the endpoints share: the rooms beside the server, and how adapters are called here."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Collection, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from types import MappingProxyType

from adapterd.core import ServerStats
from adapterd.errors import AdapterdError, BeingRead, Overloaded
from adapterd.router_view import PREFIXED, Spelling, spelled
from adapterd.server.change_pool import ChangePool
from adapterd.server.drain import Drain
from adapterd.server.in_use import AdaptersInUse
from adapterd.server.readiness import Readiness
from adapterd.server.render_pool import RenderPool
from adapterd.server.seams import Daemon, FullProofs, ModelDescription, ResolvedModel
from adapterd.server.streams import OutputStreams
from adapterd.server.warm_up import warm_up

_logger = logging.getLogger(__name__)

_LOADING_POLL_SECONDS = 0.05
READING_SECONDS = 30.0
"""How long a request waits for weights that have to be read first."""


class ServerState:
    """`streams`, `render_pool` and `changes` live between start and stop of the app, on its event loop."""

    def __init__(
        self,
        daemon: Daemon,
        *,
        max_queue: int = 1024,
        spellings: Collection[Spelling] = PREFIXED,
        more_spellings: Mapping[str, str] = MappingProxyType({}),
        warms_up: bool = False,
        reading_seconds: float = READING_SECONDS,
        full_proofs: FullProofs | None = None,
    ) -> None:
        """`spellings`: how /v1/models lists adapters; requests may use any. `more_spellings`: what
        else a request's `model` may be -> an adapter's name. `warms_up`: ready after a forward."""
        self.daemon = daemon
        self.full_proofs = full_proofs
        self.spec = replace(daemon.spec, max_model_len=daemon.engine.max_model_len)
        self.metrics = daemon.metrics
        self.metrics.server_stats = self.stats
        self.drain = Drain()
        self.readiness = Readiness(daemon, self.drain, is_warm=not warms_up)
        self.in_use = AdaptersInUse()
        self.created_unix = int(time.time())
        self.streams: OutputStreams
        self.render_pool: RenderPool
        self.changes: ChangePool
        self._max_queue = max_queue
        self._spellings = frozenset(spellings)
        self._more_spellings = dict(more_spellings)
        self._reading_seconds = reading_seconds
        self._num_reading: Counter[str] = Counter()  # requests that wait for weights, by adapter

    async def resolve(self, model: str) -> ResolvedModel:
        """What `model` names now; waits, off the engine's thread and for a bounded time, where weights are read.

        Raises Overloaded where as many wait for that as may wait at all, or where it takes too long.
        """
        model = self._more_spellings.get(model, model)
        try:
            return self.daemon.registry.resolve(model)
        except BeingRead as reading:
            first = reading
        num_reading = self._num_reading.total()
        if num_reading >= self._max_queue:
            raise Overloaded(
                f"{num_reading} requests wait for weights to be read already; try again in a moment"
            )
        try:
            async with asyncio.timeout(self._reading_seconds):
                return await self._resolve_after(model, first)
        except TimeoutError:
            raise Overloaded(
                f"the weights that {model!r} needs did not come to memory within {self._reading_seconds:g} s: "
                "others are in use, or the disk is slow; try again, or start with a larger --host-memory",
                retry_after_seconds=5,
            ) from None

    def describe(self, model: str) -> ModelDescription:
        """What `model` names now, by name alone: at once, and without any effect."""
        return self.daemon.registry.describe(self._more_spellings.get(model, model))

    async def _resolve_after(self, model: str, reading: BeingRead) -> ResolvedModel:
        kept: list[object] = []  # until it is resolved: memory may be too small to keep it for nobody
        while True:
            with self._reading(reading.name):
                # Shielded, for others wait for the same reading.
                kept.append(await asyncio.shield(asyncio.wrap_future(reading.done)))
            try:
                return self.daemon.registry.resolve(model)
            except BeingRead as another:
                reading = another

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

    def model_ids(self, name: str) -> list[str]:
        """How an adapter is listed."""
        return spelled(self.spec.name, name, self._spellings)

    def stats(self) -> ServerStats:
        return ServerStats(
            reading=tuple(sorted(self._num_reading.items())),
            is_ready=self.readiness.why_unready() is None,
            is_draining=self.drain.has_begun,
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Start the rooms and stop them again: the registry reads adapters, the engine turns its crank."""
        self.streams = OutputStreams(asyncio.get_running_loop())
        self.render_pool = RenderPool(max_waiting=self._max_queue)
        self.changes = ChangePool()
        self.daemon.registry.start()
        self.daemon.engine.start(self.streams.deliver)
        if self.full_proofs is not None:
            self.full_proofs.start()
        warming_up = asyncio.create_task(self._warm_up())
        try:
            yield
        finally:
            warming_up.cancel()
            await asyncio.gather(warming_up, return_exceptions=True)
            if self.full_proofs is not None:
                await asyncio.to_thread(self.full_proofs.stop)
            await asyncio.to_thread(self.daemon.engine.stop)
            await asyncio.to_thread(self.daemon.registry.stop)
            self.render_pool.close()
            await asyncio.to_thread(self.changes.close)

    async def _warm_up(self) -> None:
        while not self.readiness.is_warm:
            await asyncio.sleep(_LOADING_POLL_SECONDS)
            if not self.readiness.has_loaded():
                continue
            try:
                await warm_up(self)
            except AdapterdError as error:
                self.readiness.failure = f"the warm-up failed: {error.message}"
                _logger.error("%s", self.readiness.failure)
                return
            self.readiness.is_warm = True
