"""What the registry says of one name to those outside."""

from dataclasses import dataclass
from pathlib import Path

from adapterd.core import AdapterId
from adapterd.names import NameRecord, Owner, State, Version


@dataclass(frozen=True)
class AdapterEntry:
    """One name as people see it. `error` beside READY: a newer version was refused and the old one serves."""

    name: str
    state: State
    id: AdapterId | None
    path: Path
    source: str | None
    sha256: str | None
    error: str | None
    loaded_at: float | None
    num_bytes: int
    rank: int
    targets: tuple[str, ...]
    owner: Owner | None
    number: int | None
    previous: int | None
    versions: tuple[Version, ...]
    aliases: tuple[tuple[str, int], ...]
    is_pinned: bool
    in_host_memory: bool

    @classmethod
    def of(cls, record: NameRecord, *, in_host_memory: bool) -> "AdapterEntry":
        version = record.current_version
        return cls(
            name=record.name,
            state=record.state,
            id=version.id if version is not None else None,
            path=record.path if record.path is not None else Path(),
            source=record.source,
            sha256=record.sha256,
            error=record.error,
            loaded_at=record.loaded_at,
            num_bytes=version.num_bytes if version is not None else 0,
            rank=version.rank if version is not None else 0,
            targets=version.targets if version is not None else (),
            owner=record.owner,
            number=record.current,
            previous=record.previous,
            versions=tuple(record.versions[number] for number in sorted(record.versions)),
            aliases=tuple(sorted(record.aliases.items())),
            is_pinned=record.is_pinned,
            in_host_memory=in_host_memory,
        )
