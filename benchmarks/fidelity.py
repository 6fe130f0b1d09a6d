"""Does influence mean what it says: agreement with retraining, and between two references. Needs numpy and scipy only.

Negative influence = proponent: a row that is trained on lowers the validation loss by about as much as its influence
is negative, so a set of rows is predicted to have the loss `sum of their influence`, up to a constant and a factor.
"""

from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy.stats import spearmanr


MIN_SUBSETS = 10
# Seeds of the same training agree less than this: no score can be told from noise by such retraining.
MIN_SEED_AGREEMENT = 0.1


@dataclass(frozen=True)
class Fidelity:
    """
    How a score agrees with retraining.

    Attributes:
        spearman (`float`): Rank correlation with the loss averaged over seeds; its mean over validation rows if there
            are several.
        seed_agreement (`float`, *optional*): Mean rank correlation of the losses of two seeds; `None` with one.
        ceiling (`float`, *optional*): Expected score of a perfect prediction, the square root of the reliability of
            the average over k seeds (Spearman-Brown: `k r / (1 + (k - 1) r)`, `r` = `seed_agreement`).
        warning (`str`, *optional*): Why nothing can be concluded, where the seeds do not agree.
    """

    spearman: float
    seed_agreement: float | None
    ceiling: float | None
    warning: str | None = None


@dataclass(frozen=True)
class ScoreAgreement:
    """
    How two scores of the same rows agree.

    Attributes:
        spearman (`float`): Rank correlation.
        overlap (`float`): Share of the first coreset that is in the second; the fraction by chance.
        rows (`int`): Rows that have both scores.
    """

    spearman: float
    overlap: float
    rows: int


def compute_lds(influence: np.ndarray, members: np.ndarray, losses: np.ndarray) -> Fidelity:
    r"""
    Linear datamodeling score: does summed influence order subsets of the pool as training on them does?

    The rank correlation, over subsets S of the pool, of the predicted loss `sum_{i in S} influence_i` with the loss
    on the validation set after training on S (Park et al., TRAK, arXiv 2303.14186, eq. 6). Retraining itself is noisy,
    so the score of a perfect prediction is below 1: that ceiling is estimated from how well the seeds agree.

    ```python
    >>> members = np.stack([np.isin(np.arange(64), rng.choice(64, 32, replace=False)) for _ in range(50)])
    >>> losses = np.stack([[train_and_evaluate(subset, seed) for seed in (0, 1, 2)] for subset in members])
    >>> compute_lds(np.array(scored["influence"]), members, losses).spearman
    ```

    Args:
        influence (`numpy.ndarray` of shape `[n]` or `[n, Q]`):
            Influence of every row of the pool, or on each of Q validation rows (`influence_per_query`); negative =
            proponent. Any score to compare it with works, with small values for rows that should lower the loss.
        members (`numpy.ndarray` of shape `[m, n]`, bool):
            Which rows each of the m subsets holds; random halves of the pool are usual.
        losses (`numpy.ndarray` of shape `[m, seeds]` or `[m, seeds, Q]`):
            Validation loss (nats) after training on each subset with each seed; for each validation row if
            `influence` has a column for each.

    Returns:
        [`Fidelity`]

    Raises:
        ValueError: if shapes do not fit, there are fewer than 10 subsets, a value is not finite, or predictions or
            losses are constant.
    """
    influence, members, losses = np.asarray(influence, dtype=np.float64), np.asarray(members), np.asarray(losses)
    if members.ndim != 2 or members.dtype != np.bool_ or members.shape[1] != len(influence):
        raise ValueError(
            f"`members` is {members.dtype} of shape {members.shape}, but it tells for each subset which of the "
            f"{len(influence)} rows it holds: pass booleans of shape [subsets, {len(influence)}]."
        )
    return _measure_fidelity(members.astype(np.float64) @ influence, losses, "subsets")


def compare_leave_one_out(influence: np.ndarray, left_out: np.ndarray) -> Fidelity:
    r"""
    Does influence order the rows as training without each of them does?

    Args:
        influence (`numpy.ndarray` of shape `[n]` or `[n, Q]`):
            As in [`compute_lds`]; negative = proponent.
        left_out (`numpy.ndarray` of shape `[n, seeds]` or `[n, seeds, Q]`):
            Validation loss (nats) after training on all rows but one, for each row and seed. The loss with all rows is
            the same for every row and does not matter. Influence is compared with minus this loss.

    Returns:
        [`Fidelity`]

    Raises:
        ValueError: as [`compute_lds`], rows in the place of subsets.
    """
    return _measure_fidelity(np.asarray(influence, dtype=np.float64), -np.asarray(left_out), "rows")


def compare_scores(first: np.ndarray, second: np.ndarray, fraction: float) -> ScoreAgreement:
    r"""
    How far two scores of the same rows agree, such as the influence of a small reference model and of the target.

    ```python
    >>> small, large = (np.array(scored["influence"]) for scored in (scored_by_small, scored_by_target))
    >>> compare_scores(small, large, fraction=0.25).spearman
    ```

    Args:
        first, second (`numpy.ndarray` of shape `[n]`):
            Scores in the order of the rows; NaN where a row carries no loss (left out if either is).
        fraction (`float`):
            Share of the rows that a coreset of either would keep (smallest first), in (0, 1).

    Returns:
        [`ScoreAgreement`]

    Raises:
        ValueError: if the lengths differ, fewer than 10 rows have both scores, or either is constant.
    """
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if first.ndim != 1 or first.shape != second.shape:
        raise ValueError(
            f"The scores have the shapes {first.shape} and {second.shape}; give one score of each kind for every row."
        )
    if not 0 < fraction < 1:
        raise ValueError(f"fraction={fraction} is outside (0, 1): it is the share of the rows that a coreset keeps.")
    both = ~(np.isnan(first) | np.isnan(second))
    first, second = first[both], second[both]
    spearman = _measure_fidelity(first, second[:, None], "rows with both scores").spearman
    overlap = share_kept(first, second, max(round(fraction * len(first)), 1))
    return ScoreAgreement(spearman, overlap, len(first))


def share_kept(first: np.ndarray, second: np.ndarray, count: int) -> float:
    """Share of the `count` smallest scores that are also among the smallest of another score."""
    kept, other = (np.argsort(scores, kind="stable")[:count] for scores in (first, second))
    return len(np.intersect1d(kept, other)) / count


def _measure_fidelity(predicted: np.ndarray, measured: np.ndarray, what: str) -> Fidelity:
    """Rank correlation of `[m]` or `[m, Q]` predictions with `[m, seeds]` or `[m, seeds, Q]` measurements."""
    measured = np.asarray(measured, dtype=np.float64)
    if measured.ndim != predicted.ndim + 1 or (len(measured), *measured.shape[2:]) != predicted.shape:
        raise ValueError(
            f"The predictions have shape {predicted.shape} and the measurements {measured.shape}: measurements have a "
            "second axis for the seeds, and else the same shape."
        )
    if len(predicted) < MIN_SUBSETS:
        raise ValueError(
            f"{len(predicted)} {what} say nothing about a correlation: at least {MIN_SUBSETS} are needed. Take more."
        )
    predicted = predicted.reshape(len(predicted), -1)
    measured = measured.reshape(*measured.shape[:2], -1)
    for name, values in (("predictions", predicted), ("measurements", measured)):
        if not np.isfinite(values).all():
            raise ValueError(f"Some {name} are NaN or infinite: leave out such {what}, and say how many they were.")
    mean = measured.mean(axis=1)
    for name, values in (("predictions", predicted), ("measurements", mean)):
        constant = int((np.ptp(values, axis=0) == 0).sum())
        if constant:
            raise ValueError(
                f"The {name} are the same for all {what} in {constant} of {values.shape[1]} columns, so they order "
                "nothing. Check that the scores differ between rows and that the trainings saw different ones."
            )
    spearman, seeds = _correlate(predicted, mean), measured.swapaxes(0, 1)
    if len(seeds) == 1:
        return Fidelity(spearman, None, None)
    agreement = float(np.mean([_correlate(first, second) for first, second in combinations(seeds, 2)]))
    if agreement < MIN_SEED_AGREEMENT:
        warning = (
            f"Two seeds of the same training agree by {agreement:.2f} only: what is measured is mostly noise, and no "
            "score can be judged by it. Average over more seeds, or train on fewer rows for more steps."
        )
        return Fidelity(spearman, agreement, None, warning)
    return Fidelity(spearman, agreement, float(np.sqrt(len(seeds) * agreement / (1 + (len(seeds) - 1) * agreement))))


def _correlate(first: np.ndarray, second: np.ndarray) -> float:
    """Mean rank correlation of each column of `[m, Q]` with that of another, of those where neither is constant."""
    pairs = [pair for pair in zip(first.T, second.T, strict=True) if np.ptp(pair[0]) > 0 and np.ptp(pair[1]) > 0]
    return float(np.mean([spearmanr(*pair).statistic for pair in pairs]))
