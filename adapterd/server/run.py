"""Serving the app on a socket until a signal says to stop: first no new work, then the end of the old, then exit."""

import signal
import socket
import sys
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from adapterd.errors import ConfigError
from adapterd.server.http import BoundedHttp
from adapterd.server.state import ServerState

_CUT_SECONDS = 2.0
"""After the drain timeout, what still runs gets this long to send its error."""


def bind(host: str, port: int) -> socket.socket:
    """A bound socket, not listening yet. Raises ConfigError: better before a model has loaded than after."""
    listener: socket.socket | None = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        if listener is not None:
            listener.close()
        reason = f"cannot listen on {host}:{port}: {error.strerror}; choose another --host or --port"
        raise ConfigError(reason, param="port") from None
    return listener


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class DrainingServer(uvicorn.Server):
    """Serves `app` until SIGTERM or SIGINT, or until the engine fails.

    uvicorn alone closes its listener at the first signal; a server behind a balancer has to outlast the news
    of it. SIGTERM comes from whoever also tells the balancer: new work is taken for `drain_delay` seconds more,
    and what runs then has `drain_timeout` to finish. `on_ready` is called once, when /readyz turns green.
    """

    def __init__(
        self,
        app: Starlette,
        state: ServerState,
        *,
        drain_timeout: float,
        on_ready: Callable[[], None],
        drain_delay: float = 0.0,
    ) -> None:
        config = uvicorn.Config(
            app,
            http=BoundedHttp,
            lifespan="on",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=5,
        )
        super().__init__(config)
        self._state = state
        self._drain_delay = drain_delay
        self._drain_timeout = drain_timeout
        self._on_ready = on_ready
        self._is_announced = False
        self._has_failed = False
        self._deadline_seconds = 0.0

    @property
    def exit_code(self) -> int:
        return 1 if self._has_failed or not self.started else 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins the drain; a second one ends it at once."""
        if self._state.drain.has_begun:
            self.should_exit = self.force_exit = True
            return
        delay = self._drain_delay if sig == signal.SIGTERM else 0.0
        self._deadline_seconds = time.monotonic() + delay + self._drain_timeout
        self._state.drain.begin(delay_seconds=delay)

    async def on_tick(self, counter: int) -> bool:
        if await super().on_tick(counter):
            return True
        if self._state.daemon.engine.stats().failed is not None:
            self._has_failed = True
            return True
        if not self._is_announced and self._state.readiness.why_unready() is None:
            self._is_announced = True
            self._on_ready()
        return self._is_drained()

    def _is_drained(self) -> bool:
        drain, late = self._state.drain, time.monotonic() - self._deadline_seconds
        if drain.has_begun and late > 0:
            self._state.streams.fail_all("the server is shutting down")
        return drain.is_complete or (drain.has_begun and late > _CUT_SECONDS)


def print_ready(url: str, models: list[str], *, asks_for_key: bool) -> None:
    """The one thing a person wants to see, on stdout; logs go to stderr."""
    model = models[1] if len(models) > 1 else models[0]
    body = (
        f'{{"model": "{model}", "messages": [{{"role": "user", "content": "My parcel has not arrived."}}]}}'
    )
    key = " -H 'Authorization: Bearer KEY'" if asks_for_key else ""
    print(
        f"adapterd is ready on {url} with {', '.join(models)}. Try:\n"
        f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'",
        flush=True,
        file=sys.stdout,
    )
