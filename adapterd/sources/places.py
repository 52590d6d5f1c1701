"""Where one daemon's adapters come from, as it was started with: a value, which opens and reads nothing."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from adapterd.errors import ConfigError
from adapterd.sources.allow import AllowList
from adapterd.sources.cache import SourceCache


@dataclass(frozen=True)
class AdapterPlaces:
    """`directories` hold folders of adapters; `named` are folders of one adapter each, by what they are called here.
    Both are watched. `manifest` is the file that owns names, if there is one; `resolve` are patterns for names that
    nobody registered. Whatever else is read has to be allowed by `allow`; without a `cache` nothing is downloaded.
    """

    directories: Sequence[Path] = ()
    named: Mapping[str, Path] = field(default_factory=dict)
    allow: AllowList = field(default_factory=AllowList)
    cache: SourceCache | None = None
    manifest: Path | None = None
    resolve: Sequence[str] = ()

    def found(self) -> "AdapterPlaces":
        """The same with absolute paths of what is watched. Raises ConfigError where that is no directory."""
        for directory in (*self.directories, *self.named.values()):
            if not directory.is_dir():
                raise ConfigError(f"adapter directory {directory} does not exist", param="adapters")
        return replace(
            self,
            directories=tuple(_absolute(directory) for directory in self.directories),
            named={name: _absolute(folder) for name, folder in self.named.items()},
        )


def _absolute(directory: Path) -> Path:
    """Links stay as they are: a published version is one, and leads elsewhere tomorrow."""
    return Path(os.path.abspath(directory))
