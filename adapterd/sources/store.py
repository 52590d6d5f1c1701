"""An object store as a place, through fsspec: one prefix, whose objects are the files."""

import hashlib
import json
from collections.abc import Callable
from typing import Any

import fsspec

from adapterd.sources.download import Held, Sink
from adapterd.sources.source import Source

READ_BYTES = 8 << 20
_CONNECT_SECONDS, _READ_SECONDS = 10, 60
_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {"config_kwargs": {"connect_timeout": _CONNECT_SECONDS, "read_timeout": _READ_SECONDS}},
    "gs": {"timeout": _READ_SECONDS},
}


class Store:
    """Credentials and endpoint come from the environment, as s3fs and gcsfs read it."""

    def __init__(self, scheme: str, open_filesystem: Callable[..., Any] = fsspec.filesystem) -> None:
        # Listings must be what is there now, not what was there when somebody asked before.
        self._files = open_filesystem(scheme, use_listings_cache=False, **_OPTIONS.get(scheme, {}))

    def look(self, source: Source) -> Held:
        prefix = f"{source.authority}/{source.path}"
        listing = {
            entry["name"].rstrip("/").rpartition("/")[2]: entry
            for entry in self._files.ls(prefix, detail=True)
            if entry["type"] == "file"
        }
        sizes = {name: entry["size"] for name, entry in listing.items()}
        marks = {name: _mark(entry) for name, entry in sorted(listing.items())}
        state = None if None in marks.values() else hashlib.sha256(json.dumps(marks).encode()).hexdigest()
        return Held(source, state, sizes)

    def fetch(self, held: Held, name: str, sink: Sink) -> None:
        path = f"{held.source.authority}/{held.source.path}/{name}"
        with self._files.open(path, "rb", block_size=READ_BYTES) as file:
            while data := file.read(READ_BYTES):
                sink.write(data)


def _mark(entry: dict[str, Any]) -> str | None:
    """What changes with an object's content: its ETag (S3), generation or checksum (GCS)."""
    for key in ("ETag", "etag", "generation", "md5Hash", "crc32c"):
        if entry.get(key):
            return f"{entry['size']} {entry[key]}"
    return None
