"""Which rows a run's arms have: chosen once from the scored pool, written down as `coresets.json`, and read by all.

What is trained on, published and shown are these rows. The file holds, under one name each (`coreset_25`), the
arguments of [`select_coreset`] and the positions of the rows in the pool.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from hf_in2core.names import INFLUENCE, LENGTH_MATCHED, METHODS, name_coreset
from hf_in2core.rows.scored import hash_scores, read_scores

from .coreset import select_positions
from .lengths import match_lengths


RECORD = "coresets.json"
RECORD_VERSION = 1
# The strategy of a coreset is the run's own.
# A coreset of random rows, where no method was better, is another draw than those of the random arm.
OWN_SEED = 10_000
ARM_STRATEGIES = {"full": "top", "random": "random", "opponents": "bottom"}


@dataclass(frozen=True)
class Coreset:
    """
    Rows that were chosen from a scored pool.

    Attributes:
        arguments (`dict`):
            Those of [`select_coreset`] that chose them.
        rows_with_loss (`int`):
            Rows of the pool that they were chosen from.
        positions (`list[int]`):
            Where they stand in the pool, ascending.
    """

    arguments: dict[str, Any]
    rows_with_loss: int
    positions: list[int]

    def take_from(self, scored: Dataset) -> Dataset:
        """Its rows as [`select_coreset`] returns them: the smallest influence, or value of another column, first."""
        scores = read_scores(scored, self.arguments.get("column", INFLUENCE))
        positions = np.array(self.positions)
        return scored.select(positions[np.argsort(scores[positions], kind="stable")])


def describe_choice(arm: str, fraction: float, seed: int = 0, strategy: str = "top") -> tuple[str, dict[str, Any]]:
    """
    What an arm's rows are called in the record, and the arguments of [`select_coreset`] that choose them.

    Rows that are drawn have their seed in the name: `random_25-seed0`. `strategy` is that of the arm `coreset`, or one
    of `METHODS`, which are arms too. Those of the arm `length_matched` are as long as the coreset's, which they name.
    """
    name, chosen = name_coreset(fraction, arm), METHODS.get(arm, METHODS.get(strategy))
    if arm == LENGTH_MATCHED:
        return f"{name}-seed{seed}", {"as_long_as": name_coreset(fraction), "seed": seed}
    if arm in ARM_STRATEGIES or chosen is None:
        arguments: dict[str, Any] = {"strategy": ARM_STRATEGIES.get(arm, strategy), "column": INFLUENCE}
    else:
        arguments = {"strategy": chosen.strategy, "column": chosen.column}
    if arguments["strategy"] == "random" and arm == "coreset":
        return name, arguments | {"fraction": fraction, "seed": OWN_SEED}
    if arm == "random":
        return f"{name}-seed{seed}", arguments | {"fraction": fraction, "seed": seed}
    return name, arguments | {"fraction": fraction}


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
            Name → arguments of [`select_coreset`], as of [`describe_choice`].
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
        if name not in recorded or (renew and recorded[name].arguments != arguments):
            if "as_long_as" in arguments:
                like = np.array(coresets[arguments["as_long_as"]].positions)
                positions, column = match_lengths(scored, like, arguments["seed"]).tolist(), INFLUENCE
            else:
                positions = select_positions(scored, **arguments, order="original").tolist()
                column = arguments["column"]
            with_loss = int(np.isfinite(read_scores(scored, column)).sum())
            coresets[name] = Coreset(dict(arguments), with_loss, positions)
    if write and coresets != recorded and (renew or os.access(path.parent, os.W_OK)):
        write_record(path, scores, coresets)
    return coresets


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


def _is_valid(coreset: Coreset, num_rows: int) -> bool:
    """Whether every row is one of the pool, once and in its order."""
    positions = coreset.positions
    in_pool = all(type(row) is int and 0 <= row < num_rows for row in positions)
    in_order = all(first < second for first, second in zip(positions, positions[1:], strict=False))
    return bool(positions) and in_pool and in_order and isinstance(coreset.arguments, dict)


def write_record(path: Path, scores: str, coresets: Mapping[str, Coreset]) -> None:
    """Write a `coresets.json` whole or not at all, a line for each coreset: 7 MB for a million rows."""
    entries = ",\n".join(f"{json.dumps(name)}: {json.dumps(asdict(coreset))}" for name, coreset in coresets.items())
    text = f'{{"format_version": {RECORD_VERSION}, "scores": "{scores}", "coresets": {{\n{entries}\n}}}}\n'
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
