"""What is known of one name: its versions by number, which of them it means, its aliases, who owns it.

Frozen data and pure functions of it. A change makes a new record, so that a reader sees either all of it or
nothing; `registry.py` decides the changes, `database.py` keeps them over a restart.

A version's number counts the contents seen under a name, from 1 on, and is never given twice. Content that
comes back has the number it had.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from adapterd.adapter import Adapter
from adapterd.core import AdapterId, BaseMatch
from adapterd.errors import InvalidRequest
from adapterd.model_name import check_alias, is_version_digest, is_version_number
from adapterd.proof import Proof
from adapterd.watch import Signature

Owner = Literal["folder", "runtime", "manifest", "resolver"]
"""Whose word counts for a name: a watched folder's, a caller's at run time, the manifest's, or that of the pattern
by which it was found when it was first asked for."""

State = Literal["LOADING", "READY", "FAILED", "ABSENT"]

MAX_VERSIONS = 16
"""Versions remembered for a name; beyond that the oldest that nothing points to is forgotten."""

MAX_ALIASES = 64


@dataclass(frozen=True)
class Version:
    """One content under one name. `path` is the folder it was read from, links followed.

    `source` is where that was downloaded from, as exactly as its address can say; None for a folder of its own.
    `base_match` is how we know that it is for this base: by its fingerprint, or only by the shapes of its tensors.
    `proof` is how its products compared with PEFT's when it was read last; None where nobody compared them.
    """

    number: int
    id: AdapterId
    path: Path
    num_bytes: int
    rank: int
    targets: tuple[str, ...]
    first_loaded_at: float
    source: str | None = None
    base_model: str | None = None
    base_match: BaseMatch = "shapes"
    proof: Proof | None = None


@dataclass(frozen=True)
class NameRecord:
    """`path` and `root` are where the name is loaded from, links unfollowed; `signature` is how that folder
    looked when it was last acted upon: read, refused or unloaded. `source` and `sha256` are what was asked for,
    where that is more than a watched folder; `declared` is the manifest's whole entry, as last acted upon.

    `error` beside a current version: a newer one was refused, and the one before serves on.
    """

    name: str
    owner: Owner | None = None
    path: Path | None = None
    root: Path | None = None
    signature: Signature | None = None
    source: str | None = None
    sha256: str | None = None
    declared: str | None = None
    versions: Mapping[int, Version] = field(default_factory=lambda: MappingProxyType({}))
    next_number: int = 1
    current: int | None = None
    previous: int | None = None
    aliases: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    is_pinned: bool = False
    loaded_at: float | None = None
    error: str | None = None
    is_loading: bool = False

    @property
    def state(self) -> State:
        if self.current is not None:
            return "READY"
        if self.is_loading:
            return "LOADING"
        return "FAILED" if self.error is not None else "ABSENT"

    @property
    def is_behind(self) -> bool:
        """Whether a newer version was refused, and the one before serves on."""
        return self.current is not None and self.error is not None

    @property
    def current_version(self) -> Version | None:
        return None if self.current is None else self.versions[self.current]

    @property
    def wanted(self) -> frozenset[AdapterId]:
        """The versions that a request may ask for without naming a number or a digest."""
        if self.current is None:
            return frozenset()
        return frozenset(self.versions[number].id for number in (self.current, *self.aliases.values()))

    def find(self, selector: str) -> Version | None:
        """The version that NAME@selector means: a number, an alias, or the beginning of a digest."""
        if is_version_number(selector):
            return self.versions.get(int(selector))
        if selector in self.aliases:
            return self.versions[self.aliases[selector]]
        if is_version_digest(selector):
            # The newest first, should two digests begin alike.
            return next(
                (
                    version
                    for _, version in sorted(self.versions.items(), reverse=True)
                    if version.id.digest.startswith(selector)
                ),
                None,
            )
        return None

    def with_version(self, adapter: Adapter, *, now: float, source: str | None = None) -> "NameRecord":
        """Point the name to `adapter`, as a new version unless its content is known."""
        record, number = self.knowing(adapter, now=now, source=source)
        record = replace(record, error=None, is_loading=False, loaded_at=now)
        return record.pointed_to(number)._pruned()

    def knowing(self, adapter: Adapter, *, now: float, source: str | None = None) -> tuple["NameRecord", int]:
        """The same with `adapter` among its versions, and its number; the name points where it did."""
        known = next((v for v in self.versions.values() if v.id == adapter.id), None)
        number = self.next_number if known is None else known.number
        version = Version(
            number=number,
            id=AdapterId(adapter.id.digest, self.name),
            path=adapter.path,
            num_bytes=adapter.num_bytes,
            rank=adapter.max_rank,
            targets=adapter.targets,
            first_loaded_at=now if known is None else known.first_loaded_at,
            source=source,
            base_model=adapter.base_model_name,
            base_match=adapter.base_match,
            proof=adapter.proof,
        )
        versions = MappingProxyType({**self.versions, number: version})
        record = replace(self, versions=versions, next_number=max(self.next_number, number + 1))
        return record, number

    def pointed_to(self, number: int) -> "NameRecord":
        """The same with another current version; what was current is what a rollback returns to."""
        previous = self.previous if self.current in (None, number) else self.current
        return replace(self, current=number, previous=None if previous == number else previous)

    def with_alias(self, alias: str, number: int) -> "NameRecord":
        """Raises InvalidRequest for what can be no alias, or for one too many."""
        check_alias(alias)
        if alias not in self.aliases and len(self.aliases) >= MAX_ALIASES:
            raise InvalidRequest(
                f"the adapter {self.name!r} has {MAX_ALIASES} aliases already; remove one first",
                param="alias",
            )
        return replace(self, aliases=MappingProxyType({**self.aliases, alias: number}))

    def with_aliases(self, aliases: Mapping[str, int]) -> "NameRecord":
        """The same with these aliases and no others. Raises InvalidRequest."""
        record = replace(self, aliases=MappingProxyType({}))
        for alias, number in aliases.items():
            record = record.with_alias(alias, number)
        return record

    def without_alias(self, alias: str) -> "NameRecord":
        aliases = {key: number for key, number in self.aliases.items() if key != alias}
        return replace(self, aliases=MappingProxyType(aliases))

    def absent(self) -> "NameRecord":
        """Not served any more. What was known of it stays, so that its numbers are never given twice."""
        return replace(
            self,
            current=None,
            previous=None,
            is_pinned=False,
            error=None,
            is_loading=False,
            loaded_at=None,
        )

    def ownerless(self) -> "NameRecord":
        """Whoever comes first may have the name."""
        return replace(
            self, owner=None, path=None, root=None, signature=None, source=None, sha256=None, declared=None
        )

    def forgotten(self) -> "NameRecord":
        """The same without its versions and aliases. Its counter stays."""
        return replace(self, versions=MappingProxyType({}), aliases=MappingProxyType({}))

    def _pruned(self) -> "NameRecord":
        kept = {self.current, self.previous, *self.aliases.values()}
        spare = [number for number in sorted(self.versions) if number not in kept]
        gone = set(itertools.islice(spare, max(0, len(self.versions) - MAX_VERSIONS)))
        versions = {number: version for number, version in self.versions.items() if number not in gone}
        return replace(self, versions=MappingProxyType(versions))
