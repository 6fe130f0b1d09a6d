"""How each split was made: kept beside the rows as `splits.json`, and told in the card.

A coreset that is given by the arguments of [`select_coreset`] is what they say. Of rows that are given as they are,
only what can be seen in the pool is told. What a repository holds of this is data like any other: it is never trusted
to have a form, and is escaped before it is shown.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from datasets import Dataset

from hf_in2core.evaluation.formats import read_object
from hf_in2core.names import INFLUENCE, parse_coreset
from hf_in2core.rows.scored import read_scores
from hf_in2core.selection.record import ARM_STRATEGIES, Coreset, choose_coreset

from .text import Markdown, format_block, format_code


Record = dict[str, Any]

_CHOICES = {
    "top": "the smallest {} first",
    "bottom": "the largest {} first",
    "random": "rows drawn at random",
    "round_robin": "each validation set in turn takes its strongest proponent",
    "round_robin_rows": "each validation row in turn takes its strongest proponent",
    "greedy": "each validation row in turn takes the row that helps it most, given those taken before",
}


def record_choice(arguments: Mapping[str, Any]) -> Record:
    """What is kept of a split that [`select_coreset`] chose: its arguments, the ones that decide always among them."""
    kept = {
        key: value if isinstance(value, str | int | float) else json.dumps(value) for key, value in arguments.items()
    }
    return {"strategy": "top", "column": INFLUENCE, **kept}


def recognise_choice(name: str, rows: Dataset, pool: Dataset) -> Record:
    """
    How rows that are given as they are relate to the pool, as far as their scores show it.

    Args:
        name (`str`):
            Name of the split; the share that it names (`coreset_50`) is told where it is the right one.
        rows (`datasets.Dataset`):
            The split, with the pool's columns.
        pool (`datasets.Dataset`):
            The scored pool.

    Returns:
        `dict`: as of [`record_choice`] where the rows hold the strongest proponents or the strongest opponents of the
        pool and nothing else; empty otherwise.
    """
    own, scores = np.sort(read_scores(rows, INFLUENCE)), np.sort(read_scores(pool, INFLUENCE))
    scores = scores[~np.isnan(scores)]
    if np.isnan(own).any() or len(own) > len(scores):
        return {}
    ends = {"top": scores[: len(own)], "bottom": scores[len(scores) - len(own) :]}
    strategy = next((strategy for strategy, end in ends.items() if np.array_equal(own, end)), None)
    if strategy is None:
        return {}
    _, share = parse_coreset(name)
    is_right = share is not None and round(share * len(scores)) == len(own)
    return record_choice({"strategy": strategy, **({"fraction": share} if is_right else {"size": len(own)})})


def find_coreset(name: str, given: Dataset | Coreset | Mapping[str, Any], pool: Dataset) -> Coreset | None:
    """
    The rows of a split, and what chose them as far as it is known; `None` for a control, whose rows nothing favours.

    Rows that are given as they are stand in the pool where their influence does.
    """
    if isinstance(given, Mapping):
        given = choose_coreset(pool, {key: value for key, value in record_choice(given).items() if key != "order"})
    elif isinstance(given, Dataset):
        scores = read_scores(pool, INFLUENCE)
        positions = np.flatnonzero(np.isin(scores, read_scores(given, INFLUENCE))).tolist()
        known = recognise_choice(name, given, pool) or {"strategy": "top"}
        given = Coreset(known, int((~np.isnan(scores)).sum()), positions)
    is_control = given.arguments.get("strategy") in ("random", "bottom") or parse_coreset(name)[0] in ARM_STRATEGIES
    return None if is_control else given


def read_records(content: bytes | None) -> dict[str, Record]:
    """The records of a `splits.json`; none where there is no such file, or it is none of ours."""
    return {
        name: {key: item for key, item in record.items() if isinstance(item, str | int | float)}
        for name, record in read_object(content).items()
        if isinstance(record, dict) and isinstance(record.get("command", ""), str)
    }


def write_records(records: Mapping[str, Record]) -> bytes:
    """The content of `splits.json`."""
    return (json.dumps(records, indent=2, ensure_ascii=False) + "\n").encode()


def say_choice(record: Mapping[str, Any]) -> Markdown:
    """How a split was chosen, for a cell of a table: in words, and as the call that chooses it again."""
    strategy = record.get("strategy")
    if not isinstance(strategy, str):
        return Markdown("not told by who published it")
    words = _CHOICES.get(strategy, "")
    column = record.get("column", INFLUENCE)
    if column == INFLUENCE:
        words = {"top": "the strongest proponents", "bottom": "the strongest opponents"}.get(strategy, words)
    words = words.format(format_code(str(column)))
    if (spared := record.get("spared")) is not None:
        return Markdown(f"{words}, but for those of a coreset: {format_code(str(spared))}")
    arguments = [f"{key}={value!r}" for key, value in record.items() if key != "command"]
    call = format_code(f"select_coreset(pool, {', '.join(arguments)})")
    return Markdown(f"{words}: {call}" if words else call)


def list_commands(records: Mapping[str, Record]) -> list[tuple[Markdown, Markdown]]:
    """The commands that made splits, each once: which splits, and the command as a block."""
    made: dict[str, list[str]] = {}
    for name, record in records.items():
        command = record.get("command")
        if isinstance(command, str) and command.strip():
            made.setdefault(command.strip(), []).append(name)
    return [
        (Markdown(", ".join(format_code(name) for name in names)), format_command(command))
        for command, names in made.items()
    ]


def format_command(command: str) -> Markdown:
    """Shell commands, one a line, as a block; through HTML where they hold what could end or mark a fenced one."""
    if not re.search("['\"#\\\\]", command):
        command = command.replace(" --", " \\\n    --")
    if re.fullmatch(r"[\x20-\x7e\n]*", command) and not re.search(r"[`<]", command):
        return Markdown(f"```bash\n{command}\n```")
    return format_block(command)
