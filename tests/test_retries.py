"""What fails rests for longer each time, by itself, up to a bound."""

from adapterd.retries import Retries


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_each_failure_in_a_row_doubles_the_rest_up_to_the_most() -> None:
    clock = Clock()
    retries = Retries(5.0, 18.0, clock=clock)
    assert not retries.is_resting("a")
    assert [retries.failed("a") for _ in range(4)] == [5.0, 10.0, 18.0, 18.0]
    assert retries.num_failures("a") == 4
    clock.now = 17.9
    assert retries.is_resting("a")
    clock.now = 18.0
    assert not retries.is_resting("a")
    retries.forget("a")
    assert retries.num_failures("a") == 0
    assert retries.failed("a") == 5.0


def test_what_has_failed_lets_nothing_else_rest() -> None:
    retries = Retries(5.0, 20.0, clock=Clock())
    retries.failed("a")
    retries.failed("b")
    assert not retries.is_resting("c")
    retries.forget_others({"b", "c"})
    assert (retries.is_resting("a"), retries.is_resting("b")) == (False, True)
    retries.forget_all()
    assert not retries.is_resting("b")


def test_what_fails_for_ever_rests_for_the_most() -> None:
    retries = Retries(1.0, 300.0, clock=Clock())
    assert {retries.failed("a") for _ in range(2000)} == {2.0**i for i in range(9)} | {300.0}
