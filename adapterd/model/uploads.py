"""Adapters on their way from host memory into the bank, in a thread of their own, beside the steps.

Pages are taken in the runner's thread, in the order of its decisions; filling them is what takes time. An adapter is
used by no step before its upload has been told, so nothing here is ordered against kernels but one thing: pages that
an evicted adapter gave back may still be read by steps that were launched before.
"""

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from adapterd.adapter import Adapter
from adapterd.core import AdapterEvents, AdapterId, Unobserved
from adapterd.model.lora import LoraBank
from adapterd.model.transfer import aligned, copy_in_slices

logger = logging.getLogger(__name__)

Uploaded = Callable[[AdapterId, str | None], None]

_STAGING_BYTES = 32 << 20


class AdapterUploads:
    """One upload at a time, in the order in which they were begun. `tell` hears of the end of each."""

    def __init__(self, bank: LoraBank, device: torch.device, events: AdapterEvents | None = None) -> None:
        self._bank = bank
        self._events: AdapterEvents = Unobserved() if events is None else events
        self._device = device
        # The executor's thread starts with the first upload and ends when nobody holds the executor any more.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="adapter-upload")
        self._staging: _Staging | None = None
        self.tell: Uploaded = lambda adapter_id, error: None

    def begin(self, adapter: Adapter) -> None:
        """Take the pages now and fill them soon. Called in the thread that launches the steps."""
        self._bank.take(adapter)
        launched: torch.cuda.Event | None = None
        if self._device.type == "cuda":
            launched = torch.cuda.Event()  # type: ignore[no-untyped-call]
            launched.record(torch.cuda.current_stream(self._device))
        self._thread.submit(self._upload, adapter, launched)

    def _upload(self, adapter: Adapter, launched: "torch.cuda.Event | None") -> None:
        error: str | None = None
        began = time.monotonic()
        try:
            if launched is None:
                self._bank.fill(adapter, copy_in_slices)
            else:
                self._fill_on_device(adapter, launched)
            self._events.adapter_loaded(adapter.id.name, "device", time.monotonic() - began)
            logger.debug("adapter %s (%s) uploaded", adapter.id.name, adapter.id.digest[:12])
        except Exception as failure:  # whatever it is, who waits must be told
            logger.exception("adapter %s could not be uploaded", adapter.id.name)
            error = f"{type(failure).__name__}: {failure}"
        self.tell(adapter.id, error)

    def _fill_on_device(self, adapter: Adapter, launched: "torch.cuda.Event") -> None:
        """On a stream of its own; returns when the bytes are there."""
        if self._staging is None:
            self._staging = _Staging(self._device)
        staging = self._staging
        with torch.cuda.stream(staging.stream):
            staging.stream.wait_event(launched)
            self._bank.fill(adapter, staging.copy)
            staging.stream.synchronize()
            staging.num_used = 0


class _Staging:
    """A piece of pinned memory, through which goes whatever is not pinned, contiguous and of the device's type already
    (host_layout.py). Source of the idea: CUDA best practices, 10.1.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.num_used = 0
        self._buffer = torch.empty(_STAGING_BYTES, dtype=torch.uint8, pin_memory=True)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        if source.dtype == target.dtype and source.is_contiguous() and source.is_pinned():
            target.copy_(source, non_blocking=True)
            return
        num_bytes = target.numel() * target.element_size()
        if num_bytes > len(self._buffer):
            middle = len(target) // 2
            if middle == 0:
                raise ValueError(f"a row of {num_bytes} bytes is larger than the staging memory")
            self.copy(target[:middle], source[:middle])
            self.copy(target[middle:], source[middle:])
            return
        if self.num_used + num_bytes > len(self._buffer):
            self.stream.synchronize()
            self.num_used = 0
        piece = self._buffer[self.num_used : self.num_used + num_bytes].view(target.dtype).view(target.shape)
        copy_in_slices(piece, source)
        target.copy_(piece, non_blocking=True)
        self.num_used += aligned(num_bytes)
