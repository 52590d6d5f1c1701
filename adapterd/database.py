"""What the registry knows, kept over a restart: names, versions, counters, aliases, pins, folder signatures.

One SQLite file, written by one process. Each record is replaced whole in one transaction, so a process that is
killed at any moment leaves every name as it was before or after, never between. No weights are kept here.
"""

import json
import sqlite3
import threading
import weakref
from collections.abc import Iterable
from pathlib import Path
from types import MappingProxyType
from typing import get_args

from adapterd.core import AdapterDigest, AdapterId
from adapterd.errors import ConfigError
from adapterd.names import NameRecord, Owner, Version
from adapterd.proof import Proof
from adapterd.watch import Signature

FILE = "registry.sqlite3"
_FORMAT = 3
_TABLES = """
CREATE TABLE base (fingerprint TEXT);
CREATE TABLE name (
    name TEXT PRIMARY KEY, owner TEXT, path TEXT, root TEXT, signature TEXT, next_number INTEGER NOT NULL,
    current INTEGER, previous INTEGER, is_pinned INTEGER NOT NULL, loaded_at REAL, error TEXT,
    source TEXT, sha256 TEXT, declared TEXT
) WITHOUT ROWID;
CREATE TABLE version (
    name TEXT NOT NULL REFERENCES name ON DELETE CASCADE, number INTEGER NOT NULL, digest TEXT NOT NULL,
    path TEXT NOT NULL, num_bytes INTEGER NOT NULL, rank INTEGER NOT NULL, targets TEXT NOT NULL,
    first_loaded_at REAL NOT NULL, source TEXT, base_model TEXT, base_match TEXT NOT NULL DEFAULT 'shapes',
    proof TEXT,
    PRIMARY KEY (name, number), UNIQUE (name, digest)
) WITHOUT ROWID;
CREATE TABLE alias (
    name TEXT NOT NULL, alias TEXT NOT NULL, number INTEGER NOT NULL, PRIMARY KEY (name, alias),
    FOREIGN KEY (name, number) REFERENCES version ON DELETE CASCADE
) WITHOUT ROWID;
"""

_FROM_FORMAT_1 = """
ALTER TABLE name ADD COLUMN source TEXT;
ALTER TABLE name ADD COLUMN sha256 TEXT;
ALTER TABLE name ADD COLUMN declared TEXT;
ALTER TABLE version ADD COLUMN source TEXT;
ALTER TABLE version ADD COLUMN base_model TEXT;
ALTER TABLE version ADD COLUMN base_match TEXT NOT NULL DEFAULT 'shapes';
"""
_FROM_FORMAT_2 = "ALTER TABLE version ADD COLUMN proof TEXT;"


class Database:
    """`directory` None keeps nothing beyond the process. Every method may be called from any thread."""

    def __init__(self, directory: Path | None, *, base_fingerprint: str | None = None) -> None:
        """Raises ConfigError if the file cannot be used: unreadable, another format, another daemon's."""
        self._lock = threading.Lock()
        self._where = ":memory:"
        try:
            if directory is not None:
                directory.mkdir(parents=True, exist_ok=True)
                self._where = str(directory / FILE)
            # Autocommit: `with self._connection` alone would not begin a transaction where we want one.
            self._connection = sqlite3.connect(
                self._where, timeout=1.0, isolation_level=None, check_same_thread=False
            )
            # Also where a start is given up half-way and nobody is there to close it.
            self._close = weakref.finalize(self, self._connection.close)
            self._open(base_fingerprint)
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(
                f"the registry in {directory} cannot be opened: {error}; is another adapterd using it?"
                " Each needs a --state directory of its own",
                param="state",
            ) from error

    def load(self) -> list[NameRecord]:
        """Every name, as it was saved last."""
        with self._lock:
            versions: dict[str, dict[int, Version]] = {}
            for (
                name,
                number,
                digest,
                path,
                num_bytes,
                rank,
                targets,
                first,
                source,
                model,
                match,
                proof,
            ) in self._connection.execute(
                "SELECT name, number, digest, path, num_bytes, rank, targets, first_loaded_at, source,"
                " base_model, base_match, proof FROM version"
            ):
                versions.setdefault(name, {})[number] = Version(
                    number,
                    AdapterId(AdapterDigest(digest), name),
                    Path(path),
                    num_bytes,
                    rank,
                    tuple(json.loads(targets)),
                    first,
                    source,
                    model,
                    "fingerprint" if match == "fingerprint" else "shapes",
                    None if proof is None else Proof(**json.loads(proof)),
                )
            aliases: dict[str, dict[str, int]] = {}
            for name, alias, number in self._connection.execute("SELECT name, alias, number FROM alias"):
                aliases.setdefault(name, {})[alias] = number
            rows = self._connection.execute(
                "SELECT name, owner, path, root, signature, next_number, current, previous, is_pinned,"
                " loaded_at, error, source, sha256, declared FROM name"
            )
            return [
                NameRecord(
                    name=name,
                    owner=_owner(owner),
                    path=None if path is None else Path(path),
                    root=None if root is None else Path(root),
                    signature=_signature_from(signature),
                    versions=MappingProxyType(versions.get(name, {})),
                    next_number=next_number,
                    current=current,
                    previous=previous,
                    aliases=MappingProxyType(aliases.get(name, {})),
                    is_pinned=bool(is_pinned),
                    loaded_at=loaded_at,
                    error=error,
                    source=source,
                    sha256=sha256,
                    declared=declared,
                )
                for name, owner, path, root, signature, next_number, current, previous, is_pinned, *rest in rows
                for loaded_at, error, source, sha256, declared in [rest]
            ]

    def save(self, record: NameRecord) -> None:
        """Replace what is known of a name, in one transaction.

        Raises sqlite3.Error, as for a full disk; then nothing has changed.
        """
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                self._replace(record)
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:  # where a disk is full SQLite has ended it by itself
                    self._connection.execute("ROLLBACK")
                raise

    def close(self) -> None:
        """Nothing can be saved afterwards. Closing twice is harmless."""
        with self._lock:
            self._close()

    def _open(self, base_fingerprint: str | None) -> None:
        execute = self._connection.execute
        # Exclusive: a second daemon on the same file is refused at its start, not at its first write.
        execute("PRAGMA locking_mode = EXCLUSIVE")
        execute("PRAGMA journal_mode = WAL")
        # A commit survives the death of the process; a power cut may cost the last ones, never the whole.
        execute("PRAGMA synchronous = NORMAL")
        execute("PRAGMA foreign_keys = ON")
        (version,) = execute("PRAGMA user_version").fetchone()
        if not 0 <= version <= _FORMAT:
            raise sqlite3.DatabaseError(f"its format is {version}, and this adapterd reads 1 to {_FORMAT}")
        changes = {0: _TABLES, 1: _FROM_FORMAT_1 + _FROM_FORMAT_2, 2: _FROM_FORMAT_2}.get(version)
        if changes is not None:
            self._connection.executescript(f"BEGIN;{changes}PRAGMA user_version = {_FORMAT};COMMIT;")
        execute("BEGIN IMMEDIATE")
        known = execute("SELECT fingerprint FROM base").fetchone()
        if known is None or known[0] != base_fingerprint:
            # What was checked against another base has to be read and checked again.
            execute("UPDATE name SET signature = NULL")
            execute("DELETE FROM base")
            execute("INSERT INTO base VALUES (?)", (base_fingerprint,))
        execute("COMMIT")

    def _replace(self, record: NameRecord) -> None:
        execute = self._connection.execute
        execute("DELETE FROM name WHERE name = ?", (record.name,))
        execute(
            "INSERT INTO name VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                record.name,
                record.owner,
                None if record.path is None else str(record.path),
                None if record.root is None else str(record.root),
                _signature_text(record.signature),
                record.next_number,
                record.current,
                record.previous,
                record.is_pinned,
                record.loaded_at,
                record.error,
                record.source,
                record.sha256,
                record.declared,
            ),
        )
        self._connection.executemany(
            "INSERT INTO version VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            _version_rows(record.versions.values()),
        )
        self._connection.executemany(
            "INSERT INTO alias VALUES (?, ?, ?)",
            [(record.name, alias, number) for alias, number in record.aliases.items()],
        )


def _version_rows(versions: Iterable[Version]) -> list[tuple[object, ...]]:
    return [
        (
            version.id.name,
            version.number,
            version.id.digest,
            str(version.path),
            version.num_bytes,
            version.rank,
            json.dumps(version.targets),
            version.first_loaded_at,
            version.source,
            version.base_model,
            version.base_match,
            None if version.proof is None else json.dumps(vars(version.proof)),
        )
        for version in versions
    ]


def _owner(text: str | None) -> Owner | None:
    known: tuple[Owner, ...] = get_args(Owner)
    return next((owner for owner in known if owner == text), None)


def _signature_text(signature: Signature | None) -> str | None:
    return None if signature is None else json.dumps([str(signature.real_path), signature.files])


def _signature_from(text: str | None) -> Signature | None:
    if text is None:
        return None
    real_path, files = json.loads(text)
    return Signature(Path(real_path), tuple((str(name), *numbers) for name, *numbers in files))
