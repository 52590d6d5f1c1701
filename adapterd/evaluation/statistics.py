"""What so few rows can prove: intervals of shares, means and differences, and tests of pairs.

Everything is deterministic: the bootstrap draws from a fixed seed, so the same answers give the same report.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_Z = 1.959964  # of the 95 % interval
_CHANCE = 0.05
"""Differences that chance alone makes this often are not proven: the other side of a 95 % interval."""
_RESAMPLES = 4000
_SEED = 20
_LARGEST_EXACT_TEST = 2000
_CELLS_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` rows with its 95 % interval; all three numbers are NaN where n is 0."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Difference:
    """Mean of ours minus theirs over the same `n` rows, its 95 % interval, and how likely chance alone is.

    The interval is the percentile bootstrap's, and holds 0 wherever `p` is 0.05 or more: it claims nothing
    that the test does not.
    `better`, `worse`: rows that differ, by direction. `test` names what `p` comes from: McNemar's exact test
    where rows are right or wrong, else the sign-flip permutation test.
    """

    value: float
    low: float
    high: float
    n: int
    better: int
    worse: int
    p: float
    test: str


def wilson(count: int, total: int) -> tuple[float, float]:
    """The 95 % Wilson interval of a share; NaN of nothing. Unlike a bootstrap it does not call 20 of 20 certain."""
    if not total:
        return (math.nan, math.nan)
    p, scale = count / total, 1 + _Z * _Z / total
    middle = p + _Z * _Z / (2 * total)
    spread = _Z * math.sqrt(p * (1 - p) / total + _Z * _Z / (4 * total * total))
    return ((middle - spread) / scale, (middle + spread) / scale)


def estimate(values: Sequence[float]) -> Estimate:
    """Mean of one value a row: Wilson's interval if all are 0 or 1, else the percentile bootstrap's."""
    if not values:
        return Estimate(math.nan, math.nan, math.nan, 0)
    array = np.asarray(values, dtype=np.float64)
    low, high = wilson(int(array.sum()), len(array)) if is_binary(array) else _bootstrap_mean(array)
    return Estimate(float(array.mean()), low, high, len(array))


def ratio_estimate(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """Sum over sum, as of losses over tokens, with the interval of resampled rows."""
    if not numerators or not sum(denominators):
        return Estimate(math.nan, math.nan, math.nan, 0)
    above, below = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    draws = np.concatenate(
        [
            above[rows].sum(axis=1) / np.maximum(below[rows].sum(axis=1), 1e-300)
            for rows in _resamples(len(above))
        ]
    )
    low, high = np.quantile(draws, (0.025, 0.975))
    return Estimate(float(above.sum() / below.sum()), float(low), float(high), len(above))


def bootstrap(
    n: int, statistic: Callable[[NDArray[np.int64]], float], *, resamples: int = 1000
) -> tuple[float, float]:
    """The percentile interval of any statistic of `n` rows; it gets the drawn row numbers. Source: Efron 1979."""
    draws = [statistic(row) for rows in _resamples(n, resamples) for row in rows]
    low, high = np.nanquantile(draws, (0.025, 0.975))
    return float(low), float(high)


def compare(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Ours against theirs on the same rows, in the same order. Raises ValueError for no rows or unequal lengths."""
    if len(ours) != len(theirs) or not ours:
        raise ValueError(f"{len(ours)} and {len(theirs)} rows are no pairs to compare")
    a, b = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    delta = a - b
    better, worse = int((delta > 0).sum()), int((delta < 0).sum())
    if is_binary(a) and is_binary(b):
        p, test = mcnemar(better, worse), "McNemar"
    else:
        p, test = sign_flip(delta), "permutation"
    low, high = _bootstrap_mean(delta)
    if p >= _CHANCE:
        # A bootstrap of rows that all differ alike sees no spread: one row of one would be proof.
        low, high = min(low, 0.0), max(high, 0.0)
    return Difference(float(delta.mean()), low, high, len(delta), better, worse, p, test)


def mcnemar(better: int, worse: int) -> float:
    """Two-sided exact McNemar test: how likely so uneven a split of the rows that differ is, if both were equal."""
    n, k = better + worse, min(better, worse)
    if n == 0:
        return 1.0
    if n > _LARGEST_EXACT_TEST:  # the normal approximation with continuity correction
        return math.erfc(max(0.0, abs(better - worse) - 1) / math.sqrt(2 * n))
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / (1 << n))


def sign_flip(delta: Floats) -> float:
    """Two-sided paired permutation test: how often random signs give a mean as far from 0. Never below 1/resamples."""
    moved = delta[delta != 0]
    if not len(moved):
        return 1.0
    rng = np.random.default_rng(_SEED)
    extreme = 0
    limit = abs(moved.sum()) * (1 - 1e-12)  # equal up to rounding is as far
    for size in _chunks(_RESAMPLES, len(moved)):
        signs = rng.integers(0, 2, size=(size, len(moved)), dtype=np.int8) * 2 - 1
        extreme += int((np.abs(signs @ moved) >= limit).sum())
    return (extreme + 1) / (_RESAMPLES + 1)


def is_binary(values: Floats) -> bool:
    return bool(np.isin(values, (0.0, 1.0)).all())


def _bootstrap_mean(values: Floats) -> tuple[float, float]:
    draws = np.concatenate([values[rows].mean(axis=1) for rows in _resamples(len(values))])
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(low), float(high)


def _resamples(n: int, resamples: int = _RESAMPLES) -> Iterator[NDArray[np.int64]]:
    """Row numbers drawn with replacement: matrices of one resample a row, a few MB each."""
    rng = np.random.default_rng(_SEED)
    for size in _chunks(resamples, n):
        yield rng.integers(0, n, size=(size, n))


def _chunks(total: int, width: int) -> list[int]:
    """`total` in parts that keep a matrix of `width` columns within a few MB."""
    size = max(1, min(total, _CELLS_AT_ONCE // max(1, width)))
    return [min(size, total - start) for start in range(0, total, size)]
