"""Columns made of other columns of a scored pool: ranks fused, and relevance with quality. No model is needed."""

from collections.abc import Sequence

import numpy as np
from datasets import Dataset, Value

from hf_in2core.names import FUSED_RANK
from hf_in2core.rows.scored import rank_rows, read_scores


# As in the paper of reciprocal rank fusion: the first few ranks do not decide alone.
FUSION_CONSTANT = 60


def add_fused_rank(scored: Dataset, columns: Sequence[str], name: str = FUSED_RANK) -> Dataset:
    r"""
    Add the rank by several columns together: reciprocal rank fusion (Cormack et al., SIGIR 2009).

        s(row) = sum_c 1 / (60 + rank_c(row)),  the largest first

    Args:
        scored ([`~datasets.Dataset`]):
            Rows with the columns, each of which has its best rows at its smallest values.
        columns (`Sequence[str]`):
            At least two, such as `["cosine_rank", "rds_rank"]`.
        name (`str`, *optional*, defaults to `"fused_rank"`):
            The column to add.

    Returns:
        [`~datasets.Dataset`]: the rows with `name` (int64, 0 = first); null where one of the columns is.

    Raises:
        ValueError: if a column is missing or fewer than two are given.
    """
    if len(columns) < 2:
        raise ValueError(f"columns={list(columns)}: one rank alone is fused with nothing. Give at least two columns.")
    values = np.stack([read_scores(scored, column) for column in columns])
    ranks = np.stack([rank_rows(np.where(np.isnan(values).any(axis=0), np.nan, column)) for column in values])
    return _add_rank(scored, -(1 / (FUSION_CONSTANT + ranks)).sum(axis=0), name)


def add_clean_rank(scored: Dataset, relevance: str, quality: str, name: str, worst: float = 0.25) -> Dataset:
    """
    Add relevance then quality: the rank by one column, with the worst rows by another behind all others.

    A wrong answer to the right question is as relevant as the right one; what a reference model finds most unlikely
    (`quality="loss"`) has more of the wrong ones.

    Args:
        scored ([`~datasets.Dataset`]):
            Rows with both columns, each of which has its best rows at its smallest values.
        relevance (`str`):
            Column that ranks, such as `"rds_rank"`.
        quality (`str`):
            Column whose largest values are the worst, such as `"loss"`.
        name (`str`):
            The column to add.
        worst (`float`, *optional*, defaults to `0.25`):
            Share of the rows that goes behind the others.

    Returns:
        [`~datasets.Dataset`]: the rows with `name` (int64, 0 = first); null where one of the columns is.

    Raises:
        ValueError: if a column is missing.
    """
    ranks, losses = read_scores(scored, relevance), read_scores(scored, quality)
    ranks = rank_rows(np.where(np.isnan(losses), np.nan, ranks))
    known = np.isfinite(ranks)
    behind = rank_rows(np.where(known, losses, np.nan)) >= round((1 - worst) * known.sum())
    return _add_rank(scored, ranks + len(ranks) * behind, name)


def _add_rank(scored: Dataset, values: np.ndarray, name: str) -> Dataset:
    ranks = [None if np.isnan(rank) else int(rank) for rank in rank_rows(values)]
    return scored.add_column(name, ranks, feature=Value("int64"))
