"""The columns that the methods rank by, added to a scored pool: by the reference, its untrained base, or words."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig

from hf_in2core import InfluenceConfig, InfluenceTrainer
from hf_in2core.influence.config import AUTOCAST_DTYPES, choose_autocast
from hf_in2core.influence.cosines import add_cosine, add_less, check_moments, make_gradient_dot
from hf_in2core.influence.launcher import check_launcher
from hf_in2core.names import (
    ANSWER_CLUSTER,
    BM25_RANK,
    CLUSTERS,
    COSINE_CLEAN_RANK,
    COSINE_RANK,
    ENCODER_RANK,
    FUSED_RANK,
    IFD,
    LESS,
    LOSS,
    METHODS,
    RDS_CLEAN_RANK,
    RDS_RANK,
    ROW_CLUSTER,
    STRATEGIES_BY_ROW,
    list_method_columns,
)
from hf_in2core.rows.preparation import Preparation
from hf_in2core.selection.baselines import add_bm25, add_encoder, add_ifd, add_loss, add_rds
from hf_in2core.selection.clusters import add_clusters
from hf_in2core.selection.combined import add_clean_rank, add_fused_rank
from hf_in2core.selection.similarities import ENCODER, import_bm25s, load_encoder

from .run_folder import quiet_loading
from .training import load_model, make_influence_trainer


# Optimizers whose state has Adam's moments under the names of torch.
ADAM = ("adamw_torch", "adamw_torch_fused")
# What a column is made of, where it is made of others.
INGREDIENTS = {
    COSINE_CLEAN_RANK: (COSINE_RANK, LOSS),
    RDS_CLEAN_RANK: (RDS_RANK, LOSS),
    FUSED_RANK: (COSINE_RANK, RDS_RANK),
}


@dataclass(frozen=True)
class Reference:
    """A trained reference model, and the rows that it scores by the rows that select."""

    model: ModelConfig
    args: InfluenceConfig
    adapter: str
    pool: Dataset
    validation: dict[str, Dataset]
    tokenizer: PreTrainedTokenizerBase
    encoder: str | None = None
    checkpoints: Sequence[str] = ()


def needs_queries(methods: Iterable[str]) -> bool:
    """Whether a method or strategy reads the influence on single validation rows, so that each is a query."""
    methods = list(methods)
    strategies = [METHODS[method].strategy if method in METHODS else method for method in methods]
    return COSINE_RANK in list_columns(methods) or any(strategy in STRATEGIES_BY_ROW for strategy in strategies)


def list_columns(methods: Iterable[str]) -> list[str]:
    """The columns that methods need beside those of influence, each after what it is made of."""
    found: dict[str, None] = {}
    for method in methods:
        column = METHODS[method].column if method in METHODS else method
        if column in MAKERS and (method in METHODS or method in CLUSTERS):
            found |= dict.fromkeys([*INGREDIENTS.get(column, ()), column])
    return list(found)


def check_methods(
    methods: Iterable[str],
    encoder: str | None = None,
    checkpoints: Sequence[str] | None = None,
    optim: str | None = None,
) -> None:
    """
    Check before long work that the columns of some methods can be made.

    Args:
        methods (`Iterable[str]`): Of `METHODS` and `CLUSTERS`; strategies and other arms need nothing.
        encoder (`str`, *optional*): As of [`Reference`].
        checkpoints (`Sequence[str]`, *optional*): Likewise, where the reference is trained already.
        optim (`str`, *optional*): The optimizer that will train it, where it is not.

    Raises:
        ImportError: if the library of BM25 or of sentence encoders is needed and not installed.
        OSError: if there is no such encoder.
        ValueError: if the launcher shards the model and a column needs it whole, or LESS finds no moments of Adam.
    """
    columns = list_columns(methods)
    if BM25_RANK in columns:
        import_bm25s()
    if ENCODER_RANK in columns:
        with quiet_loading():
            load_encoder(encoder or ENCODER)
    if whole := [column for column in columns if column in (LOSS, IFD, RDS_RANK, LESS, *CLUSTERS)]:
        check_launcher(f"methods that rank by {', '.join(whole)}")
    if LESS in columns and checkpoints is not None:
        check_moments(checkpoints)
    if LESS in columns and optim is not None and optim not in ADAM:
        raise ValueError(
            f"LESS reads Adam's moments from checkpoints of the reference, but --optim {optim} trains it. Give one of "
            f"{', '.join(ADAM)} (as --reference_optim, for the reference alone), or leave out `less`."
        )


def add_columns(scored: Dataset, columns: Iterable[str], reference: Reference) -> tuple[Dataset, dict[str, float]]:
    """
    Add the columns that are not there yet.

    Args:
        scored ([`~datasets.Dataset`]): The scored pool.
        columns (`Iterable[str]`): As of [`list_columns`].
        reference ([`Reference`]): What made the scores.

    Returns:
        `tuple`: the pool with the columns, and the seconds that each one added took.

    Raises:
        ValueError: as the functions of [`hf_in2core.selection.baselines`].
    """
    seconds: dict[str, float] = {}
    for column in columns:
        if column not in scored.column_names:
            start = time.perf_counter()
            with quiet_loading(repeated=True):
                made = MAKERS[column](scored, reference)
            # Not the mean similarity, by which nothing is ranked.
            kept = {*scored.column_names, *list_method_columns([column])}
            scored = made.select_columns([name for name in made.column_names if name in kept])
            seconds[column] = time.perf_counter() - start
            # Each process has made it: they wait for the slowest, not for the next collective call's time limit.
            PartialState().wait_for_everyone()
    return scored, seconds


def _prepare(reference: Reference) -> Preparation:
    return Preparation.from_args(reference.args, reference.tokenizer, reference.pool)


def _list_options(
    reference: Reference, adapter: str | None
) -> tuple[Any, Preparation, int | None, torch.dtype | None]:
    """Model, preparation, tokens of a batch and the precision of the run: what functions that read the model take."""
    args = reference.args
    model = load_model(reference.model, args, adapter)
    return model, _prepare(reference), args.tokens_per_batch, AUTOCAST_DTYPES[choose_autocast(args, model.dtype)]


def _join_validation(reference: Reference) -> Dataset:
    """The rows of all validation sets, with the columns that all of them have."""
    sets = list(reference.validation.values())
    shared = [name for name in sets[0].column_names if all(name in rows.column_names for rows in sets)]
    return concatenate_datasets([rows.select_columns(shared) for rows in sets]) if len(sets) > 1 else sets[0]


def _make_trainer(reference: Reference, args: InfluenceConfig) -> InfluenceTrainer:
    rows = (reference.pool, reference.validation, reference.tokenizer)
    return make_influence_trainer(reference.model, args, reference.adapter, *rows)


def _add_clusters(scored: Dataset, reference: Reference, column: str) -> Dataset:
    model, preparation, tokens_per_batch, autocast = _list_options(reference, adapter=None)
    return add_clusters(scored, model, preparation, column, None, tokens_per_batch, autocast)


MAKERS: dict[str, Callable[[Dataset, Reference], Dataset]] = {
    LOSS: lambda scored, by: add_loss(scored, *_list_options(by, by.adapter)),
    IFD: lambda scored, by: add_ifd(scored, *_list_options(by, by.adapter)),
    RDS_RANK: lambda scored, by: add_rds(scored, _join_validation(by), *_list_options(by, adapter=None)),
    BM25_RANK: lambda scored, by: add_bm25(scored, _join_validation(by), _prepare(by)),
    ENCODER_RANK: lambda scored, by: add_encoder(scored, _join_validation(by), _prepare(by), by.encoder or ENCODER),
    COSINE_RANK: lambda scored, by: add_cosine(scored, _make_trainer(by, by.args)),
    LESS: lambda scored, by: add_less(scored, _make_trainer(by, make_gradient_dot(by.args)), by.checkpoints),
    COSINE_CLEAN_RANK: lambda scored, _: add_clean_rank(scored, *INGREDIENTS[COSINE_CLEAN_RANK], COSINE_CLEAN_RANK),
    RDS_CLEAN_RANK: lambda scored, _: add_clean_rank(scored, *INGREDIENTS[RDS_CLEAN_RANK], RDS_CLEAN_RANK),
    ANSWER_CLUSTER: lambda scored, by: _add_clusters(scored, by, ANSWER_CLUSTER),
    ROW_CLUSTER: lambda scored, by: _add_clusters(scored, by, ROW_CLUSTER),
    FUSED_RANK: lambda scored, _: add_fused_rank(scored, INGREDIENTS[FUSED_RANK]),
}
