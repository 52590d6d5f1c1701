"""A reverse proxy as simple as one can be: it asks each backend for /readyz, takes the ready ones in turn, keeps
connections to them and retries nothing. What a backend does wrong, a client sees."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

CHECK_SECONDS = 0.05


class Proxy:
    """`backends` may be changed while it runs."""

    def __init__(self, backends: list[str]) -> None:
        self.backends = backends
        self._ready: list[str] = []
        self._turn = 0
        self.app = Starlette(
            routes=[Route("/{path:path}", self._forward, methods=["GET", "POST"])], lifespan=self._lifespan
        )

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        async with httpx.AsyncClient(timeout=60) as self._client:
            checking = asyncio.create_task(self._keep_checking())
            yield
            checking.cancel()
            await asyncio.gather(checking, return_exceptions=True)

    async def _keep_checking(self) -> None:
        while True:
            ready = await asyncio.gather(*(self._is_ready(backend) for backend in list(self.backends)))
            self._ready = [b for b, is_ready in zip(list(self.backends), ready, strict=False) if is_ready]
            await asyncio.sleep(CHECK_SECONDS)

    async def _is_ready(self, backend: str) -> bool:
        with suppress(httpx.HTTPError):
            return (await self._client.get(f"{backend}/readyz")).status_code == 200
        return False

    async def _forward(self, request: Request) -> Response:
        if not self._ready:
            return JSONResponse({"error": "no backend is ready"}, status_code=502)
        self._turn += 1
        backend = self._ready[self._turn % len(self._ready)]
        asked = self._client.build_request(
            request.method,
            f"{backend}{request.url.path}",
            content=await request.body(),
            headers={"content-type": request.headers.get("content-type", "")},
        )
        answer = await self._client.send(asked, stream=True)

        async def pass_on() -> AsyncIterator[bytes]:
            try:
                async for part in answer.aiter_raw():
                    yield part
            finally:
                await answer.aclose()

        return StreamingResponse(
            pass_on(), status_code=answer.status_code, media_type=answer.headers["content-type"]
        )
