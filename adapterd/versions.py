"""Which versions of adapters are in host memory, and who holds them. Bookkeeping only; the caller locks."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakValueDictionary

from adapterd.adapter import Adapter
from adapterd.core import AdapterId
from adapterd.errors import Unavailable


@dataclass
class _Version:
    adapter: Adapter
    num_holds: int


class VersionTable:
    """Counted holds: one for each name that points to a version, one for each lease of it."""

    def __init__(self) -> None:
        self._versions: dict[AdapterId, _Version] = {}
        # Versions that nothing holds but that a resolved request may still be about to lease.
        self._alive: WeakValueDictionary[AdapterId, Adapter] = WeakValueDictionary()

    def __len__(self) -> int:
        return len(self._versions)

    def __getitem__(self, adapter_id: AdapterId) -> Adapter:
        """A held version; KeyError if nobody holds it."""
        return self._versions[adapter_id].adapter

    def add(self, adapter: Adapter) -> Adapter:
        """Hold a version that was just read; the copy already here, if the content is known."""
        version = self._versions.get(adapter.id)
        if version is None:
            version = self._versions[adapter.id] = _Version(adapter, 0)
            self._alive[adapter.id] = adapter
        version.num_holds += 1
        return version.adapter

    def hold(self, adapter_id: AdapterId) -> None:
        """Hold a version once more. Raises Unavailable if it has gone and nobody looks at it any more."""
        version = self._versions.get(adapter_id)
        if version is None:
            adapter = self._alive.get(adapter_id)
            if adapter is None:
                raise Unavailable(
                    f"this version of {adapter_id.name!r} was just replaced; send the request again"
                )
            version = self._versions[adapter_id] = _Version(adapter, 0)
        version.num_holds += 1

    def let_go(self, adapter_id: AdapterId) -> bool:
        """Give one hold back; whether it was the last, so that the version has left."""
        version = self._versions[adapter_id]
        version.num_holds -= 1
        if version.num_holds:
            return False
        del self._versions[adapter_id]
        return True

    def find(self, name: str, digest_prefix: str) -> Adapter | None:
        """A held version that was read under `name`, by the beginning of its digest."""
        for adapter_id, version in self._versions.items():
            if adapter_id.name == name and adapter_id.digest.startswith(digest_prefix):
                return version.adapter
        return None


class Lease:
    """Holds the versions of one mix in host memory until released. Releasing twice is harmless."""

    def __init__(self, release: Callable[[], None]) -> None:
        self._release: Callable[[], None] | None = release
        self._lock = threading.Lock()

    def release(self) -> None:
        with self._lock:
            release, self._release = self._release, None
        if release is not None:
            release()
