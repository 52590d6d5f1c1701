"""All names and the weights of their versions, under one lock: what is known, what is in memory, who holds it.

The one place where a record of a name is replaced, on disk first and then for everyone at once. Nothing is
read or waited for here but the database's own write.
"""

import threading
import time
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from adapterd.adapter import Adapter
from adapterd.core import AdapterEvents, AdapterId, AdapterMix, LoadedName
from adapterd.database import Database
from adapterd.errors import Unavailable
from adapterd.names import NameRecord, State, Version
from adapterd.versions import HostVersions, Lease


@dataclass(frozen=True)
class HostMemory:
    """Counters of the weights in host memory. `median_bytes` is of all current versions, in memory or not;
    `num_changes` is another number whenever names or what is in memory may have changed."""

    max_bytes: int | None
    num_bytes: int
    num_hits: int
    num_misses: int
    num_evictions: int
    median_bytes: int
    num_changes: int


@dataclass(frozen=True)
class VersionUse:
    """One version now: its bytes in host memory, leases on it, whether some name means it, and what it has done
    since the start (`last_used` is Unix time)."""

    host_bytes: int
    num_leases: int
    is_wanted: bool
    num_requests: int
    last_used: float | None


class Catalog:
    """Every method may be called from any thread. `on_drop` hears, outside the lock, of each version that no
    name means any more and nobody holds; `on_pins` is called there when other versions are pinned than before,
    `on_room` when memory may have become free."""

    def __init__(
        self,
        database: Database,
        *,
        host_bytes: int | None,
        on_drop: Callable[[AdapterId], None],
        on_room: Callable[[], None] = lambda: None,
        on_pins: Callable[[], None] = lambda: None,
        events: AdapterEvents | None = None,
    ) -> None:
        self._database = database
        self._on_drop = on_drop
        self._on_room = on_room
        self._on_pins = on_pins
        self._changed = threading.Condition()  # guards all below
        self._names: dict[str, NameRecord] = {}
        self._num_by_state: Counter[State] = Counter()
        self._num_behind = 0
        self._host = HostVersions(host_bytes, events=events)
        self._meanings: dict[AdapterId, dict[str, NameRecord]] = {}  # by spelling: NAME, or NAME@ALIAS
        self._sizes: list[int] = []  # of the current versions, sorted
        self._num_puts = 0
        self._num_wanted: Counter[AdapterId] = Counter()
        self._pinned_ids: dict[str, AdapterId] = {}  # what each pinned name means
        self._uses: dict[AdapterId, tuple[int, float]] = {}  # requests and when the last one began

    # Names

    def record(self, name: str) -> NameRecord:
        """What is known of a name; an empty record if nothing is."""
        with self._changed:
            return self._names.get(name, NameRecord(name))

    def records(self) -> tuple[NameRecord, ...]:
        with self._changed:
            return tuple(self._names.values())

    def num_by_state(self) -> Counter[State]:
        with self._changed:
            return self._num_by_state.copy()

    def num_behind(self) -> int:
        """Names whose newer version was refused while the one before serves on."""
        with self._changed:
            return self._num_behind

    def update(self, name: str, change: Callable[[NameRecord], NameRecord]) -> bool:
        """Replace a record by what `change` makes of it, in memory alone; whether that is another one.

        For what is not worth keeping: that a folder was seen and is on its way.
        """
        with self._changed:
            before = self._names.get(name, NameRecord(name))
            after = change(before)
            self._set(after)
            return after is not before

    def put(self, record: NameRecord, adapter: Adapter | None = None, *, save: bool = True) -> None:
        """Make `record` what is known of its name. `adapter`: weights of one of its versions, to be kept.

        The caller sees to it that changes of one name come one after the other.
        """
        if save:
            self._database.save(record)
        with self._changed:
            before = self._names.get(record.name, NameRecord(record.name))
            pinned_before = self._host.pinned
            self._set(record)
            if adapter is not None:
                self._host.add(adapter)
            dropped = self._account(before, record)
            has_pinned = self._host.pinned != pinned_before
            self._changed.notify_all()
        self._tell(dropped)
        if has_pinned:
            self._on_pins()
        self._on_room()

    def wait_for_names(self, holds: Callable[[tuple[NameRecord, ...]], bool], timeout: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: holds(tuple(self._names.values())), timeout)

    # Weights

    def pinned(self) -> frozenset[AdapterId]:
        """The versions that pinned names mean now."""
        with self._changed:
            return self._host.pinned

    def in_memory(self, adapter_id: AdapterId) -> Adapter | None:
        """A version's weights, now the last used."""
        with self._changed:
            return self._host.get(adapter_id)

    def is_in_memory(self, adapter_id: AdapterId) -> bool:
        with self._changed:
            return adapter_id in self._host

    def keep(self, adapter: Adapter) -> Adapter:
        """Put weights that were read again into memory."""
        with self._changed:
            return self._host.add(adapter)

    def reserve(self, num_bytes: int) -> bool:
        """Set memory aside for weights that are about to be read; False: requests hold too much of it."""
        with self._changed:
            return self._host.reserve(num_bytes)

    def unreserve(self, num_bytes: int) -> None:
        """What was set aside is in memory, or will not come."""
        with self._changed:
            self._host.unreserve(num_bytes)

    def held(self, adapter_id: AdapterId) -> Adapter:
        """A leased version's weights; KeyError if nobody holds it."""
        with self._changed:
            return self._host[adapter_id]

    def lease(self, mix: AdapterMix) -> Lease:
        """Raises Unavailable if a version has gone."""
        held: list[AdapterId] = []
        try:
            with self._changed:
                for adapter_id, _ in mix:
                    self._host.hold(adapter_id)
                    held.append(adapter_id)
                for adapter_id in held:
                    self._uses[adapter_id] = self._uses.get(adapter_id, (0, 0.0))[0] + 1, time.time()
        except Unavailable:
            self._release(held)
            raise
        return Lease(lambda: self._release(held))

    def use_of(self, adapter_id: AdapterId) -> VersionUse:
        with self._changed:
            num_requests, last_used = self._uses.get(adapter_id, (0, None))
            return VersionUse(
                host_bytes=self._host.bytes_of(adapter_id),
                num_leases=self._host.num_holders(adapter_id),
                is_wanted=adapter_id in self._num_wanted,
                num_requests=num_requests,
                last_used=last_used,
            )

    def host_memory(self) -> HostMemory:
        with self._changed:
            host = self._host
            return HostMemory(
                max_bytes=host.max_bytes,
                num_bytes=host.num_bytes,
                num_hits=host.num_hits,
                num_misses=host.num_misses,
                num_evictions=host.num_evictions,
                median_bytes=self._sizes[len(self._sizes) // 2] if self._sizes else 0,
                num_changes=self._num_puts + host.num_changes,
            )

    def loaded(self, on_device: Collection[AdapterId]) -> tuple[LoadedName, ...]:
        """Every spelling of a version that is in host memory or one of these."""
        with self._changed:
            return tuple(
                LoadedName(spelling, adapter_id, _meanings(record)[spelling].rank, record.is_pinned)
                for adapter_id in dict.fromkeys((*on_device, *self._host.ids()))
                for spelling, record in self._meanings.get(adapter_id, {}).items()
            )

    def check_integrity(self) -> None:
        """Books balance. Only while nothing is being loaded."""
        with self._changed:
            self._host.check_integrity()
            wanted = Counter(adapter_id for record in self._names.values() for adapter_id in record.wanted)
            assert self._num_wanted == wanted
            assert self._num_by_state == Counter(record.state for record in self._names.values())
            assert self._num_behind == sum(record.is_behind for record in self._names.values())

    # Called with the lock held

    def _set(self, record: NameRecord) -> None:
        if (before := self._names.get(record.name)) is not None:
            self._num_by_state[before.state] -= 1
            self._num_behind -= before.is_behind
        self._num_by_state[record.state] += 1
        self._num_behind += record.is_behind
        self._names[record.name] = record

    def _account(self, before: NameRecord, after: NameRecord) -> Sequence[AdapterId]:
        """Count who is meant by names now; the versions to tell `on_drop` of."""
        self._num_puts += 1
        self._note_meanings(before, after)
        self._num_wanted.update(after.wanted - before.wanted)
        self._num_wanted.subtract(before.wanted - after.wanted)
        unwanted = [i for i in before.wanted - after.wanted if not self._num_wanted[i]]
        for adapter_id in unwanted:
            del self._num_wanted[adapter_id]
        if before.is_pinned or after.is_pinned:
            self._pin(after)
        # An earlier version stays in memory while there is room; one that cannot be asked for does not.
        forgotten = {version.id for version in before.versions.values()}
        if after.current is not None:
            forgotten -= {version.id for version in after.versions.values()}
        for adapter_id in forgotten:
            if adapter_id not in self._num_wanted:
                self._host.discard(adapter_id)
                self._uses.pop(adapter_id, None)
        return [adapter_id for adapter_id in unwanted if not self._host.is_held(adapter_id)]

    def _note_meanings(self, before: NameRecord, after: NameRecord) -> None:
        for spelling, version in _meanings(before).items():
            names = self._meanings[version.id]
            del names[spelling]
            if not names:
                del self._meanings[version.id]
        for spelling, version in _meanings(after).items():
            self._meanings.setdefault(version.id, {})[spelling] = after
        if before.current_version is not None:
            del self._sizes[bisect_left(self._sizes, before.current_version.num_bytes)]
        if after.current_version is not None:
            insort(self._sizes, after.current_version.num_bytes)

    def _pin(self, record: NameRecord) -> None:
        if record.is_pinned and record.current_version is not None:
            self._pinned_ids[record.name] = record.current_version.id
        else:
            self._pinned_ids.pop(record.name, None)
        self._host.pin(self._pinned_ids.values())

    # Called without it

    def _release(self, adapter_ids: Sequence[AdapterId]) -> None:
        with self._changed:
            free = [adapter_id for adapter_id in adapter_ids if self._host.let_go(adapter_id)]
            dropped = [adapter_id for adapter_id in free if adapter_id not in self._num_wanted]
        self._tell(dropped)
        if free:
            self._on_room()

    def _tell(self, dropped: Sequence[AdapterId]) -> None:
        for adapter_id in dropped:
            self._on_drop(adapter_id)


def _meanings(record: NameRecord) -> Mapping[str, Version]:
    """What each spelling of a name means: NAME, and NAME@ALIAS."""
    if record.current_version is None:
        return {}
    aliases = {f"{record.name}@{alias}": record.versions[number] for alias, number in record.aliases.items()}
    return {record.name: record.current_version, **aliases}
