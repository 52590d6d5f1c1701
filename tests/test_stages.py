"""The seconds of a start are told by stage, and add up to the whole."""

import subprocess
import sys
import time
from pathlib import Path

from adapterd.stages import Stages

ROOT = Path(__file__).parents[1]


def test_stages_follow_one_another_and_add_up() -> None:
    times = iter([10.0, 12.1, 12.4, 14.4, 15.4])
    stages = Stages(lambda: next(times))
    for stage in ("imports", "weights", "layers", "weights"):
        stages.done(stage)
    assert str(stages) == "5.4 s: imports 2.1, weights 1.3, layers 2.0"


def test_a_process_began_when_it_was_started() -> None:
    """Regression: by the time of day of the machine's boot, a second more or less."""
    code = (
        "import time; from adapterd.stages import Stages; stages = Stages.of_this_process();"
        " stages.done('imports'); print(stages, time.time())"
    )
    for _ in range(3):
        before = time.time()
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
        )
        said, now = float(done.stdout.split()[0]), float(done.stdout.split()[-1])
        assert 0.0 < said <= now - before + 0.1
        assert said >= (now - before) / 2
