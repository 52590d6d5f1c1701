"""`adapterd pull`: sources into a directory that a daemon watches, for init containers and sidecars. No torch.

Each adapter appears whole, by one rename. What has not changed is not fetched again; what fails leaves what was
there before.
"""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from adapterd.errors import AdapterdError, ConfigError, SourceFailed
from adapterd.manifest import Declared, Manifest, read_manifest
from adapterd.model_name import is_adapter_name, shown
from adapterd.sources.allow import AllowList
from adapterd.sources.download import Downloader
from adapterd.sources.publish import PublishedDirectory
from adapterd.sources.source import Hashes, hashes_text, parse_declared

_logger = logging.getLogger(__name__)


class PullSettings(Protocol):
    """`config.PullSettings` is the real thing."""

    @property
    def sources(self) -> Sequence[str]: ...
    @property
    def into(self) -> Path: ...
    @property
    def manifest(self) -> Path | None: ...
    @property
    def allow_source(self) -> Sequence[str]: ...
    @property
    def interval(self) -> float: ...
    @property
    def keep(self) -> int: ...
    @property
    def download_timeout(self) -> float: ...


@dataclass(frozen=True)
class Pulled:
    """What one round did with one name. `error` beside a digest: the version before is still there."""

    name: str
    digest: str | None
    is_new: bool
    error: str | None = None


class Puller:
    """Raises ConfigError for a setting that makes no sense, before anything is fetched."""

    def __init__(self, settings: PullSettings) -> None:
        self._settings = settings
        self._given = _given(settings.sources)
        if not self._given and settings.manifest is None:
            raise ConfigError("nothing to pull: name sources, or a --manifest", param="sources")
        AllowList(settings.allow_source)
        try:
            self._published = PublishedDirectory(settings.into, num_kept=settings.keep)
        except OSError as error:
            raise ConfigError(f"{settings.into} cannot be written: {error.strerror}", param="into") from None

    def watch(self, stop: threading.Event, report: Callable[[Sequence[Pulled]], None]) -> None:
        """Pull again every `interval` seconds until `stop`; a manifest that cannot be read leaves all as it is."""
        while not stop.is_set():
            try:
                report([pulled for pulled in self.pull() if pulled.is_new or pulled.error])
            except ConfigError as error:
                _logger.error("%s", error.message)
            stop.wait(self._settings.interval)

    def pull(self) -> list[Pulled]:
        """One round over everything; one that fails does not keep the others. Raises ConfigError."""
        wanted = self._wanted()
        allow = self._settings.allow_source or [
            f"{declared.source.scheme}://{declared.source.authority}/*"
            for declared in wanted.values()
            if not declared.source.is_local
        ]
        downloader = Downloader(AllowList(allow), timeout_seconds=self._settings.download_timeout)
        done = [self._pull(name, declared, downloader) for name, declared in wanted.items()]
        if self._settings.manifest is not None:
            for name in set(self._published.names()) - wanted.keys():
                self._published.withdraw(name)
                _logger.info("%s: withdrawn, the manifest names it no more", name)
        return done

    def _wanted(self) -> dict[str, Declared]:
        wanted = dict(self._given)
        if self._settings.manifest is not None:
            for name, declared in _from_manifest(read_manifest(self._settings.manifest)).items():
                if name in wanted:
                    raise ConfigError(
                        f"{name!r} is both in the manifest and on the command line", param="sources"
                    )
                wanted[name] = declared
        return wanted

    def _pull(self, name: str, declared: Declared, downloader: Downloader) -> Pulled:
        note = self._published.note(name)
        try:
            source, hashes = declared.source, declared.hashes
            digest = note.get("digest")
            is_same = note.get("source") == str(source) and note.get("sha256") == hashes_text(hashes)
            if is_same and (source.is_pinned or hashes):
                return Pulled(name, digest, False)
            held = downloader.look(source)
            if is_same and held.state is not None and note.get("state") == held.state:
                return Pulled(name, digest, False)

            def fill(partial: Path) -> Hashes:
                return downloader.fetch(held, partial, hashes)

            about = {"source": str(source), "sha256": hashes_text(hashes), "state": held.state}
            digest, is_new = self._published.publish(name, fill, about)
            return Pulled(name, digest, is_new)
        except OSError as error:
            reason = SourceFailed(f"{name!r} could not be written: {error}").message
            return Pulled(name, note.get("digest"), False, reason)
        except AdapterdError as error:
            return Pulled(name, note.get("digest"), False, error.message)


def _given(sources: Sequence[str]) -> dict[str, Declared]:
    """NAME=SOURCE, or SOURCE alone, which is called by its last part."""
    given: dict[str, Declared] = {}
    for text in sources:
        name, mark, address = text.partition("=")
        if not mark or not is_adapter_name(name):
            name, address = "", text
        try:
            declared = Declared(*parse_declared(address))
        except AdapterdError as error:
            raise ConfigError(error.message, param="sources") from None
        name = name or declared.source.name
        if not is_adapter_name(name):
            raise ConfigError(
                f"{shown(name)} is no name of an adapter; write NAME={address}", param="sources"
            )
        if name in given:
            raise ConfigError(f"two sources are called {name!r}; write NAME=SOURCE", param="sources")
        given[name] = declared
    return given


def _from_manifest(manifest: Manifest) -> Mapping[str, Declared]:
    for adapter in manifest.adapters.values():
        for alias, what in adapter.aliases.items():
            if what is not None:
                raise ConfigError(
                    f"the manifest gives {adapter.name!r} the alias {alias!r} with a source of its own, and a pulled"
                    " directory holds one version of each name; give it a name of its own, or let the daemon fetch"
                    " it (serve --manifest)",
                    param="manifest",
                )
    return {name: adapter.current for name, adapter in manifest.adapters.items()}
