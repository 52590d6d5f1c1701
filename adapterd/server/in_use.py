"""Which answers run on which adapter versions, so that an unload can end them."""

from collections.abc import Iterator
from contextlib import contextmanager

from adapterd.core import AdapterId, AdapterMix
from adapterd.server.streams import OutputStream


class AdaptersInUse:
    """Which streams run on which adapter versions, so that they can be ended. Event loop only."""

    def __init__(self) -> None:
        self._streams: dict[AdapterId, set[OutputStream]] = {}

    @contextmanager
    def by(self, stream: OutputStream, mix: AdapterMix) -> Iterator[None]:
        ids = [adapter_id for adapter_id, _ in mix]
        for adapter_id in ids:
            self._streams.setdefault(adapter_id, set()).add(stream)
        try:
            yield
        finally:
            for adapter_id in ids:
                self._streams[adapter_id].discard(stream)
                if not self._streams[adapter_id]:
                    del self._streams[adapter_id]

    def fail(self, adapter_id: AdapterId, reason: str) -> int:
        """End all streams of a version with an error; how many they were."""
        streams = tuple(self._streams.get(adapter_id, ()))
        for stream in streams:
            stream.fail(reason)
        return len(streams)
