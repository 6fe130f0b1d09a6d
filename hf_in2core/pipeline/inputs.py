"""What a command is given: rows, tokenizers, models, adapters; and everything that can be checked before long work."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from accelerate import PartialState
from datasets import ClassLabel, Dataset, Value
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig

from hf_in2core.names import CLUSTERS, POOL, describe_set, list_added_columns
from hf_in2core.rows.checks import CheckedRows, check_rows, refuse_bad_rows
from hf_in2core.rows.columns import get_column_names, read_template
from hf_in2core.rows.doubts import say_doubts
from hf_in2core.rows.hashes import hash_set, hash_tokenization
from hf_in2core.rows.masks import compare_masks
from hf_in2core.rows.preparation import Preparation, prepare_rows
from hf_in2core.rows.sources import load_raw_rows
from hf_in2core.selection.clusters import count_clusters

from .arguments import DataArguments, In2CoreArguments
from .leakage import count_near_copies, refuse_same_source, separate_sets
from .run_folder import warn


# Answers that each stand in so many validation rows on average are few.
MIN_REPEATED = 4


@dataclass
class Inputs:
    """
    Pool, validation sets by name and test set; raw rows, the hash of each set, and what to tell of each.

    `hashes` and `facts` are by the names of the sets in words. Facts are `rows`, where there are any `dropped`,
    `first_dropped` and `without_label`, `shared` (rows that are in another set, by its name), `near_copies` and
    `judging`.
    `held_back` has the rows that judge a tournament, in whose inputs `validation` is the other half of each set.
    """

    pool: Dataset
    validation: dict[str, Dataset]
    test: Dataset
    hashes: dict[str, str]
    facts: dict[str, dict[str, Any]]
    held_back: dict[str, Dataset] = field(default_factory=dict)


def load_inputs(
    args: In2CoreArguments,
    validation_sources: dict[str, str],
    reference: tuple[SFTConfig, PreTrainedTokenizerBase],
    target: tuple[SFTConfig, PreTrainedTokenizerBase],
) -> Inputs:
    """
    Load all sets and look at every row of them, once: rows that cannot be trained on, and rows in several sets.

    Malformed rows are refused, or dropped with `--bad_rows drop`. Rows of the pool that are in the validation or test
    set, and validation rows that are in the test set, are refused too, dropped with `--drop_overlap`, or counted with
    `--allow_overlap`.

    Args:
        args ([`In2CoreArguments`]): Sources and settings.
        validation_sources (`dict[str, str]`): Sources of the validation sets by name.
        reference, target (`tuple`): Training arguments and tokenizer of either model.

    Raises:
        ValueError: if a set is empty or malformed, cannot be masked as the pool is, shares rows with another, or
            nothing is left of it.
    """
    assert args.pool is not None and args.test is not None
    refuse_same_source(args, validation_sources)
    with PartialState().main_process_first():
        raw = {POOL: load_raw_rows(args.pool, POOL, args.columns)}
        raw["test"] = load_raw_rows(args.test, "test set", args.columns)
        validation = load_validation(validation_sources, args.columns)
        raw |= {describe_set(name): rows for name, rows in validation.items()}
        checked = check_inputs(raw, reference, target)
    if args.bad_rows != "drop":
        refuse_bad_rows(checked.values())
    for message in compare_masks(
        checked[POOL], list(checked.values())[1:], reference[0].completion_only_loss is not None
    ):
        warn(message)
    kept, shared = separate_sets(checked, args)
    facts: dict[str, dict[str, Any]] = {}
    for name, rows in raw.items():
        warn_of_bad_rows(checked[name])
        facts[name] = describe_checked(checked[name])
        for message in say_doubts(checked[name]):
            warn(message)
        if len(kept[name]) < len(rows):
            raw[name] = rows.select(kept[name])
    in_pool = {checked[POOL].hashes[row] for row in kept[POOL]}
    for name, found in count_near_copies(raw, in_pool, args.columns, reference[1]).items():
        facts[name]["near_copies"] = found
    for name, counts in shared.items():
        facts[name]["shared"] = counts
    for name, rows in raw.items():
        facts[name]["rows"] = len(rows)
    templates = [read_template(tokenizer) for _, tokenizer in (reference, target)]
    return Inputs(
        pool=raw[POOL],
        validation={name: raw[describe_set(name)] for name in validation},
        test=raw["test"],
        hashes={name: hash_set(dataset, args.columns, templates) for name, dataset in raw.items()},
        facts=facts,
    )


def hold_back(inputs: Inputs, seed: int, preparation: Preparation, templates: Iterable[str]) -> Inputs:
    """
    The inputs of a tournament: one seeded half of each validation set selects, the other judges the methods.

    Its rows are read by `preparation` and by the chat `templates`, as of [`~hf_in2core.rows.hashes.hash_set`].

    Returns:
        [`Inputs`]: those of the run with halves for validation sets, and `held_back`.

    Raises:
        ValueError: if a set has fewer than two rows.
    """
    halves = replace(inputs, validation={}, held_back={}, hashes=dict(inputs.hashes))
    for name, rows in inputs.validation.items():
        what = describe_set(name)
        if len(rows) < 2:
            raise ValueError(
                f"The {what} set has {len(rows)} row, and --strategy auto judges by a half of it that selects "
                "nothing. Give more rows, or name a strategy."
            )
        selects, judges = draw_halves(rows, seed, preparation)
        halves.validation[name], halves.held_back[name] = rows.select(selects), rows.select(judges)
        halves.hashes[what] = hash_set(halves.validation[name], preparation.columns, templates)
        inputs.facts[what]["judging"] = len(judges)
    return halves


def draw_halves(rows: Dataset, seed: int, preparation: Preparation) -> tuple[np.ndarray, np.ndarray]:
    """
    Positions of two random halves, ascending; where few answers repeat, each half has as many of every one.

    Else one half might have no row of an answer, and what validation rows take in turn would leave it out.
    """
    order = np.random.default_rng(seed).permutation(len(rows))
    prepared = prepare_rows(rows, preparation)
    answers = dict.fromkeys(range(len(rows)), "")
    answers |= {
        row: str([label for label in labels if label != -100])
        for row, labels in zip(prepared["row"], prepared["labels"], strict=True)
    }
    if MIN_REPEATED * len(set(answers.values())) > len(rows):
        return np.sort(order[: -(-len(rows) // 2)]), np.sort(order[-(-len(rows) // 2) :])
    order = np.array(sorted(order.tolist(), key=answers.__getitem__))
    return np.sort(order[::2]), np.sort(order[1::2])


def check_inputs(
    sets: dict[str, Dataset],
    reference: tuple[SFTConfig, PreTrainedTokenizerBase],
    target: tuple[SFTConfig, PreTrainedTokenizerBase],
) -> dict[str, CheckedRows]:
    """Check every row of all sets as the reference sees it, and of pool and test set as the target does."""
    first, second = (Preparation.from_args(*model, sets[POOL]) for model in (reference, target))
    what = {name: name if name == POOL else f"{name} set" for name in sets}
    checked = {name: check_rows(rows, first, what[name]) for name, rows in sets.items()}
    if hash_tokenization(first) != hash_tokenization(second):
        for name in (POOL, "test"):
            known = {row.position for row in checked[name].bad}
            also = check_rows(sets[name], second, what[name])
            for message in set(say_doubts(also)) - set(say_doubts(checked[name])):
                warn(f"For the target model: {message}")
            checked[name].bad += [
                replace(row, reason=f"{row.reason} (for the target model)")
                for row in also.bad
                if row.position not in known
            ]
    return checked


def warn_of_bad_rows(checked: CheckedRows) -> None:
    """
    Tell of malformed rows that are dropped.

    Raises:
        ValueError: if none is left.
    """
    if not checked.bad:
        return
    found = f"{len(checked.bad)} of {checked.num_rows} rows of the {checked.what} cannot be trained on"
    if len(checked.bad) == checked.num_rows:
        raise ValueError(f"{found}, the first: {checked.bad[0]}. Nothing is left when they are dropped.")
    warn(f"{found} and are dropped, the first: {checked.bad[0]}.")


def load_good_rows(
    source: str,
    what: str,
    args: DataArguments,
    training_args: SFTConfig,
    tokenizer: PreTrainedTokenizerBase,
    revision: str | None = None,
) -> Dataset:
    """The rows of the one set that a command reads, as `--columns` and `--bad_rows` say; see [`keep_good_rows`]."""
    rows = load_raw_rows(source, what, args.columns, revision)
    return keep_good_rows(rows, what, Preparation.from_args(training_args, tokenizer, rows), args.bad_rows)


def keep_good_rows(rows: Dataset, what: str, preparation: Preparation, bad_rows: str) -> Dataset:
    """
    Look at every row of a set of a command that reads one: malformed ones are refused, or dropped with `drop`.

    Raises:
        ValueError: naming them, or if none is left.
    """
    checked = check_rows(rows, preparation, what)
    if bad_rows != "drop":
        refuse_bad_rows([checked])
    for message in say_doubts(checked):
        warn(message)
    warn_of_bad_rows(checked)
    return rows.select(checked.list_good()) if checked.bad else rows


def describe_checked(checked: CheckedRows) -> dict[str, Any]:
    """What results and cards tell of a set that was checked."""
    facts: dict[str, Any] = {"rows": checked.num_rows}
    if checked.bad:
        facts |= {"dropped": len(checked.bad), "first_dropped": str(checked.bad[0])}
    if checked.without_label:
        facts["without_label"] = len(checked.without_label)
    return facts


def load_validation(sources: dict[str, str], columns: list[str] | None = None) -> dict[str, Dataset]:
    """Load the validation sets of [`~hf_in2core.rows.sources.parse_named_sources`] by their names."""
    return {name: load_raw_rows(source, f"{describe_set(name)} set", columns) for name, source in sources.items()}


def check_pool_columns(
    pool: Dataset,
    validation_sets: Iterable[str],
    needed: Sequence[str | None] = (),
    per_query: bool = False,
    also: Sequence[str] = (),
) -> None:
    """
    Check the pool's column names.

    Raises:
        ValueError: if the pool already has a column that scoring adds, or lacks one that a flag names.
    """
    names = get_column_names(pool)
    clashes = [name for name in [*list_added_columns(validation_sets, per_query), *also] if name in names]
    if clashes:
        raise ValueError(
            f"The pool already has the column(s) {', '.join(clashes)}. Remove or rename them before scoring."
        )
    missing = [name for name in needed if name is not None and name not in names]
    if missing:
        raise ValueError(f"The pool has no column {', '.join(missing)}; it has: {', '.join(names)}.")


def check_tasks(validation: dict[str, Dataset], column: str) -> None:
    """
    Check that every validation set says of which tasks its rows are: those are the tasks of interest.

    Raises:
        ValueError: if a set has no such column.
    """
    for name, rows in validation.items():
        if column not in (names := get_column_names(rows)):
            raise ValueError(
                f"The {describe_set(name)} set has no column {column}; it has: {', '.join(names)}. --task_column "
                "reads there which tasks count, so add it to the set, or leave out --task_column."
            )


def check_groups(pool: Dataset, column: str, num_rows: int) -> None:
    """
    Check that the groups of a column can share the rows of a coreset.

    Raises:
        ValueError: if its values name no groups, or there are more groups than rows.
    """
    if column not in CLUSTERS and not isinstance(pool.features[column], (Value, ClassLabel)):
        raise ValueError(
            f"--group_column {column} holds {pool.features[column]}, and nested values do not name a group. Give a "
            "column of strings, integers or booleans."
        )
    groups = count_clusters(len(pool)) if column in CLUSTERS else len(pool.unique(column))
    if groups > num_rows:
        raise ValueError(
            f"--group_column {column} has {groups:,} values in {len(pool):,} rows, but the smallest coreset has "
            f"{num_rows:,} rows: most groups would get none, whatever their scores. Give a column of few "
            "values, or larger --fractions."
        )


def check_trainable(
    rows: Dataset,
    what: str,
    training_args: SFTConfig,
    tokenizer: PreTrainedTokenizerBase,
    pool: Dataset | None = None,
) -> Dataset:
    """
    Prepare rows as SFT will, and check that some carry loss.

    What carries loss in them is what does in the pool, where one is given.

    Raises:
        ValueError: if the columns, masks or template do not fit, or no row carries a loss token.
    """
    prepared = prepare_rows(rows, Preparation.from_args(training_args, tokenizer, rows if pool is None else pool))
    if len(prepared) == 0:
        raise ValueError(
            f"No row of the {what} ({len(rows)} rows) carries loss at `max_length={training_args.max_length}`: "
            "prompts may fill it, or masks hide every token. Raise `max_length` or check the completions."
        )
    return prepared


def take_fraction(rows: Dataset, fraction: float, seed: int) -> Dataset:
    """A seeded part of some rows, in their order."""
    if fraction == 1.0:
        return rows
    size = max(round(fraction * len(rows)), 1)
    return rows.select(np.sort(np.random.default_rng(seed).permutation(len(rows))[:size]))
