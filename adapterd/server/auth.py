"""Who may ask at all, and who may change what is served. Probes, version and metrics are open to everyone."""

import hashlib
import ipaddress
from collections.abc import Awaitable, Callable
from functools import wraps

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from adapterd.errors import ConfigError, Forbidden, Unauthorized
from adapterd.server.envelope import on_adapterd_error
from adapterd.server.keys import KeyRing, Role

OPEN_PATHS = frozenset({"/livez", "/readyz", "/health", "/metrics", "/metrics/router", "/version"})

_ROLE = "adapterd.role"
"""Where a scope says who asks."""

_KEY = "adapterd.key"
"""Where a scope has the digest of the known key that came with it; empty without one."""

Endpoint = Callable[[Request], Awaitable[Response]]


def check_exposure(
    host: str,
    *,
    has_keys: bool,
    insecure_no_auth: bool,
    has_admin_keys: bool = False,
    allow_runtime_adapters: bool = False,
) -> None:
    """Raises ConfigError where others could reach what nobody guards.

    `insecure_no_auth` is an operator's word that somebody in front checks the clients; nobody in front can tell
    an admin, so changing what is served needs a key of ours all the same.
    """
    is_public = not is_loopback(host)
    if is_public and not has_keys and not insecure_no_auth:
        raise ConfigError(
            f"--host {host} can be reached from other machines and no API key is set; start with"
            " --api-key-file FILE, or with --insecure-no-auth if something in front checks who calls",
            param="host",
        )
    if allow_runtime_adapters and not has_admin_keys and (is_public or has_keys or insecure_no_auth):
        raise ConfigError(
            "--allow-runtime-adapters lets callers change what is served, and no admin key is set; start with"
            " --admin-key-file FILE, or write role=admin behind a key in --api-key-file",
            param="allow_runtime_adapters",
        )


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def trusts_this_machine(host: str, keys: KeyRing | None, *, insecure_no_auth: bool) -> bool:
    """Whether it is enough to ask from here, so that `LocalHosts` has to stand before the app."""
    return keys is None and not insecure_no_auth and is_loopback(host)


class LocalHosts:
    """Middleware that answers 403 to requests for a name that anybody could own.

    A page of the web can have its own name point to the visitor's machine (DNS rebinding). What it asks here is of
    its own origin then, and no preflight stops it; `Host` alone still tells. Port forwards and clients of this
    machine say `localhost`, a name under it, an address, or, from a container, a name that no public DNS knows.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            for name, value in scope["headers"]:
                if name == b"host" and not _is_nobodys(value.decode("latin-1")):
                    error = Forbidden(
                        "without API keys this daemon answers its own machine alone, under 'localhost' or an address;"
                        " start it with --api-key-file FILE, or with --insecure-no-auth if something in front checks"
                        " who calls",
                        code="host_not_allowed",
                    )
                    response = await on_adapterd_error(Request(scope), error)
                    await response(scope, receive, send)
                    return
        await self._app(scope, receive, send)


def _is_nobodys(authority: str) -> bool:
    """Whether HOST[:PORT] is an address or a name that nobody can own."""
    host = authority.strip().lower()
    host = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    name = host.removesuffix(".")
    if name in ("", "localhost") or name.endswith((".localhost", ".internal")):
        return True
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class ApiKeys:
    """Middleware that asks for `Authorization: Bearer KEY` and tells the endpoints whose key it was.

    `without_key` is what someone is who sends none that is known: without any `keys` at all, an admin; nobody,
    or just a client, where there are keys.
    """

    def __init__(self, app: ASGIApp, keys: KeyRing | None, without_key: Role | None) -> None:
        self._app = app
        self._keys = keys
        self._without_key = without_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope[_ROLE], scope[_KEY] = self._caller(scope)
            if scope[_ROLE] is None and scope["path"] not in OPEN_PATHS:
                error = Unauthorized("Incorrect or missing API key; send 'Authorization: Bearer KEY'.")
                response = await on_adapterd_error(Request(scope), error)
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _caller(self, scope: Scope) -> tuple[Role | None, bytes]:
        """Who asks, and the digest of the key that says so."""
        if self._keys is None or scope["path"] in OPEN_PATHS:
            return self._without_key, b""
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, key = values[0].partition(b" ") if len(values) == 1 else (b"", b"", b"")
        role = self._keys.role_of(key.strip())
        if role is None or scheme.lower() != b"bearer":
            return self._without_key, b""
        return role, hashlib.sha256(key.strip()).digest()


def prefix_scope(scope: Scope, cache_salt: str | None) -> bytes:
    """Who shares prefixes with this request: those with the same key and the same `cache_salt`; see core.Request."""
    key: bytes = scope[_KEY]
    if not key and cache_salt is None:
        return b""
    return hashlib.sha256(repr((key, cache_salt)).encode()).digest()


def without_key(keys: KeyRing | None, *, insecure_no_auth: bool) -> Role | None:
    """What a caller is who sends no known key, in a daemon that `check_exposure` has let start."""
    if keys is None:
        return "admin"
    return "client" if insecure_no_auth and not keys.has("client") else None


def admin_only(endpoint: Endpoint) -> Endpoint:
    """The endpoint, for those alone who may change what is served."""

    @wraps(endpoint)
    async def guarded(request: Request) -> Response:
        if request.scope[_ROLE] != "admin":
            raise Forbidden(
                "this needs an admin's API key; a key becomes one by 'role=admin' in the key file"
            )
        return await endpoint(request)

    return guarded
