"""Which sources an operator allows: patterns from --allow-source, and nothing remote without one.

    hf://my-org/*    hf://my-org/support    s3://bucket/adapters/*    https://models.example.com/*    /mnt/models

`*` stands for any characters, in the owner, bucket or host and in the path apart: none of the two can reach
into the other. A pattern without a scheme is a directory, and allows what is below it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adapterd.errors import ConfigError, Forbidden
from adapterd.sources.source import REMOTE_SCHEMES, Source


@dataclass(frozen=True)
class _Pattern:
    scheme: str
    authority: re.Pattern[str]
    path: re.Pattern[str]


class AllowList:
    """`roots` are the directories it allows. Raises ConfigError for a pattern that is none."""

    def __init__(self, patterns: Sequence[str] = (), *, param: str = "allow_source") -> None:
        self._texts = tuple(patterns)
        self._patterns: list[_Pattern] = []
        roots: list[Path] = []
        for text in patterns:
            scheme, mark, rest = text.partition("://")
            if not mark or scheme == "file":
                roots.append(_directory(rest if mark else text, text, param))
                continue
            if scheme not in REMOTE_SCHEMES:
                raise ConfigError(
                    f"{text!r} is no pattern of sources; it begins with a directory or"
                    f" {', '.join(f'{known}://' for known in REMOTE_SCHEMES)}",
                    param=param,
                )
            authority, _, path = rest.partition("/")
            if not authority or not path or "@" in text or "#" in text or "?" in text:
                raise ConfigError(
                    f"{text!r} is no pattern of sources; write it as {scheme}://OWNER-BUCKET-OR-HOST/PATH with *"
                    " for what may differ, and no revision",
                    param=param,
                )
            authority = authority.lower().removesuffix({"https": ":443", "http": ":80"}.get(scheme, "/"))
            self._patterns.append(_Pattern(scheme, _compiled(authority), _compiled(path)))
        self.roots = tuple(roots)

    @property
    def allows_remote(self) -> bool:
        return bool(self._patterns)

    def allows(self, source: Source) -> bool:
        """Whether a remote source matches a pattern; directories are checked where they are resolved."""
        return any(
            pattern.scheme == source.scheme
            and pattern.authority.fullmatch(source.authority.lower())
            and pattern.path.fullmatch(source.path)
            for pattern in self._patterns
        )

    def check(self, source: Source) -> None:
        """Raises Forbidden for a remote source that no pattern allows."""
        if not source.is_local and not self.allows(source):
            allowed = f"allowed are {', '.join(self._texts)}" if self._patterns else "none is allowed"
            raise Forbidden(
                f"the source {source} is not allowed; {allowed} (--allow-source PATTERN)",
                param="source",
                code="source_not_allowed",
            )


def _directory(path: str, text: str, param: str) -> Path:
    directory = Path(path.removesuffix("/*"))
    if not directory.is_absolute() or "*" in str(directory) or ".." in directory.parts:
        raise ConfigError(
            f"{text!r} is no pattern of sources; a directory is written in full, as in /mnt/models",
            param=param,
        )
    return directory


def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(".*".join(re.escape(part) for part in re.split(r"\*+", pattern)))
