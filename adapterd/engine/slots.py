"""The books of adapter memory: which adapters have pages there, who holds them, which are pinned. No torch.

An adapter's pages are booked when its upload begins and it can run when the upload has ended. Held is what running
sequences use; the rest is idle and stays until `engine/residency.py` gives its pages to another. model/runner.py
moves the bytes.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from adapterd.core import AdapterEvents, AdapterId, AdapterMix, Unobserved


@dataclass
class _Booked:
    num_pages: int
    num_holders: int = 0
    is_uploaded: bool = False
    is_retired: bool = False


class AdapterSlots:
    """Pages booked by adapter. `pages_of` says what a version will take; it is asked only of one that has no pages
    yet, and whose weights are held therefore by whoever waits for it.
    """

    def __init__(
        self,
        num_pages: int,
        pages_of: Callable[[AdapterId], int],
        *,
        events: AdapterEvents | None = None,
    ) -> None:
        self.num_pages = num_pages
        self._events: AdapterEvents = Unobserved() if events is None else events
        self._pages_of = pages_of
        self._booked: OrderedDict[AdapterId, _Booked] = OrderedDict()  # longest unused first
        self._pinned: set[AdapterId] = set()
        self._evictions: list[AdapterId] = []
        self._uploads: list[AdapterId] = []
        self.num_free_pages = num_pages
        self.num_held_pages = 0
        self.resident: tuple[AdapterId, ...] = ()
        self.resident_pages: tuple[int, ...] = ()  # of each of `resident`
        self.num_uploading = 0
        self.num_uploads = 0
        self.num_evictions = 0

    # What there is

    def is_booked(self, mix: AdapterMix) -> bool:
        """Whether every adapter of a mix has its pages; some may still be on their way."""
        return all(adapter_id in self._booked for adapter_id, _ in mix)

    def is_ready(self, mix: AdapterMix) -> bool:
        """Whether a sequence of this mix could run now."""
        booked = self._booked
        return all(adapter_id in booked and booked[adapter_id].is_uploaded for adapter_id, _ in mix)

    def num_missing_pages(self, mix: AdapterMix) -> int:
        """Pages to book before a mix can be uploaded whole."""
        missing = {adapter_id for adapter_id, _ in mix if adapter_id not in self._booked}
        return sum(self._pages_of(adapter_id) for adapter_id in missing)

    def can_ever_hold(self, mix: AdapterMix) -> bool:
        """Whether a mix fits beside everything pinned."""
        pinned = self._pinned | {adapter_id for adapter_id, _ in mix}
        return sum(self.size(adapter_id) for adapter_id in pinned) <= self.num_pages

    def size(self, adapter_id: AdapterId) -> int:
        """Pages of an adapter that is booked, or that somebody waits for."""
        booked = self._booked.get(adapter_id)
        return self._pages_of(adapter_id) if booked is None else booked.num_pages

    def idle(self) -> Iterable[AdapterId]:
        """What could be evicted now, longest unused first."""
        return [
            adapter_id
            for adapter_id, booked in self._booked.items()
            if booked.is_uploaded and not booked.num_holders and adapter_id not in self._pinned
        ]

    def held(self) -> Iterable[AdapterId]:
        """What could be evicted once its holders have let go."""
        return [
            adapter_id
            for adapter_id, booked in self._booked.items()
            if booked.num_holders and adapter_id not in self._pinned
        ]

    def is_pinned(self, adapter_id: AdapterId) -> bool:
        return adapter_id in self._pinned

    @property
    def pinned(self) -> tuple[AdapterId, ...]:
        """Pinned adapters, whether they have arrived or not."""
        return tuple(self._pinned)

    # Sequences

    def want(self, mix: AdapterMix) -> None:
        """A sequence of this mix has come to wait: whether its adapters are there already is what events tell."""
        for adapter_id, _ in mix:
            booked = self._booked.get(adapter_id)
            is_resident = booked is not None and booked.is_uploaded
            self._events.adapter_wanted(adapter_id.name, is_resident=is_resident)

    def hold(self, mix: AdapterMix) -> None:
        """A sequence begins to run a mix that is ready."""
        for adapter_id, _ in mix:
            booked = self._booked[adapter_id]
            assert booked.is_uploaded
            self.num_held_pages += 0 if booked.num_holders else booked.num_pages
            booked.num_holders += 1
            self._booked.move_to_end(adapter_id)

    def release(self, mix: AdapterMix) -> None:
        """One holder less for every adapter of a mix."""
        for adapter_id, _ in mix:
            booked = self._booked[adapter_id]
            booked.num_holders -= 1
            if booked.num_holders == 0:
                self.num_held_pages -= booked.num_pages
                self._booked.move_to_end(adapter_id)
                if booked.is_retired:
                    self.evict(adapter_id)

    # Coming and going

    def load(self, mix: AdapterMix) -> None:
        """Book the missing pages of a mix, which must be free, and have its adapters uploaded."""
        for adapter_id, _ in mix:
            if adapter_id not in self._booked:
                num_pages = self._pages_of(adapter_id)
                assert num_pages <= self.num_free_pages
                self._booked[adapter_id] = _Booked(num_pages)
                self.num_free_pages -= num_pages
                self._uploads.append(adapter_id)
                self.num_uploads += 1
                self.num_uploading += 1

    def arrived(self, adapter_id: AdapterId) -> None:
        """An upload has ended: the adapter can run."""
        booked = self._booked[adapter_id]
        assert not booked.is_uploaded
        booked.is_uploaded = True
        self.num_uploading -= 1
        self._show_resident()
        if booked.is_retired:
            self.evict(adapter_id)

    def evict(self, adapter_id: AdapterId) -> None:
        """Take the pages of an adapter that nobody holds and that is not on its way."""
        booked = self._booked.pop(adapter_id)
        assert booked.is_uploaded
        assert not booked.num_holders
        self.num_free_pages += booked.num_pages
        self._show_resident()
        self._evictions.append(adapter_id)
        self.num_evictions += 1
        self._events.adapter_evicted(adapter_id.name, "device")

    def retire(self, adapter_id: AdapterId) -> None:
        """A version that nobody will ask for again: it leaves as soon as nobody holds it, pinned or not."""
        self._pinned.discard(adapter_id)
        booked = self._booked.get(adapter_id)
        if booked is None:
            return
        if booked.num_holders or not booked.is_uploaded:
            booked.is_retired = True
        else:
            self.evict(adapter_id)

    def pin(self, adapter_id: AdapterId) -> None:
        """Never evict an adapter, here or once it has come; if it was retired, it is meant again."""
        self._pinned.add(adapter_id)
        booked = self._booked.get(adapter_id)
        if booked is not None:
            booked.is_retired = False

    def unpin(self, adapter_id: AdapterId) -> None:
        """It may leave like any other. Harmless if it is not pinned."""
        self._pinned.discard(adapter_id)

    def take_moves(self) -> tuple[tuple[AdapterId, ...], tuple[AdapterId, ...]]:
        """(evictions, uploads) decided since last asked; evictions first, since uploads need their pages."""
        moves = tuple(self._evictions), tuple(self._uploads)
        self._evictions, self._uploads = [], []
        return moves

    def _show_resident(self) -> None:
        """Longest unused first, as of the last change of who is there."""
        there = [(adapter_id, booked) for adapter_id, booked in self._booked.items() if booked.is_uploaded]
        self.resident = tuple(adapter_id for adapter_id, _ in there)
        self.resident_pages = tuple(booked.num_pages for _, booked in there)

    def check_integrity(self) -> None:
        """free + booked = total, and held is what those with holders take."""
        entries = self._booked.values()
        assert self.num_free_pages + sum(entry.num_pages for entry in entries) == self.num_pages
        assert self.num_held_pages == sum(entry.num_pages for entry in entries if entry.num_holders)
        assert set(self.resident) == {i for i, entry in self._booked.items() if entry.is_uploaded}
        assert all(entry.is_uploaded for entry in entries if entry.num_holders)
        assert not any(entry.is_retired for i, entry in self._booked.items() if i in self._pinned)
        assert self.num_uploading == sum(not entry.is_uploaded for entry in entries)
