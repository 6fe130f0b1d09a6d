"""Whether a ranking by influence is more than noise: how far halves of the validation set rank the pool alike.

While a reference trains, the gradients of single validation rows shrink and turn against one another until their mean,
which `influence` is read with, is hardly more than chance. No label of any task is needed to see it: two random halves
of the validation set are the same question asked twice, and their answers drift apart.
"""

from dataclasses import dataclass

import numpy as np
from datasets import Dataset

from hf_in2core.engine.halves import MIN_QUERIES, correlate_halves, extrapolate, say_disagreement
from hf_in2core.evaluation.intervals import LEVEL
from hf_in2core.rows.scored import read_query_scores


MIN_ROWS, MAX_ROWS = 30, 10_000


@dataclass(frozen=True)
class Agreement:
    """
    How far random halves of the validation set rank the pool alike.

    Attributes:
        agreement (`float`): Spearman's correlation over the pool between the mean influence on one half of the
            validation rows and on the other, mean over 50 random halves; 1 = the same ranking, 0 = chance.
        low, high (`float`): Between which 95 % of the halves lie.
        reliability (`float`): The agreement that two validation sets of the full size are to be expected to have,
            `2 r / (1 + r)` (Spearman and Brown); 0 for `r` below 0.
        num_queries, num_rows (`int`): Validation rows and rows of the pool.
        warning (`str`, *optional*): What to do, if the agreement is below 0.75.
    """

    agreement: float
    low: float
    high: float
    reliability: float
    num_queries: int
    num_rows: int
    warning: str | None


def measure_agreement(scored: Dataset, seed: int = 0) -> Agreement:
    r"""
    Measure how far random halves of the validation set rank the pool alike; tells a reference past its useful point.

    ```python
    >>> trainer.fit_influence(per_example=True)
    >>> measure_agreement(trainer.score_influence()).warning
    >>> for folder in checkpoints:  # the latest one that is not warned of
    ...     print(folder, measure_agreement(trainer.score_influence(checkpoints=[folder])).agreement)
    ```

    It says whether `influence` is a stable answer, not whether it is the right one: an early reading may agree on
    ranking rows by the size of their gradients. It says nothing of rows chosen in turn (`round_robin_rows`).

    Args:
        scored ([`~datasets.Dataset`]):
            Scored pool with `influence_per_query`; rows without loss are left out, and of more than 10,000 rows a
            seeded sample is looked at.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the halves and of the sample.

    Returns:
        [`Agreement`]

    Raises:
        ValueError: if there is no `influence_per_query`, if there are fewer than 10 validation rows or 30 rows with
            loss, or if a half gives every row the same influence.
    """
    influence = read_query_scores(scored, "Agreement")
    influence = influence[:, ~np.isnan(influence).any(axis=0)]
    num_queries, num_rows = influence.shape
    if num_queries < MIN_QUERIES or num_rows < MIN_ROWS:
        raise ValueError(
            f"{num_queries} validation rows and {num_rows} rows with loss say nothing about agreement: at least "
            f"{MIN_QUERIES} and {MIN_ROWS} are needed. Use a larger validation set or pool."
        )
    if num_rows > MAX_ROWS:
        influence = influence[:, np.random.default_rng(seed).choice(num_rows, MAX_ROWS, replace=False)]
    found = correlate_halves(influence, seed)
    if np.isnan(found).any():
        raise ValueError(
            "Every row has the same influence on half of the validation rows, so nothing is ranked. Train the "
            "reference's adapter first, and check that the validation rows differ from one another."
        )
    agreement = float(np.mean(found))
    low, high = (float(value) for value in np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    reliability = max(extrapolate(agreement, 2), 0.0)
    return Agreement(agreement, low, high, reliability, num_queries, num_rows, say_disagreement(agreement))
