"""Whether a ranking by influence is more than noise: how far halves of the validation set rank the pool alike.

While a reference trains, the gradients of single validation rows shrink and turn against one another until their mean,
which `influence` is read with, is hardly more than chance. No label of any task is needed to see it: two random halves
of the validation set are the same question asked twice, and their answers drift apart.
"""

from typing import Any

import numpy as np
from datasets import Dataset
from scipy.stats import spearmanr

from hf_in2core.rows.scored import read_query_scores


MIN_QUERIES, MIN_ROWS, MAX_ROWS = 10, 30, 10_000
HALVES = 50
# On the data of docs/benchmarks/when_to_read.md every reading above it found the rows of the task, and few below it.
MIN_AGREEMENT = 0.75


def measure_agreement(scored: Dataset, seed: int = 0) -> dict[str, Any]:
    r"""
    Measure how far random halves of the validation set rank the pool alike; tells a reference past its useful point.

    ```python
    >>> trainer.fit_influence(per_example=True)
    >>> measure_agreement(trainer.score_influence())["warning"]
    >>> for folder in checkpoints:  # the latest one that is not warned of
    ...     print(folder, measure_agreement(trainer.score_influence(checkpoints=[folder]))["agreement"])
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
        `dict`:

        - `agreement` (`float`): Spearman's correlation over the pool between the mean influence on one half of the
          validation rows and on the other, mean over 50 random halves; 1 = the same ranking, 0 = chance.
        - `low`, `high` (`float`): between which 95 % of the halves lie.
        - `reliability` (`float`): the agreement that two validation sets of the full size are to be expected to have,
          `2 r / (1 + r)` (Spearman and Brown); 0 for `r` below 0.
        - `num_queries`, `num_rows` (`int`): validation rows and rows of the pool.
        - `warning` (`str` or `None`): what to do, if the agreement is below 0.75.

    Raises:
        ValueError: if there is no `influence_per_query`, if there are fewer than 10 validation rows or 30 rows with
            loss, or if a half gives every row the same influence.
    """
    if "influence_per_query" not in scored.column_names:
        raise ValueError(
            "Agreement needs the column influence_per_query, but the dataset has "
            f"{scored.column_names}. Call `trainer.fit_influence(per_example=True)` before scoring."
        )
    influence = read_query_scores(scored)
    influence = influence[:, ~np.isnan(influence).any(axis=0)]
    num_queries, num_rows = influence.shape
    if num_queries < MIN_QUERIES or num_rows < MIN_ROWS:
        raise ValueError(
            f"{num_queries} validation rows and {num_rows} rows with loss say nothing about agreement: at least "
            f"{MIN_QUERIES} and {MIN_ROWS} are needed. Use a larger validation set or pool."
        )
    generator = np.random.default_rng(seed)
    if num_rows > MAX_ROWS:
        influence = influence[:, generator.choice(num_rows, MAX_ROWS, replace=False)]
    found = []
    for _ in range(HALVES):
        half, other = np.array_split(generator.permutation(num_queries), 2)
        means = influence[half].mean(0), influence[other].mean(0)
        if np.ptp(means[0]) == 0 or np.ptp(means[1]) == 0:
            raise ValueError(
                "Every row has the same influence on half of the validation rows, so nothing is ranked. Train the "
                "reference's adapter first, and check that the validation rows differ from one another."
            )
        found.append(float(spearmanr(*means).statistic))
    agreement = float(np.mean(found))
    low, high = (float(value) for value in np.quantile(found, [0.025, 0.975]))
    return {
        "agreement": agreement,
        "low": low,
        "high": high,
        "reliability": max(2 * agreement / (1 + agreement), 0.0) if agreement > 0 else 0.0,
        "num_queries": num_queries,
        "num_rows": num_rows,
        "warning": None if agreement >= MIN_AGREEMENT else _warn(agreement),
    }


def _warn(agreement: float) -> str:
    return (
        f"Halves of the validation set rank the pool differently (Spearman {agreement:.2f}): the ranking by "
        "`influence` is largely noise, which is what a reference trained past its useful point gives. Read it at "
        "an earlier checkpoint (`score_influence(checkpoints=[...])`), let the validation rows choose in turn "
        '(`select_coreset(strategy="round_robin_rows")`), or use more validation rows.'
    )
