"""An app over fakes, asked in-process; and the same app behind a real socket."""

import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette

from adapterd.server.app import create_app
from adapterd.server.state import ServerState
from tests.server.fakes import FakeDaemon


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def daemon() -> FakeDaemon:
    return FakeDaemon()


@pytest.fixture
def state(daemon: FakeDaemon) -> ServerState:
    return ServerState(daemon)


@asynccontextmanager
async def asking(state: ServerState, **options: object) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the app in this process, with the rooms started."""
    transport = httpx.ASGITransport(create_app(state, **options), raise_app_exceptions=False)
    async with state.running(), httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


@pytest.fixture
async def client(state: ServerState, anyio_backend: str) -> AsyncIterator[httpx.AsyncClient]:
    async with asking(state, allow_runtime_adapters=True) as client:
        yield client


@contextmanager
def listening(app: Starlette) -> Iterator[str]:
    """Serve `app` on a free port of this machine; gives its address."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def server_url(state: ServerState) -> Iterator[str]:
    with listening(create_app(state, allow_runtime_adapters=True)) as url:
        yield url
