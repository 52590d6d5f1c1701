"""Probes, version and metrics: open to everyone, quick, and never waiting for the engine."""

import time

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

import adapterd
from adapterd.metrics import CONTENT_TYPE
from adapterd.server.state import ServerState

MAX_STEP_SECONDS = 120.0
"""An engine that shows no sign of life for longer is stuck; a step over a long prompt on a CPU is not."""


class Health:
    def __init__(self, state: ServerState) -> None:
        self._state = state

    async def livez(self, request: Request) -> Response:
        """Red when only a restart helps: the engine failed or hangs."""
        return _probe(self._dead())

    async def readyz(self, request: Request) -> Response:
        """Red while the first adapters load, while draining, and when not live."""
        return _probe(self._dead() or self._draining() or self._loading())

    async def version(self, request: Request) -> Response:
        return JSONResponse({"version": adapterd.__version__})

    async def metrics(self, request: Request) -> Response:
        return Response(self._state.metrics.render(), headers={"content-type": CONTENT_TYPE})

    def _dead(self) -> str | None:
        stats = self._state.daemon.engine.stats()
        if stats.failed is not None:
            return "the engine failed"
        if time.monotonic() - stats.heartbeat_seconds > MAX_STEP_SECONDS:
            return "the engine hangs"
        return None

    def _draining(self) -> str | None:
        return "shutting down" if self._state.drain.has_begun else None

    def _loading(self) -> str | None:
        return None if self._state.is_loaded() else "loading adapters"


def _probe(reason: str | None) -> Response:
    if reason is None:
        return JSONResponse({"status": "ok"})
    return JSONResponse({"status": "unavailable", "reason": reason}, status_code=503)
