"""Pools that grow: rows scored later by the same scorer, merged and ranked anew, without a refit."""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset, Features, Json, List, Value, concatenate_datasets
from scipy.stats import spearmanr

from hf_in2core.engine.batches import read_token_rows
from hf_in2core.engine.fit import run_fit_pass
from hf_in2core.engine.gradients import GradientRecorder
from hf_in2core.engine.passes import Passes
from hf_in2core.engine.scoring import Directions, score_token_rows
from hf_in2core.engine.state import hash_prepared
from hf_in2core.engine.validation import run_validation_pass
from hf_in2core.names import (
    INFLUENCE,
    NUM_LOSS_TOKENS,
    PER_CHECKPOINT,
    PER_QUERY,
    POOL,
    RANK,
    VALIDATION,
    describe_set,
)
from hf_in2core.rows.checks import check_rows
from hf_in2core.rows.hashes import find_shared_rows, hash_rows
from hf_in2core.rows.preparation import prepare_rows
from hf_in2core.rows.scored import (
    add_influence_columns,
    list_own_columns,
    read_query_scores,
    read_scores,
)

from .checks import warn_of_overlap
from .scorer import InfluenceScorer


logger = logging.getLogger(__name__)

# Largest difference between two scores of one row, relative to the largest score, that rounding can make.
_SAME_SCORE = 1e-3


def merge_scored(pools: Sequence[Dataset]) -> Dataset:
    """
    Merge pools that one scorer has scored, and rank their rows anew.

    A row's influence depends on the scorer and on the row alone, so pools that the same scorer has scored lie on one
    scale; only the rank is of the pool as a whole. Rows that an earlier pool holds already are left out.

    Args:
        pools (`Sequence[datasets.Dataset]`):
            Scored pools with the same columns; `influence_rank` may be missing, as after `dataset.map(scorer)`.

    Returns:
        `datasets.Dataset`: the rows of the first pool, then the new ones of each other, with the columns of the first
        and `influence_rank` (0 = strongest proponent) over all of them. Negative influence = proponent.

    Raises:
        ValueError: if a pool has other columns or is not scored, or if a row that two pools share has another
            influence in each, so that different scorers must have scored them.
    """
    first = pools[0]
    own = list_own_columns(first)
    columns = [name for name in first.column_names if name != RANK]
    types = align_types(pools)
    parts = [first.select_columns(columns).with_format(None)]
    known = dict(zip(hash_rows(first.select_columns(own)), read_scores(first, INFLUENCE), strict=True))
    for number, pool in enumerate(pools[1:], start=2):
        pool = pool.select_columns(columns).with_format(None)
        hashes, influence = hash_rows(pool.select_columns(own)), read_scores(pool, INFLUENCE)
        is_known = find_shared_rows(hashes, known)
        _check_same_scorer(np.array([known[h] for h in np.array(hashes)[is_known]]), influence[is_known], number)
        if is_known.any():
            logger.info("%d of %d rows of pool %d are there already.", is_known.sum(), len(pool), number)
        new = np.flatnonzero(~is_known)
        parts.append(pool.select(new))
        known |= {hashes[row]: influence[row] for row in new}
    merged = concatenate_datasets([part if part.features == types else part.cast(types) for part in parts])
    scores = {name: read_scores(merged, name) for name in columns if name not in (*own, PER_QUERY, PER_CHECKPOINT)}
    if NUM_LOSS_TOKENS in scores:
        scores[NUM_LOSS_TOKENS] = scores[NUM_LOSS_TOKENS].astype(np.int64)
    if PER_QUERY in columns:
        scores[PER_QUERY] = read_query_scores(merged).T
    return add_influence_columns(merged.select_columns(own), scores)


def _check_same_scorer(before: np.ndarray, now: np.ndarray, number: int) -> None:
    both = ~np.isnan(before) & ~np.isnan(now)
    if not both.any():
        return
    difference = float(np.abs(before[both] - now[both]).max() / max(np.abs(before[both]).max(), 1e-300))
    if difference > _SAME_SCORE:
        raise ValueError(
            f"{both.sum()} rows of pool {number} are in an earlier pool too, but with another influence (by up to "
            f"{difference:.1%} of the largest): other scorers have scored them, and their numbers do not compare. "
            "Score both with the same scorer."
        )


def align_types(pools: Sequence[Dataset], names: Sequence[str] | None = None) -> Features:
    """
    The types with which the rows of several pools make one; a warning names the columns whose type changes.

    Nulls take the type of what stands in the other pool, objects get the keys of both (null where a row has none), and
    whole numbers become floating-point ones beside those.

    Args:
        pools (`Sequence[datasets.Dataset]`):
            The pools, the first of which the others join.
        names (`Sequence[str]`, *optional*):
            Columns to compare; by default all but the rank.

    Returns:
        `datasets.Features`: of the first pool's columns, in its order.

    Raises:
        ValueError: naming the columns that one pool lacks, or whose types do not go together.
    """
    first = pools[0]
    wanted = [name for name in (names or first.column_names) if name != RANK]
    types = {name: first.features[name] for name in wanted}
    changed: dict[str, str] = {}
    for number, pool in enumerate(pools[1:], start=2):
        others = [name for name in pool.column_names if name != RANK and (names is None or name in wanted)]
        if differing := sorted(set(wanted) ^ set(others)):
            raise ValueError(
                f"Pool {number} and the first differ in the columns {', '.join(differing)}, so they do not make one "
                "pool. Bring its rows into the same columns, and score them with the same scorer."
            )
        for name in wanted:
            aligned = _align_type(types[name], pool.features[name])
            if aligned is None:
                raise ValueError(
                    f"Column `{name}` holds {_say_type(types[name])} in the first pool and "
                    f"{_say_type(pool.features[name])} in pool {number}, which make no one column. Bring both to one "
                    f"type, for example with `dataset.cast_column({name!r}, ...)`."
                )
            if aligned != types[name]:
                changed[name] = f"`{name}` from {_say_type(types[name])} to {_say_type(aligned)}"
            types[name] = aligned
    if changed:
        logger.warning("The pool's columns change their types with the new rows: %s.", ", ".join(changed.values()))
    return Features(types)


def _align_type(one: Any, other: Any) -> Any:
    """A type that holds the values of both; `None` where there is none."""
    if one == other:
        return one
    if isinstance(one, Json) or isinstance(other, Json):
        return Json()
    if isinstance(one, Value) and isinstance(other, Value):
        if "null" in (one.dtype, other.dtype):
            return other if one.dtype == "null" else one
        if {one.dtype, other.dtype} <= {"string", "large_string"}:
            return one
        dtypes = [value.dtype for value in (one, other)]
        is_number = all(re.fullmatch(r"u?int\d+|float\d+", dtype) for dtype in dtypes)
        return Value(np.result_type(*dtypes).name) if is_number else None
    if isinstance(one, Value) and one.dtype == "null":
        return other
    if isinstance(other, Value) and other.dtype == "null":
        return one
    if isinstance(one, List) and isinstance(other, List):
        item = _align_type(one.feature, other.feature)
        return None if item is None else List(item, length=one.length if one.length == other.length else -1)
    if isinstance(one, dict) and isinstance(other, dict):
        null = Value("null")
        items = {key: _align_type(one.get(key, null), other.get(key, null)) for key in [*one, *other]}
        return None if None in items.values() else items
    return None


def _say_type(feature: Any) -> str:
    if isinstance(feature, Value):
        return {"null": "nothing but nulls", "large_string": "string"}.get(feature.dtype, feature.dtype)
    if isinstance(feature, List):
        return f"lists of {_say_type(feature.feature)}"
    return f"objects with {', '.join(feature)}" if isinstance(feature, dict) else type(feature).__name__


def check_fitted_pool(
    scorer: InfluenceScorer,
    pool: Dataset,
    validation: Dataset | Mapping[str, Dataset] | None = None,
    sample_size: int = 256,
    seed: int = 0,
) -> float | None:
    """
    Warn when a scorer was fitted on another pool than the one it scores, or when validation rows are in this one.

    Influence through `u` fitted on the pool A ranks rows of a pool B almost as `u` fitted on B would as long as their
    gradients are of a kind. How nearly that is so is measured on a sample of B: a second `u` is fitted on the sample,
    both score it, and their scores are compared by Spearman's rank correlation.

    Args:
        scorer ([`InfluenceScorer`]):
            The scorer.
        pool (`datasets.Dataset`):
            Raw or scored rows.
        validation (`datasets.Dataset` or `Mapping[str, datasets.Dataset]`, *optional*):
            The validation sets that the scorer was fitted with; without them nothing can be measured.
        sample_size (`int`, *optional*, defaults to `256`):
            Rows of the sample.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the sample.

    Returns:
        `float` or `None`: the rank correlation; `None` where the pool is the one it was fitted on, where the estimator
        fits on none, or where nothing could be measured.

    Raises:
        ValueError: if `validation` is not what the scorer was fitted with, by names and numbers of rows.
    """
    sets = {VALIDATION: validation} if isinstance(validation, Dataset) else dict(validation or {})
    given, stated = {name: len(rows) for name, rows in sets.items()}, dict(scorer.config.validation_sets)
    if sets and given != stated:
        raise ValueError(
            f"The validation sets {given} are not those that the scorer was fitted with ({stated}; names and rows). "
            "Pass the same ones, or none."
        )
    pool = pool.select_columns(list_own_columns(pool))
    if sets:
        every = {POOL: pool} | {f"{describe_set(name)} set": rows for name, rows in sets.items()}
        checked = [check_rows(rows, scorer.preparation, what) for what, rows in every.items()]
        warn_of_overlap(checked[0], checked[1:])
    prepared = prepare_rows(pool, scorer.preparation)
    if scorer.config.estimator != "datainf" or hash_prepared(prepared) == scorer.config.pool_hash:
        return None
    warn = logger.warning if PartialState().is_main_process else logger.debug
    said = "The scorer was fitted on another pool (%d rows) than the one it scores (%d rows)"
    sizes = scorer.config.num_fit_examples, len(pool)
    if not sets or scorer.config.per_example:
        warn(
            f"{said}. How nearly it ranks them as a refit would can be measured on a sample: pass the validation set.",
            *sizes,
        )
        return None
    positions = np.random.default_rng(seed).choice(len(prepared), min(sample_size, len(prepared)), replace=False)
    correlation = _measure_agreement(scorer, prepared.select(np.sort(positions)), sets)
    warn(
        f"{said}. On a sample of %d rows its ranking correlates %.3f with that of a scorer fitted on the sample "
        "(Spearman; 1 = the same ranking). Fit anew where that is too little.",
        *sizes,
        len(positions),
        correlation,
    )
    return correlation


def _measure_agreement(scorer: InfluenceScorer, sample: Dataset, validation: Mapping[str, Dataset]) -> float:
    passes = scorer.make_passes()
    means = [
        run_validation_pass(passes, prepare_rows(validation[name], scorer.preparation), f"validation-{name}", name)
        for name in scorer.config.validation_sets
    ]
    v = {key: torch.stack([mean[key] for mean in means]) for key in passes.blocks}
    refitted = run_fit_pass(passes, sample, v, scorer.config.damping_scale, None, seed=0).ihvp
    refitted = {key: value.to(scorer.directions[key]) for key, value in refitted.items()}
    scores = [_score(scorer, passes, sample, directions) for directions in (scorer.directions, refitted)]
    return float(spearmanr(*scores).statistic)


def _score(scorer: InfluenceScorer, passes: Passes, sample: Dataset, directions: Directions) -> np.ndarray:
    with GradientRecorder(scorer.model, passes.blocks, passes.autocast) as recorder:
        return score_token_rows(passes, recorder, read_token_rows(sample), directions, cosine=False).mean(axis=1)
