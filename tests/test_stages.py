"""The seconds of a start are told by stage, and add up to the whole."""

import time

from adapterd.stages import Stages


def test_stages_follow_one_another_and_add_up() -> None:
    times = iter([10.0, 12.1, 12.4, 14.4, 15.4])
    stages = Stages(lambda: next(times))
    for stage in ("imports", "weights", "layers", "weights"):
        stages.done(stage)
    assert str(stages) == "5.4 s: imports 2.1, weights 1.3, layers 2.0"


def test_a_process_began_before_its_first_stage() -> None:
    stages = Stages.of_this_process()
    stages.done("imports")
    said = float(str(stages).partition(" ")[0])
    assert 0.0 < said < time.time()
