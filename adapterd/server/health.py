"""Probes and version: open to everyone, quick, and never waiting for the engine."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

import adapterd
from adapterd.server.state import ServerState


class Health:
    def __init__(self, state: ServerState) -> None:
        self._state = state

    async def livez(self, request: Request) -> Response:
        """Red when only a restart helps: the engine failed or hangs."""
        return _probe(self._state.readiness.why_dead())

    async def readyz(self, request: Request) -> Response:
        """Red until the first adapters are read and the first forwards done, while draining, and when not live."""
        return _probe(self._state.readiness.why_unready())

    async def version(self, request: Request) -> Response:
        return JSONResponse({"version": adapterd.__version__})


def _probe(reason: str | None) -> Response:
    if reason is None:
        return JSONResponse({"status": "ok"})
    return JSONResponse({"status": "unavailable", "reason": reason}, status_code=503)
