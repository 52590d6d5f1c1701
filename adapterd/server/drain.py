"""The end of a daemon behind a balancer: the news first, then no new work, then the end of the old.

From the first signal on /readyz is red and every answer closes its connection, so that whoever sends requests
here learns of it and goes elsewhere; for as long as that may take, what comes all the same is served.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapterd.errors import Unavailable

RETRY_SECONDS = 5


class Drain:
    """Counts running generations. Event loop only."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._refuses_from_seconds: float | None = None
        self.num_running = 0

    def begin(self, *, delay_seconds: float = 0.0) -> None:
        """New work is taken for so long and no longer."""
        self._refuses_from_seconds = self._clock() + delay_seconds

    @property
    def has_begun(self) -> bool:
        return self._refuses_from_seconds is not None

    @property
    def refuses(self) -> bool:
        return self._refuses_from_seconds is not None and self._clock() >= self._refuses_from_seconds

    @property
    def is_complete(self) -> bool:
        return self.refuses and self.num_running == 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Raises Unavailable once new work is refused."""
        if self.refuses:
            raise Unavailable("the server is shutting down", retry_after_seconds=RETRY_SECONDS)
        self.num_running += 1
        try:
            yield
        finally:
            self.num_running -= 1


class ClosingConnections:
    """Middleware: once the drain has begun, no connection outlives the answer it carries."""

    def __init__(self, app: ASGIApp, drain: Drain) -> None:
        self._app = app
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_closing(message: Message) -> None:
            if message["type"] == "http.response.start" and self._drain.has_begun:
                message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        await self._app(scope, receive, send_closing)
