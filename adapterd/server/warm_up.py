"""The first forwards, before any client's: of the base, and of every pinned adapter.

What is slow only once (kernels chosen, graphs recorded, weights moved) is over when the daemon calls itself ready,
and each pinned adapter has shown that it runs, or why it does not.
"""

import asyncio
import logging
import time
from contextlib import ExitStack
from typing import Protocol

from adapterd.core import Output, Request, RequestId, SamplingParams
from adapterd.errors import AdapterdError
from adapterd.server.dialect import check_alive
from adapterd.server.seams import Daemon, ResolvedModel
from adapterd.server.streams import OutputStreams

_logger = logging.getLogger(__name__)

_PROMPT = "Hello"


class Rooms(Protocol):
    """What of the server's state a forward needs."""

    daemon: Daemon
    streams: OutputStreams

    async def resolve(self, model: str) -> ResolvedModel: ...


async def warm_up(rooms: Rooms) -> None:
    """Raises AdapterdError if the base cannot run. Adapters that cannot are logged, and are their own affair."""
    daemon = rooms.daemon
    prompt = await asyncio.to_thread(daemon.renderer.encode, _PROMPT)
    began = time.monotonic()
    await _forward(rooms, daemon.spec.name, prompt)
    pinned = [entry.name for entry in daemon.registry.list() if entry.is_pinned and entry.id is not None]
    results = await asyncio.gather(*(_try_forward(rooms, name, prompt) for name in pinned))
    for name, error in zip(pinned, results, strict=True):
        if error is not None:
            _logger.warning("pinned adapter %s does not run: %s", name, error)
    _logger.info(
        "warmed up in %.1f s: the base and %d pinned adapters", time.monotonic() - began, len(pinned)
    )


async def _try_forward(rooms: Rooms, model: str, prompt: list[int]) -> str | None:
    try:
        await _forward(rooms, model, prompt)
    except AdapterdError as error:
        return error.message
    return None


async def _forward(rooms: Rooms, model: str, prompt: list[int]) -> None:
    resolved = await rooms.resolve(model)
    request = Request(
        id=RequestId(f"warm-up-{model}"),
        prompt_token_ids=tuple(prompt),
        params=SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True),
        mix=resolved.mix,
        eos_token_ids=resolved.eos_token_ids,
        arrival_seconds=time.monotonic(),
    )
    with ExitStack() as held:
        lease = rooms.daemon.registry.lease(resolved.mix)
        held.callback(lease.release)
        held.callback(rooms.daemon.engine.abort, request.id)
        rooms.daemon.engine.submit(request)
        held.callback(rooms.streams.close, [request.id])
        outputs = await rooms.streams.open([request.id], 1, _unobserved).take_all()
        check_alive(outputs)


def _unobserved(output: Output) -> None:
    """A warm-up is no request of anyone's and counts in no metric."""
