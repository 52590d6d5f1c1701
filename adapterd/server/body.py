"""A request's body as JSON, read under hard limits, before anything looks at what it says."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request

from adapterd.errors import AdapterdError, InvalidRequest

MAX_BODY_BYTES = 4 * 2**20
"""Holds the token ids of a 500k context; parsing it takes some tens of milliseconds."""

_PARSE_BESIDE_LOOP_BYTES = 64 * 2**10
"""Above this, parsing would hold up the other streams for more than a millisecond."""


BODY_TIMEOUT_SECONDS = 60.0


class BodyTooSlow(AdapterdError):
    status = 408
    type = "invalid_request_error"
    code = "request_timeout"


class BodyTooLarge(AdapterdError):
    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class UnsupportedMediaType(AdapterdError):
    status = 415
    type = "invalid_request_error"
    code = "unsupported_media_type"


async def read_json(
    request: Request,
    *,
    max_bytes: int = MAX_BODY_BYTES,
    timeout_seconds: float = BODY_TIMEOUT_SECONDS,
    may_be_empty: bool = False,
) -> dict[str, Any]:
    """The body as a JSON object; `may_be_empty`: no bytes are an object without fields.

    Raises BodyTooLarge before buffering more than `max_bytes`, BodyTooSlow, UnsupportedMediaType for anything
    but plain JSON, InvalidRequest for what is not one valid UTF-8 JSON object.
    """
    _check_headers(request, max_bytes)
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_seconds):
            async for chunk in _chunks(request):
                body += chunk
                if len(body) > max_bytes:
                    raise BodyTooLarge(f"the body is larger than {max_bytes} bytes")
    except TimeoutError:
        raise BodyTooSlow(f"the body did not arrive within {timeout_seconds:g} seconds") from None
    if may_be_empty and not body:
        return {}
    if len(body) > _PARSE_BESIDE_LOOP_BYTES:
        return await asyncio.to_thread(parse_json, bytes(body))
    return parse_json(bytes(body))


async def _chunks(request: Request) -> AsyncIterator[bytes]:
    """Read by hand: `Request.stream` would keep the whole body a second time."""
    more = True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        yield message.get("body", b"")
        more = message.get("more_body", False)


def _check_headers(request: Request, max_bytes: int) -> None:
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        raise UnsupportedMediaType("compressed bodies are not supported; send plain JSON")
    # Asking for this type also keeps a web page from posting to a daemon on its visitor's own machine: browsers
    # send it across origins only after a preflight, which gets no permission here. (auth.LocalHosts keeps those
    # pages out whose own origin is made to be here.)
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise UnsupportedMediaType("the body must be JSON; send the header 'Content-Type: application/json'")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and (len(length) > 18 or int(length) > max_bytes):
        raise BodyTooLarge(f"the body is larger than {max_bytes} bytes")


def parse_json(body: bytes) -> dict[str, Any]:
    """One JSON object. Refuses what JSON or its use here leaves open: NaN, duplicate keys, lone surrogates,
    more than 200 levels, integers of thousands of digits."""
    try:
        value = from_json(body, allow_inf_nan=False)
        # The same bytes again, for the one thing the parser above is silent about.
        json.loads(body, object_pairs_hook=_refuse_duplicates)
    except ValueError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise InvalidRequest("the body must be a JSON object", code="invalid_json")
    return value


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> None:
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            raise ValueError(f"key {key[:64]!r} occurs twice")
        seen.add(key)
