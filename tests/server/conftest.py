"""An app over fakes, asked in-process; and the real daemon on a tiny random base, behind a real socket."""

import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import httpx
import pytest
import torch
import uvicorn
from starlette.types import ASGIApp

from adapterd.adapter_writer import write_adapter
from adapterd.config import ServeSettings
from adapterd.daemon import Daemon
from adapterd.server.app import create_app
from adapterd.server.http import BoundedHttp
from adapterd.server.state import ServerState
from tests.server.fakes import FakeDaemon
from tests.tiny import spec_of, tiny_llama


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


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.01)


@contextmanager
def listening(app: ASGIApp, *, http: type[BoundedHttp] = BoundedHttp) -> Iterator[str]:
    """Serve `app` on a free port of this machine; gives its address."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, http=http, log_config=None))
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


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama on disk, and beside it a folder "adapters" with "support" and "medical"."""
    directory = tmp_path_factory.mktemp("real") / "tiny"
    model = tiny_llama(directory)
    generator = torch.Generator().manual_seed(1)
    for name, rank, last_name in (("support", 4, "q_proj"), ("medical", 8, "down_proj")):
        shapes = {path: shape for path, shape in spec_of(model).lora_targets.items() if last_name in path}
        tensors = {
            path: (
                torch.randn(rank, d_in, generator=generator),
                torch.randn(d_out, rank, generator=generator),
            )
            for path, (d_out, d_in) in shapes.items()
        }
        write_adapter(
            directory.parent / "adapters" / name,
            tensors,
            r=rank,
            lora_alpha=2 * rank,
            target_modules=[last_name],
            base_name="tiny",
            base_fingerprint=None,
        )
    return directory


@pytest.fixture(scope="session")
def server_url(tiny_base: Path) -> Iterator[str]:
    """The real daemon on a real socket."""
    settings = ServeSettings(
        base=str(tiny_base), adapters=(tiny_base.parent / "adapters",), kv_memory=2**22, adapter_memory=2**22
    )
    daemon = Daemon.build(settings)
    state = ServerState(daemon, spellings=("prefixed", "bare"))
    with listening(create_app(state, allow_runtime_adapters=True)) as url:
        assert daemon.registry.wait_loaded(30)
        yield url
