"""How far influence goes with length: raw influence favours long or short rows, whatever they say."""

from dataclasses import dataclass

import numpy as np
from datasets import Dataset
from scipy.stats import ks_2samp, spearmanr

from hf_in2core.names import INFLUENCE, NUM_LOSS_TOKENS
from hf_in2core.notebook import render_html, show_figure
from hf_in2core.rows.scored import read_scores


# A coreset whose lengths differ by more is warned of: a gap of 0.25 means that at least a quarter of its rows would
# have to be swapped for others to give it the lengths of the pool.
MAX_LENGTH_GAP = 0.25
MIN_ROWS = 10
LENGTH_BINS = 20


@dataclass(frozen=True, repr=False)
class Lengths:
    """
    What [`compare_lengths`] returns; a notebook shows it as a table.

    Attributes:
        spearman (`float` or `None`): Rank correlation of what the rows were selected by with `num_loss_tokens` over
            the pool. For influence (negative = proponent) below 0 means that long rows come first. `None` if either
            is constant.
        pool_tokens, coreset_tokens (`float`): Mean `num_loss_tokens` of a row.
        ratio (`float`): `coreset_tokens / pool_tokens`.
        gap (`float`): Largest distance between the two cumulative distributions of lengths (Kolmogorov-Smirnov), 0 =
            the same lengths, 1 = no overlap.
        warning (`str` or `None`): What to do, if the gap is above 0.25.
    """

    spearman: float | None
    pool_tokens: float
    coreset_tokens: float
    ratio: float
    gap: float
    warning: str | None

    def __repr__(self) -> str:
        return f"Lengths({', '.join(f'{name} {value}' for name, value in self._rows())}; {self.warning or 'alike'})"

    def _repr_html_(self) -> str:
        note = "A rank correlation below 0 means that long rows come first (negative influence = proponent)."
        title = "Lengths of the coreset against the pool"
        return render_html(title, self._rows(), notes=[self.warning or "", note])

    def _rows(self) -> list[tuple[str, str]]:
        return [
            ("loss tokens per row of the pool", show_figure(self.pool_tokens)),
            ("of the coreset", show_figure(self.coreset_tokens)),
            ("ratio", show_figure(self.ratio)),
            ("gap (0 = the same lengths, 1 = no overlap)", show_figure(self.gap)),
            ("rank correlation with length", show_figure(self.spearman)),
        ]


def correlate_with_length(scores: np.ndarray, num_loss_tokens: np.ndarray) -> float | None:
    """Spearman's rank correlation of scores and lengths, `[n]` each; `None` below three rows or for a constant."""
    if len(scores) < 3 or np.ptp(scores) == 0 or np.ptp(num_loss_tokens) == 0:
        return None
    return float(spearmanr(scores, num_loss_tokens).statistic)


def compare_lengths(scored: Dataset, coreset: Dataset, column: str = INFLUENCE) -> Lengths:
    r"""
    Compare the lengths of a coreset's rows with those of the pool, and tell how the ranking goes with length.

    ```python
    >>> lengths = compare_lengths(scored, select_coreset(scored, fraction=0.25))
    >>> lengths.warning
    ```

    Args:
        scored ([`~datasets.Dataset`]):
            Scored pool with `num_loss_tokens`; rows without a loss token are left out.
        coreset ([`~datasets.Dataset`]):
            Rows selected from it, with `num_loss_tokens`.
        column (`str`, *optional*, defaults to `"influence"`):
            What they were selected by.

    Returns:
        [`Lengths`]

    Raises:
        ValueError: if a column is missing, or fewer than 10 rows of the pool or no row of the coreset carry loss.
    """
    for name, dataset, needed in (
        ("pool", scored, [column, NUM_LOSS_TOKENS]),
        ("coreset", coreset, [NUM_LOSS_TOKENS]),
    ):
        missing = [one for one in needed if one not in dataset.column_names]
        if missing:
            raise ValueError(
                f"The {name} has no column {' and no '.join(missing)} (its columns: {dataset.column_names}). Score it "
                "with `trainer.score_influence()`, and select the coreset from the scored pool."
            )
    tokens, scores = read_scores(scored, NUM_LOSS_TOKENS), read_scores(scored, column)
    carries_loss = (tokens > 0) & ~np.isnan(scores)
    tokens, scores = tokens[carries_loss], scores[carries_loss]
    kept = read_scores(coreset, NUM_LOSS_TOKENS)
    kept = kept[kept > 0]
    if len(tokens) < MIN_ROWS or len(kept) == 0:
        raise ValueError(
            f"{len(tokens)} rows of the pool and {len(kept)} of the coreset carry loss, which says nothing about "
            f"their lengths: at least {MIN_ROWS} and 1 are needed. Use a larger pool."
        )
    gap = float(ks_2samp(kept, tokens, method="asymp").statistic)
    pool_mean, mean = float(tokens.mean()), float(kept.mean())
    warning = (
        f"The coreset's rows are {'longer' if mean > pool_mean else 'shorter'} than the pool's: {mean:.0f} loss "
        f"tokens on average against {pool_mean:.0f}. Part of what it gains or loses may be length. Compare it with "
        "`hf_in2core.selection.baselines.select_length_matched`, and see whether another `loss_reduction` or "
        '`estimator="gradient_cosine"` ranks the same rows first.'
    )
    return Lengths(
        spearman=correlate_with_length(scores, tokens),
        pool_tokens=pool_mean,
        coreset_tokens=mean,
        ratio=mean / pool_mean,
        gap=gap,
        warning=warning if gap > MAX_LENGTH_GAP else None,
    )


def match_lengths(scored: Dataset, coreset: np.ndarray, seed: int = 0) -> np.ndarray:
    """
    Draw rows that are as long as those of a coreset: what of its gain is due to length alone.

    The rows that carry loss are cut into 20 bins of equal size by `num_loss_tokens`; from each as many are drawn as
    the coreset has there.

    Args:
        scored ([`~datasets.Dataset`]): Scored pool, with `num_loss_tokens`.
        coreset (`numpy.ndarray` of int64): Positions of the coreset's rows.
        seed (`int`, *optional*, defaults to `0`): Seed of the draw.

    Returns:
        `numpy.ndarray` of int64: positions, ascending, as many as the coreset has.

    Raises:
        ValueError: if there is no `num_loss_tokens`.
    """
    if NUM_LOSS_TOKENS not in scored.column_names:
        raise ValueError(
            f"The dataset has no column {NUM_LOSS_TOKENS!r} to match lengths by (its columns: {scored.column_names}). "
            "Score it first: `trainer.score_influence()`."
        )
    rows = np.flatnonzero(np.isfinite(read_scores(scored, INFLUENCE)))
    lengths = read_scores(scored, NUM_LOSS_TOKENS)[rows]
    in_coreset = np.isin(rows, coreset)
    generator = np.random.default_rng(seed)
    # Equal lengths fall on either side of a border in a random order, not in that of the pool.
    shuffled = generator.permutation(len(rows))
    by_length = shuffled[np.argsort(lengths[shuffled], kind="stable")]
    drawn = [
        generator.choice(members, int(in_coreset[members].sum()), replace=False)
        for members in np.array_split(by_length, min(LENGTH_BINS, len(rows)))
    ]
    return np.sort(rows[np.concatenate(drawn)])
