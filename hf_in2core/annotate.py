"""The columns that scoring adds to a dataset."""

import numpy as np
from datasets import Dataset, Value


def add_influence_columns(dataset: Dataset, columns: dict[str, np.ndarray]) -> Dataset:
    """
    Add scored columns and the global rank to a dataset.

    Args:
        dataset ([`~datasets.Dataset`]):
            Raw rows.
        columns (`dict[str, numpy.ndarray]`):
            `influence` and others, `[n]`; NaN becomes null.

    Returns:
        [`~datasets.Dataset`]
    """
    influence = columns["influence"]
    carries_loss = ~np.isnan(influence)
    order = np.argsort(influence[carries_loss], kind="stable")
    ranks = np.empty(len(order), dtype=np.int64)
    ranks[order] = np.arange(len(order))
    rank_column: list[int | None] = [None] * len(influence)
    for row, rank in zip(np.flatnonzero(carries_loss), ranks, strict=True):
        rank_column[row] = int(rank)
    for name, column in columns.items():
        if column.dtype == np.int64:
            dataset = dataset.add_column(name, column, feature=Value("int64"))
            continue
        values = [None if np.isnan(value) else float(value) for value in column]
        dataset = dataset.add_column(name, values, feature=Value("float64"))
        if name == "influence":
            dataset = dataset.add_column("influence_rank", rank_column, feature=Value("int64"))
    return dataset
