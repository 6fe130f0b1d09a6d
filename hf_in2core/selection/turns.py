"""Taking rows in turn: who takes them, by which scores, and how near to its turn a row stands that nobody took."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset

from hf_in2core.names import (
    INFLUENCE,
    METHODS,
    STRATEGIES_BY_ROW,
    TAKEN_BY,
    TAKING_SCORES,
    VALIDATION,
    describe_set,
    name_set_column,
    name_taking_columns,
)
from hf_in2core.rows.scored import find_set_columns, rank_rows, read_query_scores, read_scores


BEST_RANK = "best rank"
_TAKERS = {"round_robin": "validation sets", "round_robin_rows": "validation rows", "greedy": "validation rows"}


class TakenRows(NamedTuple):
    """Rows in the order in which they were taken, `[count]` each: what each was taken for, and by whom (from 0)."""

    rows: np.ndarray
    scores: np.ndarray
    takers: np.ndarray


def take_round_robin(rows: np.ndarray, count: int, set_scores: np.ndarray) -> np.ndarray:
    """Let each validation set (rows of `set_scores`, shape `[Q, pool]`) take its next strongest proponent in turn."""
    # No queue is asked for more than `count` rows: the others have taken fewer when it is its turn.
    queues = [iter(rows[np.argsort(scores[rows], kind="stable")[:count]].tolist()) for scores in set_scores]
    taken: dict[int, None] = {}
    while len(taken) < count:
        for queue in queues:
            if len(taken) == count:
                break
            # Every queue holds `count` rows and fewer are taken, so there is always a next one.
            row = next(row for row in queue if row not in taken)
            taken[row] = None
    return np.fromiter(taken, dtype=np.int64, count=count)


def count_turns(set_scores: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
    """
    The turn at which each row is taken when the queries of `[Q, n]` scores take their strongest proponents in turn.

    Returns:
        `numpy.ndarray` of shape `[n]`, float64: 0 = taken first; NaN for rows that are not among `rows`.
    """
    rows = np.arange(set_scores.shape[1]) if rows is None else rows
    turns = np.full(set_scores.shape[1], np.nan)
    turns[take_round_robin(rows, len(rows), set_scores)] = np.arange(len(rows))
    return turns


def find_sign(method: str) -> int:
    """By what a score of `TAKING_SCORES` is multiplied so that the smallest is taken first."""
    return 1 if TAKING_SCORES[method] == "cosine" else -1


class Taking(NamedTuple):
    """By whom and for what each row was taken (`[n]` each, NaN without loss); the score in words, and its sign."""

    words: str
    sign: int
    scores: np.ndarray
    takers: np.ndarray


def read_taking(scored: Dataset, column: str) -> Taking | None:
    """What is kept beside a rank; `None` for other columns, and where a version before this made the rank."""
    names = name_taking_columns(column)
    if not names or not set(names) <= set(scored.column_names):
        return None
    method = TAKEN_BY[column]
    return Taking(TAKING_SCORES[method], find_sign(method), *(read_scores(scored, name) for name in names))


def read_taking_scores(scored: Dataset, strategy: str) -> tuple[np.ndarray | None, np.ndarray]:
    """
    Who takes rows in turn, and the influence of every row on each.

    Args:
        scored ([`~datasets.Dataset`]):
            Scored pool.
        strategy (`str`):
            As in [`~hf_in2core.select_coreset`].

    Returns:
        `tuple`: names of the validation sets, or positions of the validation rows, `[Q]`, and float64 `[Q, pool]`;
        `None` and nothing where a column decides.

    Raises:
        ValueError: if a column that is needed is missing, or a set has not scored every row that carries loss.
    """
    if strategy == "round_robin":
        names = find_set_columns(scored.features)
        return np.array([name.removeprefix(name_set_column("")) for name in names]), _read_set_scores(scored, names)
    if strategy in STRATEGIES_BY_ROW:
        set_scores = read_query_scores(scored, f"strategy={strategy!r}")
        return np.arange(len(set_scores)), set_scores
    return None, np.empty((0, len(scored)))


def _read_set_scores(scored: Dataset, names: list[str]) -> np.ndarray:
    """Read the `influence_<name>` columns of the validation sets as float64 of shape `[Q, pool]`."""
    if len(names) < 2:
        raise ValueError(
            f"strategy='round_robin' needs the influence_<name> columns of at least two validation sets, but the "
            f"dataset has {names or 'none'} (all columns: {scored.column_names}). Score it with "
            'eval_dataset={"name": ..., "other_name": ...}, or use strategy="top".'
        )
    set_scores = np.stack([read_scores(scored, name) for name in names])
    rows = np.flatnonzero(~np.isnan(read_scores(scored, INFLUENCE)))
    for name, scores in zip(names, set_scores, strict=True):
        missing = rows[np.isnan(scores[rows])]
        if len(missing):
            raise ValueError(
                f"Column {name!r} is null or NaN in {len(missing)} rows whose influence is not (the first is row "
                f"{missing[0]}), so this set cannot rank them. Score the dataset again, or drop the column."
            )
    return set_scores


@dataclass(frozen=True)
class DecidingScore:
    """
    By what the rows of a pool stand in line for a coreset, known of every row, taken or not.

    A column that decides is that score itself. Where rows are taken in turn, only those that were taken have a turn:
    the score is the best rank, the smallest of the row's ranks by its influence on each of those who take. A column of
    turns is of all rows: each has who took it, and for what.

    Attributes:
        values (`np.ndarray` of shape `[n]`): The score, the smallest first in line; NaN where a row carries no loss.
        ranks (`np.ndarray` of shape `[n]`): 0 = first in line; of best ranks, several rows have the same.
        influence (`np.ndarray` of shape `[n]`): On who ranks the row best, or its cosine; on the mean validation loss
            otherwise.
        takers (`np.ndarray` of shape `[n]`, *optional*): Who ranks the row best, or took it: a validation row (a
            number) or a named set (str). `None` where a column decides alone.
        taking ([`Taking`], *optional*): Of a column of turns, where it is kept.
        name (`str`): `"influence"` or `"best rank"`, and over whom.
        how (`str`): How the coreset was chosen, in words that follow "chosen".
        meaning (`str`): What the score is, in a sentence.
    """

    values: np.ndarray
    ranks: np.ndarray
    influence: np.ndarray
    takers: np.ndarray | None = None
    taking: Taking | None = None
    name: str = INFLUENCE
    how: str = "by influence"
    meaning: str = "Influence on the validation loss: negative = proponent."

    @cached_property
    def percentiles(self) -> np.ndarray:
        """Share of the other rows that stand before each in line, in percent, `[n]`: 0 = first; NaN without loss."""
        known = np.sort(self.values[~np.isnan(self.values)])
        before = np.where(np.isnan(self.values), np.nan, np.searchsorted(known, self.values))
        return 100 * before / max(len(known) - 1, 1)

    @cached_property
    def is_turns(self) -> bool:
        """Whether every row has a value of its own, its place in line, which tells nothing but the order."""
        known = np.sort(self.values[~np.isnan(self.values)])
        return len(known) > 0 and np.array_equal(known, np.arange(len(known)))

    @property
    def histogram(self) -> tuple[str, np.ndarray]:
        """What a histogram is of, and its values: of turns it would be flat, but not of what rows were taken for."""
        if self.taking is not None:
            minus = "" if self.taking.sign > 0 else "\N{MINUS SIGN}"
            return (
                f"{minus}{self.taking.words} with the validation row that takes it",
                self.taking.sign * self.taking.scores,
            )
        return (f"{INFLUENCE}, which did not choose", self.influence) if self.is_turns else (self.name, self.values)

    def describe(self, row: int, validation_sets: Mapping[str, int], taken: int | None = None) -> str:
        """Where a row stands in line, in words; less of it where `taken`, its turn, is told beside it."""
        if np.isnan(self.values[row]):
            return "no influence: it carries no loss"
        percentile = f"percentile {self.percentiles[row]:.1f}"
        if self.is_turns and taken == self.values[row]:
            return percentile
        if self.takers is None:
            score = "" if self.is_turns else f", {self.name} {self.values[row]:+.3g}"
            return f"rank {int(self.ranks[row]):,}, {percentile}{score}"
        taker = name_taker(self.takers[row].item(), validation_sets)
        if self.taking is not None:
            score = f"{self.taking.words} {self.taking.scores[row]:+.3g}"
            return f"turn {int(self.values[row]):,}, {percentile}, for {taker}: {score}"
        influence = f"influence on it {self.influence[row]:+.3g}"
        return f"{BEST_RANK} {int(self.ranks[row]):,} ({percentile}; for {taker}, {influence})"


def read_deciding_score(
    scored: Dataset, strategy: str = "top", column: str = INFLUENCE, group_column: str | None = None, **_: Any
) -> DecidingScore:
    """
    Read by what rows were chosen, of the arguments that chose them; groups and others leave the score as it is.

    Raises:
        ValueError: if a column that is needed is missing.
    """
    found = _read_score(scored, strategy, column)
    how = found.how if group_column is None else f"{found.how}, within each `{group_column}`"
    return replace(found, how=how)


def _read_score(scored: Dataset, strategy: str, column: str) -> DecidingScore:
    influence = read_scores(scored, INFLUENCE)
    takers, set_scores = read_taking_scores(scored, strategy)
    rows = np.flatnonzero(~np.isnan(influence))
    if takers is None:
        if column == INFLUENCE or strategy == "random":
            how = "at random" if strategy == "random" else "by influence"
            return DecidingScore(influence, rank_rows(influence), influence, how=how)
        end, sign, minus = ("largest", -1, "\N{MINUS SIGN}") if strategy == "bottom" else ("smallest", 1, "")
        values = sign * read_scores(scored, column)
        ranks = rank_rows(values)
        words = "".join(f" ({method.words})" for method in METHODS.values() if method[:2] == (column, strategy))
        meaning = f"The {end} {column} is first in line; the influence on the mean chose nothing."
        name, how = f"{minus}{column}", f"by {column}{words}"
        taking = read_taking(scored, column) if strategy == "top" else None
        if taking is None:
            return DecidingScore(values, ranks, influence, name=name, how=how, meaning=meaning)
        nearest = "smallest" if taking.sign > 0 else "largest"
        told = "; a negative cosine = proponent" if taking.sign > 0 else ""
        meaning = (
            f"Each validation row in turn takes the row of {nearest} {taking.words} with it that none has taken yet "
            f"(turn 0 = taken first{told}); the influence on the mean chose nothing."
        )
        signed = taking.scores if taking.sign > 0 else influence
        return DecidingScore(values, ranks, signed, taking.takers, taking, name=name, how=how, meaning=meaning)
    best, winners = np.full(len(influence), np.nan), np.zeros(len(influence), dtype=np.int64)
    for number, scores in enumerate(set_scores):
        ranks = rank_rows(scores, rows)
        is_better = ~(best <= ranks)
        best[is_better], winners[is_better] = ranks[is_better], number
    on_winner = set_scores[winners, np.arange(len(influence))]
    over = f"{len(takers):,} {_TAKERS[strategy]}"
    return DecidingScore(
        values=best,
        ranks=best,
        influence=on_winner,
        takers=takers[winners],
        name=f"{BEST_RANK} over {over}",
        how=f"in turn by {over}" + (", each given the rows taken before" if strategy == "greedy" else ""),
        meaning=f"Best rank: a row is ranked by its influence on each of {over}, and the smallest of its ranks counts "
        "(0 = the strongest proponent of one of them).",
    )


def find_ends(
    deciding: DecidingScore, influence: np.ndarray, kept: Iterable[int], count: int
) -> tuple[np.ndarray, np.ndarray]:
    """
    The first and the last rows in line, by the score that chose.

    Args:
        deciding ([`DecidingScore`]):
            Of the pool.
        influence (`np.ndarray` of shape `[n]`):
            On the mean validation loss.
        kept (`Iterable[int]`):
            Rows that a coreset keeps.
        count (`int`):
            The most rows of either end.

    Returns:
        `tuple`: positions of the strongest proponents (of negative influence on who ranks them best), and of the
        strongest opponents: rows of positive influence that are not kept, the last in line first.
    """
    order = np.lexsort((influence, deciding.values))[: int((~np.isnan(influence)).sum())]
    is_kept = np.zeros(len(influence), dtype=bool)
    is_kept[np.fromiter(kept, dtype=np.int64)] = True
    # Among the last of a pool that helps throughout there are proponents too.
    proponents = order[deciding.influence[order] < 0][:count]
    opponents = order[(influence[order] > 0) & ~is_kept[order]][::-1][:count]
    return proponents, opponents


def name_taker(taker: float | str, validation_sets: Mapping[str, int]) -> str:
    """Who takes rows, in words: a named set, or a validation row, counted through the sets (name → rows)."""
    if isinstance(taker, str):
        return describe_set(taker)
    row = int(taker)
    for name, rows in validation_sets.items():
        if row < rows:
            return f"{describe_set(name)} row {row:,}"
        row -= rows
    return f"{VALIDATION} row {row:,}"
