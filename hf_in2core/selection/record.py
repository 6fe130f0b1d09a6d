"""Which rows a run's arms have: chosen once from the scored pool, written down as `coresets.json`, and read by all.

What is trained on, published and shown are these rows. The file holds, under one name each (`coreset_25`), the
arguments of [`select_coreset`], the positions of the rows in the pool, and what chose each: lists of the same length.
"""

import json
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from hf_in2core.files import write_whole
from hf_in2core.names import (
    INFLUENCE,
    LENGTH_MATCHED,
    METHODS,
    TAKEN_BY,
    TAKING_SCORES,
    name_coreset,
    parse_coreset,
)
from hf_in2core.rows.scored import hash_scores, read_scores

from .coreset import choose_positions, find_column
from .lengths import match_lengths
from .turns import name_taker, read_taking


RECORD = "coresets.json"
# Version 1 knows the rows, but not what chose each.
RECORD_VERSION = 2
# A coreset of random rows, where no method was better, is another draw than those of the random arm.
OWN_SEED = 10_000
# The strategy of a coreset is the run's own.
ARM_STRATEGIES = {"full": "top", "random": "random", "opponents": "bottom"}


@dataclass(frozen=True)
class Coreset:
    """
    Rows that were chosen from a scored pool.

    Attributes:
        arguments (`dict`):
            Those of [`select_coreset`] that chose them; `spared` holds those of the coreset whose rows were taken only
            once no others were left, `as_long_as` those of the coreset whose lengths random rows have.
        rows_with_loss (`int`):
            Rows of the pool that they were chosen from.
        positions (`list[int]`):
            Where they stand in the pool, ascending.
        turns (`list[int]`, *optional*):
            When each was taken, 0 = first. `None` where a version before this was recorded has chosen.
        scores (`list[float]`, *optional*):
            What each was taken for: influence, or on whom took it; of a rank the score that is kept beside it. `None`
            likewise, and for random rows.
        takers (`list[int]` or `list[str]`, *optional*):
            The validation row or the named set that took each. `None` likewise, and where a column alone decided.
    """

    arguments: dict[str, Any]
    rows_with_loss: int
    positions: list[int]
    turns: list[int] | None = None
    scores: list[float] | None = None
    takers: list[int] | list[str] | None = None

    def take_from(self, scored: Dataset) -> Dataset:
        """Its rows as [`select_coreset`] returns them: the smallest influence, or value of another column, first."""
        scores = read_scores(scored, self.arguments.get("column", INFLUENCE))
        positions = np.array(self.positions)
        return scored.select(positions[np.argsort(scores[positions], kind="stable")])

    def describe_rows(self, validation_sets: Mapping[str, int]) -> dict[int, str]:
        """What chose each row, in words, by its position; empty where that is not recorded."""
        if self.turns is None or self.scores is None:
            return {}
        column = self.arguments.get("column", INFLUENCE)
        given = " given the rows before" if self.arguments["strategy"] == "greedy" else ""
        what = TAKING_SCORES[TAKEN_BY[column]] if column in TAKEN_BY else f"influence on it{given}"
        takers = [None] * len(self.turns) if self.takers is None else self.takers
        # Of a rank alone the value is the turn, which is told already.
        alone = "" if column.endswith("_rank") else f" for its {column}, {{:+.3g}}"
        return {
            row: f"taken in turn {turn:,}{alone.format(score)}"
            if taker is None
            else f"taken in turn {turn:,} by {name_taker(taker, validation_sets)}, {what} {score:+.3g}"
            for row, turn, score, taker in zip(self.positions, self.turns, self.scores, takers, strict=True)
        }

    def turn_of(self) -> dict[int, int]:
        """The turn of each row by its position; empty where that is not recorded."""
        return {} if self.turns is None else dict(zip(self.positions, self.turns, strict=True))


def describe_choice(
    arm: str, fraction: float, seed: int = 0, strategy: str = "top", groups: Mapping[str, str] | None = None
) -> tuple[str, dict[str, Any]]:
    """
    What an arm's rows are called in the record, and the arguments of [`select_coreset`] that choose them.

    Rows that are drawn have their seed in the name: `random_25-seed0`. `strategy` is that of the arm `coreset`, or one
    of `METHODS`, which are arms too. The coreset's rows are no opponents, and as long as those of `length_matched`.
    `groups` are `group_column` and `group_quota`, within which the coreset and the methods choose and controls do not.
    """
    name, coreset = name_coreset(fraction, arm), _describe_strategy(strategy, fraction, groups)
    if arm == "coreset":
        return name, coreset
    if arm == LENGTH_MATCHED:
        return f"{name}-seed{seed}", {"as_long_as": coreset, "seed": seed}
    arguments = _describe_strategy(ARM_STRATEGIES.get(arm, arm), fraction, groups if arm in METHODS else None)
    if arm == "random":
        return f"{name}-seed{seed}", arguments | {"seed": seed}
    return name, arguments | ({"spared": coreset} if arm == "opponents" else {})


def _describe_strategy(strategy: str, fraction: float, groups: Mapping[str, str] | None) -> dict[str, Any]:
    strategy, column = find_column(strategy)
    seed = {"seed": OWN_SEED} if strategy == "random" else {}
    return {"strategy": strategy, "column": column, "fraction": fraction, **seed, **(groups or {})}


def take_coresets(
    run: str | Path,
    scored: Dataset,
    wanted: Mapping[str, Mapping[str, Any]],
    renew: bool = False,
    write: bool = True,
) -> dict[str, Coreset]:
    """
    Take the recorded coresets of a run; those that are wanted and not recorded are chosen now, and recorded.

    Args:
        run (`str` or `Path`):
            Folder of the run.
        scored ([`~datasets.Dataset`]):
            Its scored pool.
        wanted (`Mapping[str, Mapping]`):
            Name → arguments, as of [`describe_choice`].
        renew (`bool`, *optional*, defaults to `False`):
            For the run itself: choose again what was chosen from other scores or by other arguments.
        write (`bool`, *optional*, defaults to `True`):
            Whether this process writes, where there is something new. A folder that is only read may be read-only.

    Returns:
        `dict[str, Coreset]`: all that the record has then, by name.

    Raises:
        ValueError: if what is recorded was chosen from other scores, or by a newer version; or as
            [`select_coreset`].
    """
    path, scores = Path(run) / RECORD, hash_scores(scored)
    recorded_from, recorded = read_record(path, len(scored))
    if recorded and recorded_from != scores:
        if not renew:
            raise ValueError(
                f"{path} holds rows that were chosen from other scores than those in {path.parent / 'scored'}: the "
                "run was interrupted, or its scores were replaced. Start `in2core run` again into this folder."
            )
        recorded = {}
    coresets = dict(recorded)
    for name, arguments in wanted.items():
        before = recorded.get(name)
        is_same = before is not None and before.arguments == arguments
        if before is not None and (before.turns is not None if is_same else not renew):
            continue
        chosen = choose_coreset(scored, arguments, coresets.values())
        # What was trained on stays; where it would be chosen again, it is known now what chose each row.
        if before is None or not is_same or before.positions == chosen.positions:
            coresets[name] = chosen
    if write and coresets != recorded and (renew or os.access(path.parent, os.W_OK)):
        write_record(path, scores, coresets)
    return coresets


def choose_coreset(scored: Dataset, arguments: Mapping[str, Any], coresets: Iterable[Coreset] = ()) -> Coreset:
    """Choose rows by the arguments of a [`Coreset`]; others that they name may be among `coresets`."""
    options, column = dict(arguments), arguments.get("column", INFLUENCE)
    with_loss = int(np.isfinite(read_scores(scored, column)).sum())
    for key in ("spared", "as_long_as"):
        if other := options.pop(key, None):
            recorded = (coreset.positions for coreset in coresets if coreset.arguments == other)
            options[key] = next(recorded, None) or choose_positions(scored, **other).positions.tolist()
    if "as_long_as" in options:
        positions = match_lengths(scored, np.array(options["as_long_as"]), options["seed"])
        return Coreset(dict(arguments), with_loss, positions.tolist())
    choice = choose_positions(scored, **options)
    scores, takers = choice.scores, choice.takers
    if options.get("strategy", "top") == "top" and (taking := read_taking(scored, column)) is not None:
        scores, takers = taking.scores[choice.positions], taking.takers[choice.positions].astype(np.int64)
    lists = (None if values is None else values.tolist() for values in (choice.turns, scores, takers))
    return Coreset(dict(arguments), with_loss, choice.positions.tolist(), *lists)


def read_record(path: Path, num_rows: int) -> tuple[str, dict[str, Coreset]]:
    """
    Read the scores' hash and the coresets of a `coresets.json`; none where it is missing or damaged.

    Raises:
        ValueError: if a newer version has written it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format_version"] > RECORD_VERSION:
            raise ValueError(
                f"{path} has format version {content['format_version']}, but this hf_in2core reads up to "
                f"{RECORD_VERSION}. Upgrade: `pip install -U hf-in2core`."
            )
        coresets = {name: Coreset(**entry) for name, entry in content["coresets"].items()}
        valid = all(_is_valid(coreset, num_rows) for coreset in coresets.values())
        return content["scores"], coresets if valid else {}
    except (OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        return "", {}


def read_choice(scored: str | Path, fraction: float | None = None) -> dict[str, Any]:
    """
    By which arguments of [`select_coreset`], the fraction aside, a run chose the coreset from its pool.

    Args:
        scored (`str` or `Path`):
            The pool as it was given, such as `RUN/scored`.
        fraction (`float`, *optional*):
            The fraction whose coreset is meant where the run has it; else that of the run's first fraction.

    Returns:
        `dict`: empty where no run has chosen from it.
    """
    run = Path(scored).expanduser().absolute().parent
    _, recorded = read_record(run / RECORD, sys.maxsize)
    try:
        # The record keeps what runs with other fractions have chosen before.
        last = json.loads((run / "results.json").read_text(encoding="utf-8"))["config"]["fractions"]
    except (OSError, ValueError, KeyError, TypeError):
        last = []
    wanted = [name_coreset(share) for share in (fraction, *last) if isinstance(share, float | int)]
    others = [name for name in recorded if parse_coreset(name)[0] == "coreset"]
    found = next((recorded[name].arguments for name in [*wanted, *others] if name in recorded), {})
    return {name: value for name, value in found.items() if name != "fraction"}


def _is_valid(coreset: Coreset, num_rows: int) -> bool:
    """Whether every row is one of the pool, once and in its order, and what is told of each is told of all."""
    positions = coreset.positions
    for told, kinds in ((coreset.turns, (int,)), (coreset.scores, (int, float)), (coreset.takers, (int, str))):
        if told is not None and (len(told) != len(positions) or not all(type(value) in kinds for value in told)):
            return False
    in_pool = all(type(row) is int and 0 <= row < num_rows for row in positions)
    in_order = all(first < second for first, second in zip(positions, positions[1:], strict=False))
    return bool(positions) and in_pool and in_order and isinstance(coreset.arguments, dict)


def write_record(path: Path, scores: str, coresets: Mapping[str, Coreset]) -> None:
    """Write a `coresets.json` whole or not at all, a line for each coreset: 40 MB for a million rows."""
    entries = ",\n".join(f"{json.dumps(name)}: {json.dumps(vars(coreset))}" for name, coreset in coresets.items())
    text = f'{{"format_version": {RECORD_VERSION}, "scores": "{scores}", "coresets": {{\n{entries}\n}}}}\n'
    write_whole(path, text)
