"""The real daemon in a process of its own, as a person starts it, on a port that the system picks."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_READY = re.compile(r"adapterd is ready on (http://\S+)")
_START_SECONDS = 120.0
_STOP_SECONDS = 60.0


@contextmanager
def served(*arguments: str, cwd: Path | None = None) -> Iterator[str]:
    """`adapterd serve ARGUMENTS --port 0`; yields the url once it is ready, and ends it as an operator would.

    Raises AssertionError with its log if it does not start, or does not leave with exit status 0.
    """
    command = [sys.executable, "-m", "adapterd", "serve", "--port", "0", *arguments]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ADAPTERD_")}
    process = subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines: list[str] = []
    url = _wait_until_ready(process, lines)
    try:
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            status = process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            raise AssertionError("adapterd did not leave at SIGTERM:\n" + "".join(lines)) from None
    assert status == 0, f"adapterd left with status {status}:\n" + "".join(lines)


def _wait_until_ready(process: "subprocess.Popen[str]", lines: list[str]) -> str:
    assert process.stdout is not None
    found: list[str] = []
    ready = threading.Event()

    def read() -> None:
        for line in process.stdout or ():
            lines.append(line)
            if match := _READY.search(line):
                found.append(match[1])
                ready.set()
        ready.set()

    threading.Thread(target=read, daemon=True).start()
    ready.wait(_START_SECONDS)
    if not found:
        process.kill()
        raise AssertionError("adapterd did not start:\n" + "".join(lines))
    return found[0]
