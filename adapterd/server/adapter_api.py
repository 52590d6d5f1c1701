"""/v1/adapters: what there is, where it lies and what it does; loading, versions, pins, and giving memory back.

An answer to a change says that it has happened: what was loaded is what new requests use, and what was unloaded has
given its memory back, or the answer says who still holds it.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapterd.core import AdapterId
from adapterd.errors import InvalidRequest, ModelNotFound, OtherContent
from adapterd.server.adapter_bodies import (
    MAX_DEADLINE_SECONDS,
    AliasBody,
    EmptyBody,
    LoadBody,
    RollbackBody,
    UnloadBody,
    UpdateBody,
)
from adapterd.server.adapter_cards import AdapterCard, AdapterList, Cards, StillHeld, Unloaded
from adapterd.server.body import read_json
from adapterd.server.seams import AdapterEntry
from adapterd.server.state import ServerState
from adapterd.server.validation import validate

M = TypeVar("M", bound=BaseModel)

ABORT_SECONDS = 10.0
"""How long requests that were aborted get to let go; a step of the engine has to end first."""

_POLL_SECONDS = 0.005


class Adapters:
    """Every method that changes something runs beside the event loop: it waits for disks and networks."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._registry = state.daemon.registry

    # What there is

    async def list(self, request: Request) -> Response:
        def answer() -> AdapterList:
            cards, manifest = self._cards(), self._registry.manifest()
            return {
                "object": "list",
                "data": [cards.card(entry) for entry in self._registry.list()],
                "manifest": None
                if manifest is None
                else {"path": str(manifest.path), "sha256": manifest.sha256, "error": manifest.error},
            }

        return JSONResponse(await asyncio.to_thread(answer))

    async def one(self, request: Request) -> Response:
        def answer() -> AdapterCard:
            return self._cards().card(self._registry.entry(_name(request)))

        return JSONResponse(await asyncio.to_thread(answer))

    # What it is made of

    async def load(self, request: Request) -> Response:
        """201 for a name that was not served before."""
        body = await _body(request, LoadBody)

        def load() -> tuple[AdapterCard, int]:
            is_new = not self._is_served(body.name)
            try:
                self._registry.load(
                    body.name, body.source, inplace=body.replace, sha256=body.sha256, pinned=body.pinned
                )
            except OtherContent as error:
                way_out = "set 'replace' to true to serve this instead"
                raise OtherContent(f"{error.message}; {way_out}", param=error.param) from None
            return self._cards().card(self._registry.entry(body.name)), 201 if is_new else 200

        card, status = await self._state.changes.run(load)
        return JSONResponse(card, status_code=status)

    async def update(self, request: Request) -> Response:
        body = await _body(request, UpdateBody)
        return await self._card(
            lambda: self._registry.update(_name(request), body.source, sha256=body.sha256)
        )

    async def rollback(self, request: Request) -> Response:
        body = await _body(request, RollbackBody)
        return await self._card(lambda: self._registry.rollback(_name(request), _selector(body.version)))

    async def alias(self, request: Request) -> Response:
        body = await _body(request, AliasBody)
        return await self._card(
            lambda: self._registry.alias(_name(request), body.alias, _selector(body.version))
        )

    async def unalias(self, request: Request) -> Response:
        return await self._card(lambda: self._registry.unalias(_name(request), request.path_params["alias"]))

    # Where it lies

    async def pin(self, request: Request) -> Response:
        await _body(request, EmptyBody)
        return await self._card(lambda: self._registry.pin(_name(request)))

    async def unpin(self, request: Request) -> Response:
        await _body(request, EmptyBody)
        return await self._card(lambda: self._registry.pin(_name(request), pinned=False))

    async def prefetch(self, request: Request) -> Response:
        await _body(request, EmptyBody)
        return await self._card(lambda: self._registry.prefetch(_name(request)))

    # Its end

    async def unload(self, request: Request) -> Response:
        """200 once all memory is back; 202 if running requests hold some of it beyond the deadline."""
        body = await _body(request, UnloadBody)
        return await self._unload(_name(request), body.deadline_seconds, abort=body.abort, forget=False)

    async def delete(self, request: Request) -> Response:
        """The same, and its versions and aliases are forgotten."""
        seconds = _seconds(request.query_params.get("deadline_seconds", "30"))
        abort = request.query_params.get("abort", "false")
        if abort not in ("true", "false"):
            raise InvalidRequest(f"abort must be true or false, not {abort!r}", param="abort")
        return await self._unload(_name(request), seconds, abort=abort == "true", forget=True)

    async def _unload(self, name: str, seconds: float, *, abort: bool, forget: bool) -> Response:
        memory = _Memory(self._state)
        ids = self._registry.version_ids(name)
        before = memory.held_by(ids)
        change = self._registry.forget if forget else self._registry.unload
        await self._state.changes.run(lambda: change(name))
        num_aborted = 0
        if not await memory.is_back(ids, seconds) and abort:
            num_aborted = sum(
                self._state.in_use.fail(adapter_id, f"the adapter {name!r} was unloaded")
                for adapter_id in memory.unwanted(ids)
            )
            await memory.is_back(ids, ABORT_SECONDS)
        ids = memory.unwanted(ids)
        held = memory.held_by(ids)
        answer: Unloaded = {
            "object": "adapter.unloading" if held else "adapter.unloaded",
            "name": name,
            "digests": [adapter_id.digest for adapter_id in ids],
            "host_bytes": _sum(before, ids, "host_bytes") - _sum(held, ids, "host_bytes"),
            "device_bytes": _sum(before, ids, "device_bytes") - _sum(held, ids, "device_bytes"),
            "requests_aborted": num_aborted,
            "held": held,
        }
        return JSONResponse(answer, status_code=202 if held else 200)

    def _is_served(self, name: str) -> bool:
        try:
            return self._registry.entry(name).id is not None
        except ModelNotFound:
            return False

    def _cards(self) -> Cards:
        resident = self._state.daemon.engine.stats().resident
        return Cards(self._registry, self._state.spec.name, resident, self._state.full_proofs)

    async def _card(self, change: Callable[[], AdapterEntry]) -> Response:
        def answer() -> AdapterCard:
            return self._cards().card(change())

        return JSONResponse(await self._state.changes.run(answer))


class _Memory:
    """What versions take on host and device, and waiting until they do no more."""

    def __init__(self, state: ServerState) -> None:
        self._state = state

    def held_by(self, ids: Sequence[AdapterId]) -> list[StillHeld]:
        """The versions that take any memory, or that a request holds."""
        stats = self._state.daemon.engine.stats()
        device = dict(zip(stats.resident, stats.resident_bytes, strict=True))
        uses = [(adapter_id, self._state.daemon.registry.use_of(adapter_id)) for adapter_id in ids]
        return [
            {
                "digest": adapter_id.digest,
                "requests": use.num_leases,
                "host_bytes": use.host_bytes,
                "device_bytes": device.get(adapter_id, 0),
            }
            for adapter_id, use in uses
            if use.num_leases or use.host_bytes or adapter_id in device
        ]

    def unwanted(self, ids: Sequence[AdapterId]) -> list[AdapterId]:
        """Without those that a name means, another one or this one again by now: they stay, and are nobody's to wait
        for or to end."""
        return [
            adapter_id for adapter_id in ids if not self._state.daemon.registry.use_of(adapter_id).is_wanted
        ]

    async def is_back(self, ids: Sequence[AdapterId], seconds: float) -> bool:
        """Wait until the versions take no memory or are wanted again, at most `seconds`; whether that came about."""
        deadline = time.monotonic() + seconds
        while self.held_by(self.unwanted(ids)):
            if time.monotonic() >= deadline:
                return False
            await asyncio.sleep(_POLL_SECONDS)
        return True


def _sum(held: Sequence[StillHeld], ids: Sequence[AdapterId], key: str) -> int:
    digests = {adapter_id.digest for adapter_id in ids}
    return sum(
        one["host_bytes"] if key == "host_bytes" else one["device_bytes"]
        for one in held
        if one["digest"] in digests
    )


async def _body(request: Request, model: type[M]) -> M:
    return validate(model, await read_json(request, may_be_empty=True))


def _name(request: Request) -> str:
    name: str = request.path_params["name"]
    return name


def _selector(version: str | int | None) -> str | None:
    return None if version is None else str(version)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= MAX_DEADLINE_SECONDS:
        raise InvalidRequest(
            f"deadline_seconds must be a number from 0 to {MAX_DEADLINE_SECONDS:g}, not {text[:64]!r}",
            param="deadline_seconds",
        )
    return seconds
