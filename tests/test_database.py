"""What survives: a restart, a change of base, and death in the middle of a write."""

import json
import resource
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest

from adapterd.core import AdapterDigest, AdapterId
from adapterd.database import FILE, Database
from adapterd.errors import ConfigError
from adapterd.names import NameRecord, Version
from adapterd.proof import Proof
from adapterd.watch import Signature

SIGNATURE = Signature(
    Path("/adapters/.v/1"), (("adapter_config.json", 1, 2, 3, 4), ("adapterd.json", 5, 6, 7, 8))
)


def version(number: int, name: str = "a") -> Version:
    digest = AdapterDigest(f"{number:064x}")
    return Version(number, AdapterId(digest, name), Path(f"/adapters/.v/{number}"), 128, 2, ("q_proj",), 1.5)


RECORD = NameRecord(
    name="a",
    owner="folder",
    path=Path("/adapters/a"),
    root=Path("/adapters"),
    signature=SIGNATURE,
    versions=MappingProxyType({1: version(1), 4: version(4)}),
    next_number=5,
    current=4,
    previous=1,
    aliases=MappingProxyType({"stable": 1}),
    is_pinned=True,
    loaded_at=2.5,
)


def reopened(directory: Path, **arguments: str) -> list[NameRecord]:
    database = Database(directory, **arguments)
    records = database.load()
    database.close()
    return records


def save(directory: Path, *records: NameRecord, **arguments: str) -> None:
    database = Database(directory, **arguments)
    for record in records:
        database.save(record)
    database.close()


def test_a_record_comes_back_whole(tmp_path: Path) -> None:
    save(tmp_path / "state", RECORD, NameRecord("b", owner="runtime", error="bad"))
    assert reopened(tmp_path / "state") == [RECORD, NameRecord("b", owner="runtime", error="bad")]


def test_what_the_manifest_a_download_and_a_proof_left_comes_back(tmp_path: Path) -> None:
    proof = Proof("within bound", 1e-3, 48, True, 0.01)
    downloaded = replace(
        version(1), source="hf://acme/a@4f1c", base_model="mini", base_match="fingerprint", proof=proof
    )
    record = replace(
        RECORD,
        owner="manifest",
        source="hf://acme/a",
        sha256='{"adapter_model.safetensors": "00"}',
        declared="[]",
        versions=MappingProxyType({1: downloaded, 4: version(4)}),
    )
    save(tmp_path, record)
    assert reopened(tmp_path) == [record]


_FORMAT_1 = """
CREATE TABLE base (fingerprint TEXT);
CREATE TABLE name (
    name TEXT PRIMARY KEY, owner TEXT, path TEXT, root TEXT, signature TEXT, next_number INTEGER NOT NULL,
    current INTEGER, previous INTEGER, is_pinned INTEGER NOT NULL, loaded_at REAL, error TEXT
) WITHOUT ROWID;
CREATE TABLE version (
    name TEXT NOT NULL REFERENCES name ON DELETE CASCADE, number INTEGER NOT NULL, digest TEXT NOT NULL,
    path TEXT NOT NULL, num_bytes INTEGER NOT NULL, rank INTEGER NOT NULL, targets TEXT NOT NULL,
    first_loaded_at REAL NOT NULL, PRIMARY KEY (name, number), UNIQUE (name, digest)
) WITHOUT ROWID;
CREATE TABLE alias (
    name TEXT NOT NULL, alias TEXT NOT NULL, number INTEGER NOT NULL, PRIMARY KEY (name, alias),
    FOREIGN KEY (name, number) REFERENCES version ON DELETE CASCADE
) WITHOUT ROWID;
INSERT INTO base VALUES (NULL);
INSERT INTO name VALUES ('a', 'runtime', '/adapters/a', '/adapters', NULL, 2, 1, NULL, 0, 2.5, NULL);
INSERT INTO version VALUES ('a', 1, 'DIGEST', '/adapters/.v/1', 128, 2, '["q_proj"]', 1.5);
INSERT INTO alias VALUES ('a', 'stable', 1);
PRAGMA user_version = 1;
"""


_TO_FORMAT_2 = """
ALTER TABLE name ADD COLUMN source TEXT;
ALTER TABLE name ADD COLUMN sha256 TEXT;
ALTER TABLE name ADD COLUMN declared TEXT;
ALTER TABLE version ADD COLUMN source TEXT;
ALTER TABLE version ADD COLUMN base_model TEXT;
ALTER TABLE version ADD COLUMN base_match TEXT NOT NULL DEFAULT 'shapes';
PRAGMA user_version = 2;
"""


@pytest.mark.parametrize("later", ["", _TO_FORMAT_2])
def test_a_file_of_a_format_before_is_taken_over(tmp_path: Path, later: str) -> None:
    connection = sqlite3.connect(tmp_path / FILE)
    connection.executescript(_FORMAT_1.replace("DIGEST", version(1).id.digest) + later)
    connection.close()
    known = replace(
        NameRecord(
            "a", owner="runtime", path=Path("/adapters/a"), root=Path("/adapters"), next_number=2, current=1
        ),
        versions=MappingProxyType({1: version(1)}),
        aliases=MappingProxyType({"stable": 1}),
        loaded_at=2.5,
    )
    assert reopened(tmp_path) == [known]
    save(tmp_path, RECORD)
    assert reopened(tmp_path) == [RECORD]


def test_saving_again_replaces(tmp_path: Path) -> None:
    moved = replace(
        RECORD, current=1, aliases=MappingProxyType({}), versions=MappingProxyType({1: version(1)})
    )
    save(tmp_path, RECORD, moved)
    assert reopened(tmp_path) == [moved]


def test_another_base_makes_every_folder_be_looked_at_again(tmp_path: Path) -> None:
    save(tmp_path, RECORD, base_fingerprint="one")
    assert reopened(tmp_path, base_fingerprint="one") == [RECORD]
    assert reopened(tmp_path, base_fingerprint="two") == [replace(RECORD, signature=None)]


def test_an_alias_of_nothing_is_refused_and_leaves_what_was(tmp_path: Path) -> None:
    database = Database(tmp_path)
    database.save(RECORD)
    with pytest.raises(sqlite3.IntegrityError):
        database.save(replace(RECORD, aliases=MappingProxyType({"stable": 9})))
    assert database.load() == [RECORD]
    database.close()


def test_a_second_daemon_is_refused(tmp_path: Path) -> None:
    first = Database(tmp_path)
    with pytest.raises(ConfigError, match="is another adapterd using it"):
        Database(tmp_path)
    first.close()
    Database(tmp_path).close()


@pytest.mark.parametrize("content", [b"no database at all, whatever its name says" * 10, None])
def test_a_file_that_is_none_of_ours_is_a_config_error(tmp_path: Path, content: bytes | None) -> None:
    if content is None:
        connection = sqlite3.connect(tmp_path / FILE)
        connection.execute("PRAGMA user_version = 99")
        connection.close()
    else:
        (tmp_path / FILE).write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be opened"):
        Database(tmp_path)


STORM = """
import json, os, signal, sys, time
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from adapterd.database import Database
from tests.test_database import RECORD, version

def write_for_ever(database):
    number = max((record.next_number for record in database.load()), default=1)
    while True:
        versions = MappingProxyType({n: version(n) for n in range(max(1, number - 9), number + 1)})
        aliases = MappingProxyType({"stable": number, "before": max(1, number - 1)})
        database.save(replace(
            RECORD, versions=versions, current=number, previous=None, aliases=aliases, next_number=number + 1
        ))
        number += 1

for turn in range(40):
    writer = os.fork()
    if writer == 0:
        write_for_ever(Database(Path(sys.argv[1])))
    time.sleep(0.02 + 0.0017 * turn)
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    database = Database(Path(sys.argv[1]))
    for record in database.load():
        newest, versions = record.current, record.versions
        print(json.dumps([
            newest, record.next_number - 1, dict(record.aliases), sorted(versions), versions[newest] == version(newest)
        ]))
    database.close()
"""


def test_killed_in_the_middle_of_a_write_it_opens_whole(tmp_path: Path) -> None:
    """Forty writers, each killed at another moment. A record says in three tables how far it got: a torn
    write would make them disagree, and a lost one would make the count go back."""
    done = subprocess.run(
        [sys.executable, "-c", STORM, str(tmp_path)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    seen = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(seen) > 30
    for current, counted, aliases, versions, is_right in seen:
        assert current == counted == aliases["stable"] == versions[-1]
        assert aliases["before"] == max(1, current - 1)
        assert is_right
    counts = [current for current, *_ in seen]
    assert counts == sorted(counts)
    assert counts[-1] > len(seen)


def test_a_full_disk_leaves_what_was_and_is_no_end(tmp_path: Path) -> None:
    """A record larger than SQLite's cache is written before the commit, where SQLite ends the transaction itself."""
    database = Database(tmp_path)
    database.save(RECORD)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (1 << 20, hard)
    )  # the nearest to a full disk that needs no disk
    try:
        with pytest.raises(sqlite3.OperationalError, match="disk"):
            database.save(replace(RECORD, error="x" * (8 << 20)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert database.load() == [RECORD]
    database.save(replace(RECORD, error="another"))
    database.close()
    assert reopened(tmp_path) == [replace(RECORD, error="another")]
