"""Rows that the sets of a run share: refused, dropped or allowed; and near-copies, counted."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hf_in2core.names import POOL
from hf_in2core.rows.checks import CheckedRows
from hf_in2core.rows.columns import list_read_columns, map_row, read_template
from hf_in2core.rows.overlap import find_near_copies, find_overlap, hash_content, list_words
from hf_in2core.rows.text import render_row

from .arguments import In2CoreArguments
from .run_folder import agree, warn


TEST = "test"
NUM_PAIRS = 5
LONGEST_TEXT = 300


def refuse_same_source(args: In2CoreArguments, validation_sources: Mapping[str, str]) -> None:
    """
    Refuse one source for two sets, unless `--allow_overlap` goes on with it.

    Raises:
        ValueError: naming the flags and the source.
    """
    given = [("--validation", source) for source in validation_sources.values()]
    given += [("--test", args.test or ""), ("--pool", args.pool or "")]
    for place, (flag, source) in enumerate(given):
        for other_flag, other in given[place + 1 :]:
            if args.allow_overlap or flag == other_flag or _identify_source(source) != _identify_source(other):
                continue
            does = "select" if flag == "--validation" else "judge"
            why = "judge what they selected" if other_flag == "--test" else "be trained on as well"
            raise ValueError(
                f"{flag} and {other_flag} name the same source ({source}): all of its rows would {does} and {why}. "
                "Give each rows of its own, for example by splitting the file; --allow_overlap goes on, and the "
                "results say so."
            )


def _identify_source(source: str) -> str:
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else source


def separate_sets(
    checked: Mapping[str, CheckedRows], args: In2CoreArguments
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, int]]]:
    """
    Look for rows of the pool in the other sets, and for rows of the validation sets in the test set.

    Args:
        checked (`Mapping[str, CheckedRows]`): Every set by its name in words.
        args ([`In2CoreArguments`]): Whether such rows are refused, dropped or allowed.

    Returns:
        `tuple`: by set the positions of its well-formed rows that stay, and for each pair that was compared the rows
        that the first still shares with the second.

    Raises:
        ValueError: with counts and an example of each pair, or if nothing is left of a set.
    """
    kept = {name: found.list_good() for name, found in checked.items()}
    shared: dict[str, dict[str, int]] = {}
    said: list[str] = []
    for name in [*(name for name in checked if name not in (POOL, TEST)), POOL]:
        others = [TEST] if name != POOL else [other for other in checked if other != POOL]
        shared[name] = dict.fromkeys(others, 0)
        for other in others:
            overlap = find_overlap(checked[name], checked[other])
            if overlap is None:
                continue
            if not args.drop_overlap:
                said.append(str(overlap))
                shared[name][other] = len(overlap.rows)
                continue
            warn(f"{overlap}; they are dropped from the {overlap.what}.")
            kept[name] = np.setdiff1d(kept[name], overlap.rows)
            if len(kept[name]) == 0:
                raise ValueError(
                    f"{overlap}, and nothing is left of the {overlap.what} when they are dropped. Give another set."
                )
    if said and not args.allow_overlap:
        raise ValueError(
            f"Sets that should have no row in common share some: {'; '.join(said)}. What selects or judges must not "
            "be trained on, nor judge what it selected; the figures would be too good. Rows are the same where prompt "
            "and completion are, but for white space and case. --drop_overlap drops them from the pool, and from the "
            "validation set those of the test set; --allow_overlap goes on all the same, and the results say so."
        )
    for found in said:
        warn(f"{found}; what they measure is too good.")
    return kept, shared


def count_near_copies(
    sets: Mapping[str, Dataset], known: set[str], columns: list[str] | None, tokenizer: PreTrainedTokenizerBase
) -> dict[str, dict[str, Any]]:
    """
    Count the rows of validation and test sets that the pool nearly holds, and warn of them.

    Args:
        sets (`Mapping[str, Dataset]`): Every set by its name in words, raw and well-formed rows.
        known (`set[str]`): Hashes of the pool's rows; what is in it as it stands is no near-copy.
        columns (`list[str]`, *optional*): Column mapping.
        tokenizer (`transformers.PreTrainedTokenizerBase`): The reference's.

    Returns:
        `dict[str, dict]`: by set `rows`, how many there are, and `pairs`, the nearest, each with `row`, `pool_row`,
        `share` (of the row's runs of words that the pool's row has) and both texts. The same on every process.
    """
    return agree(lambda: _find_pairs(sets, known, columns, tokenizer))


def _find_pairs(
    sets: Mapping[str, Dataset], known: set[str], columns: list[str] | None, tokenizer: PreTrainedTokenizerBase
) -> dict[str, dict[str, Any]]:
    def read(name: str) -> Any:
        rows = sets[name].with_format(None)
        rows = rows.select_columns(list_read_columns(rows.column_names, columns))
        return (map_row(row, columns, read_template(tokenizer)) for row in rows)

    def show(name: str, row: int) -> str:
        raw = sets[name].with_format(None)[row]
        return render_row(map_row(raw, columns, read_template(tokenizer)), LONGEST_TEXT, tokenizer)

    names = [name for name in sets if name != POOL]
    words = {name: [[] if hash_content(row) in known else list_words(row) for row in read(name)] for name in names}
    nearest = find_near_copies(map(list_words, read(POOL)), len(sets[POOL]), sum(words.values(), []))
    found: dict[str, dict[str, Any]] = {}
    start = 0
    for name in names:
        pairs: list[dict[str, Any]] = [
            {"row": place - start, "pool_row": row, "share": share}
            for place, (row, share) in nearest.items()
            if start <= place < start + len(words[name])
        ]
        start += len(words[name])
        pairs.sort(key=lambda pair: -pair["share"])
        shown = [
            pair | {"text": show(name, pair["row"]), "pool_text": show(POOL, pair["pool_row"])}
            for pair in pairs[:NUM_PAIRS]
        ]
        found[name] = {"rows": len(pairs), "pairs": shown}
        if pairs:
            warn(
                f"{len(pairs):,} of {len(words[name]):,} rows of the {name} set have a near-copy in the pool, the "
                f"nearest of them row {pairs[0]['row']} in row {pairs[0]['pool_row']} of the pool; what they measure "
                "may be too good. The page shows pairs."
            )
    return found
