import math

import numpy as np
import pytest

from adapterd.evaluation.statistics import (
    bootstrap,
    compare,
    estimate,
    mcnemar,
    ratio_estimate,
    sign_flip,
    wilson,
)


def test_wilson_interval_against_known_values() -> None:
    assert wilson(18, 20) == (pytest.approx(0.6990, abs=1e-4), pytest.approx(0.9721, abs=1e-4))
    assert wilson(0, 20)[0] == pytest.approx(0.0)
    assert wilson(20, 20)[1] == pytest.approx(1.0)
    assert math.isnan(wilson(0, 0)[0])


def test_a_share_gets_wilsons_interval_and_a_mean_the_bootstraps() -> None:
    share = estimate([1.0] * 18 + [0.0] * 2)
    assert (share.low, share.high) == wilson(18, 20)
    values = list(np.random.default_rng(1).normal(0.5, 0.1, 400))
    mean = estimate(values)
    # The bootstrap of a mean of 400 normal values is the textbook interval, nearly.
    spread = 1.96 * np.std(values) / 20
    assert mean.low == pytest.approx(np.mean(values) - spread, abs=0.001)
    assert mean.high == pytest.approx(np.mean(values) + spread, abs=0.001)
    assert math.isnan(estimate([]).value)
    assert estimate([]).n == 0


def test_the_same_values_give_the_same_interval() -> None:
    values = [0.1, 0.5, 0.7, 0.2]
    assert estimate(values) == estimate(values)


def test_a_ratio_is_of_sums_and_not_a_mean_of_ratios() -> None:
    found = ratio_estimate([10.0, 1.0], [10.0, 100.0])
    assert found.value == pytest.approx(11 / 110)
    assert found.low <= found.value <= found.high
    assert ratio_estimate([], []).n == 0


def test_any_statistic_can_be_resampled() -> None:
    low, high = bootstrap(100, lambda rows: float(np.median(rows)))
    assert 30 < low < 50 < high < 70


def test_mcnemar_against_the_binomial_by_hand() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 5) == 1.0
    assert mcnemar(10, 2) == pytest.approx(2 * (1 + 12 + 66) / 2**12)
    assert mcnemar(2, 10) == mcnemar(10, 2)


def test_mcnemar_of_very_many_rows_agrees_with_the_exact_one() -> None:
    exact = min(1.0, 2 * sum(math.comb(2001, i) for i in range(950)) / (1 << 2001))
    assert mcnemar(2001 - 949, 949) == pytest.approx(exact, rel=0.05)


def test_permutation_against_all_sign_flips() -> None:
    delta = np.array([0.3, 0.2, -0.1, 0.4, 0.25, 0.15])
    signs = np.array(np.meshgrid(*[[-1, 1]] * 6)).reshape(6, -1).T
    exact = float((np.abs(signs @ delta) >= abs(delta.sum()) - 1e-12).mean())
    assert sign_flip(delta) == pytest.approx(exact, abs=0.02)
    assert sign_flip(np.zeros(3)) == 1.0


def test_rows_that_differ_are_counted_by_direction_and_tested_as_pairs() -> None:
    ours = [1.0] * 60 + [0.0] * 40
    theirs = [1.0] * 30 + [0.0] * 30 + [1.0] * 5 + [0.0] * 35
    found = compare(ours, theirs)
    assert (found.better, found.worse, found.n) == (30, 5, 100)
    assert found.value == pytest.approx(0.25)
    assert 0.1 < found.low < 0.25 < found.high < 0.4
    assert (found.p, found.test) == (mcnemar(30, 5), "McNemar")
    assert compare([0.5, 0.7], [0.4, 0.6]).test == "permutation"


def test_pairs_narrow_the_interval_of_a_difference() -> None:
    """What one row is hard for, it is hard for both: unpaired intervals would not see a gain this steady."""
    rng = np.random.default_rng(2)
    hard = rng.uniform(0, 1, 200)
    found = compare(list(hard + 0.02), list(hard + rng.normal(0, 0.01, 200)))
    assert found.low > 0.017
    assert estimate(list(hard)).high - estimate(list(hard)).low > 0.05


def test_unequal_lengths_are_no_pairs() -> None:
    with pytest.raises(ValueError, match="2 and 1 rows"):
        compare([1.0, 0.0], [1.0])


@pytest.mark.parametrize("ours", [[1.0], [1.0] * 5, [0.6] * 5])
def test_a_few_rows_that_all_gain_alike_prove_nothing(ours: list[float]) -> None:
    """Their bootstrap has no spread at all; the test says what they are worth."""
    found = compare(ours, [0.0] * len(ours))
    assert found.p >= 0.05
    assert (found.low, found.high) == pytest.approx((0, found.value))
    lost = compare([0.0] * len(ours), ours)
    assert (lost.low, lost.high) == pytest.approx((lost.value, 0))


def test_one_row_more_proves_what_five_did_not() -> None:
    found = compare([1.0] * 6, [0.0] * 6)
    assert (found.p < 0.05, found.low) == (True, 1)
