"""The columns that scoring adds to a dataset, written and read. What is missing is null there and NaN in numpy."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import xxhash
from datasets import Dataset, Features, List, Value

from hf_in2core.names import (
    INFLUENCE,
    NUM_LOSS_TOKENS,
    PER_CHECKPOINT,
    PER_QUERY,
    RANK,
    TAKEN_BY,
    list_added_columns,
    list_set_columns,
    name_taking_columns,
)


if TYPE_CHECKING:
    from hf_in2core.engine.scoring import TopRows


# Rows of `influence_per_query` that are hashed at once.
HASHED_ROWS = 10_000


def require_scores(scored: Dataset) -> None:
    """Refuse a pool that was not scored."""
    if INFLUENCE not in scored.column_names:
        raise ValueError(
            f"The pool has no column {INFLUENCE!r} (it has {', '.join(scored.column_names)}). Score it first, with "
            "InfluenceTrainer.score_influence() or dataset.map(scorer, batched=True)."
        )


# --- writing ---


def add_influence_columns(dataset: Dataset, columns: Mapping[str, np.ndarray]) -> Dataset:
    """
    Add scored columns and the global rank to a dataset, and record in the type of the rank what was added.

    The record goes wherever the column goes: into files, onto the Hub, and through `map`, `select` and `filter`.

    Args:
        dataset ([`~datasets.Dataset`]):
            Raw rows.
        columns (`dict[str, numpy.ndarray]`):
            `influence` and others, `[n]`, or `[n, Q]` for a column of lists; NaN becomes null.

    Returns:
        [`~datasets.Dataset`]
    """
    lists = {name: column for name, column in columns.items() if column.ndim == 2}
    singles = {name: column for name, column in columns.items() if name not in lists}
    ranks = [None if np.isnan(rank) else int(rank) for rank in rank_rows(columns[INFLUENCE])]
    for name, column in singles.items():
        if column.dtype == np.int64:
            dataset = dataset.add_column(name, column, feature=Value("int64"))
            continue
        values = [None if np.isnan(value) else float(value) for value in column]
        dataset = dataset.add_column(name, values, feature=Value("float64"))
        if name == INFLUENCE:
            record = json.dumps([*singles, RANK, *lists])
            dataset = dataset.add_column(RANK, ranks, feature=Value("int64", id=record))
    for name, column in lists.items():
        dataset = add_list_column(dataset, name, column)
    return dataset


def rank_rows(scores: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
    """Ranks of all scores or of those of `rows`, `[n]`: 0 = smallest, ties by position; NaN where there is none."""
    rows = np.flatnonzero(~np.isnan(scores)) if rows is None else rows
    ranks = np.full(len(scores), np.nan)
    ranks[rows[np.argsort(scores[rows], kind="stable")]] = np.arange(len(rows))
    return ranks


def spread(values: np.ndarray, rows: np.ndarray, num_rows: int) -> np.ndarray:
    """Put `[m, Q]` values of prepared rows at their positions in the pool, `[n, Q]`; NaN elsewhere."""
    spread_values = np.full((num_rows, values.shape[1]), np.nan)
    spread_values[rows] = values
    return spread_values


def add_list_column(dataset: Dataset, name: str, influence: np.ndarray) -> Dataset:
    """
    Add `influence_per_query` or another column of lists of float64, null where the row carries no loss.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows.
        name (`str`):
            Name of the column.
        influence (`numpy.ndarray` of shape `[n, Q]`):
            For example influence on every query; negative = proponent.

    Returns:
        [`~datasets.Dataset`]
    """
    empty = np.isnan(influence).any(axis=1)
    column = pa.FixedSizeListArray.from_arrays(pa.array(influence.ravel()), influence.shape[1], mask=pa.array(empty))
    feature = List(Value("float64"), length=influence.shape[1])
    return dataset.add_column(name, column, feature=feature)


def make_top_rows(top: "TopRows", validation: dict[str, Dataset]) -> Dataset:
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


def describe_columns(validation_sets: list[str]) -> dict[str, Value]:
    """The columns with one value per row that scoring adds, and their types."""
    return {
        name: Value("int64" if name in (RANK, NUM_LOSS_TOKENS) else "float64")
        for name in list_added_columns(validation_sets)
    }


# --- reading ---


def read_column(scored: Dataset, column: str) -> pa.ChunkedArray:
    """
    Read a column, and no other, as arrow.

    Raises:
        ValueError: if there is none of that name.
    """
    if column not in scored.column_names:
        raise ValueError(f"The dataset has no column {column!r} (its columns: {scored.column_names}). Score it first.")
    # Selecting the column first keeps the others (the texts) on disk; "arrow" is independent of the user's format.
    return scored.select_columns(column).with_format("arrow")[:].column(column)


def is_numeric(kind: pa.DataType) -> bool:
    """Whether a column of this type can hold scores; one that is null throughout has no other type."""
    return pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind)


def read_scores(scored: Dataset, column: str) -> np.ndarray:
    """
    Read a column of scores as float64 of shape `[rows]`, null as NaN.

    Raises:
        TypeError: if the column holds no numbers.
        ValueError: if there is none of that name, or it has infinite values.
    """
    values = read_column(scored, column)
    if not is_numeric(values.type):
        raise TypeError(f"Column {column!r} holds {values.type}, but scores are numbers. Score the dataset again.")
    scores = values.cast(pa.float64()).to_numpy().astype(np.float64)
    infinite = np.flatnonzero(np.isinf(scores))
    if len(infinite):
        raise ValueError(
            f"Column {column!r} is infinite in {len(infinite)} rows (the first is row {infinite[0]}), so they cannot "
            "be compared with the others. Look at these rows and score the dataset again, or filter them out."
        )
    return scores


def count_unscored(scored: Dataset) -> int:
    """
    How many rows have no influence after scoring: malformed ones, and those without a label.

    Args:
        scored ([`~datasets.Dataset`]):
            Rows with `influence`, null or NaN where there is none; [`~hf_in2core.rows.checks.check_rows`] tells why.
    """
    return int(np.isnan(read_scores(scored, INFLUENCE)).sum())


def read_numbers(scored: Dataset, column: str) -> np.ndarray:
    """Read what is finite of a column, as [`read_scores`] does; all NaN where it is missing or holds no numbers."""
    values = read_column(scored, column) if column in scored.column_names else None
    if values is None or not is_numeric(values.type):
        return np.full(len(scored), np.nan)
    numbers = values.cast(pa.float64()).to_numpy().astype(np.float64)
    return np.where(np.isfinite(numbers), numbers, np.nan)


def read_record(features: Mapping[str, Any]) -> list[str]:
    """The columns that the last scoring added, as it recorded them; none where there is no such record."""
    try:
        recorded = json.loads(getattr(features.get(RANK), "id", None) or "[]")
    except ValueError:  # an id of somebody else's
        return []
    return [name for name in recorded if name in features] if isinstance(recorded, list) else []


def forget_record(features: Mapping[str, Any]) -> dict[str, Any]:
    """The types of columns without what scoring and methods have recorded in them, to compare them with others."""
    recording = {RANK, *(name_taking_columns(column)[-1] for column in TAKEN_BY)}
    return {
        name: Value(feature.dtype) if name in recording and isinstance(feature, Value) else feature
        for name, feature in features.items()
    }


def find_scored_columns(features: Mapping[str, Any]) -> list[str]:
    """
    The columns that scoring added, in their order.

    Without a record (rows of `map(scorer)`, or scored by version 0.1) they are told by name and type: columns of
    numbers, or of lists of them, with the names that scoring gives.
    """
    recorded = read_record(features)
    if recorded:
        return [name for name in features if name in recorded]
    added = (INFLUENCE, RANK, NUM_LOSS_TOKENS, PER_QUERY, PER_CHECKPOINT, *find_set_columns(features))
    return [name for name in features if name in added]


def find_set_columns(features: Mapping[str, Any]) -> list[str]:
    """The columns with the influence on each of several named validation sets."""
    recorded = read_record(features)
    return [
        name
        for name in list_set_columns(recorded or list(features))
        if isinstance(features[name], Value) and features[name].dtype.startswith("float")
    ]


def find_mean_columns(scored: Dataset) -> list[str]:
    """
    Of rows scored without a record: the columns of validation sets, told by that their mean is `influence`.

    Returns:
        `list[str]`: with `influence` and the number of loss tokens; empty where there are none, or their mean is
        another, so that one of them is somebody's own.
    """
    names = find_set_columns(scored.features)
    if not names or not {INFLUENCE, NUM_LOSS_TOKENS} <= set(scored.column_names):
        return []
    mean = np.mean([read_numbers(scored, name) for name in names], axis=0)
    is_mean = np.allclose(mean, read_numbers(scored, INFLUENCE), rtol=1e-6, atol=0, equal_nan=True)
    return [INFLUENCE, *names, NUM_LOSS_TOKENS] if is_mean else []


def list_own_columns(scored: Dataset) -> list[str]:
    """A pool's own columns, without those that scoring added."""
    added = find_scored_columns(scored.features)
    return [name for name in scored.column_names if name not in added]


def read_query_scores(scored: Dataset, reader: str = "This") -> np.ndarray:
    """
    Read `influence_per_query` as float64 of shape `[Q, rows]`, NaN where the row has none; `reader` says who needs it.

    Raises:
        ValueError: if the dataset has no such column.
    """
    if PER_QUERY not in scored.column_names:
        raise ValueError(
            f"{reader} needs the column {PER_QUERY}, the influence on every validation row, but the dataset has "
            f"{scored.column_names}. Call `trainer.fit_influence(per_example=True)` before scoring."
        )
    column = read_column(scored, PER_QUERY).combine_chunks()
    filled = column.is_valid().to_numpy(zero_copy_only=False)
    values = column.drop_null().flatten().to_numpy(zero_copy_only=False)
    scores = np.full((len(column), len(values) // max(int(filled.sum()), 1)), np.nan)
    scores[filled] = values.reshape(int(filled.sum()), -1)
    return scores.T


def hash_scores(scored: Dataset) -> str:
    """Hash of the influence of every row, all that rows are chosen by: 32 hexadecimal digits."""
    digest = xxhash.xxh3_128()
    for name in [INFLUENCE, *find_set_columns(scored.features)]:
        digest.update(name.encode())
        digest.update(read_scores(scored, name).tobytes())
    if PER_QUERY in scored.column_names:
        for start in range(0, len(scored), HASHED_ROWS):
            part = scored.select(range(start, min(start + HASHED_ROWS, len(scored))))
            digest.update(read_query_scores(part).tobytes())
    return digest.hexdigest()
