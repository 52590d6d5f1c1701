"""Adapters' whole answers compared with PEFT's while nobody waits: `adapterd adapters prove`, in a process of its own.

The proof holds the base once more, so it is no part of this process, and none begins that was not asked for
(`--prove-idle`). It runs at the lowest priority, begins once the engine has had no work for a while, is stopped where
it stands as soon as there is some, and goes on when there is none. Each version that a name means is proven once; where
a try gave no verdict, it is tried again later.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from adapterd.core import AdapterDigest, AdapterId, EngineStats
from adapterd.entries import AdapterEntry
from adapterd.retries import Retries

_logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.05
_LOWEST_PRIORITY = 19
_MOST_RETRIES_APART = 64.0
"""In times of the rest after the first failure: a version that fails for ever is tried about once an hour."""

Proven = Mapping[str, Any]
"""What `adapters prove` writes of one adapter (`full_proof.FullProof`), or `error` alone where it could not."""


def prove_command(base: str, dtype: str, quantization: str) -> tuple[str, ...]:
    """What proves the adapter in a folder, which is to be added with the file for the verdict: on the CPU, for the
    device is the engine's."""
    return (
        *(sys.executable, "-m", "adapterd", "adapters", "prove", "--base", base, "--device", "cpu"),
        *("--dtype", dtype, "--quantization", quantization),
    )


def current_versions(entries: Iterable[AdapterEntry]) -> list[tuple[AdapterId, Path]]:
    """What names mean now, and the folder of each."""
    return [
        (version.id, version.path)
        for entry in entries
        for version in entry.versions
        if version.number == entry.number
    ]


class _NoVerdict(Exception):
    """The process ended and has judged nothing: the system ended it, or something hindered it."""


class IdleProofs:
    """`current` gives the versions that names mean now and their folders; `stats` tells whether there is work."""

    def __init__(
        self,
        command: Sequence[str],
        current: Callable[[], Iterable[tuple[AdapterId, Path]]],
        stats: Callable[[], EngineStats],
        *,
        idle_seconds: float,
        look_seconds: float = 1.0,
        retry_seconds: float = 60.0,
        max_superseded: int = 4096,
    ) -> None:
        """`look_seconds`: between two looks, where there was nothing to prove. `retry_seconds`: the rest after a proof
        that gave no verdict, as on a full disk or where the system has ended it; the same version rests for longer
        each time. `max_superseded`: proofs that are kept of versions which no name means any more."""
        self._command = tuple(command)
        self._current = current
        self._stats = stats
        self._idle_seconds = idle_seconds
        self._look_seconds = look_seconds
        self._retry_seconds = retry_seconds
        self._max_superseded = max_superseded
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._num_steps = -1
        self._idle_since = time.monotonic()
        self._proofs: dict[AdapterDigest, Proven] = {}
        self._retries = Retries(retry_seconds, _MOST_RETRIES_APART * retry_seconds)

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="idle-proofs", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the proof that is under way. Harmless if never started."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()

    def of(self, digest: AdapterDigest) -> Proven | None:
        """What was found of a version, or why the last try found nothing; None before."""
        return self._proofs.get(digest)

    def _run(self) -> None:
        while not self._stopping.wait(_POLL_SECONDS):
            if self._seconds_idle() < self._idle_seconds:
                continue
            try:
                rest_seconds = 0.0 if self._prove_next() else self._look_seconds
            except _NoVerdict as error:
                rest_seconds = self._retry_seconds
                _logger.warning("%s; the next proof is tried in %g s", error, rest_seconds)
            except Exception:  # a full disk, say: whatever it is, the next try may do better
                rest_seconds = self._retry_seconds
                _logger.exception("an adapter could not be proven; the next try is in %g s", rest_seconds)
            self._stopping.wait(rest_seconds)

    def _prove_next(self) -> bool:
        """Prove a version that has not been; False if there is none. Raises what hinders the proof."""
        current = tuple(self._current())
        self._forget_superseded({adapter_id.digest for adapter_id, _ in current})
        due = [one for one in current if self._is_due(one[0].digest)]
        if not due:
            return False
        # What has failed comes after what has not: it may fail for ever, and nothing else would get a turn.
        adapter_id, folder = min(due, key=lambda one: self._retries.num_failures(one[0].digest))
        try:
            self._prove(adapter_id, folder)
        except Exception as error:
            self._retries.failed(adapter_id.digest)
            self._proofs[adapter_id.digest] = {"error": f"{error}; it will be tried again"}
            raise
        self._retries.forget(adapter_id.digest)
        return True

    def _is_due(self, digest: AdapterDigest) -> bool:
        if self._retries.num_failures(digest):
            return not self._retries.is_resting(digest)
        return digest not in self._proofs

    def _forget_superseded(self, current: Set[AdapterDigest]) -> None:
        """Down to the bound, the oldest first. What names mean is no part of it: it would be proven again."""
        superseded = [digest for digest in self._proofs if digest not in current]
        for digest in superseded[: max(0, len(superseded) - self._max_superseded)]:
            del self._proofs[digest]
        self._retries.forget_others(self._proofs.keys())

    def _seconds_idle(self) -> float:
        """How long there has been no work; a step since the last look counts as work."""
        stats, now = self._stats(), time.monotonic()
        if stats.num_running or stats.num_waiting or stats.num_steps != self._num_steps:
            self._idle_since = now
        self._num_steps = stats.num_steps
        return now - self._idle_since

    def _prove(self, adapter_id: AdapterId, folder: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="adapterd-proof-") as scratch:
            verdict, log = Path(scratch) / "verdict.json", Path(scratch) / "log"
            with log.open("wb") as output:
                process = subprocess.Popen(
                    [*self._command, "--adapters", str(folder), "--json-out", str(verdict)],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=_environment(),
                    # A group of its own in our session: should we die while it is stopped, the system ends it.
                    process_group=0,
                )
            try:
                os.setpriority(os.PRIO_PROCESS, process.pid, _LOWEST_PRIORITY)
                has_ended = self._wait(process)
            finally:
                process.kill()
                process.wait()
            if has_ended:
                self._proofs[adapter_id.digest] = _read(adapter_id, process.returncode, verdict, log)

    def _wait(self, process: "subprocess.Popen[bytes]") -> bool:
        """Let it run while there is no work, until it has ended; False where we are to stop first."""
        is_stopped = False
        while process.poll() is None:
            if self._stopping.wait(_POLL_SECONDS):
                return False
            is_busy = self._seconds_idle() < self._idle_seconds
            if is_busy != is_stopped:
                process.send_signal(signal.SIGSTOP if is_busy else signal.SIGCONT)
                is_stopped = is_busy
        return True


def _environment() -> dict[str, str]:
    """Ours without the settings of `serve`, which are none of the proof's, and without a device."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ADAPTERD_")}
    return {**kept, "CUDA_VISIBLE_DEVICES": ""}


def _read(adapter_id: AdapterId, status: int, verdict: Path, log: Path) -> Proven:
    """What the process wrote before it ended with `status`. Raises _NoVerdict."""
    about = f"adapter {adapter_id.name} ({adapter_id.digest[:12]})"
    try:
        (proof,) = json.loads(verdict.read_text())
    except (OSError, ValueError):
        raise _NoVerdict(f"the proof of {about} {_how_it_ended(status, log)}") from None
    if "error" in proof:
        _logger.warning("%s could not be proven: %s", about, proof["error"])
        return {"error": proof["error"]}
    if proof["digest"] != adapter_id.digest:
        return {"error": f"its folder holds {proof['digest'][:12]} by now"}
    level = logging.WARNING if proof["verdict"] == "refused" else logging.INFO
    _logger.log(level, "%s: whole answers are %s", about, proof["verdict"])
    return {key: value for key, value in proof.items() if key != "adapter"}


def _how_it_ended(status: int, log: Path) -> str:
    if status < 0:
        return f"was ended by signal {-status} ({signal.strsignal(-status)}); perhaps memory was short"
    last_line = log.read_text(errors="replace").strip().rpartition("\n")[2]
    return f"ended with status {status} and no verdict: {last_line}"
