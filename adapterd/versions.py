"""Which versions of adapters are in host memory, and who holds them. Bookkeeping only; the caller locks.

A budget in bytes. What a lease holds or a pin keeps stays whatever it takes; of the rest the longest unused
leaves first, to be read again when someone asks for it.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from weakref import WeakValueDictionary

from adapterd.adapter import Adapter
from adapterd.core import AdapterEvents, AdapterId, Unobserved
from adapterd.errors import Unavailable


class HostVersions:
    """`max_bytes` None: no limit."""

    def __init__(self, max_bytes: int | None = None, *, events: AdapterEvents | None = None) -> None:
        self.max_bytes = max_bytes
        self._events: AdapterEvents = Unobserved() if events is None else events
        self._kept: OrderedDict[AdapterId, Adapter] = OrderedDict()  # longest unused first
        self._held: dict[AdapterId, tuple[Adapter, int]] = {}
        self.pinned: frozenset[AdapterId] = frozenset()
        # Versions that have left, but that a resolved request may still be about to lease.
        self._alive: WeakValueDictionary[AdapterId, Adapter] = WeakValueDictionary()
        self.num_hits = 0
        self.num_misses = 0
        self.num_evictions = 0
        self.num_bytes = 0
        self.num_changes = 0
        self.num_held_bytes = 0
        self.num_reserved_bytes = 0

    def ids(self) -> tuple[AdapterId, ...]:
        """Every version here, those longest unused last."""
        return tuple(dict.fromkeys((*self._held, *reversed(self._kept))))

    def __len__(self) -> int:
        return len(self._kept.keys() | self._held.keys())

    def __contains__(self, adapter_id: AdapterId) -> bool:
        return adapter_id in self._kept or adapter_id in self._held

    def __getitem__(self, adapter_id: AdapterId) -> Adapter:
        """A held version; KeyError if nobody holds it."""
        return self._held[adapter_id][0]

    def add(self, adapter: Adapter) -> Adapter:
        """Keep a version that was just read; the copy already here, if the content is known."""
        known = self._find(adapter.id)
        if known is None:
            known = adapter
            self._alive[adapter.id] = adapter
            self.num_bytes += adapter.num_bytes
        elif adapter.id not in self._kept and adapter.id not in self._held:
            self.num_bytes += known.num_bytes
        self.num_changes += adapter.id not in self
        self._kept[adapter.id] = known
        self._kept.move_to_end(adapter.id)
        self._evict(spare=adapter.id)
        return known

    def get(self, adapter_id: AdapterId) -> Adapter | None:
        """A version in memory, now the last used; None counts as a miss."""
        adapter = self._find(adapter_id)
        if adapter is None:
            self.num_misses += 1
            return None
        self.num_hits += 1
        return self.add(adapter)

    def hold(self, adapter_id: AdapterId) -> None:
        """Hold a version once more. Raises Unavailable if it has gone and nobody looks at it any more."""
        adapter = self._find(adapter_id)
        if adapter is None:
            raise Unavailable(
                f"this version of {adapter_id.name!r} was just replaced; send the request again"
            )
        if adapter_id not in self:
            self.num_bytes += adapter.num_bytes
            self.num_changes += 1
        _, count = self._held.get(adapter_id, (adapter, 0))
        self.num_held_bytes += 0 if count else adapter.num_bytes
        self._held[adapter_id] = adapter, count + 1

    def let_go(self, adapter_id: AdapterId) -> bool:
        """Give one hold back; whether it was the last."""
        adapter, count = self._held.pop(adapter_id)
        if count > 1:
            self._held[adapter_id] = adapter, count - 1
            return False
        self.num_held_bytes -= adapter.num_bytes
        if adapter_id not in self._kept:
            self.num_bytes -= adapter.num_bytes
            self.num_changes += 1
        self._evict()
        return True

    def bytes_of(self, adapter_id: AdapterId) -> int:
        """Bytes that a version takes here; 0 if it is not in memory."""
        return 0 if adapter_id not in self else self._here(adapter_id).num_bytes

    def num_holders(self, adapter_id: AdapterId) -> int:
        return self._held[adapter_id][1] if adapter_id in self._held else 0

    def reserve(self, num_bytes: int) -> bool:
        """Set bytes aside for a version that is about to be read, or say that there is no room beside what is held and
        pinned. There always is where nothing is held: one request at a time is served whatever it takes.
        """
        staying = self.num_reserved_bytes + self.num_held_bytes
        pinned = sum(
            adapter.num_bytes
            for adapter_id, adapter in self._kept.items()
            if adapter_id in self.pinned and adapter_id not in self._held
        )
        if self.max_bytes is not None and staying and staying + pinned + num_bytes > self.max_bytes:
            return False
        self.num_reserved_bytes += num_bytes
        self._evict()
        return True

    def unreserve(self, num_bytes: int) -> None:
        """The version has been read, and counts as what it takes, or will not be."""
        self.num_reserved_bytes -= num_bytes

    def is_held(self, adapter_id: AdapterId) -> bool:
        return adapter_id in self._held

    def discard(self, adapter_id: AdapterId) -> int:
        """Keep a version no longer than it is held; the bytes that are free at once."""
        adapter = self._kept.pop(adapter_id, None)
        if adapter is None or adapter_id in self._held:
            return 0
        self.num_bytes -= adapter.num_bytes
        self.num_changes += 1
        return adapter.num_bytes

    def pin(self, adapter_ids: Iterable[AdapterId]) -> None:
        """From now on these are never evicted, and those pinned before may be."""
        self.pinned = frozenset(adapter_ids)
        self._evict()

    def check_integrity(self) -> None:
        """The bytes counted are those of what is here."""
        here = {**self._kept, **{adapter_id: adapter for adapter_id, (adapter, _) in self._held.items()}}
        assert self.num_bytes == sum(adapter.num_bytes for adapter in here.values())
        assert self.num_held_bytes == sum(adapter.num_bytes for adapter, _ in self._held.values())

    def _here(self, adapter_id: AdapterId) -> Adapter:
        return self._held[adapter_id][0] if adapter_id in self._held else self._kept[adapter_id]

    def _find(self, adapter_id: AdapterId) -> Adapter | None:
        if adapter_id in self._held:
            return self._held[adapter_id][0]
        return self._kept.get(adapter_id) or self._alive.get(adapter_id)

    def _evict(self, spare: AdapterId | None = None) -> None:
        """Down to the budget, as far as nothing stands against it. `spare` was just read for someone."""
        if self.max_bytes is None:
            return
        for adapter_id in list(self._kept):
            if self.num_bytes + self.num_reserved_bytes <= self.max_bytes:
                return
            if adapter_id not in self._held and adapter_id not in self.pinned and adapter_id != spare:
                self.discard(adapter_id)
                self.num_evictions += 1
                self._events.adapter_evicted(adapter_id.name, "host")


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
