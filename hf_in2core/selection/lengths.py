"""How far influence goes with length: raw influence favours long or short rows, whatever they say."""

import numpy as np
from datasets import Dataset
from scipy.stats import ks_2samp, spearmanr

from hf_in2core.notebook import Lengths
from hf_in2core.rows.scored import read_scores


# A coreset whose lengths differ by more is warned of: a gap of 0.25 means that at least a quarter of its rows would
# have to be swapped for others to give it the lengths of the pool.
MAX_LENGTH_GAP = 0.25
MIN_ROWS = 10


def compare_lengths(scored: Dataset, coreset: Dataset, column: str = "influence") -> Lengths:
    r"""
    Compare the lengths of a coreset's rows with those of the pool, and tell how the ranking goes with length.

    ```python
    >>> lengths = compare_lengths(scored, select_coreset(scored, fraction=0.25))
    >>> lengths["warning"]
    ```

    Args:
        scored ([`~datasets.Dataset`]):
            Scored pool with `num_loss_tokens`; rows without a loss token are left out.
        coreset ([`~datasets.Dataset`]):
            Rows selected from it, with `num_loss_tokens`.
        column (`str`, *optional*, defaults to `"influence"`):
            What they were selected by.

    Returns:
        `dict`, which a notebook shows as a table:

        - `spearman` (`float` or `None`): rank correlation of `column` with `num_loss_tokens` over the pool. For
          influence (negative = proponent) below 0 means that long rows come first. `None` if either is constant.
        - `pool_tokens`, `coreset_tokens` (`float`): mean `num_loss_tokens` of a row.
        - `ratio` (`float`): `coreset_tokens / pool_tokens`.
        - `gap` (`float`): largest distance between the two cumulative distributions of lengths (Kolmogorov-Smirnov),
          0 = the same lengths, 1 = no overlap.
        - `warning` (`str` or `None`): what to do, if the gap is above 0.25.

    Raises:
        ValueError: if a column is missing, or fewer than 10 rows of the pool or no row of the coreset carry loss.
    """
    for name, dataset, needed in (
        ("pool", scored, [column, "num_loss_tokens"]),
        ("coreset", coreset, ["num_loss_tokens"]),
    ):
        missing = [one for one in needed if one not in dataset.column_names]
        if missing:
            raise ValueError(
                f"The {name} has no column {' and no '.join(missing)} (its columns: {dataset.column_names}). Score it "
                "with `trainer.score_influence()`, and select the coreset from the scored pool."
            )
    tokens, scores = read_scores(scored, "num_loss_tokens"), read_scores(scored, column)
    carries_loss = (tokens > 0) & ~np.isnan(scores)
    tokens, scores = tokens[carries_loss], scores[carries_loss]
    kept = read_scores(coreset, "num_loss_tokens")
    kept = kept[kept > 0]
    if len(tokens) < MIN_ROWS or len(kept) == 0:
        raise ValueError(
            f"{len(tokens)} rows of the pool and {len(kept)} of the coreset carry loss, which says nothing about "
            f"their lengths: at least {MIN_ROWS} and 1 are needed. Use a larger pool."
        )
    constant = np.ptp(tokens) == 0 or np.ptp(scores) == 0
    gap = float(ks_2samp(kept, tokens, method="asymp").statistic)
    result = Lengths(
        spearman=None if constant else float(spearmanr(scores, tokens).statistic),
        pool_tokens=float(tokens.mean()),
        coreset_tokens=float(kept.mean()),
        ratio=float(kept.mean() / tokens.mean()),
        gap=gap,
        warning=None,
    )
    if gap > MAX_LENGTH_GAP:
        result["warning"] = (
            f"The coreset's rows are {'longer' if result['ratio'] > 1 else 'shorter'} than the pool's: "
            f"{result['coreset_tokens']:.0f} loss tokens on average against {result['pool_tokens']:.0f}. Part of what "
            "it gains or loses may be length. Compare it with `hf_in2core.selection.baselines.select_length_matched`, "
            'and see whether another `loss_reduction` or `estimator="gradient_cosine"` ranks the same rows first.'
        )
    return result
