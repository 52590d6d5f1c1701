"""Looking at something again and again in a thread, at a pace that a slow disk sets."""

import logging
import threading
import time
from collections.abc import Callable

_logger = logging.getLogger(__name__)


class Poller:
    """Calls `look` every so many seconds, in a thread called `name`, from `start` to `stop`."""

    def __init__(self, look: Callable[[], None], seconds: float, *, name: str) -> None:
        self._look = look
        self._seconds = seconds
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Wait for the look that is under way. Harmless if never started."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        seconds = self._seconds
        while not self._stopping.wait(seconds):
            began = time.monotonic()
            try:
                self._look()
            except Exception:  # a full disk, say: whatever it is, the next look may do better
                _logger.exception("a look of %s failed", self._thread.name)
            # Ten thousand folders on a slow disk take a while to look at; never spend more than a tenth on it.
            seconds = max(self._seconds, 10 * (time.monotonic() - began))
