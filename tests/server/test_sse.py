"""Events on the wire, and the end of work nobody waits for."""

import asyncio

import pytest
from starlette.requests import ClientDisconnect
from starlette.types import Message

from adapterd.server.sse import EventStream, unless_disconnected

pytestmark = pytest.mark.anyio


async def test_events_of_one_step_are_one_write() -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    events = EventStream(send, {"x-adapterd-digest": "base"})
    await events.events([])
    assert not events.is_started
    await events.events([{"text": "ü"}, {"text": "\n"}])
    await events.done()
    start, *bodies = sent
    assert start["status"] == 200
    assert (b"x-adapterd-digest", b"base") in start["headers"]
    assert [body["body"] for body in bodies] == [
        'data: {"text":"ü"}\n\ndata: {"text":"\\n"}\n\n'.encode(),
        b"data: [DONE]\n\n",
    ]
    assert [body["more_body"] for body in bodies] == [True, False]


async def test_work_is_cancelled_and_cleans_up_when_the_client_goes_away() -> None:
    cleaned = False

    async def work() -> None:
        nonlocal cleaned
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            cleaned = True

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    with pytest.raises(ClientDisconnect):
        await unless_disconnected(receive, work())
    assert cleaned


async def test_work_that_ends_gives_its_result_or_error() -> None:
    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def three() -> int:
        return 3

    async def broken() -> int:
        raise KeyError("broken")

    before = asyncio.all_tasks()
    assert await unless_disconnected(receive, three()) == 3
    with pytest.raises(KeyError, match="broken"):
        await unless_disconnected(receive, broken())
    assert asyncio.all_tasks() == before
