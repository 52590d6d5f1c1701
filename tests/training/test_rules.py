import pytest

from adapterd.training.rules import epochs_for, learning_rate_for, num_steps_for


@pytest.mark.parametrize(
    ("num_parameters", "rate"),
    [(8_000_000_000, 2e-4), (596_000_000, 4.4e-4), (70_000_000_000, 1e-4), (3_475_968, 2e-3), (10, 2e-3)],
)
def test_a_smaller_base_learns_at_a_higher_rate(num_parameters: int, rate: float) -> None:
    assert learning_rate_for(num_parameters) == rate


@pytest.mark.parametrize(("num_rows", "epochs"), [(1, 10), (200, 10), (1700, 7), (12_000, 1), (10**6, 1)])
def test_few_rows_are_seen_more_often(num_rows: int, epochs: float) -> None:
    assert epochs_for(num_rows) == epochs


def test_steps_are_whole_and_an_epochs_last_batch_may_be_small() -> None:
    assert num_steps_for(17, 8, 2.0) == 6
    assert num_steps_for(17, 8, 0.1) == 1
