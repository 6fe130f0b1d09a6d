"""How well a training set covers test rows: influence read the other way round.

DataInf (arXiv 2310.00902) asks which training rows a loss is owed to; In2Core (arXiv 2408.03560) turns the question
round and asks how much of a training set speaks for one test row. Here a test row's coverage is an aggregation of the
influence of all training rows on its loss, and whether it means anything is its rank correlation with that loss. The
same aggregations of semantic similarity (RDS+, BM25, sentence embeddings) are there to compare with.
"""

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset, Features, List, Value
from peft import PeftModel

from hf_in2core.engine.losses import compute_row_losses
from hf_in2core.engine.scoring import TopRows
from hf_in2core.evaluation.intervals import LEVEL, MIN_PAIRS, RankCorrelation, compute_rank_correlation
from hf_in2core.influence.config import AUTOCAST_DTYPES
from hf_in2core.rows.hashes import find_shared_tokens
from hf_in2core.rows.scored import read_query_scores, read_scores
from hf_in2core.selection.similarities import (
    ENCODER,
    compute_bm25_similarities,
    compute_encoder_similarities,
    compute_rds_similarities,
    load_encoder,
)


if TYPE_CHECKING:
    from hf_in2core.influence.trainer import InfluenceTrainer


SIMILARITIES = ("rds", "bm25", "embedding")


@dataclass(frozen=True)
class CoverageCorrelation(RankCorrelation):
    """
    A [`~hf_in2core.evaluation.intervals.RankCorrelation`] of coverage with an outcome, and what it says.

    Attributes:
        conclusion (`str`): `"negative"` or `"positive"` where the whole interval is on that side of 0, `"none"` where
            it holds 0 or where either column is constant.
    """

    conclusion: str


def compute_coverage(trainer: "InfluenceTrainer", *, top_k: int = 10) -> Dataset:
    r"""
    Coverage of every test row by the pool, from the influence of the pool's rows on the test row's loss.

    The test rows are the trainer's `eval_dataset`; they select nothing here. Each is a query of its own: this calls
    `fit_influence(per_example=True)` and `score_influence`, and goes on where an earlier call was stopped. It holds
    `rows x test rows` float64 numbers in memory.

    ```python
    >>> trainer = InfluenceTrainer(model, args, train_dataset=pool, eval_dataset=test)
    >>> trainer.train()
    >>> coverage = compute_coverage(trainer)
    >>> worst = coverage.sort("coverage_top_k").select(range(10))
    >>> correlate_coverage(coverage)["coverage_top_k"].estimate
    ```

    Args:
        trainer ([`InfluenceTrainer`]):
            Trainer of a reference that was trained on the pool. Its scorer is the one of single rows afterwards.
        top_k (`int`, *optional*, defaults to `10`):
            Proponents to list for each test row, and to take the mean of in `coverage_top_k`.

    Returns:
        [`~datasets.Dataset`]: a row for every test row that carries loss, with

        - `test_set` (string) and `test_row` (int64): name of the evaluation set, position in it;
        - `loss` (float64): mean negative log-likelihood per labelled token under the reference, nats, and
          `num_loss_tokens` (int64);
        - the aggregations of [`measure_coverage`] (float64, larger = better covered) over `-influence`:
          `coverage_sum`, `coverage_top_k`, `coverage_mean` and `coverage_share`;
        - `proponents` (list of int64) and `proponent_influence` (list of float64): positions in the pool of the
          `top_k` rows of the most negative influence, strongest first.

    Raises:
        ValueError: if `top_k` is below 1 or above the number of rows that carry loss, or if test rows also stand in
            the pool (they cover themselves).
    """
    prepared = trainer.prepared_pool
    tests = trainer.prepared_validation
    _check_request(top_k, prepared, tests)
    trainer.fit_influence(per_example=True)
    influence = read_query_scores(trainer.score_influence(overwrite=True))
    rows = np.flatnonzero(~np.isnan(influence).any(axis=0))
    strength = -influence[:, rows]
    columns = _describe_tests(trainer, tests) | measure_coverage(strength, top_k)
    return _make_dataset(columns, strength, rows, top_k, "influence")


def compute_similarity_coverage(
    trainer: "InfluenceTrainer", by: str = "rds", *, top_k: int = 10, encoder: Any = ENCODER
) -> Dataset:
    r"""
    The same from semantic similarity instead of influence, to tell what influence adds.

    Args:
        trainer ([`InfluenceTrainer`]):
            As in [`compute_coverage`].
        by (`str`, *optional*, defaults to `"rds"`):
            `"rds"` (cosine of the position-weighted mean of hidden states, of the model without its adapter if it has
            one), `"bm25"` (shared words) or `"embedding"` (cosine of sentence embeddings).
        top_k (`int`, *optional*, defaults to `10`):
            Nearest rows to list for each test row, and to take the mean of in `coverage_top_k`.
        encoder (`sentence_transformers.SentenceTransformer` or `str`, *optional*, defaults to all-MiniLM-L6-v2):
            Sentence encoder of `by="embedding"`, or its folder or Hub id.

    Returns:
        [`~datasets.Dataset`]: as [`compute_coverage`], but of the aggregations `coverage_top_k` and `coverage_mean`
        alone, and with `nearest` (positions in the pool, nearest first) and `nearest_similarity`.

    Raises:
        ImportError: if the library that `by` needs is not installed.
        ValueError: as [`compute_coverage`], or if `by` is unknown.
    """
    if by not in SIMILARITIES:
        raise ValueError(f"by={by!r} does not exist. Use one of {', '.join(map(repr, SIMILARITIES))}.")
    prepared = trainer.prepared_pool
    tests = trainer.prepared_validation
    _check_request(top_k, prepared, tests)
    strength = np.concatenate([_compute_similarities(trainer, by, prepared, test, encoder) for test in tests.values()])
    found = measure_coverage(strength, top_k)
    columns = {name: found[name] for name in ("coverage_top_k", "coverage_mean")}
    rows = prepared.with_format("numpy")["row"][:]
    return _make_dataset(_describe_tests(trainer, tests) | columns, strength, rows, top_k, "similarity")


def measure_coverage(strength: np.ndarray, top_k: int = 10) -> dict[str, np.ndarray]:
    r"""
    Aggregate how strongly each training row speaks for each test row.

    Args:
        strength (`numpy.ndarray` of shape `[Q, n]`):
            `-influence` of `n` training rows on `Q` test rows (positive = proponent), or a similarity.
        top_k (`int`, *optional*, defaults to `10`):
            Rows in the mean of the strongest.

    Returns:
        `dict[str, numpy.ndarray]` of float64 `[Q]`, larger = better covered:

        - `coverage_sum`: sum over proponents, `sum_k max(strength_k, 0)`;
        - `coverage_top_k`: mean of the `top_k` strongest;
        - `coverage_mean`: mean over all rows, opponents included;
        - `coverage_share`: proponents' share of all influence, `sum_k max(strength_k, 0) / sum_k |strength_k|` in
          [0, 1], which does not depend on the size of the test row's gradient; 0.5 where there is no influence.

    Raises:
        ValueError: if a value is not finite, or `top_k` does not fit the number of rows.
    """
    strength = np.asarray(strength, dtype=np.float64)
    if strength.ndim != 2 or not np.isfinite(strength).all():
        raise ValueError(
            f"Coverage needs a matrix [test rows, training rows] of finite numbers, but got shape {strength.shape}"
            f"{'' if strength.ndim != 2 else ' with values that are not finite'}. Leave out rows without loss."
        )
    _check_top_k(top_k, strength.shape[1])
    positive, total = np.maximum(strength, 0).sum(1), np.abs(strength).sum(1)
    strongest = -np.partition(-strength, top_k - 1, axis=1)[:, :top_k]
    return {
        "coverage_sum": positive,
        "coverage_top_k": strongest.mean(1),
        "coverage_mean": strength.mean(1),
        "coverage_share": np.divide(positive, total, out=np.full(len(total), 0.5), where=total > 0),
    }


def correlate_coverage(
    coverage: Dataset, column: str = "loss", level: float = LEVEL
) -> dict[str, CoverageCorrelation]:
    r"""
    Whether better covered test rows have another loss: Spearman's correlation of every aggregation with a column.

    Coverage that means something correlates negatively with the loss. Rows whose column is null are left out.

    Args:
        coverage ([`~datasets.Dataset`]):
            From [`compute_coverage`] or [`compute_similarity_coverage`].
        column (`str`, *optional*, defaults to `"loss"`):
            Column to correlate with, such as the loss or another outcome that was added.
        level (`float`, *optional*, defaults to `0.95`):
            Confidence level in (0, 1).

    Returns:
        `dict[str, CoverageCorrelation]`: by the `coverage_*` column.

    Raises:
        ValueError: if a column is missing, or fewer than 10 test rows are left.
    """
    names = [name for name in coverage.column_names if name.startswith("coverage_")]
    if not names or column not in coverage.column_names:
        raise ValueError(
            f"The dataset has no column {column if names else 'coverage_*'} (its columns: {coverage.column_names}). "
            "Pass what `compute_coverage` returns, with the outcome as a column."
        )
    outcome = read_scores(coverage, column)
    kept = ~np.isnan(outcome)
    if kept.sum() < MIN_PAIRS:
        raise ValueError(
            f"{kept.sum()} test rows have a `{column}`, which says nothing about a correlation: at least {MIN_PAIRS} "
            "are needed, and some hundred for a narrow interval."
        )
    results = {}
    for name in names:
        found = compute_rank_correlation(read_scores(coverage, name)[kept], outcome[kept], level)
        conclusion = "none"
        if found.low is not None and found.high is not None and found.low * found.high > 0:
            conclusion = "negative" if found.high < 0 else "positive"
        results[name] = CoverageCorrelation(**vars(found), conclusion=conclusion)
    return results


def _check_request(top_k: int, prepared: Dataset, tests: dict[str, Dataset]) -> None:
    _check_top_k(top_k, len(prepared))
    for name, test in tests.items():
        shared = test.with_format("numpy")["row"][:][find_shared_tokens(test, [prepared])]
        if len(shared):
            raise ValueError(
                f"{len(shared)} of the {len(test)} rows of the test set `{name}` also stand in the pool (rows "
                f"{shared[:10].tolist()}), where they cover themselves. Drop them from one of the two."
            )


def _check_top_k(top_k: int, num_rows: int) -> None:
    if not 1 <= top_k <= num_rows:
        raise ValueError(f"top_k={top_k} does not fit: {num_rows} rows of the pool carry loss. Give 1 to {num_rows}.")


def _describe_tests(trainer: "InfluenceTrainer", tests: dict[str, Dataset]) -> dict[str, Iterable[Any]]:
    autocast = AUTOCAST_DTYPES[trainer.autocast]
    model = trainer.accelerator.unwrap_model(trainer.model)
    size = trainer.args.tokens_per_batch
    losses = [compute_row_losses(model, test, size, autocast, f"Loss: {name}") for name, test in tests.items()]
    return {
        "test_set": [name for name, test in tests.items() for _ in range(len(test))],
        "test_row": np.concatenate([test.with_format("numpy")["row"][:] for test in tests.values()]),
        "loss": np.concatenate([found.nll / found.num_loss_tokens for found in losses]),
        "num_loss_tokens": np.concatenate([found.num_loss_tokens for found in losses]),
    }


def _make_dataset(columns: dict[str, Any], strength: np.ndarray, rows: np.ndarray, top_k: int, kind: str) -> Dataset:
    top = TopRows.find(rows, -strength, top_k)
    names = ("proponents", "proponent_influence") if kind == "influence" else ("nearest", "nearest_similarity")
    types = {"test_set": "string", "test_row": "int64", "num_loss_tokens": "int64"}
    features = {name: Value(types.get(name, "float64")) for name in columns}
    lists = {names[0]: List(Value("int64")), names[1]: List(Value("float64"))}
    values = top.influence[:, :top_k] * (1 if kind == "influence" else -1)
    columns = columns | {names[0]: top.rows[:, :top_k], names[1]: values}
    return Dataset.from_dict(columns, features=Features(features | lists))


def _compute_similarities(
    trainer: "InfluenceTrainer", by: str, prepared: Dataset, test: Dataset, encoder: Any
) -> np.ndarray:
    """Similarity of every row of the pool to every test row, float64 `[Q, n]`."""
    tokenizer = trainer.preparation.processing_class
    if by == "bm25":
        return compute_bm25_similarities(prepared, test, tokenizer)
    if by == "rds":
        model = trainer.accelerator.unwrap_model(trainer.model)
        with model.disable_adapter() if isinstance(model, PeftModel) else nullcontext():
            return compute_rds_similarities(
                prepared, test, model, trainer.args.tokens_per_batch, AUTOCAST_DTYPES[trainer.autocast]
            )
    encoder = load_encoder(encoder) if isinstance(encoder, str) else encoder
    return compute_encoder_similarities(prepared, test, tokenizer, encoder)
