"""What is kept of rows that validation rows took in turn: by whom and for what, and how far halves of those agree."""

import json
from typing import Any

import numpy as np
from datasets import Dataset

from hf_in2core.names import METHODS, name_taking_columns

from .turns import count_turns, find_sign


MIN_QUERIES, MIN_ROWS, MAX_ROWS = 10, 30, 10_000
HALVES = 10
# Of the way from chance to the same rows. In made-up pools, where the rows of interest are known, coresets below it
# had mostly found less than half of what there was to find beyond chance, and those above it more.
MIN_GAIN = 0.1
# Shares of the pool at which the overlap is kept; between two of them it is a straight line.
SHARES = (0.01, 0.02, 0.05, *(tenth / 10 for tenth in range(1, 10)))


def make_turn_columns(method: str, similarities: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """
    The columns of a round-robin: each validation row in turn takes the nearest row that none has taken yet.

    Args:
        method (`str`):
            Of `TAKING_SCORES`.
        similarities (`np.ndarray` of shape `[Q, n]`):
            The score of every row on every validation row: for cosines of influence the smallest is taken first, for
            similarities the largest.

    Returns:
        `tuple`: `<method>_rank` (the turn, 0 = taken first), `<method>_score` (that of the row on who took it) and
        `<method>_taker` (which of the validation rows that was), `[n]` each; and what is recorded in the type of the
        last, as of [`read_overlap`].
    """
    set_scores = similarities if find_sign(method) > 0 else -similarities
    turns = count_turns(set_scores).astype(np.int64)
    takers = turns % len(similarities)
    rank = METHODS[method].column
    score, taker = name_taking_columns(rank)
    columns = {rank: turns, score: similarities[takers, np.arange(len(turns))], taker: takers}
    halves = measure_halves(set_scores)
    return columns, {} if halves is None else {taker: json.dumps({"halves": halves})}


def measure_halves(set_scores: np.ndarray, seed: int = 0) -> dict[str, list[float]] | None:
    """
    Measure how far two halves of the validation rows, each taking rows in turn, choose the same ones.

    Args:
        set_scores (`np.ndarray` of shape `[Q, n]`):
            The smallest is taken first. Of more than 10,000 rows a seeded sample is looked at.
        seed (`int`, *optional*, defaults to `0`):
            Of the sample and the halves.

    Returns:
        `dict`: `shares` of the pool, and `overlap`: of the rows that one half chooses, the share that the other half
        chooses too, mean over 10 random halves; that of random rows is the share of the pool itself. `None` for fewer
        than 10 validation rows or 30 rows, which say nothing.
    """
    num_queries, num_rows = set_scores.shape
    if num_queries < MIN_QUERIES or num_rows < MIN_ROWS:
        return None
    generator = np.random.default_rng(seed)
    if num_rows > MAX_ROWS:
        set_scores = set_scores[:, generator.choice(num_rows, MAX_ROWS, replace=False)]
    counts = [max(round(share * set_scores.shape[1]), 1) for share in SHARES]
    found = np.zeros(len(counts))
    for _ in range(HALVES):
        parts = np.array_split(generator.permutation(num_queries), 2)
        # A row is in both coresets of `count` rows if the later of its two turns is among the first `count`.
        later = np.maximum(*(count_turns(set_scores[part]) for part in parts))
        found += [(later < count).sum() / count for count in counts]
    return {"shares": list(SHARES), "overlap": [round(float(value), 4) for value in found / HALVES]}


def find_overlap(halves: Any, fraction: float) -> float | None:
    """The overlap of [`measure_halves`] at a fraction; `None` where it was not measured."""
    try:
        shares, overlap = halves["shares"], halves["overlap"]
        return float(np.interp(fraction, [0, *shares, 1], [overlap[0], *overlap, 1]))
    except (KeyError, TypeError, ValueError, IndexError):  # somebody else's, or none
        return None


def read_overlap(scored: Dataset, column: str, fraction: float) -> float | None:
    """The overlap at a fraction as it was recorded when the rank was made, if it was."""
    *_, taker = name_taking_columns(column) or ("",)
    try:
        record = json.loads(getattr(scored.features.get(taker), "id", None) or "null")
    except ValueError:  # an id of somebody else's
        return None
    return find_overlap(record.get("halves") if isinstance(record, dict) else None, fraction)


def say_overlap(overlap: float | None, fraction: float) -> tuple[str, str | None]:
    """What halves of the validation rows share, in a sentence, and what to do where it is hardly more than chance."""
    if overlap is None:
        return "How far two halves of the validation rows choose alike was not measured for rows taken in turn.", None
    share = f"{100 * fraction:.3g} %"
    told = (
        f"Two halves of the validation rows, each choosing {share} of the pool in turn, have {100 * overlap:.0f} % of "
        f"their rows in common, where random rows have {share}."
    )
    if fraction >= 1 or overlap - fraction >= MIN_GAIN * (1 - fraction):
        return told, None
    return told, (
        f"{told} Which rows are chosen is mostly chance: use more validation rows, or let short runs find another way "
        "to choose (`--strategy auto`)."
    )
