"""The columns that scoring adds to a dataset."""

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value

from hf_in2core.engine.scoring import TopRows


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


def spread(values: np.ndarray, rows: np.ndarray, num_rows: int) -> np.ndarray:
    """Put `[m, Q]` values of prepared rows at their positions in the pool, `[n, Q]`; NaN elsewhere."""
    spread_values = np.full((num_rows, values.shape[1]), np.nan)
    spread_values[rows] = values
    return spread_values


def add_query_column(dataset: Dataset, influence: np.ndarray) -> Dataset:
    """
    Add `influence_per_query`: for every row a list of `Q` float64, null where the row carries no loss.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows.
        influence (`numpy.ndarray` of shape `[n, Q]`):
            Influence on every query; negative = proponent.

    Returns:
        [`~datasets.Dataset`]
    """
    empty = np.isnan(influence).any(axis=1)
    column = pa.FixedSizeListArray.from_arrays(pa.array(influence.ravel()), influence.shape[1], mask=pa.array(empty))
    feature = List(Value("float64"), length=influence.shape[1])
    return dataset.add_column("influence_per_query", column, feature=feature)


def make_top_rows(top: TopRows, validation: dict[str, Dataset]) -> Dataset:
    """
    The strongest training rows of every validation row as a dataset.

    Args:
        top ([`TopRows`]):
            From the score pass.
        validation (`dict[str, Dataset]`):
            Prepared validation sets by name, in the order of the queries.

    Returns:
        [`~datasets.Dataset`]: one row per validation row, with `validation_set`, `validation_row` (its position),
        `proponents` and `opponents` (positions in the pool, strongest first), `proponent_influence` (negative) and
        `opponent_influence`.
    """
    num_kept = top.rows.shape[1] // 2
    columns: dict[str, list] = {
        "validation_set": [name for name, prepared in validation.items() for _ in range(len(prepared))],
        "validation_row": [row for prepared in validation.values() for row in prepared["row"]],
    }
    for name, part in (("proponent", slice(0, num_kept)), ("opponent", slice(num_kept, None))):
        found = [row[row >= 0] for row in top.rows[:, part]]
        values = [row[~np.isnan(row)] for row in top.influence[:, part]]
        columns[f"{name}s"], columns[f"{name}_influence"] = found, values
    features = Features(
        {
            "validation_set": Value("string"),
            "validation_row": Value("int64"),
            "proponents": List(Value("int64")),
            "proponent_influence": List(Value("float64")),
            "opponents": List(Value("int64")),
            "opponent_influence": List(Value("float64")),
        }
    )
    return Dataset.from_dict(columns, features=features)
