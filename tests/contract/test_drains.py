"""Daemons replaced one after the other under load: no client sees a failed or a cut answer.

Three real daemons in this process, behind a proxy, each replaced once. `python -m bench.drains --drains 50` does it
with processes, SIGTERM and haproxy; its last output is bench/results/drains.json.
"""

import asyncio
import signal
import threading
from collections import Counter
from pathlib import Path

import httpx
import pytest

from adapterd.config import ServeSettings
from adapterd.daemon import Daemon
from adapterd.server.app import create_app
from adapterd.server.run import DrainingServer, bind, url_of
from adapterd.server.state import ServerState
from bench.drains import Clients
from tests.contract.proxy import CHECK_SECONDS, Proxy
from tests.server.conftest import listening

DELAY_SECONDS = 60 * CHECK_SECONDS
"""Long enough for the proxy to look once on a machine that has much else to do."""


class Replica:
    """One daemon as `adapterd serve` runs it, but for the process."""

    def __init__(self, tiny_base: Path) -> None:
        settings = ServeSettings(
            base=str(tiny_base),
            adapters=(tiny_base.parent / "adapters",),
            kv_memory=2**22,
            adapter_memory=2**20,
        )
        state = ServerState(Daemon.build(settings), warms_up=True)
        listener = bind("127.0.0.1", 0)
        self.url = url_of(listener)
        self.is_ready = threading.Event()
        self.server = DrainingServer(
            create_app(state),
            state,
            drain_delay=DELAY_SECONDS,
            drain_timeout=30,
            on_ready=self.is_ready.set,
        )
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]})
        self.thread.start()
        assert self.is_ready.wait(30)

    def end(self, number: int = signal.SIGTERM) -> int:
        self.server.handle_exit(number, None)
        self.thread.join(60)
        assert not self.thread.is_alive()
        return self.server.exit_code


async def replace_each(replicas: list[Replica], proxy: Proxy, url: str, tiny_base: Path) -> Clients:
    clients = Clients(url, ("tiny", "tiny:support", "tiny:medical"), num_clients=6)
    running = asyncio.create_task(clients.run())
    for number in range(len(replicas)):
        await asyncio.sleep(0.2)
        replacement = await asyncio.to_thread(Replica, tiny_base)
        proxy.backends.append(replacement.url)
        old, replicas[number] = replicas[number], replacement
        assert await asyncio.to_thread(old.end) == 0
        proxy.backends.remove(old.url)
    clients.is_stopping = True
    await running
    return clients


def test_rolling_replacement_cuts_nobody_off(tiny_base: Path) -> None:
    replicas = [Replica(tiny_base) for _ in range(3)]
    proxy = Proxy([replica.url for replica in replicas])
    try:
        with listening(proxy.app) as url:
            while httpx.get(f"{url}/readyz").status_code != 200:
                pass
            clients = asyncio.run(replace_each(replicas, proxy, url, tiny_base))
    finally:
        assert [replica.end(signal.SIGINT) for replica in replicas] == [0, 0, 0]
    assert clients.num_answers > 20
    assert clients.failures == Counter()


@pytest.mark.parametrize("tail", [b"", b"data: {}\n\n", b"data: [DONE]\n\n"])
def test_the_clients_would_see_it(tail: bytes) -> None:
    """An answer that is cut, or whole but of the wrong length, is a failure to them."""

    async def ask() -> str | None:
        async def answer(request: httpx.Request) -> httpx.Response:
            return httpx.Response(200, content=tail)

        async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as client:
            return await Clients("http://daemon", ("m",))._ask(client, "m", 3)

    assert asyncio.run(ask()) is not None
