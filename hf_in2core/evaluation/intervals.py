"""Confidence intervals over seeds and of differences between arms; numpy and scipy only."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri, stdtrit
from scipy.stats import spearmanr


# Confidence level of whatever is told with an interval.
LEVEL = 0.95
MIN_PAIRS = 10


@dataclass(frozen=True)
class Interval:
    """
    A mean and its confidence interval.

    Attributes:
        mean (`float`): The mean; `None` where a value is not finite.
        half_width, low, high (`float`): Half of the interval, and its ends; `None` where none can be given.
        n (`int`): Values, or seeds of the smaller arm.
        level (`float`): Confidence level.
    """

    mean: float | None
    half_width: float | None
    low: float | None
    high: float | None
    n: int
    level: float


@dataclass(frozen=True)
class LossDifference(Interval):
    """
    An [`Interval`] of the difference of two arms' mean losses.

    Attributes:
        method (`str`): `"paired t"` or `"Welch t"`; `None` where a loss is not finite.
    """

    method: str | None


@dataclass(frozen=True)
class JudgedDifference(LossDifference):
    """
    A [`LossDifference`] and what it says.

    Attributes:
        outcome (`str`): `"better"`, `"worse"`, `"inconclusive"` or `"no interval"`; against the full pool also
            `"no worse"`.
    """

    outcome: str


@dataclass(frozen=True)
class RankCorrelation:
    """
    Spearman's rank correlation.

    Attributes:
        estimate, low, high (`float`): In [-1, 1]; `None` where either side is constant.
        n (`int`): Pairs.
        level (`float`): Confidence level.
    """

    estimate: float | None
    low: float | None
    high: float | None
    n: int
    level: float


def compute_confidence_interval(values: Sequence[float] | np.ndarray, level: float = LEVEL) -> Interval:
    r"""
    Student-t confidence interval of the mean of independent values, such as one loss per seed.

    Args:
        values (`Sequence[float]` or `np.ndarray` of shape `[n]`):
            Finite values, at least one.
        level (`float`, *optional*, defaults to `0.95`):
            Confidence level in (0, 1).

    Returns:
        [`Interval`]: with a single value `half_width`, `low` and `high` are `None`: one value says nothing about its
        own spread.

    Raises:
        `ValueError`: no values, a value that is not finite, or a level outside (0, 1).
    """
    array = _check_values(values, level)
    mean, n = float(array.mean()), len(array)
    if n < 2:
        return Interval(mean, None, None, None, n, level)
    return Interval(*_find_ends(mean, float(array.std(ddof=1)) / math.sqrt(n), n - 1, level), n, level)


def compare_losses(first: Mapping[int, float], second: Mapping[int, float], level: float = LEVEL) -> LossDifference:
    r"""
    Difference `first - second` of the mean losses of two arms, with its t-interval.

    Args:
        first (`Mapping[int, float]`):
            Loss by seed of one arm.
        second (`Mapping[int, float]`):
            Loss by seed of the other arm. With the same seeds the differences are taken seed by seed (paired t);
            otherwise the arms are taken as independent samples of unequal variance (Welch).
        level (`float`, *optional*, defaults to `0.95`):
            Confidence level in (0, 1).

    Returns:
        [`LossDifference`]: with a `mean` below 0 the first arm has the lower loss. `half_width`, `low` and `high` are
        `None` where no interval can be given: an arm has fewer than two seeds, or the loss is the same for all seeds
        in both arms, so that the seeds say nothing about noise.

    Raises:
        `ValueError`: an arm without values, a loss that is not finite, or a level outside (0, 1).
    """
    a = _check_values(list(first.values()), level)
    b = _check_values(list(second.values()), level)
    paired = set(first) == set(second)
    n = min(len(a), len(b))
    difference = float(a.mean() - b.mean())
    method = "paired t" if paired else "Welch t"
    if n < 2 or (np.ptp(a) == 0 and np.ptp(b) == 0):
        return LossDifference(difference, None, None, None, n, level, method)
    if paired:
        differences = [first[seed] - second[seed] for seed in first]
        return LossDifference(**vars(compute_confidence_interval(differences, level)), method=method)
    square_a, square_b = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
    freedom = (square_a + square_b) ** 2 / (square_a**2 / (len(a) - 1) + square_b**2 / (len(b) - 1))
    ends = _find_ends(difference, math.sqrt(square_a + square_b), float(freedom), level)
    return LossDifference(*ends, n, level, method)


def compute_rank_correlation(
    first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray, level: float = LEVEL
) -> RankCorrelation:
    r"""
    Spearman's rank correlation with its confidence interval.

    The interval is symmetric in Fisher's `z = atanh(r)`, with the variance `(1 + r^2 / 2) / (n - 3)` of Bonett and
    Wright (Psychometrika 65, 2000).

    Args:
        first, second (`Sequence[float]` or `np.ndarray` of shape `[n]`):
            Finite values, pair by pair; at least ten.
        level (`float`, *optional*, defaults to `0.95`):
            Confidence level in (0, 1).

    Returns:
        [`RankCorrelation`]: without an estimate where either side is constant: without an order there is nothing to
        correlate.

    Raises:
        `ValueError`: different lengths, fewer than ten pairs, a value that is not finite, or a level outside (0, 1).
    """
    a, b = _check_values(first, level), _check_values(second, level)
    if len(a) != len(b) or len(a) < MIN_PAIRS:
        raise ValueError(
            f"A rank correlation needs pairs, at least {MIN_PAIRS} of them, but got {len(a)} and {len(b)} values."
        )
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return RankCorrelation(None, None, None, len(a), level)
    # Rounding takes a correlation of 1 a hair beyond it.
    r = float(np.clip(spearmanr(a, b).statistic, -1, 1))
    z = math.atanh(np.clip(r, -1 + 1e-15, 1 - 1e-15))
    half_width = float(ndtri((1 + level) / 2)) * math.sqrt((1 + r * r / 2) / (len(a) - 3))
    return RankCorrelation(r, math.tanh(z - half_width), math.tanh(z + half_width), len(a), level)


def _check_values(values: Sequence[float] | np.ndarray, level: float) -> np.ndarray:
    if not 0 < level < 1:
        raise ValueError(f"level={level} is outside (0, 1). A {100 * LEVEL:g} % interval is level={LEVEL}.")
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0:
        raise ValueError(
            f"A confidence interval needs one value per seed or row, but got an array of shape {array.shape}."
        )
    if not np.isfinite(array).all():
        raise ValueError(
            f"The values {array.tolist()} are not all finite: leave out the seeds that diverged, and say so."
        )
    return array


def _find_ends(mean: float, standard_error: float, freedom: float, level: float) -> tuple[float, float, float, float]:
    """The first four values of an [`Interval`]."""
    half_width = float(stdtrit(freedom, (1 + level) / 2)) * standard_error
    return mean, half_width, mean - half_width, mean + half_width
