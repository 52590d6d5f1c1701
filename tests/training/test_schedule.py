import math

import pytest

from adapterd.training.schedule import Schedule


def schedule(**changes: float) -> Schedule:
    settings = {"max_steps": 100, "num_warmup": 10, "decay_fraction": 0.2, "patience": 2} | changes
    return Schedule(**settings)  # type: ignore[arg-type]


def test_warms_up_holds_and_decays_to_almost_nothing() -> None:
    s = schedule()
    factors = [s.factor(step) for step in range(1, 101)]
    assert factors[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert factors[10:81] == [1.0] * 71  # the first step of the decay is still whole
    assert factors[80:] == pytest.approx([i / 20 for i in range(20, 0, -1)])
    assert not s.is_done(99)
    assert s.is_done(100)


def test_a_decay_of_all_steps_is_a_line_from_the_warm_up_on() -> None:
    s = schedule(decay_fraction=1.0)
    assert [s.factor(step) for step in range(11, 101)] == pytest.approx([i / 90 for i in range(90, 0, -1)])


def test_a_flat_validation_loss_begins_the_decay_early() -> None:
    s = schedule()
    assert s.observe(20, 1.0)
    assert not s.observe(30, 1.1)
    assert s.flat_at is None
    assert not s.observe(40, 1.0)  # equal is no gain
    assert (s.flat_at, s.decay_start, s.decay_end) == (40, 40, 50)
    assert s.factor(40) == 1.0
    assert s.factor(50) == pytest.approx(0.1)
    assert not s.is_done(49)
    assert s.is_done(50)
    assert (s.best_step, s.best_loss) == (20, 1.0)


def test_a_decay_that_gains_nothing_ends_early() -> None:
    s = schedule(max_steps=1000)
    s.observe(100, 1.0)
    for step in (200, 300):
        s.observe(step, 2.0)
    assert s.decay_start == 300
    assert s.observe(310, 0.9)
    s.observe(320, 0.95)
    assert not s.is_done(320)
    s.observe(330, 0.95)
    assert s.is_done(330)
    assert s.decay_end == 375
    assert s.best_step == 310


@pytest.mark.parametrize("flat", [(168, 180), (160, 172, 184)], ids=["two", "as many as end it"])
def test_evaluations_before_the_decay_do_not_end_it(flat: tuple[int, ...]) -> None:
    s = schedule(max_steps=230, patience=3)
    assert s.decay_start == 184
    s.observe(148, 1.0)
    for step in flat:
        s.observe(step, 1.1)
    assert not s.is_done(185)
    for step in (192, 204):
        s.observe(step, 1.1)
        assert not s.is_done(step)
    s.observe(216, 1.1)
    assert s.is_done(216)
    assert s.flat_at is None


def test_losses_during_the_warm_up_count_as_nothing_lost() -> None:
    s = schedule()
    s.observe(2, 1.0)
    for step in (4, 6, 8, 10):
        s.observe(step, 3.0)
    assert s.flat_at is None


def test_a_decay_never_ends_beyond_the_last_step() -> None:
    s = schedule(decay_fraction=0.9)
    s.observe(5, 1.0)
    assert s.decay_start == 10
    s = schedule(max_steps=60, decay_fraction=0.5, num_warmup=0)
    s.observe(10, 1.0)
    s.observe(20, 1.0)
    s.observe(29, 1.0)
    assert (s.decay_start, s.decay_end) == (29, 58)


def test_the_state_is_all_there_is() -> None:
    s, restored = schedule(), schedule()
    for step, loss in ((20, 1.0), (30, 1.1), (40, 1.2), (45, 1.3)):
        s.observe(step, loss)
    restored.restore(s.state())
    assert restored == s
    assert math.isinf(schedule().state()["best_loss"] or 0)
