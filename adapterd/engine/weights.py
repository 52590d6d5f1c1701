"""Host weights of the adapters that submitted sequences run, and what those take on the device."""

import threading
from collections.abc import Callable
from dataclasses import dataclass

from adapterd.adapter import Adapter
from adapterd.core import AdapterId, AdapterMix


@dataclass
class _Held:
    adapter: Adapter
    num_pages: int
    num_holders: int = 0


class WeightsInUse:
    """Weights by reference, with their size in pages of adapter memory, worked out when they are first held.

    A client that goes away gives up its lease at once, while the step that is running may be about to upload
    its adapter: so the engine counts on references of its own, taken while the lease still stands.
    """

    def __init__(self, find: Callable[[AdapterId], Adapter], pages_of: Callable[[Adapter], int]) -> None:
        self._find = find
        self._pages_of = pages_of
        self._lock = threading.Lock()
        self._held: dict[AdapterId, _Held] = {}

    def hold(self, mix: AdapterMix) -> None:
        """Called by whoever submits, with the mix leased."""
        with self._lock:
            for adapter_id, _ in mix:
                held = self._held.get(adapter_id)
                if held is None:
                    adapter = self._find(adapter_id)
                    held = self._held[adapter_id] = _Held(adapter, self._pages_of(adapter))
                held.num_holders += 1

    def release(self, mix: AdapterMix) -> None:
        with self._lock:
            for adapter_id, _ in mix:
                held = self._held[adapter_id]
                held.num_holders -= 1
                if held.num_holders == 0:
                    del self._held[adapter_id]

    def get(self, adapter_id: AdapterId) -> Adapter:
        """Weights that are held; KeyError if they are not, which is our own bug."""
        with self._lock:
            return self._held[adapter_id].adapter

    def num_pages(self, adapter_id: AdapterId) -> int:
        """What they take of adapter memory. KeyError as for `get`."""
        with self._lock:
            return self._held[adapter_id].num_pages
