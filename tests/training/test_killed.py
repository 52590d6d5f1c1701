"""A run killed at random moments and resumed writes the bytes of one that ran through.

Three kills here; the campaign of fifty is `KILLS=50 python -m pytest tests/training/test_killed.py`.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from adapterd.cli import EXIT_STOPPED
from adapterd.file_names import SEAL_FILE, WEIGHTS_FILE
from adapterd.training.history import METRICS_FILE
from tests.tiny import tiny_llama
from tests.training.runs import write_rows

KILLS = int(os.environ.get("KILLS", "3"))
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    tiny_llama(tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl", num_rows=60)
    flags = (
        "--name support --rank 4 --batch-size 4 --epochs 12 --patience 99 --learning-rate 0.003 --device cpu"
    )
    return [
        *(sys.executable, "-m", "adapterd", "train", "--base", str(tmp_path / "base")),
        *("--data", str(tmp_path / "rows.jsonl"), "--checkpoint-seconds", "0.001", *flags.split()),
    ]


class Run:
    """The command in a process of its own, its log in a file."""

    def __init__(self, command: list[str], out: Path) -> None:
        self.out = out
        self._log = out.with_suffix(".log")
        with self._log.open("w") as file:
            self.process = subprocess.Popen(
                [*command, "--out", str(out)],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.DEVNULL,
                stderr=file,
            )

    @property
    def log(self) -> str:
        return self._log.read_text()

    def until(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not holds() and self.process.poll() is None:
            assert time.monotonic() < deadline, self.log
            time.sleep(0.001)

    def end(self, number: int | None = None) -> int:
        if number is not None:
            self.process.send_signal(number)
        return self.process.wait(timeout=300)


def newest_step(out: Path) -> int:
    found = [int(path.name[:9]) for path in out.glob(".runs/support/checkpoints/*.pt")]
    return max(found, default=0)


def test_killed_and_resumed_is_bit_identical(command: list[str], tmp_path: Path) -> None:
    through = Run(command, tmp_path / "through")
    assert through.end() == 0, through.log
    num_steps = 12 * 14  # 54 rows to train on, 4 a step
    rng = random.Random(os.environ.get("KILL_SEED", "1"))
    out = tmp_path / "killed"
    killed_at = []
    for kill in range(KILLS):
        run = Run(command, out)
        # Spread over the whole run, so that each of many kills finds something left to do.
        done = newest_step(out)
        wanted = done + 1 + rng.randrange(max(1, (num_steps - done) // (KILLS - kill + 1)))
        run.until(lambda wanted=wanted: newest_step(out) >= wanted)
        time.sleep(rng.random() * 0.02)  # wherever it is by then
        assert run.end(signal.SIGKILL) == -signal.SIGKILL, run.log
        killed_at.append(newest_step(out))
    last = Run(command, out)
    assert last.end() == 0, last.log
    assert f"going on after step {killed_at[-1]}" in last.log
    print(f"{KILLS} kills, newest checkpoint after each: {killed_at}")
    for name in (WEIGHTS_FILE, SEAL_FILE, METRICS_FILE):
        assert (out / "support" / name).read_bytes() == (tmp_path / "through" / "support" / name).read_bytes()


def test_sigterm_leaves_a_checkpoint_and_a_code_of_its_own(command: list[str], tmp_path: Path) -> None:
    out = tmp_path / "adapters"
    run = Run([*command, "--checkpoint-seconds", "3600", "--epochs", "2000"], out)
    run.until(lambda: "at most 28000 steps" in run.log)
    time.sleep(0.5)
    assert run.end(signal.SIGTERM) == EXIT_STOPPED, run.log
    step = newest_step(out)
    assert f"stopped after step {step}; the same command goes on" in run.log
    assert step > 0
    assert not (out / "support").exists()
