"""Outputs on their way from the engine thread to the responses that wait for them on the event loop."""

import asyncio
from collections.abc import Callable, Iterable

from adapterd.core import Output, RequestId

SequenceKey = tuple[RequestId, int]

_MAX_PENDING = 256
"""Outputs kept one by one for a reader that lags; then they are merged, so that its queue stays bounded."""


def merge(outputs: list[Output]) -> Output:
    """Several steps of one sequence, in order, as one. Counts are cumulative: the last ones hold."""
    last = outputs[-1]
    if len(outputs) == 1:
        return last
    return Output(
        request_id=last.request_id,
        index=last.index,
        token_ids=tuple(token for output in outputs for token in output.token_ids),
        text="".join(output.text for output in outputs),
        logprobs=tuple(item for output in outputs for item in output.logprobs),
        num_prompt_tokens=last.num_prompt_tokens,
        num_cached_tokens=last.num_cached_tokens,
        num_output_tokens=last.num_output_tokens,
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        prompt_logprobs=tuple(item for output in outputs for item in output.prompt_logprobs),
        error=last.error,
    )


class OutputStream:
    """The outputs of one response: of one request, or of several for several prompts. Event loop only."""

    def __init__(self, keys: Iterable[SequenceKey], observe: Callable[[Output], None]) -> None:
        self._unfinished = set(keys)
        self._observe = observe
        self._pending: dict[SequenceKey, list[Output]] = {}
        self._arrived = asyncio.Event()
        self._all_finished = asyncio.Event()

    @property
    def is_finished(self) -> bool:
        """Nothing is pending and nothing more will come."""
        return not self._unfinished and not self._pending

    def put(self, output: Output) -> None:
        key = (output.request_id, output.index)
        if key not in self._unfinished:
            return
        self._observe(output)
        pending = self._pending.setdefault(key, [])
        pending.append(output)
        if len(pending) > _MAX_PENDING:
            pending[:] = [merge(pending)]
        if output.finish_reason is not None:
            self._unfinished.discard(key)
        # One failed sequence ends a response: do not wait for the others to finish first.
        if not self._unfinished or output.finish_reason in ("abort", "overloaded", "error"):
            self._all_finished.set()
        self._arrived.set()

    def fail(self, error: str) -> None:
        """End what still runs, with `error` for the client."""
        for request_id, index in tuple(self._unfinished):
            self.put(Output(request_id, index, (), "", (), 0, 0, 0, finish_reason="abort", error=error))

    async def take(self) -> list[Output]:
        """Wait for outputs; at most one a sequence, with all that came since the last call."""
        await self._arrived.wait()
        self._arrived.clear()
        pending, self._pending = self._pending, {}
        return [merge(outputs) for outputs in pending.values()]

    async def take_all(self) -> list[Output]:
        """Wait for the end of every sequence; each one's whole answer."""
        await self._all_finished.wait()
        return await self.take()


class OutputStreams:
    """Which response waits for which request."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._streams: dict[RequestId, OutputStream] = {}

    def __len__(self) -> int:
        return len(self._streams)

    def deliver(self, outputs: list[Output]) -> None:
        """Called in the engine thread, once a step: one wake-up of the event loop, whatever the batch."""
        self._loop.call_soon_threadsafe(self._distribute, outputs)

    def _distribute(self, outputs: list[Output]) -> None:
        for output in outputs:
            # A response that is gone has no stream: its outputs of the step in flight are dropped.
            if stream := self._streams.get(output.request_id):
                stream.put(output)

    def open(
        self, request_ids: Iterable[RequestId], num_sequences: int, observe: Callable[[Output], None]
    ) -> OutputStream:
        ids = tuple(request_ids)
        stream = OutputStream(((id, index) for id in ids for index in range(num_sequences)), observe)
        self._streams.update(dict.fromkeys(ids, stream))
        return stream

    def close(self, request_ids: Iterable[RequestId]) -> None:
        for request_id in request_ids:
            self._streams.pop(request_id, None)

    def fail_all(self, error: str) -> None:
        for stream in set(self._streams.values()):
            stream.fail(error)
