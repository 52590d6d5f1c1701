"""From a folder to an Adapter: where a path a caller gives may lie, and reading what is there, again if need be.

Called in a pool or in a caller's own thread, never under a lock: it waits for the disk.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from adapterd.adapter import Adapter, read_adapter
from adapterd.core import AdapterEvents, BaseSpec, Unobserved
from adapterd.errors import AdapterdError, AdapterRefused, ConfigError, InvalidRequest
from adapterd.model_name import shown
from adapterd.names import Version
from adapterd.token_table import TokenizerIdentity
from adapterd.watch import signature_of

_logger = logging.getLogger(__name__)


class AdapterReader:
    """Reads for one base, below `roots` and nowhere else."""

    def __init__(
        self,
        spec: BaseSpec,
        directories: Sequence[Path],
        *,
        tokenizer: TokenizerIdentity,
        base_fingerprint: str | None = None,
        check: Callable[[Adapter], None] = lambda adapter: None,
        events: AdapterEvents | None = None,
    ) -> None:
        """`check` raises AdapterRefused for an adapter that can never fit. Raises ConfigError for no directory."""
        for directory in directories:
            if not directory.is_dir():
                raise ConfigError(f"adapter directory {directory} does not exist", param="adapters")
        self.roots = tuple(Path(os.path.abspath(directory)) for directory in directories)
        self._spec = spec
        self._tokenizer = tokenizer
        self._base_fingerprint = base_fingerprint
        self._check = check
        self._events: AdapterEvents = Unobserved() if events is None else events
        self._lock = threading.Lock()
        self.num_reads = 0
        self.seconds = 0.0

    def locate(self, path: str) -> tuple[Path, Path]:
        """Where a requested path is and which root it is below; both as given, with links unfollowed.

        A path that is not absolute counts from each root, then from where the daemon was started.
        """
        for root in self.roots:
            for start in (root, Path.cwd()):
                candidate = Path(os.path.normpath(start / path))
                below = candidate.is_relative_to(root) or candidate.is_relative_to(root.resolve())
                if below and candidate.is_dir():
                    return candidate, root
        raise InvalidRequest(f"{shown(path)} is no folder below the adapter directories", param="lora_path")

    def read(self, name: str, directory: Path, root: Path) -> Adapter:
        """Raises AdapterRefused."""
        began = time.monotonic()
        adapter = read_adapter(
            directory,
            name=name,
            spec=self._spec,
            tokenizer=self._tokenizer,
            base_fingerprint=self._base_fingerprint,
            root=root,
        )
        self._check(adapter)
        seconds = time.monotonic() - began
        with self._lock:
            self.num_reads += 1
            self.seconds += seconds
        self._events.adapter_loaded(name, "host", seconds)
        return adapter

    def try_read(self, name: str, directory: Path, root: Path) -> Adapter | str:
        """The adapter, or why there is none."""
        try:
            return self.read(name, directory, root)
        except AdapterdError as error:
            return error.message
        except Exception as error:  # a reader's bug must end in a FAILED name, not in one that loads for ever
            _logger.exception("adapter %s: reading failed", name)
            return f"adapter {name!r} could not be read: {type(error).__name__}: {error}"

    def read_version(self, version: Version) -> Adapter:
        """Read a known version once more. Raises AdapterRefused if its folder holds something else by now."""
        name, path = version.id.name, version.path
        root = next((root for root in self.roots if path.is_relative_to(root.resolve())), None)
        if root is None:
            raise AdapterRefused(
                f"version {version.number} of {name!r} is in {path}, which is below no adapter directory"
            )
        if signature_of(path) is None:
            raise AdapterRefused(_gone(version, "is no adapter any more"))
        adapter = self.read(name, path, root)
        if adapter.id != version.id:
            raise AdapterRefused(_gone(version, f"holds {adapter.id.digest[:12]!r} by now"))
        return adapter


def _gone(version: Version, reason: str) -> str:
    return (
        f"version {version.number} of {version.id.name!r} is gone: it is no longer in memory, and {version.path}"
        f" {reason}. Keep each version in a folder of its own to be able to return to it"
    )
