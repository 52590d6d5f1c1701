"""SIGTERM to a command that still loads: it ends at once, as process 1 of a container no less than elsewhere."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

CONTAINER = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child")
"""Makes what it starts process 1 of a namespace of its own, which is what the kernel goes by."""

START_SECONDS = 300.0
"""Only a command that hangs takes so long to begin, even on a machine that does much else."""
STOP_SECONDS = 20.0


def read_by_now(pipe: Path, process: "subprocess.Popen[bytes]") -> int:
    """The writing end of a pipe, once somebody reads it."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # nobody reads it yet
            assert process.poll() is None, "it left before it had read anything"
            assert time.monotonic() < deadline, "it does not begin to load"
            time.sleep(0.05)


def status_after_sigterm(prefix: Sequence[str], arguments: Sequence[str], pipe: Path) -> int:
    """How a command leaves that gets the signal while it waits for what is in `pipe`."""
    os.mkfifo(pipe)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ADAPTERD_")}
    process = subprocess.Popen([*prefix, sys.executable, "-m", "adapterd", *arguments], env=environment)
    try:
        writing = read_by_now(pipe, process)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[0]) if prefix else process.pid, signal.SIGTERM)
        status = process.wait(STOP_SECONDS)
        os.close(writing)
        return status
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("command", ["serve", "pull"])
def test_a_container_that_loads_stops_at_sigterm(command: str, tmp_path: Path) -> None:
    may_make_one = shutil.which("unshare") is not None and not subprocess.run([*CONTAINER, "true"]).returncode
    if not may_make_one:
        pytest.skip("this machine lets nobody make a PID namespace")
    arguments, pipe = {
        "serve": (["serve", "--port", "0", "--base", str(tmp_path)], tmp_path / "config.json"),
        "pull": (
            ["pull", "--into", str(tmp_path / "into"), "--manifest", str(tmp_path / "m")],
            tmp_path / "m",
        ),
    }[command]
    assert status_after_sigterm(CONTAINER, arguments, pipe) == 128 + signal.SIGTERM


def test_elsewhere_the_signal_itself_ends_it(tmp_path: Path) -> None:
    arguments = ["pull", "--into", str(tmp_path / "into"), "--manifest", str(tmp_path / "m")]
    assert status_after_sigterm((), arguments, tmp_path / "m") == -signal.SIGTERM
