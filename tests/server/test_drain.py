"""The drain's clock, and connections that end with it."""

import httpx
import pytest

from adapterd.errors import Unavailable
from adapterd.server.drain import Drain
from adapterd.server.state import ServerState


class Clock:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_new_work_is_taken_until_the_delay_is_over_and_old_work_holds_the_end_up() -> None:
    clock = Clock()
    drain = Drain(clock=clock)
    with drain.running():
        drain.begin(delay_seconds=10)
        assert (drain.has_begun, drain.refuses, drain.is_complete) == (True, False, False)
        clock.seconds = 9.9
        with drain.running():
            assert drain.num_running == 2
        clock.seconds = 10
        assert (drain.refuses, drain.is_complete) == (True, False)
        with pytest.raises(Unavailable):
            drain.running().__enter__()
    assert drain.is_complete


def test_an_idle_daemon_waits_for_the_delay_too() -> None:
    clock = Clock()
    drain = Drain(clock=clock)
    drain.begin(delay_seconds=5)
    assert not drain.is_complete
    clock.seconds = 5
    assert drain.is_complete


@pytest.mark.anyio
async def test_from_the_signal_on_every_answer_closes_its_connection(
    client: httpx.AsyncClient, state: ServerState
) -> None:
    body = {"model": "tiny", "prompt": "Hi"}
    assert "connection" not in (await client.get("/livez")).headers
    state.drain.begin(delay_seconds=60)
    for response in (await client.get("/readyz"), await client.post("/v1/completions", json=body)):
        assert response.headers["connection"] == "close"
    assert response.status_code == 200
    state.drain.begin()
    refused = await client.post("/v1/completions", json=body)
    assert (refused.status_code, refused.headers["connection"], refused.headers["retry-after"]) == (
        503,
        "close",
        "5",
    )
