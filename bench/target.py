"""The server under load: what it is called, how it is started and stopped, and what memory it takes."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import IO, Any

import httpx
import psutil

_STOP_SECONDS = 30.0
_SAMPLE_SECONDS = 0.25


@dataclass(frozen=True)
class Target:
    """A server as bench/peers/*.toml describe it.

    name: in tables and results. url: its root. model: the base's name in the API. adapter_model: the name of an
    adapter in the API, with {model} and {adapter} filled in. adapter_field "lora": adapters are chosen by their
    number in llama.cpp's `lora` field and `model` stays the base's. extra_body: added to every request. start: a
    command for bash that runs the server until SIGTERM; $PYTHON is this interpreter. env: added to the command's
    environment. ready: the path that answers 200 once it serves. version: a command for bash that prints the server's
    version, where GET /version does not say it.
    """

    name: str = "server"
    url: str = "http://127.0.0.1:8000"
    model: str = "base"
    adapter_model: str = "{adapter}"
    adapter_field: str = "model"
    extra_body: dict[str, Any] = field(default_factory=dict)
    start: str | None = None
    ready: str = "/health"
    version: str | None = None
    env: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.adapter_field not in ("model", "lora"):
            raise ValueError(f"adapter_field {self.adapter_field!r}: allowed are 'model' and 'lora'")

    def body(self, adapter: str | None, index: int, num_adapters: int) -> dict[str, Any]:
        """What of a request says who answers; `adapter` None is the base."""
        if self.adapter_field == "lora":
            scales = [
                {"id": i, "scale": float(adapter is not None and i == index)} for i in range(num_adapters)
            ]
            return {"model": self.model, "lora": scales, **self.extra_body}
        name = self.model if adapter is None else self.adapter_model.format(model=self.model, adapter=adapter)
        return {"model": name, **self.extra_body}


def read_target(path: Path) -> Target:
    """A TOML file with the fields of Target. Raises ValueError for another key."""
    table = tomllib.loads(path.read_text())
    unknown = table.keys() - {entry.name for entry in fields(Target)}
    if unknown:
        raise ValueError(f"{path}: unknown key {', '.join(sorted(unknown))}")
    return Target(**{"name": path.stem, **table})


@dataclass(frozen=True)
class Running:
    """A server that answers. `memory` watches it from its start, or from now if it ran already.

    pid: of the process that was started, or that is watched; None if neither.
    """

    target: Target
    pid: int | None
    memory: "MemoryPeak"
    startup_seconds: float | None


@contextlib.contextmanager
def running(target: Target, timeout_seconds: float, pid: int | None = None) -> Iterator[Running]:
    """Start the target's command and wait until it is ready, or just wait; stop at the end what was started."""
    if target.start is None:
        _wait_until_ready(target, timeout_seconds, None)
        with MemoryPeak(pid) as memory:
            yield Running(target, pid, memory, None)
        return
    with _asking() as client:
        if _is_ready(target, client):
            raise RuntimeError(
                f"something already answers at {target.url}; stop it, or leave out the start command"
            )
    command = ["bash", "-c", f"exec {target.start}"]
    with tempfile.TemporaryFile() as log:
        began = time.perf_counter()
        process = subprocess.Popen(
            command,
            env=_environment(target),
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # so that its whole process group can be ended, and nothing else
        )
        try:
            with MemoryPeak(process.pid) as memory:
                try:
                    _wait_until_ready(target, timeout_seconds, process)
                except RuntimeError as error:
                    raise RuntimeError(f"{error}\n{shlex.join(command)}\n{_tail(log)}") from None
                yield Running(target, process.pid, memory, time.perf_counter() - began)
        finally:
            _stop(process)


def _environment(target: Target) -> dict[str, str]:
    return {**os.environ, "PYTHON": sys.executable, **target.env}


def _is_ready(target: Target, client: httpx.Client) -> bool:
    try:
        return client.get(target.url + target.ready).status_code == 200
    except httpx.HTTPError:
        return False


def _asking() -> httpx.Client:
    """To ask ten times a second with: a client reads the system's certificates, which takes 40 ms of a processor."""
    return httpx.Client(timeout=2.0)


def server_version(target: Target) -> str | None:
    """What its description's command prints, else what GET /version says (adapterd, vLLM); None if nobody says it."""
    if target.version is not None:
        command = ["bash", "-c", target.version]
        asked = subprocess.run(command, env=_environment(target), capture_output=True, text=True, check=False)
        return (asked.stdout.strip() or None) if asked.returncode == 0 else None
    try:
        answer = httpx.get(target.url + "/version", timeout=5.0).json()
    except (httpx.HTTPError, ValueError):
        return None
    found = answer.get("version") if isinstance(answer, dict) else None
    return None if found is None else str(found)


def _wait_until_ready(
    target: Target, timeout_seconds: float, process: "subprocess.Popen[bytes] | None"
) -> None:
    deadline = time.perf_counter() + timeout_seconds
    with _asking() as client:
        while not _is_ready(target, client):
            if process is not None and process.poll() is not None:
                raise RuntimeError(f"{target.name} left with status {process.returncode} before it was ready")
            if time.perf_counter() > deadline:
                raise RuntimeError(
                    f"{target.url}{target.ready} did not answer 200 within {timeout_seconds:g} s"
                )
            time.sleep(0.1)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """End the server as an operator would; then whatever of its process group is left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(_STOP_SECONDS)


def _tail(log: IO[bytes], num_bytes: int = 4000) -> str:
    log.seek(0, os.SEEK_END)
    log.seek(max(log.tell() - num_bytes, 0))
    return log.read().decode(errors="replace")


class MemoryPeak:
    """The highest sum of resident bytes over a process and its children, sampled in a thread while entered.

    Pages that several processes share count once for each, so a server of many processes is shown at its worst.
    """

    def __init__(self, pid: int | None) -> None:
        self._pid = pid
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.peak_rss_bytes: int | None = None

    def __enter__(self) -> "MemoryPeak":
        if self._pid is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._pid is not None:
            self._thread.join()

    def _sample(self) -> None:
        while not self._done.wait(_SAMPLE_SECONDS):
            now = resident_bytes(self._pid or 0)
            self.peak_rss_bytes = max(self.peak_rss_bytes or 0, now)


def resident_bytes(pid: int) -> int:
    """Of a process and all its children; those that end meanwhile count nothing."""
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
    return total
