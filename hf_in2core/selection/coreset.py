"""`select_coreset`: fewer rows out of a scored pool. Needs datasets, numpy and pyarrow only.

Sign: negative influence = proponent (training on the row lowers the validation loss), positive = opponent.
"""

import operator
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, IterableDataset, IterableDatasetDict, Value

from hf_in2core.names import GROUP_QUOTAS, INFLUENCE, METHODS, STRATEGIES
from hf_in2core.rows.scored import read_column, read_scores

from .greedy import take_greedy
from .turns import TakenRows, read_taking_scores, take_round_robin


ORDERS = ("influence", "original")


@dataclass(frozen=True)
class Choice:
    """
    Rows that were chosen, and what chose each.

    Attributes:
        positions (`np.ndarray` of shape `[k]`, int64):
            Where they stand in the pool, ascending.
        turns (`np.ndarray` of shape `[k]`, int64):
            When each was taken, 0 = first; with groups, of its group.
        scores (`np.ndarray` of shape `[k]`, float64, *optional*):
            What each was taken for: its value of the column, or its influence on the validation row or set that took
            it (with `"greedy"`, given the rows taken before). `None` for random rows, which nothing decided.
        takers (`np.ndarray` of shape `[k]`, *optional*):
            Which validation row (int64), or which named set (str), took each. `None` where a column decided.
    """

    positions: np.ndarray
    turns: np.ndarray
    scores: np.ndarray | None
    takers: np.ndarray | None


def select_coreset(
    scored: Dataset,
    *,
    fraction: float | None = None,
    size: int | None = None,
    strategy: str = "top",
    column: str = INFLUENCE,
    proponents_only: bool = False,
    group_column: str | None = None,
    group_quota: str = "proportional",
    order: str = "influence",
    seed: int = 0,
) -> Dataset:
    r"""
    Select a coreset: the rows of a scored pool that are worth training on.

    ```python
    >>> from hf_in2core import select_coreset

    >>> scored = trainer.score_influence()
    >>> coreset = select_coreset(scored, fraction=0.5)
    ```

    Negative influence = proponent (training on the row lowers the validation loss), positive = opponent. Rows whose
    `influence` is null or NaN carry no loss; they are never selected and do not count as rows that `fraction` is
    taken of. Only the columns that decide are read, so a memory-mapped pool stays on disk.

    Args:
        scored (`datasets.Dataset`):
            Pool with a numeric column `influence`, as `InfluenceTrainer.score_influence()` or
            `dataset.map(scorer, batched=True)` returns it. No other column is needed, unless `strategy` or
            `group_column` says so.
        fraction (`float`, *optional*):
            Share of the rows that carry loss to keep, in (0, 1]: `round(fraction * rows that carry loss)` rows.
            Exactly one of `fraction` and `size` must be given.
        size (`int`, *optional*):
            Number of rows to keep, at least 1.
        strategy (`str`, *optional*, defaults to `"top"`):
            Which rows are taken first:

            - `"top"`: the smallest influence first (the strongest proponents).
            - `"bottom"`: the largest influence first (the strongest opponents).
            - `"random"`: rows that carry loss, drawn under `seed` without looking at their influence. With the same
              seed and no groups, a smaller draw is contained in a larger one.
            - `"round_robin"`: for a pool scored against several named validation sets (`influence_<name>` columns).
              Each set in turn, in the order of the columns, takes its strongest proponent that no set has taken yet.
            - `"round_robin_rows"`: the same with every validation row as a set of its own, for a pool scored after
              `trainer.fit_influence(per_example=True)` (column `influence_per_query`). For a validation set of several
              tasks: their mean gradient is mostly that of the task with the largest gradients.
            - `"greedy"`: likewise, but each takes the row that helps it most given all rows taken before, so that
              copies and paraphrases of a chosen row count for less ([`greedy.take_greedy`] has the equations). For
              pools that repeat themselves. With another size it may choose other rows altogether.
            - The methods that are arms of a run, such as `"cosine"` or `"rds"`: short for the column that each ranks
              by (`cosine_rank`, `rds_rank`) and its strategy.
        column (`str`, *optional*, defaults to `"influence"`):
            Numeric column to select by in place of `influence`, such as those of [`baselines`]. Whatever it holds,
            `"top"` takes its smallest values first and `"bottom"` its largest, and null or NaN marks rows that are
            never selected: `column="rds_rank"` takes the rows closest to the validation set, `column="loss"` those of
            the lowest loss.
        proponents_only (`bool`, *optional*, defaults to `False`):
            Drop the rows with `influence` >= 0 before anything else. If fewer rows are left than asked for, all of
            them are returned, with a warning that states the counts.
        group_column (`str`, *optional*):
            Column of strings, integers or booleans that splits the rows into groups (a task, a source, a language);
            rows with null form a group of their own. `strategy` is then applied within each group.
        group_quota (`str`, *optional*, defaults to `"proportional"`):
            How many rows each group gets, always summing to the size asked for:

            - `"proportional"`: by the group's number of selectable rows, rounded by largest remainder (ties: the
              group that comes first in the pool).
            - `"equal"`: the same number for each; what a group cannot fill is shared equally by the others, and an
              indivisible rest goes to the groups that come first in the pool.
        order (`str`, *optional*, defaults to `"influence"`):
            Order of the returned rows: `"influence"` (smallest influence first, or value of `column`, whatever the
            strategy, `"random"` included) or `"original"` (as in the pool). Ties keep the order of the pool.
        seed (`int`, *optional*, defaults to `0`):
            Seed of `strategy="random"`; the other strategies draw nothing.

    Returns:
        `datasets.Dataset`: the selected rows of `scored` with all their columns. The same arguments always give the
        same rows; ties are broken by the position in the pool.

    Raises:
        `TypeError`: `scored` is not a `datasets.Dataset`, or `size`, `fraction`, `influence` or the group column has
            the wrong type.
        `ValueError`: a missing column, an option that does not exist or that needs influence where `column` is
            another, a fraction outside (0, 1], more rows asked for than carry loss, or nothing to select from.
    """
    strategy, column = find_column(strategy, column)
    positions = select_positions(
        scored,
        fraction=fraction,
        size=size,
        strategy=strategy,
        column=column,
        proponents_only=proponents_only,
        group_column=group_column,
        group_quota=group_quota,
        order=order,
        seed=seed,
    )
    return scored.select(positions)


def find_column(strategy: str, column: str = INFLUENCE) -> tuple[str, str]:
    """
    The strategy and the column that a strategy stands for, where it is the name of a method; else those given.

    Raises:
        ValueError: if a column is given with a method, which has its own.
    """
    if strategy not in METHODS:
        return strategy, column
    method = METHODS[strategy]
    if column not in (INFLUENCE, method.column):
        raise ValueError(
            f"strategy={strategy!r} ranks by the column {method.column!r}, but column={column!r} is given. Leave out "
            "one of the two."
        )
    return method.strategy, method.column


def select_positions(scored: Dataset, *, order: str = "influence", **options: Any) -> np.ndarray:
    """[`select_coreset`] where only the positions of the rows are wanted: int64 of shape `[rows kept]`."""
    _check_choice("order", order, ORDERS)
    positions = choose_positions(scored, **options).positions
    scores = read_scores(scored, options.get("column", INFLUENCE))[positions]
    return positions[np.argsort(scores, kind="stable")] if order == "influence" else positions


def choose_positions(
    scored: Dataset,
    *,
    fraction: float | None = None,
    size: int | None = None,
    strategy: str = "top",
    column: str = INFLUENCE,
    proponents_only: bool = False,
    group_column: str | None = None,
    group_quota: str = "proportional",
    seed: int = 0,
    spared: Sequence[int] = (),
) -> Choice:
    """
    [`select_coreset`] with what chose each row.

    `spared` are rows that `strategy="bottom"` takes only once no others are left.
    """
    _check_dataset(scored, column)
    _check_choice("strategy", strategy, STRATEGIES)
    _check_choice("group_quota", group_quota, GROUP_QUOTAS)
    if group_column is None and group_quota != "proportional":
        raise ValueError(
            f"group_quota={group_quota!r} shares the rows between groups, but no groups are given. Pass group_column, "
            f"one of the columns {scored.column_names}."
        )
    if group_column is not None and group_column not in scored.column_names:
        raise ValueError(f"group_column={group_column!r} is not a column of the dataset: {scored.column_names}.")
    _check_request(fraction, size)
    if column != INFLUENCE and (proponents_only or strategy.startswith(("round_robin", "greedy"))):
        asked = "proponents_only=True" if proponents_only else f"strategy={strategy!r}"
        raise ValueError(
            f"{asked} needs influence, whose sign means something, but column={column!r} is to select. Leave out one "
            "of the two."
        )

    influence = read_scores(scored, column)
    rows = np.flatnonzero(~np.isnan(influence))
    if len(rows) == 0:
        raise ValueError(
            f"{column} is null or NaN in all {len(influence)} rows: no row carries loss, so there is nothing to "
            "select. Check the labels (masks, max_length) with which the pool was scored."
        )
    count = _resolve_size(fraction, size, num_loss_rows=len(rows), num_rows=len(influence))

    if proponents_only:
        proponents = rows[influence[rows] < 0]
        if len(proponents) == 0:
            raise ValueError(
                f"proponents_only=True drops the rows with influence >= 0, and none of the {len(rows)} rows that "
                f"carry loss is left (smallest influence: {influence[rows].min():.3g}). Nothing in this pool lowers "
                "the validation loss: use another validation set or pool, or proponents_only=False."
            )
        if len(proponents) < count:
            warnings.warn(
                f"{count} rows were asked for, but only {len(proponents)} of the {len(rows)} rows that carry loss are "
                f"proponents (influence < 0); proponents_only=True returns these {len(proponents)}.",
                stacklevel=4,
            )
        rows, count = proponents, min(count, len(proponents))

    takers, set_scores = read_taking_scores(scored, strategy)
    generator = np.random.default_rng(seed)
    groups, quotas = [rows], [count]
    if group_column is not None:
        groups = _read_groups(scored, group_column, rows)
        quotas = _compute_quotas([len(group) for group in groups], count, group_quota)
    taken = [
        _take(group, quota, strategy, influence, set_scores, generator, spared)
        for group, quota in zip(groups, quotas, strict=True)
    ]
    turns = np.concatenate([np.arange(len(part.rows)) for part in taken])
    parts = TakenRows(*(np.concatenate(values) for values in zip(*taken, strict=True)))
    order = np.argsort(parts.rows, kind="stable")
    return Choice(
        positions=parts.rows[order],
        turns=turns[order],
        scores=None if strategy == "random" else parts.scores[order],
        takers=None if takers is None else takers[parts.takers[order]],
    )


def _take(
    rows: np.ndarray,
    count: int,
    strategy: str,
    influence: np.ndarray,
    set_scores: np.ndarray,
    generator: np.random.Generator,
    spared: Sequence[int],
) -> TakenRows:
    """Take `count` of the row positions `rows` (int64, ascending) by the strategy."""
    if strategy == "greedy":
        return take_greedy(set_scores.T, rows, count)
    if strategy.startswith("round_robin"):
        taken, takers = take_round_robin(rows, count, set_scores), np.arange(count) % len(set_scores)
        return TakenRows(taken, set_scores[takers, taken], takers)
    if strategy == "top":
        taken = rows[np.argsort(influence[rows], kind="stable")[:count]]
    elif strategy == "bottom":
        taken = rows[np.lexsort((-influence[rows], np.isin(rows, spared)))[:count]]
    else:
        taken = generator.permutation(rows)[:count]
    return TakenRows(taken, influence[taken], np.zeros(count, dtype=np.int64))


def _compute_quotas(sizes: list[int], count: int, group_quota: str) -> list[int]:
    """Share `count` rows between groups that hold `sizes` rows; no quota exceeds its size and the sum is `count`."""
    if group_quota == "proportional":
        total = sum(sizes)
        # Integer arithmetic: with floats, equal remainders would be ordered by rounding errors.
        quotas = [count * size // total for size in sizes]
        by_remainder = sorted(range(len(sizes)), key=lambda i: -(count * sizes[i] % total))
        for i in by_remainder[: count - sum(quotas)]:
            quotas[i] += 1
        return quotas

    quotas = [0] * len(sizes)
    while (rest := count - sum(quotas)) > 0:
        open_groups = [i for i, size in enumerate(sizes) if quotas[i] < size]
        share = rest // len(open_groups)
        if share == 0:
            for i in open_groups[:rest]:
                quotas[i] += 1
        else:
            for i in open_groups:
                quotas[i] = min(sizes[i], quotas[i] + share)
    return quotas


def _read_groups(scored: Dataset, group_column: str, rows: np.ndarray) -> list[np.ndarray]:
    """Split row positions into groups, in the order in which the groups first appear among `rows`."""
    feature = scored.features[group_column]
    if not isinstance(feature, (Value, ClassLabel)):
        raise TypeError(
            f"group_column={group_column!r} holds {feature}, and nested values do not name a group. Use a column of "
            "strings, integers or booleans."
        )
    # "encode" gives null a code of its own. All chunks of the result share one dictionary.
    encoded = read_column(scored, group_column).dictionary_encode(null_encoding="encode")
    codes = np.concatenate([chunk.indices.to_numpy(zero_copy_only=False) for chunk in encoded.chunks])[rows]
    _, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
    by_group = np.split(rows[np.argsort(inverse, kind="stable")], np.cumsum(np.bincount(inverse))[:-1])
    return [by_group[i] for i in np.argsort(first)]


def _check_dataset(scored: Dataset, column: str) -> None:
    if isinstance(scored, (IterableDataset, IterableDatasetDict)):
        raise TypeError(
            f"select_coreset got a {type(scored).__name__}: a stream cannot be ranked, since the rank of a row needs "
            "all the others. Load the scored dataset without streaming=True, or save the scored stream first "
            "(`Dataset.from_generator`)."
        )
    if isinstance(scored, DatasetDict):
        raise TypeError(f"select_coreset got a DatasetDict with the splits {list(scored)}: pass one of its splits.")
    if not isinstance(scored, Dataset):
        raise TypeError(f"select_coreset needs a scored datasets.Dataset, but got {type(scored).__name__}.")
    if column not in scored.column_names:
        remedy = (
            "Score it first: `trainer.score_influence()`, or `dataset.map(scorer, batched=True)` with a fitted "
            "InfluenceScorer."
            if column == INFLUENCE
            else "Add it first, for example with a function of `hf_in2core.selection.baselines`, or name one of these."
        )
        raise ValueError(f"The dataset has no column {column!r} (its columns: {scored.column_names}). {remedy}")
    if len(scored) == 0:
        raise ValueError("The dataset has no rows, so nothing can be selected. Check how it was loaded or filtered.")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} does not exist. Use one of {', '.join(repr(c) for c in choices)}.")


def _check_request(fraction: float | None, size: int | None) -> None:
    if (fraction is None) == (size is None):
        raise ValueError(f"Pass exactly one of fraction and size (got fraction={fraction}, size={size}).")
    if fraction is not None:
        if isinstance(fraction, (bool, str)):
            raise TypeError(f"fraction={fraction!r} is not a number in (0, 1].")
        if not 0 < fraction <= 1:
            raise ValueError(
                f"fraction={fraction} is outside (0, 1]: it is the share of the rows that carry loss, so half of them "
                "is fraction=0.5. For a number of rows use size."
            )
    if size is not None:
        try:
            rows = operator.index(size)
        except TypeError:
            rows = None
        if rows is None or isinstance(size, bool):
            raise TypeError(f"size={size!r} is not a whole number of rows. For a share of the rows use fraction.")
        if rows < 1:
            raise ValueError(f"size={size} keeps no row; it must be at least 1.")


def _resolve_size(fraction: float | None, size: int | None, num_loss_rows: int, num_rows: int) -> int:
    if size is not None:
        if size > num_loss_rows:
            raise ValueError(
                f"size={size} is more than the {num_loss_rows} rows that carry loss (of {num_rows} rows in all). Use "
                f"a size of at most {num_loss_rows}, or fraction=1.0 for all of them."
            )
        return operator.index(size)
    assert fraction is not None
    count = round(fraction * num_loss_rows)
    if count == 0:
        raise ValueError(
            f"fraction={fraction} of the {num_loss_rows} rows that carry loss rounds to 0 rows. Use size=1 or a "
            "larger fraction."
        )
    return count
