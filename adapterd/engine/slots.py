"""Which adapters are resident in adapter memory. Bookkeeping only: model/runner.py moves the bytes. No torch.

An adapter is held while a sequence that runs it is scheduled; idle ones stay resident, the longest unused
leaving first when another needs their pages.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from adapterd.core import AdapterEvents, AdapterId, AdapterMix, Unobserved


@dataclass
class _Resident:
    num_pages: int
    num_holders: int = 0


class AdapterSlots:
    """Pages booked by adapter. `pages_of` says what a version costs; it is asked when one becomes resident."""

    def __init__(
        self,
        num_pages: int,
        pages_of: Callable[[AdapterId], int],
        *,
        events: AdapterEvents | None = None,
    ) -> None:
        self.num_pages = num_pages
        self._pages_of = pages_of
        self._events: AdapterEvents = Unobserved() if events is None else events
        self._resident: OrderedDict[AdapterId, _Resident] = OrderedDict()  # longest unused first
        self._retired: set[AdapterId] = set()
        self._evictions: list[AdapterId] = []
        self._uploads: list[AdapterId] = []
        self.num_free_pages = num_pages
        self.num_held_pages = 0
        self.resident: tuple[AdapterId, ...] = ()
        self.resident_pages: tuple[int, ...] = ()  # of each of `resident`
        self.num_uploads = 0
        self.num_evictions = 0

    def hold(self, mix: AdapterMix) -> bool:
        """Make every adapter of a mix resident and hold it, or change nothing and return False.

        What must be moved for it is told by the next `take_moves`.
        """
        ids = [adapter_id for adapter_id, _ in mix]
        missing = {
            adapter_id: self._pages_of(adapter_id) for adapter_id in ids if adapter_id not in self._resident
        }
        idle = [i for i, entry in self._resident.items() if not entry.num_holders and i not in ids]
        needed = sum(missing.values()) - self.num_free_pages
        if needed > sum(self._resident[adapter_id].num_pages for adapter_id in idle):
            return False
        for adapter_id in idle:
            if needed <= 0:
                break
            needed -= self._resident[adapter_id].num_pages
            self._evict(adapter_id)
        for adapter_id, num_pages in missing.items():
            self._resident[adapter_id] = _Resident(num_pages)
            self.num_free_pages -= num_pages
            self._uploads.append(adapter_id)
            self.num_uploads += 1
        for adapter_id in ids:
            entry = self._resident[adapter_id]
            self.num_held_pages += 0 if entry.num_holders else entry.num_pages
            entry.num_holders += 1
            self._resident.move_to_end(adapter_id)
            self._events.adapter_wanted(adapter_id.name, is_resident=adapter_id not in missing)
        if missing:
            self._show_resident()
        return True

    def release(self, mix: AdapterMix) -> None:
        """One holder less for every adapter of a mix."""
        for adapter_id, _ in mix:
            entry = self._resident[adapter_id]
            entry.num_holders -= 1
            if entry.num_holders == 0:
                self.num_held_pages -= entry.num_pages
                if adapter_id in self._retired:
                    self._evict(adapter_id)

    def retire(self, adapter_id: AdapterId) -> None:
        """A version that nobody will ask for again: it leaves as soon as nobody holds it."""
        entry = self._resident.get(adapter_id)
        if entry is None:
            return
        if entry.num_holders:
            self._retired.add(adapter_id)
        else:
            self._evict(adapter_id)

    def take_moves(self) -> tuple[tuple[AdapterId, ...], tuple[AdapterId, ...]]:
        """(evictions, uploads) decided since last asked; evictions first, since uploads need their pages."""
        moves = tuple(self._evictions), tuple(self._uploads)
        self._evictions, self._uploads = [], []
        return moves

    def _evict(self, adapter_id: AdapterId) -> None:
        self.num_free_pages += self._resident.pop(adapter_id).num_pages
        self._show_resident()
        self._retired.discard(adapter_id)
        if adapter_id in self._uploads:
            self._uploads.remove(adapter_id)
        else:
            self._evictions.append(adapter_id)
            self.num_evictions += 1
            self._events.adapter_evicted(adapter_id.name, "device")

    def _show_resident(self) -> None:
        self.resident = tuple(self._resident)
        self.resident_pages = tuple(entry.num_pages for entry in self._resident.values())

    def check_integrity(self) -> None:
        """free + resident = total, and held is what residents with holders take."""
        entries = self._resident.values()
        assert self.num_free_pages + sum(entry.num_pages for entry in entries) == self.num_pages
        assert self.num_held_pages == sum(entry.num_pages for entry in entries if entry.num_holders)
        assert self._retired <= set(self._resident)
