"""DataInf fitted on a sample of the pool that grows until two halves of it agree."""

import logging
from dataclasses import replace

import numpy as np
import torch
from datasets import Dataset
from scipy.stats import spearmanr
from torch import Tensor

from .fit_sums import FitResult, FitSums, GradientSample, sum_fit_terms
from .gradients import accumulation_dtype
from .passes import Passes
from .scoring import average_over_sets, run_score_pass


logger = logging.getLogger(__name__)

# A smaller pool is fitted whole.
MIN_SAMPLED_POOL = 1000
# A sampled fit begins with a twentieth of the pool or so many rows: agreement hangs on their number and not on the
# pool's. It doubles up to this share of the pool; then all rows are fitted.
MAX_FIRST_SAMPLE = 1024
MAX_SHARE = 0.4
MIN_AGREEMENT = 0.998


def is_sampled(num_rows: int, is_stored: bool) -> bool:
    """Whether `fit_examples="auto"` takes a sample: not of a small pool, nor where the gradients of all are kept."""
    return num_rows >= MIN_SAMPLED_POOL and not is_stored


def count_held_rows(num_rows: int) -> int:
    """Rows outside of the sample that its halves are compared on: a fortieth of the pool, 50 to 256."""
    return min(max(num_rows // 40, 50), 256)


def list_sample_sizes(num_rows: int) -> list[int]:
    """Numbers of rows that a sampled fit grows through."""
    sizes = [min(num_rows // 20, MAX_FIRST_SAMPLE)]
    while 2 * sizes[-1] <= MAX_SHARE * num_rows:
        sizes.append(2 * sizes[-1])
    return sizes


def fit_sample(
    passes: Passes,
    name: str,
    prepared: Dataset,
    order: np.ndarray,
    validation_gradients: dict[str, Tensor],
    inner_damping: dict[str, float],
    damping_scale: float,
    set_sizes: list[int] | None = None,
    sample: GradientSample | None = None,
) -> FitResult:
    """
    The fit on a sample that grows until two halves of it agree, and on all rows where they do not.

    `u` is a mean over rows. The fits on the two halves have each twice the variance of the one on the whole sample, so
    that they differ more from each other than that one does from the fit on all rows. They are compared by the scores
    that they give to rows outside of the sample: the rank correlation is to be [`MIN_AGREEMENT`] at least, on every
    validation set; where validation rows are queries, of the influence on a set's mean loss, in the mean over the
    set's queries and for the worst tenth of them (of each block of queries, where not all fit into memory).

    Args:
        order (`numpy.ndarray` of shape `[n]`):
            All positions in random order: the held-back rows, then the sample as it grows.

    The other arguments are those of [`run_fit_pass`].

    Returns:
        [`FitResult`], with `agreement` where a sample was enough.
    """
    held, candidates = np.split(order, [count_held_rows(len(order))])
    held_rows = prepared.select(np.sort(held))
    silent = replace(passes, folder=None, store=None)
    halves: list[FitSums] = []
    dtype = accumulation_dtype(next(iter(passes.blocks.values())).tensor)
    done = 0
    for size in list_sample_sizes(len(order)):
        for half in range(2):
            rows = np.sort(candidates[done:size][half::2])
            added = sum_fit_terms(
                *(passes, f"{name}-{half}-{size}", prepared, rows, validation_gradients, inner_damping), sample=sample
            )
            if len(halves) < 2:
                halves.append(added)
            else:
                halves[half].add(added)
        done = size
        directions = [half.finish(passes, validation_gradients, inner_damping, damping_scale).ihvp for half in halves]
        both = {key: torch.cat([direction.pop(key).to(dtype) for direction in directions]) for key in passes.blocks}
        scores = run_score_pass(silent, held_rows, both, cosine=False, description="Influence: rows held back")
        agreement = compare_halves(scores.influence, set_sizes)
        if agreement >= MIN_AGREEMENT:
            break
    whole = halves[0]
    whole.add(halves[1])
    if agreement >= MIN_AGREEMENT:
        if passes.rank == 0:
            logger.info("Fitted on %d rows: the scores by two halves of them agree by %.4f.", done, agreement)
        result = whole.finish(passes, validation_gradients, inner_damping, damping_scale)
        return replace(result, agreement=agreement)
    if passes.rank == 0:
        logger.warning(
            "The scores by two halves of %d rows agree by %.4f (Spearman; %.3f is asked for): fitting on all %d rows.",
            done,
            agreement,
            MIN_AGREEMENT,
            len(order),
        )
    rest = np.sort(np.concatenate([held, candidates[done:]]))
    others = sum_fit_terms(passes, f"{name}-rest", prepared, rest, validation_gradients, inner_damping)
    whole.add(others)
    return whole.finish(passes, validation_gradients, inner_damping, damping_scale)


def compare_halves(scores: np.ndarray, set_sizes: list[int] | None = None) -> float:
    """
    Agreement of two halves of a sample, from the scores `[rows, 2 * Q]` that they give to the same rows.

    Returns:
        `float` in [-1, 1]: the lowest of the sets' rank correlations; of a set of several queries the one of its mean
        influence, the mean of the queries' own or their tenth percentile, whichever is lowest. Scores that are all
        equal agree with none.
    """
    first, second = np.hsplit(scores, 2)
    count = first.shape[1]
    sizes = set_sizes or [1] * count
    found = _correlate_columns(first, second)
    means = _correlate_columns(average_over_sets(first, sizes), average_over_sets(second, sizes))
    sets = np.split(found, np.cumsum(sizes)[:-1])
    return float(min(means.min(), *(min(values.mean(), np.quantile(values, 0.1)) for values in sets)))


def _correlate_columns(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Rank correlation of each column of one with that of the other, -1 where a column is constant."""
    found = np.full(first.shape[1], -1.0)
    for column, pair in enumerate(zip(first.T, second.T, strict=True)):
        if np.ptp(pair, axis=1).all():
            found[column] = spearmanr(*pair).statistic
    return found
