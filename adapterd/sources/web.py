"""The web as a place: a folder under one address, asked for each file that an adapter may have.

Redirects are followed by hand, so that no hop is asked that the operator did not allow: an allowed host cannot
send the daemon to an address of its choosing.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import httpx2

import adapterd
from adapterd.errors import AdapterdError, Forbidden, SourceFailed, SourceMissing
from adapterd.file_names import ADAPTER_FILES, REFUSED_FILES
from adapterd.sources.allow import AllowList
from adapterd.sources.download import Held, Sink
from adapterd.sources.source import Source, parse_source

MAX_HOPS = 5
_TIMEOUT = httpx2.Timeout(60.0, connect=10.0)
_ABSENT = (404, 410)


class Web:
    """`https_proxy` and the like hold. Sends no credentials."""

    def __init__(self, allow: AllowList) -> None:
        self._allow = allow

    def look(self, source: Source) -> Held:
        sizes: dict[str, int | None] = {}
        marks: list[str | None] = []
        with self._client() as client:
            for name in sorted(ADAPTER_FILES | REFUSED_FILES):
                with self._asking(client, "HEAD", source, name) as response:
                    if response.status_code in _ABSENT:
                        continue
                    length = response.headers.get("content-length", "")
                    sizes[name] = int(length) if length.isdecimal() else None
                    mark = response.headers.get("etag") or response.headers.get("last-modified")
                    marks.append(f"{name} {length} {mark}" if mark else None)
        state = None if None in marks else hashlib.sha256("\n".join(map(str, marks)).encode()).hexdigest()
        return Held(source, state, sizes)

    def fetch(self, held: Held, name: str, sink: Sink) -> None:
        with self._client() as client, self._asking(client, "GET", held.source, name) as response:
            if response.status_code in _ABSENT:
                raise SourceMissing(f"the source {held.source} holds no {name} any more")
            for data in response.iter_bytes():
                sink.write(data)

    def _client(self) -> httpx2.Client:
        # Sizes and hashes are those of the files, so nothing may be compressed on the way.
        headers = {"user-agent": f"adapterd/{adapterd.__version__}", "accept-encoding": "identity"}
        return httpx2.Client(timeout=_TIMEOUT, headers=headers)

    @contextmanager
    def _asking(
        self, client: httpx2.Client, method: str, source: Source, name: str
    ) -> Iterator[httpx2.Response]:
        """The answer about one file: it is there, or it is absent; anything else raises SourceFailed."""
        url = f"{source}/{name}"
        for _ in range(MAX_HOPS):
            with client.stream(method, url) as response:
                if not response.is_redirect:
                    if not response.is_success and response.status_code not in _ABSENT:
                        raise SourceFailed(
                            f"the source {source} could not be read: {name} was answered"
                            f" {response.status_code} {response.reason_phrase}"
                        )
                    yield response
                    return
                url = self._hop(response, source)
        raise SourceFailed(
            f"the source {source} could not be read: {name} is redirected more than {MAX_HOPS} times"
        )

    def _hop(self, response: httpx2.Response, source: Source) -> str:
        url = str(response.url.join(response.headers.get("location", "")))
        parts = urlsplit(url)
        try:
            # A signature in the query is fine here: it is not ours, and it is neither kept nor shown.
            target, _ = parse_source(f"{parts.scheme}://{parts.netloc}{parts.path}")
            is_safe = parts.scheme == "https" or source.scheme == "http"
            if not is_safe or not self._allow.allows(target):
                raise Forbidden("not allowed")
        except AdapterdError:
            raise Forbidden(
                f"the source {source} redirects to {parts.scheme}://{parts.netloc}, which is not allowed"
                " (--allow-source PATTERN)",
                param="source",
                code="source_not_allowed",
            ) from None
        return url
