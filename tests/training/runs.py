"""What the tests of training train on, and what they read of a run."""

import csv
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapterd.cli import EXIT_STOPPED
from adapterd.config import TrainSettings
from adapterd.training.history import METRICS_FILE

WORDS = ["parcel", "money", "order", "today", "please", "fine", "charged", "back"]
LABELS = ["Shipping", "Refund", "Billing", "Other"]


def write_rows(path: Path, num_rows: int = 24, first: int = 0) -> Path:
    with path.open("w") as file:
        for i in range(first, first + num_rows):
            question = f"{i}: {WORDS[i % 8]} {WORDS[(i * 3 + 1) % 8]}"
            answer = f"Category: {LABELS[i % 4]}"
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def but(settings: TrainSettings, **changes: object) -> TrainSettings:
    return TrainSettings.model_validate(settings.model_dump() | changes)


def history(directory: Path) -> list[dict[str, str]]:
    with (directory / METRICS_FILE).open() as file:
        return list(csv.DictReader(file))


@contextmanager
def measured_run(*arguments: str, log: Path) -> Iterator[str]:
    """`adapterd train ARGUMENTS --metrics-port 0` in a process of its own; yields where its metrics are.

    It is stopped as an operator would, and has to be in the midst of its steps then.
    """
    command = [sys.executable, "-m", "adapterd", "train", *arguments, "--metrics-port=0"]
    with log.open("w") as file:
        process = subprocess.Popen(command, stderr=file)
    try:
        deadline = time.monotonic() + 300
        while (found := re.search(r"http://\S+/metrics", log.read_text())) is None:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield found[0]
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == EXIT_STOPPED, log.read_text()
    finally:
        process.kill()  # harmless once it has left
        process.wait()
