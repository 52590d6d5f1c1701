"""A run killed at random moments and resumed writes the bytes of one that ran through.

Three kills here; the campaign of fifty is `KILLS=50 python -m pytest tests/training/test_killed.py`.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from adapterd.adapter import SEAL_FILE, WEIGHTS_FILE
from adapterd.cli import EXIT_STOPPED
from adapterd.training.history import METRICS_FILE
from tests.tiny import tiny_llama
from tests.training.test_train import write_rows

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


def start(command: list[str], out: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "--out", str(out)], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    )


def newest_step(out: Path) -> int:
    found = [int(path.name[:9]) for path in out.glob(".runs/support/checkpoints/*.pt")]
    return max(found, default=0)


def kill_after(process: subprocess.Popen[str], out: Path, step: int, delay: float, number: int) -> None:
    """Send the signal `delay` seconds after the checkpoint of `step` is there, wherever the run is by then."""
    deadline = time.monotonic() + 120
    while newest_step(out) < step and process.poll() is None:
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.001)
    time.sleep(delay)
    process.send_signal(number)
    process.wait(timeout=60)


def test_killed_and_resumed_is_bit_identical(command: list[str], tmp_path: Path) -> None:
    through = start(command, tmp_path / "through")
    assert through.wait(timeout=300) == 0, through.stderr and through.stderr.read()
    num_steps = 12 * 14  # 54 rows to train on, 4 a step
    rng = random.Random(os.environ.get("KILL_SEED", "1"))
    out = tmp_path / "killed"
    killed_at = []
    for kill in range(KILLS):
        process = start(command, out)
        # Spread over the whole run, so that each of many kills finds something left to do.
        step = (
            newest_step(out) + 1 + rng.randrange(max(1, (num_steps - newest_step(out)) // (KILLS - kill + 1)))
        )
        kill_after(process, out, step, rng.random() * 0.02, signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        killed_at.append(newest_step(out))
    last = start(command, out)
    _, log = last.communicate(timeout=300)
    assert last.returncode == 0, log
    assert f"going on after step {killed_at[-1]}" in log
    print(f"{KILLS} kills, newest checkpoint after each: {killed_at}")
    for name in (WEIGHTS_FILE, SEAL_FILE, METRICS_FILE):
        assert (out / "support" / name).read_bytes() == (tmp_path / "through" / "support" / name).read_bytes()


def test_sigterm_leaves_a_checkpoint_and_a_code_of_its_own(command: list[str], tmp_path: Path) -> None:
    command = [*command, "--checkpoint-seconds", "3600", "--epochs", "2000"]
    process = start(command, tmp_path)
    assert process.stderr is not None
    for line in process.stderr:
        if "at most 28000 steps" in line:
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=60)
    assert process.returncode == EXIT_STOPPED, log
    assert f"stopped after step {newest_step(tmp_path)}; the same command goes on" in log
    assert newest_step(tmp_path) > 0
    assert not (tmp_path / "support").exists()
    shutil.rmtree(tmp_path / ".runs")
