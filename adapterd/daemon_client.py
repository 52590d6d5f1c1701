"""A running daemon as a client sees it: one call of /v1/adapters after the other, and its errors in its own words."""

from pathlib import Path
from typing import Any, Protocol

import httpx2

from adapterd.errors import AdapterdError, ConfigError

Json = dict[str, Any]

CONNECT_SECONDS = 10.0


class ClientSettings(Protocol):
    """`config.AdaptersSettings` is the real thing."""

    @property
    def url(self) -> str: ...
    @property
    def api_key(self) -> str | None: ...
    @property
    def api_key_file(self) -> Path | None: ...
    @property
    def timeout(self) -> float: ...
    @property
    def json_(self) -> bool: ...


class DaemonRefused(AdapterdError):
    """The daemon's own words."""


class DaemonClient:
    """Calls one daemon. Raises DaemonRefused for what it refuses, and if it cannot be reached."""

    def __init__(self, settings: ClientSettings) -> None:
        key = _api_key(settings)
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        timeout = httpx2.Timeout(settings.timeout, connect=CONNECT_SECONDS)
        self._url = settings.url.rstrip("/")
        try:
            self._client = httpx2.Client(base_url=self._url, headers=headers, timeout=timeout)
        except (httpx2.InvalidURL, UnicodeEncodeError) as error:
            raise ConfigError(f"--url {self._url}: {error}", param="url") from None

    def call(self, method: str, path: str, body: Json | None = None, *, seconds: float | None = None) -> Json:
        """`seconds`: how long the answer may take, where that is not the usual."""
        options: Json = {} if body is None else {"json": body}
        if seconds is not None:
            options["timeout"] = httpx2.Timeout(seconds, connect=CONNECT_SECONDS)
        try:
            response = self._client.request(method, f"/v1/adapters{path}", **options)
        except (httpx2.ConnectError, httpx2.UnsupportedProtocol) as error:
            raise DaemonRefused(f"no daemon answers at {self._url} ({error}); see --url") from None
        except httpx2.HTTPError as error:
            raise DaemonRefused(
                f"the daemon at {self._url} did not answer: {type(error).__name__} {error}"
            ) from None
        try:
            answer = response.json()
        except ValueError:
            answer = {}
        if not response.is_success:
            message = answer.get("error", {}).get("message") if isinstance(answer, dict) else None
            hint = ""
            if response.status_code in (404, 405) and method != "GET" and "code" in str(answer):
                is_unserved = answer.get("error", {}).get("code") in ("unknown_url", "method_not_allowed")
                hint = " (changes need serve --allow-runtime-adapters)" if is_unserved else ""
            raise DaemonRefused(f"{message or f'the daemon answered {response.status_code}'}{hint}")
        return answer if isinstance(answer, dict) else {}

    def close(self) -> None:
        self._client.close()


def _api_key(settings: ClientSettings) -> str | None:
    """The key in the environment, or the first of a file such as the daemon reads."""
    if settings.api_key is not None or settings.api_key_file is None:
        return settings.api_key
    try:
        lines = settings.api_key_file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {settings.api_key_file}: {error}", param="api_key_file") from None
    words = [line.split() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    keys = [word[0] for word in words if not word[0].lower().startswith("sha256:")]
    if not keys:
        raise ConfigError(
            f"{settings.api_key_file} holds no API key that could be sent (a hash is none)",
            param="api_key_file",
        )
    return keys[0]
