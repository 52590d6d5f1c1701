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
_START_SECONDS = 600.0
"""Only a daemon that hangs takes so long, even on a machine that does much else; one that fails is noticed at once."""

_STOP_SECONDS = 60.0


@contextmanager
def served(*arguments: str, cwd: Path | None = None, said: list[str] | None = None) -> Iterator[str]:
    """`adapterd serve ARGUMENTS --port 0`; yields the url once it is ready, and ends it as an operator would.

    `said` gets the lines that it printed, once it has left.
    Raises AssertionError with its log if it does not start, or does not leave with exit status 0.
    """
    command = [sys.executable, "-m", "adapterd", "serve", "--port", "0", *arguments]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ADAPTERD_")}
    process = subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    log = _Log(process)
    try:
        yield log.wait_until_ready()
        process.send_signal(signal.SIGTERM)
        status = process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"adapterd did not leave at SIGTERM:\n{log.text}") from None
    finally:
        process.kill()  # harmless once it has left
        process.wait()
        log.close()
        if said is not None:
            said += log.text.splitlines()
    assert status == 0, f"adapterd left with status {status}:\n{log.text}"


class _Log:
    """What a process prints, read as it comes so that it never blocks on a full pipe."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        self._stdout = process.stdout
        self._url: str | None = None
        self._is_known = threading.Event()
        self.text = ""
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        for line in self._stdout:
            self.text += line
            if match := _READY.search(line):
                self._url = match[1]
                self._is_known.set()
        self._is_known.set()

    def wait_until_ready(self) -> str:
        self._is_known.wait(_START_SECONDS)
        assert self._url is not None, f"adapterd did not start:\n{self.text}"
        return self._url

    def close(self) -> None:
        self._thread.join()
        self._stdout.close()
