"""Who has a label of its own."""

import pytest

from adapterd.busiest import OTHER, Busiest


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def counted(busiest: Busiest, *names: str) -> list[str]:
    return [lost for name in names for lost in busiest.count(name)]


def test_names_have_labels_while_there_is_room(clock: Clock) -> None:
    busiest = Busiest(2, clock=clock)
    assert counted(busiest, "a", "b", "c") == []
    assert [busiest.label(name) for name in "abcd"] == ["a", "b", OTHER, OTHER]


def test_a_busier_name_takes_the_label_of_the_least_busy(clock: Clock) -> None:
    busiest = Busiest(2, clock=clock)
    counted(busiest, "a", "a", "b", "c", "c", "c", "c")
    clock.seconds = 11
    assert counted(busiest, "c") == ["b"]
    assert busiest.chosen == {"a", "c"}


def test_two_alike_do_not_take_turns(clock: Clock) -> None:
    busiest = Busiest(1, clock=clock)
    for clock.seconds in range(0, 1000, 5):
        assert counted(busiest, "a", "b") == []
    assert busiest.chosen == {"a"}


def test_what_was_busy_long_ago_counts_for_little(clock: Clock) -> None:
    busiest = Busiest(1, clock=clock)
    counted(busiest, *["a"] * 1000)
    clock.seconds = 3 * 3600
    counted(busiest, "b", "b", "b", "b")
    clock.seconds += 11
    assert counted(busiest, "b") == ["a"]


def test_weeks_without_a_request_are_no_trouble(clock: Clock) -> None:
    busiest = Busiest(1, clock=clock)
    counted(busiest, *["a"] * 1000)
    clock.seconds = 1e7
    assert counted(busiest, "b", "b", "b") == []
    clock.seconds += 11
    assert counted(busiest, "b") == ["a"]


def test_an_adapter_called_other_shares_the_label_of_the_others(clock: Clock) -> None:
    busiest = Busiest(1, clock=clock)
    counted(busiest, OTHER, "a")
    assert busiest.chosen == {"a"}
