"""Adapters that nobody registered, found when they are first asked for: --resolve 'hf://my-org/*'.

`*` is replaced by the name, pattern after pattern. What was not found is remembered for a while, so that a name
nobody has costs one look and not one a request. Off without a pattern.
"""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from adapterd.errors import (
    AdapterdError,
    AdapterRefused,
    ConfigError,
    InvalidRequest,
    ModelNotFound,
    SourceMissing,
    Unavailable,
)
from adapterd.readings import submit
from adapterd.sources.source import Source, parse_source

MISSING_SECONDS = 60.0
"""How long a name is known to be nowhere, or refused, before it is looked for again."""

FAILED_SECONDS = 5.0
"""The same where the source could not be asked."""

MAX_REMEMBERED = 10_000
MAX_UNDER_WAY = 64

_logger = logging.getLogger(__name__)


_PLACEHOLDER = "adapterd-placeholder"


def allowed_by(patterns: Sequence[str]) -> list[str]:
    """What whoever starts with --resolve PATTERN allows by it, as --allow-source says it: any revision.

    Raises ConfigError for a pattern that no name makes a source.
    """
    allowed = []
    for pattern in patterns:
        try:
            source, hashes = parse_source(pattern.replace("*", _PLACEHOLDER))
        except InvalidRequest as error:
            raise ConfigError(f"--resolve {pattern}: {error.message}", param="resolve") from None
        if pattern.count("*") != 1 or hashes or source.scheme == "http":
            raise ConfigError(
                f"--resolve {pattern}: write a source, other than plain http, with one * for the adapter's name",
                param="resolve",
            )
        place = source.path if source.is_local else f"{source.scheme}://{source.authority}/{source.path}"
        allowed.append(place.replace(_PLACEHOLDER, "*"))
    return allowed


class FirstUse:
    """`load` gets a name and a source, and makes the one mean the other; it runs in `pool`."""

    def __init__(
        self,
        patterns: Sequence[str],
        load: Callable[[str, Source], object],
        pool: ThreadPoolExecutor,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises ConfigError for a pattern that no name makes a source."""
        allowed_by(patterns)
        self._patterns = tuple(patterns)
        self._load = load
        self._pool = pool
        self._clock = clock
        self._lock = threading.Lock()
        self._under_way: dict[str, Future[object]] = {}
        self._failures: OrderedDict[str, tuple[float, AdapterdError]] = OrderedDict()

    def begin(self, name: str) -> "Future[object] | None":
        """The search for a name that is under way, or a new one; None if it is nowhere.

        Raises what the last search met if that was not long ago, or Unavailable if too many are under way.
        """
        if not self._patterns:
            return None
        with self._lock:
            until, failure = self._failures.get(name, (0.0, None))
            if failure is not None and self._clock() < until:
                if isinstance(failure, ModelNotFound):
                    return None
                raise failure
            search = self._under_way.get(name)
            if search is None:
                if len(self._under_way) >= MAX_UNDER_WAY:
                    raise Unavailable(
                        f"{MAX_UNDER_WAY} adapters are being looked for; try again in a moment",
                        retry_after_seconds=5,
                    )
                search = self._under_way[name] = submit(self._pool, lambda: self._search(name))
            return search

    def _search(self, name: str) -> object:
        try:
            found = self._find(name)
        except AdapterdError as error:
            self._remember(name, error)
            raise
        finally:
            with self._lock:
                self._under_way.pop(name, None)
        return found

    def _find(self, name: str) -> object:
        for pattern in self._patterns:
            source, _ = parse_source(pattern.replace("*", name))
            try:
                return self._load(name, source)
            except SourceMissing:
                continue
            except (AdapterRefused, ModelNotFound):
                raise
            except AdapterdError as error:
                raise Unavailable(f"the adapter {name!r} could not be fetched: {error.message}") from error
        raise ModelNotFound(f"the adapter {name!r} is in none of the places where it would be", param="model")

    def _remember(self, name: str, error: AdapterdError) -> None:
        _logger.info("adapter %s, asked for by a request: %s", name, error.message)
        seconds = FAILED_SECONDS if isinstance(error, Unavailable) else MISSING_SECONDS
        with self._lock:
            self._failures[name] = (self._clock() + seconds, error)
            self._failures.move_to_end(name)
            while len(self._failures) > MAX_REMEMBERED:
                self._failures.popitem(last=False)
