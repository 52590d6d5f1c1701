"""From the engine thread to the event loop."""

import asyncio
import threading

import pytest

from adapterd.core import Output, RequestId, TokenLogprobs
from adapterd.server.streams import OutputStream, OutputStreams, merge

pytestmark = pytest.mark.anyio

ID = RequestId("a")


def output(token: int, *, index: int = 0, finish: str | None = None, id: RequestId = ID) -> Output:
    scores = (TokenLogprobs(token, -1.0, 1, ()),)
    return Output(id, index, (token,), chr(token), scores, 3, 1, token - 96, finish)


def test_merged_steps_say_what_the_steps_said() -> None:
    merged = merge([output(97), output(98), output(99, finish="stop")])
    assert (merged.token_ids, merged.text, merged.num_output_tokens) == ((97, 98, 99), "abc", 3)
    assert [item.token_id for item in merged.logprobs] == [97, 98, 99]
    assert merged.finish_reason == "stop"


async def test_a_reader_that_lags_gets_all_of_it_in_few_pieces() -> None:
    seen: list[Output] = []
    stream = OutputStream([(ID, 0)], seen.append)
    for _ in range(1000):
        stream.put(output(97))
    assert len(stream._pending[ID, 0]) <= 256
    stream.put(output(98, finish="length"))
    (whole,) = await stream.take()
    assert len(whole.token_ids) == len(seen) == 1001
    assert stream.is_finished


async def test_take_waits_for_something_new() -> None:
    stream = OutputStream([(ID, 0)], lambda output: None)
    stream.put(output(97))
    assert [item.text for item in await stream.take()] == ["a"]
    waiting = asyncio.create_task(stream.take())
    await asyncio.sleep(0)
    assert not waiting.done()
    stream.put(output(98, finish="stop"))
    assert [item.text for item in await waiting] == ["b"]


async def test_take_all_waits_for_every_sequence() -> None:
    stream = OutputStream([(ID, 0), (ID, 1)], lambda output: None)
    stream.put(output(97, finish="stop"))
    waiting = asyncio.create_task(stream.take_all())
    await asyncio.sleep(0)
    assert not waiting.done()
    stream.put(output(98, index=1, finish="stop"))
    assert [item.text for item in await waiting] == ["a", "b"]


async def test_a_finished_sequence_takes_nothing_more() -> None:
    stream = OutputStream([(ID, 0)], lambda output: None)
    stream.put(output(97, finish="stop"))
    stream.put(output(98))
    assert [item.text for item in await stream.take()] == ["a"]


async def test_one_wake_up_carries_a_whole_step_from_the_other_thread() -> None:
    loop = asyncio.get_running_loop()
    wake_ups: list[object] = []
    real = loop.call_soon_threadsafe

    class Loop:
        def call_soon_threadsafe(self, *args: object) -> None:
            wake_ups.append(args)
            real(*args)

    streams = OutputStreams(Loop())
    ids = [RequestId(name) for name in "abc"]
    opened = [streams.open([id], 1, lambda output: None) for id in ids]
    step = [output(97, id=id, finish="stop") for id in (*ids, RequestId("gone"))]
    thread = threading.Thread(target=streams.deliver, args=(step,))
    thread.start()
    taken = [await stream.take_all() for stream in opened]
    thread.join()
    assert len(wake_ups) == 1
    assert [items[0].request_id for items in taken] == ids
    streams.close(ids)
    assert len(streams) == 0


async def test_fail_all_ends_what_runs_with_a_reason() -> None:
    streams = OutputStreams(asyncio.get_running_loop())
    stream = streams.open([ID], 2, lambda output: None)
    stream.put(output(97, finish="stop"))
    streams.fail_all("closing time")
    whole, cut = await stream.take_all()
    assert (whole.finish_reason, cut.finish_reason, cut.error) == ("stop", "abort", "closing time")
