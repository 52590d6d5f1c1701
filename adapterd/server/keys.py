"""API keys: read from files as hashes, kept as hashes, read again when the files change.

A file has one key a line, as it is or as `sha256:HEX`; `role=admin` behind it makes it an admin's. A folder is what
Kubernetes makes of a mounted Secret: every file in it is read. Blank lines and lines that start with # are left out.
"""

import hashlib
import hmac
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from adapterd.errors import ConfigError

_logger = logging.getLogger(__name__)

Role = Literal["client", "admin"]
"""A client asks models; an admin changes which there are as well."""

_HASHED = re.compile(r"sha256:([0-9a-f]{64})", re.IGNORECASE)
_LOOK_AGAIN_SECONDS = 2.0

Signature = tuple[tuple[str, int, int, int], ...]


class KeyRing:
    """The keys of some files and folders, each with the role that its keys have unless they say another.

    Raises ConfigError, naming file and line but never a key.
    """

    def __init__(
        self, sources: Sequence[tuple[Path, Role]], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._sources = tuple(sources)
        self._clock = clock
        self._signature = _signature(self._sources)
        self._roles: Mapping[bytes, Role] = _read(self._sources)
        self._look_again_seconds = clock() + _LOOK_AGAIN_SECONDS

    def has(self, role: Role) -> bool:
        return role in self._roles.values()

    def role_of(self, key: bytes) -> Role | None:
        """Hashes are compared, all of them every time: neither a key's bytes nor its place show in the time taken."""
        self._look_again()
        digest = hashlib.sha256(key).digest()
        found: Role | None = None
        for known, role in self._roles.items():
            if hmac.compare_digest(digest, known):
                found = role
        return found

    def _look_again(self) -> None:
        """A Secret is replaced while its pod runs. Files that cannot be understood leave the keys as they were."""
        now = self._clock()
        if now < self._look_again_seconds:
            return
        self._look_again_seconds = now + _LOOK_AGAIN_SECONDS
        signature = _signature(self._sources)
        if signature == self._signature:
            return
        self._signature = signature
        try:
            self._roles = _read(self._sources)
            _logger.info("API keys were read again")
        except ConfigError as error:
            _logger.warning("API keys stay as they were: %s", error.message)


def _files(source: Path) -> list[Path]:
    """A leading dot is for what Kubernetes swaps a Secret's files with."""
    if not source.is_dir():
        return [source]
    return sorted(file for file in source.iterdir() if not file.name.startswith(".") and file.is_file())


def _signature(sources: Sequence[tuple[Path, Role]]) -> Signature | None:
    try:
        stats = [(str(file), file.stat()) for source, _ in sources for file in _files(source)]
    except OSError:
        return None
    return tuple((name, stat.st_mtime_ns, stat.st_size, stat.st_ino) for name, stat in stats)


def _read(sources: Sequence[tuple[Path, Role]]) -> dict[bytes, Role]:
    roles: dict[bytes, Role] = {}
    for source, role in sources:
        before = len(roles)
        try:
            for file in _files(source):
                for number, line in enumerate(file.read_bytes().splitlines(), start=1):
                    if line.strip() and not line.lstrip().startswith(b"#"):
                        digest, its_role = _parse(line, role, f"line {number} of {file}")
                        # The greater right holds where a key is there twice.
                        roles[digest] = "admin" if "admin" in (its_role, roles.get(digest)) else "client"
        except OSError as error:
            raise ConfigError(f"cannot read {source}: {error.strerror}", param="api_key_file") from None
        if len(roles) == before:
            raise ConfigError(f"{source} holds no API key", param="api_key_file")
    return roles


def _parse(line: bytes, role: Role, where: str) -> tuple[bytes, Role]:
    try:
        key, *rest = line.decode("ascii").split()
    except UnicodeDecodeError:
        raise ConfigError(f"{where}: a key has ASCII characters only", param="api_key_file") from None
    if rest == ["role=admin"]:
        role = "admin"
    elif rest and rest != ["role=client"]:
        raise ConfigError(
            f"{where}: after a key there may be 'role=admin' or 'role=client', and nothing else",
            param="api_key_file",
        )
    if not key.lower().startswith("sha256:"):
        return hashlib.sha256(key.encode()).digest(), role
    hashed = _HASHED.fullmatch(key)
    if hashed is None:
        raise ConfigError(f"{where}: 'sha256:' is followed by 64 hexadecimal digits", param="api_key_file")
    return bytes.fromhex(hashed[1]), role
