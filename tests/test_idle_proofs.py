"""Proofs run while there is no work, stand still while there is some, and end with the daemon."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest

from adapterd.core import AdapterDigest, AdapterId
from adapterd.idle_proofs import IdleProofs
from tests.adapters_on_disk import until
from tests.serving import served

A, B, C = (AdapterId(AdapterDigest(letter * 64), letter) for letter in "abc")

PROVER = """
import json, os, sys, time
folder, out = sys.argv[2], sys.argv[4]
name = os.path.basename(folder)
open(folder + ".pid", "w").write(str(os.getpid()))
while not os.path.exists(folder + ".go"):
    time.sleep(0.01)
if any(variable.startswith("ADAPTERD_") for variable in os.environ):
    sys.exit("there is a setting of serve's")
if name == "broken":
    json.dump([{"adapter": name, "error": "no adapter there"}], open(out, "w"))
    sys.exit(1)
if not os.path.exists(folder + ".can"):
    if name == "a-killed":
        os.kill(os.getpid(), 9)
    if name == "a-unwritten":
        open(out, "w").write("[{")
        sys.exit("No space left on device")
json.dump([{"adapter": name, "digest": name[0] * 64, "verdict": "exact"}], open(out, "w"))
"""


class Work:
    """An engine's stats, of a given number of running sequences."""

    def __init__(self) -> None:
        self.num_running = 0
        self.num_steps = 0

    def stats(self) -> Any:
        return SimpleNamespace(
            num_running=self.num_running, num_waiting=0, num_steps=self.num_steps + self.num_running
        )


@pytest.fixture
def work() -> Work:
    return Work()


@pytest.fixture
def looks() -> list[None]:
    """One for each look for a version that is to be proven; the proof of one ends before the next look."""
    return []


@pytest.fixture
def make(
    work: Work, looks: list[None], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., IdleProofs]]:
    made: list[IdleProofs] = []
    monkeypatch.setenv("ADAPTERD_PORT", "8000")

    def build(
        *named: tuple[AdapterId, Path],
        current: Sequence[tuple[AdapterId, Path]] | None = None,
        command: Sequence[str] = (sys.executable, "-c", PROVER),
        **settings: Any,
    ) -> IdleProofs:
        """`current`, rather than `named`, where it is to change later."""
        now = named if current is None else current

        def look() -> Sequence[tuple[AdapterId, Path]]:
            looks.append(None)
            return now

        proofs = IdleProofs(command, look, work.stats, idle_seconds=0.2, look_seconds=0.05, **settings)
        made.append(proofs)
        proofs.start()
        return proofs

    yield build
    for proofs in made:
        proofs.stop()


def error_of(proofs: IdleProofs, adapter_id: AdapterId) -> str:
    found = proofs.of(adapter_id.digest)
    assert found is not None
    return str(found["error"])


def process_of(folder: Path) -> psutil.Process:
    file = folder.with_name(folder.name + ".pid")
    until(lambda: file.exists() and bool(file.read_text()))
    return psutil.Process(int(file.read_text()))


def look_again(looks: list[None]) -> None:
    """Wait for a whole look that begins from now on, and what it proves."""
    before = len(looks)
    until(lambda: len(looks) >= before + 2)


def let_go(folder: Path) -> None:
    folder.with_name(folder.name + ".go").touch()


def test_each_version_is_proven_once_at_the_lowest_priority(
    make: Callable[..., IdleProofs], looks: list[None], tmp_path: Path
) -> None:
    proofs = make((A, tmp_path / "a"), (B, tmp_path / "b"))
    assert process_of(tmp_path / "a").nice() == 19
    assert proofs.of(A.digest) is None
    let_go(tmp_path / "a")
    let_go(tmp_path / "b")
    until(lambda: proofs.of(B.digest) is not None)
    assert proofs.of(A.digest) == {"digest": A.digest, "verdict": "exact"}
    first = (tmp_path / "a.pid").read_text()
    look_again(looks)
    assert (tmp_path / "a.pid").read_text() == first


def test_nothing_begins_while_there_is_work_and_what_runs_stands_still(
    make: Callable[..., IdleProofs], work: Work, tmp_path: Path
) -> None:
    work.num_running = 1
    proofs = make((A, tmp_path / "a"))
    time.sleep(0.5)
    assert not (tmp_path / "a.pid").exists()
    work.num_running = 0
    process = process_of(tmp_path / "a")
    work.num_running = 1
    until(lambda: process.status() == psutil.STATUS_STOPPED)
    let_go(tmp_path / "a")
    time.sleep(0.5)
    assert proofs.of(A.digest) is None
    work.num_running = 0
    until(lambda: proofs.of(A.digest) is not None)


def test_a_step_between_two_looks_is_work(
    make: Callable[..., IdleProofs], work: Work, tmp_path: Path
) -> None:
    make((A, tmp_path / "a"))
    process = process_of(tmp_path / "a")
    work.num_steps += 1
    until(lambda: process.status() == psutil.STATUS_STOPPED)
    until(lambda: process.status() != psutil.STATUS_STOPPED)


def test_a_proof_ends_with_the_daemon_even_where_it_is_stopped(
    make: Callable[..., IdleProofs], work: Work, tmp_path: Path
) -> None:
    proofs = make((A, tmp_path / "a"))
    process = process_of(tmp_path / "a")
    work.num_running = 1
    until(lambda: process.status() == psutil.STATUS_STOPPED)
    proofs.stop()
    assert not process.is_running()
    assert proofs.of(A.digest) is None


def test_what_cannot_be_proven_or_has_changed_is_said_and_not_tried_again(
    make: Callable[..., IdleProofs], tmp_path: Path
) -> None:
    for name in ("broken", "changed"):
        let_go(tmp_path / name)
    proofs = make((A, tmp_path / "broken"), (B, tmp_path / "changed"))
    until(lambda: proofs.of(B.digest) is not None)
    assert proofs.of(A.digest) == {"error": "no adapter there"}
    assert proofs.of(B.digest) == {"error": f"its folder holds {'c' * 12} by now"}


def test_what_hinders_one_try_does_not_end_the_tries(
    make: Callable[..., IdleProofs], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    let_go(tmp_path / "a")
    prover = tmp_path / "prover"  # is not there at first, which is an OSError as a full disk is
    proofs = make((A, tmp_path / "a"), command=(str(prover), "-c", PROVER), retry_seconds=0.05)
    until(lambda: caplog.text.count("FileNotFoundError") >= 2)
    assert "it will be tried again" in error_of(proofs, A)
    prover.symlink_to(sys.executable)
    until(lambda: proofs.of(A.digest) == {"digest": A.digest, "verdict": "exact"})


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a-killed", "was ended by signal 9 (Killed)"),
        ("a-unwritten", "ended with status 1 and no verdict: No space left on device"),
    ],
)
def test_a_process_that_ends_without_a_verdict_is_begun_again_after_the_others(
    name: str,
    reason: str,
    make: Callable[..., IdleProofs],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for folder in (name, "b"):
        let_go(tmp_path / folder)
    proofs = make((A, tmp_path / name), (B, tmp_path / "b"), retry_seconds=0.05)
    until(lambda: proofs.of(B.digest) == {"digest": B.digest, "verdict": "exact"})
    assert reason in error_of(proofs, A)
    until(lambda: caplog.text.count(reason) >= 2)
    (tmp_path / f"{name}.can").touch()
    until(lambda: proofs.of(A.digest) == {"digest": A.digest, "verdict": "exact"})


def test_what_fails_each_time_keeps_nothing_else_from_its_turn(
    make: Callable[..., IdleProofs], tmp_path: Path
) -> None:
    """Although it comes first, and no rest is left when the next is chosen."""
    for folder in ("a-killed", "b", "c"):
        let_go(tmp_path / folder)
    proofs = make((A, tmp_path / "a-killed"), (B, tmp_path / "b"), (C, tmp_path / "c"), retry_seconds=0.0)
    until(lambda: proofs.of(C.digest) is not None)
    assert "signal 9" in error_of(proofs, A)


def test_what_failed_and_is_meant_again_is_tried_again(
    make: Callable[..., IdleProofs], tmp_path: Path
) -> None:
    for folder in ("a-killed", "b"):
        let_go(tmp_path / folder)
    current = [(A, tmp_path / "a-killed")]
    proofs = make(current=current, retry_seconds=0.05)
    until(lambda: proofs.of(A.digest) is not None)
    current[:] = [(B, tmp_path / "b")]
    until(lambda: proofs.of(B.digest) is not None)
    (tmp_path / "a-killed.can").touch()
    current[:] = [(A, tmp_path / "a-killed")]
    until(lambda: proofs.of(A.digest) == {"digest": A.digest, "verdict": "exact"})


def test_what_names_mean_is_proven_once_however_little_is_kept_and_what_they_meant_is_forgotten(
    make: Callable[..., IdleProofs], looks: list[None], tmp_path: Path
) -> None:
    for name in "abc":
        let_go(tmp_path / name)
    current = [(A, tmp_path / "a"), (B, tmp_path / "b")]
    proofs = make(current=current, max_superseded=1)
    until(lambda: proofs.of(B.digest) is not None)
    (tmp_path / "a.pid").unlink()
    (tmp_path / "b.pid").unlink()
    look_again(looks)
    assert proofs.of(A.digest) is not None
    current[:] = [(C, tmp_path / "c")]
    until(lambda: proofs.of(C.digest) is not None)
    until(lambda: proofs.of(A.digest) is None)
    assert proofs.of(B.digest) is not None
    assert sorted(path.name for path in tmp_path.glob("*.pid")) == ["c.pid"]


def test_the_daemon_proves_its_adapters_and_their_cards_say_so() -> None:
    support = Path(__file__).resolve().parent.parent / "adapters" / "support"
    with served("--adapters", str(support), "--prove-idle", "1") as url:
        card: dict[str, Any] = {}

        def is_proven() -> bool:
            card.update(httpx.get(f"{url}/v1/adapters/support", timeout=30).json())
            return card["full_proof"] is not None

        deadline = time.monotonic() + 300
        while not is_proven():
            assert time.monotonic() < deadline, "it was never proven"
            time.sleep(0.5)
    proof = card["full_proof"]
    assert proof is not None, json.dumps(card)
    assert (proof["verdict"], proof["digest"]) == ("exact", card["digest"])
