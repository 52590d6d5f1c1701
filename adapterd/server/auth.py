"""API keys: who may ask at all. Probes, version and metrics stay open, for they carry no one's data."""

import hashlib
import hmac
import ipaddress
from collections.abc import Iterable
from pathlib import Path

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from adapterd.errors import ConfigError, Unauthorized
from adapterd.server.envelope import on_adapterd_error

OPEN_PATHS = frozenset({"/livez", "/readyz", "/health", "/metrics", "/version"})


def read_key_hashes(file: Path) -> tuple[bytes, ...]:
    """SHA-256 of each key, one a line; blank lines and lines that start with # are left out.

    Raises ConfigError if the file cannot be read or holds no key.
    """
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}", param="api_key_file") from None
    keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith(b"#")]
    if not keys:
        raise ConfigError(f"{file} holds no API key", param="api_key_file")
    return tuple(hashlib.sha256(key).digest() for key in keys)


def check_exposure(host: str, *, has_keys: bool, insecure_no_auth: bool) -> None:
    """Raises ConfigError for an address that others can reach, without keys."""
    if has_keys or insecure_no_auth or _is_loopback(host):
        return
    raise ConfigError(
        f"--host {host} can be reached from other machines and no API key is set; start with"
        " --api-key-file FILE, or with --insecure-no-auth if something in front checks who calls",
        param="host",
    )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class ApiKeys:
    """Middleware that asks for `Authorization: Bearer KEY`.

    Hashes are compared, all of them every time: neither a key's bytes nor its place show in the time it takes.
    """

    def __init__(self, app: ASGIApp, key_hashes: Iterable[bytes]) -> None:
        self._app = app
        self._key_hashes = tuple(key_hashes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS and not self._is_known(scope):
            error = Unauthorized("Incorrect or missing API key; send 'Authorization: Bearer KEY'.")
            response = await on_adapterd_error(Request(scope), error)
            await response(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_known(self, scope: Scope) -> bool:
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, key = values[0].partition(b" ") if len(values) == 1 else (b"", b"", b"")
        digest = hashlib.sha256(key.strip()).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._key_hashes]
        return scheme.lower() == b"bearer" and any(matches)
