r"""Columns to compare influence with: loss, IFD, length, similarity to the validation set (RDS+, BM25, encoder).

Each `add_*` function adds columns to a dataset of raw rows, in its order, null where a row carries no loss, as scoring
adds `influence`. A column says by its name how to read it, and `select_coreset(scored, column=...)` takes the smallest
values first:

- `loss`: mean negative log-likelihood per labelled token, nats.
- `ifd`: that loss over the loss of the same answer without its prompt; about 1 where the prompt is no help.
- `rds_similarity`, `bm25_similarity`, `encoder_similarity`: larger = closer to the validation set.
- `rds_rank`, `bm25_rank`, `encoder_rank`: 0 = taken first, as in `influence_rank`. Beside each, `rds_score` is the
  similarity with the validation row that took the row at that turn, and `rds_taker` which one that was.
- `num_loss_tokens`, which scoring adds, is the baseline of length.

Gradient dot and gradient cosine are estimators of influence (`InfluenceConfig(estimator=...)`).
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Value
from torch import nn

from hf_in2core.engine.losses import compute_row_losses
from hf_in2core.names import IFD, LOSS, METHODS, list_method_columns
from hf_in2core.rows.preparation import Preparation, prepare_rows

from .coreset import select_positions
from .lengths import match_lengths
from .similarities import (
    ENCODER,
    compute_bm25_similarities,
    compute_encoder_similarities,
    compute_rds_similarities,
    import_bm25s,
    load_encoder,
)
from .taking import make_turn_columns


def add_loss(
    dataset: Dataset,
    model: nn.Module,
    preparation: Preparation,
    tokens_per_batch: int | None = None,
    autocast: torch.dtype | None = None,
    overwrite: bool = False,
) -> Dataset:
    r"""
    Add `loss`, the mean negative log-likelihood per labelled token of each row under the model.

    ```python
    >>> scored = add_loss(scored, trainer.model, trainer.preparation)
    >>> easiest = select_coreset(scored, fraction=0.25, column="loss")
    >>> hardest = select_coreset(scored, fraction=0.25, column="loss", strategy="bottom")
    ```

    Args:
        dataset ([`~datasets.Dataset`]):
            Raw rows.
        model (`torch.nn.Module`):
            Causal language model, such as the reference model with its adapter.
        preparation ([`Preparation`]):
            How rows become tokens: `trainer.preparation` or `scorer.preparation`.
        tokens_per_batch (`int`, *optional*):
            Token budget of a batch, padding included.
        autocast (`torch.dtype`, *optional*):
            Mixed precision of the forward.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to replace a column of that name.

    Returns:
        [`~datasets.Dataset`]: the rows with `loss` (float64, nats; null where a row carries no loss).

    Raises:
        ValueError: if fewer than two rows carry loss, or the column is there already.
    """
    dataset = _drop_clashes(dataset, [LOSS], overwrite)
    prepared = _prepare(dataset, preparation, "dataset", least=2)
    losses = compute_row_losses(model, prepared, tokens_per_batch, autocast, "Loss")
    return add_prepared_columns(dataset, prepared, {LOSS: losses.nll / losses.num_loss_tokens})


def add_ifd(
    dataset: Dataset,
    model: nn.Module,
    preparation: Preparation,
    tokens_per_batch: int | None = None,
    autocast: torch.dtype | None = None,
    overwrite: bool = False,
) -> Dataset:
    r"""
    Add `ifd`, the Instruction-Following Difficulty of each row (arXiv 2308.12032): how little its prompt helps.

        ifd = loss(answer | prompt) / loss(answer)

    Both losses are means over the same labelled tokens. Without its prompt a row is its first token (`<s>` or the
    opening of the chat template, where there is one) and its labelled tokens. Answers that were shuffled, or that
    belong to another prompt, gain little from the prompt they stand under, so that they have the largest values:

    ```python
    >>> scored = add_ifd(scored, trainer.model, trainer.preparation)
    >>> cleaned = select_coreset(scored, fraction=0.8, column="ifd")
    ```

    Args:
        dataset ([`~datasets.Dataset`]):
            Raw rows.
        model (`torch.nn.Module`):
            Causal language model, such as the reference model with its adapter.
        preparation ([`Preparation`]):
            How rows become tokens: `trainer.preparation` or `scorer.preparation`. Prompts must carry no loss.
        tokens_per_batch (`int`, *optional*):
            Token budget of a batch, padding included.
        autocast (`torch.dtype`, *optional*):
            Mixed precision of the forward.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to replace a column of that name.

    Returns:
        [`~datasets.Dataset`]: the rows with `ifd` (float64, >= 0; below 1 the prompt helps, above 1 it misleads; null
        where a row carries no loss).

    Raises:
        ValueError: if fewer than two rows carry loss, if every token of every row carries loss (there is no prompt to
            leave out), or if the column is there already.
    """
    dataset = _drop_clashes(dataset, [IFD], overwrite)
    prepared = _prepare(dataset, preparation, "dataset", least=2)
    alone = prepared.map(_keep_answers, batched=True, desc="IFD: answers alone")
    if all(len(ids) == len(rest) for ids, rest in zip(prepared["input_ids"], alone["input_ids"], strict=True)):
        raise ValueError(
            "Every token of every row carries loss, so that there is no prompt to leave out and IFD is 1 throughout. "
            "Use rows with `prompt` and `completion`, or `completion_only_loss=True` / `assistant_only_loss=True`."
        )
    nll, answer_nll = (
        compute_row_losses(model, part, tokens_per_batch, autocast, f"IFD: {name}").nll
        for name, part in (("rows", prepared), ("answers alone", alone))
    )
    # A loss of 0 without any prompt: nothing is left for the prompt to take off.
    return add_prepared_columns(
        dataset, prepared, {IFD: np.divide(nll, answer_nll, out=np.ones_like(nll), where=answer_nll > 0)}
    )


def add_rds(
    dataset: Dataset,
    validation: Dataset,
    model: nn.Module,
    preparation: Preparation,
    tokens_per_batch: int | None = None,
    autocast: torch.dtype | None = None,
    overwrite: bool = False,
) -> Dataset:
    r"""
    Add `rds_similarity` and `rds_rank`: how close a row's hidden states are to those of the validation rows (RDS+).

    A row is embedded as the mean of its last hidden states (the input of the output head) over all of its tokens,
    prompt included, weighted by position (RDS+, arXiv 2503.01807):

        e = sum_t w_t h_t,  w_t = t / sum_s s,  t = 1 … T

    `rds_similarity` is the mean cosine of `e` with the validation rows'. `rds_rank` is the turn at which a row is
    taken when the validation rows, in their order, each take the most similar row that none has taken yet: the
    round-robin that RDS+ selects with.

    Args:
        dataset ([`~datasets.Dataset`]):
            Raw rows.
        validation ([`~datasets.Dataset`]):
            Validation rows, in the form of `dataset`.
        model (`torch.nn.Module`):
            Causal language model. RDS+ takes the model before any fine-tuning; a reference model works too.
        preparation ([`Preparation`]):
            How rows become tokens: `trainer.preparation` or `scorer.preparation`.
        tokens_per_batch (`int`, *optional*):
            Token budget of a batch, padding included.
        autocast (`torch.dtype`, *optional*):
            Mixed precision of the forward.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to replace columns of those names.

    Returns:
        [`~datasets.Dataset`]: the rows with `rds_similarity` (float64 in [-1, 1], larger = closer), `rds_rank` (int64,
        0 = taken first), `rds_score` (float64, the cosine with the validation row that took the row) and `rds_taker`
        (int64, which of the validation rows that carry loss, from 0); null where a row carries no loss.

    Raises:
        ValueError: if fewer than two rows or no validation row carries loss, if every row is equally similar to the
            validation set, or if a column is there already.
    """
    dataset = _drop_clashes(dataset, _list_names("rds"), overwrite)
    prepared = _prepare(dataset, preparation, "dataset", least=2)
    queries = _prepare(validation, preparation, "validation set", least=1)
    similarities = compute_rds_similarities(prepared, queries, model, tokens_per_batch, autocast)
    reason = "their hidden states are the same. Check that the rows differ and that the model is a trained one"
    return _add_similarities(dataset, prepared, "rds", similarities, reason)


def add_bm25(dataset: Dataset, validation: Dataset, preparation: Preparation, overwrite: bool = False) -> Dataset:
    r"""
    Add `bm25_similarity` and `bm25_rank`: the words that a row shares with the validation rows, by BM25 (`bm25s`).

    Each validation row is a query against the rows, all as the text that the model sees, prompt included, in lower
    case; words of one character count, and stop words are kept (they tell one instruction from another).
    `bm25_similarity` is the mean score over the validation rows, `bm25_rank` the turn at which a row is taken when
    they take rows in turn, as in [`add_rds`]. No model is needed.

    Args:
        dataset ([`~datasets.Dataset`]):
            Raw rows.
        validation ([`~datasets.Dataset`]):
            Validation rows, in the form of `dataset`.
        preparation ([`Preparation`]):
            How rows become tokens: `trainer.preparation` or `scorer.preparation`.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to replace columns of those names.

    Returns:
        [`~datasets.Dataset`]: the rows with `bm25_similarity` (float64, larger = closer) and `bm25_rank` (int64, 0 =
        taken first), `bm25_score` and `bm25_taker` as in [`add_rds`]; null where a row carries no loss.

    Raises:
        ImportError: if `bm25s` is not installed.
        ValueError: as [`add_rds`], a set of rows that share no word with the validation set included.
    """
    import_bm25s()
    dataset = _drop_clashes(dataset, _list_names("bm25"), overwrite)
    prepared = _prepare(dataset, preparation, "dataset", least=2)
    queries = _prepare(validation, preparation, "validation set", least=1)

    similarities = compute_bm25_similarities(prepared, queries, preparation.processing_class)
    reason = "they share no word, or all the same ones, with it. Use another baseline for rows that are not words"
    return _add_similarities(dataset, prepared, "bm25", similarities, reason)


def add_encoder(
    dataset: Dataset,
    validation: Dataset,
    preparation: Preparation,
    encoder: Any = ENCODER,
    overwrite: bool = False,
) -> Dataset:
    r"""
    Add `encoder_similarity` and `encoder_rank`: how close a row is in meaning to the validation rows.

    Rows and validation rows are the text that the model sees, prompt included, as far as the encoder reads (256 tokens
    of the default one). `encoder_similarity` is the mean cosine of a row's embedding with the validation rows',
    `encoder_rank` the turn at which it is taken when they take rows in turn, as in [`add_rds`].

    Args:
        dataset ([`~datasets.Dataset`]):
            Raw rows.
        validation ([`~datasets.Dataset`]):
            Validation rows, in the form of `dataset`.
        preparation ([`Preparation`]):
            How rows become tokens: `trainer.preparation` or `scorer.preparation`.
        encoder (`sentence_transformers.SentenceTransformer` or `str`, *optional*, defaults to all-MiniLM-L6-v2):
            Sentence encoder, or its folder or Hub id.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to replace columns of those names.

    Returns:
        [`~datasets.Dataset`]: the rows with `encoder_similarity` (float64 in [-1, 1], larger = closer) and
        `encoder_rank` (int64, 0 = taken first), `encoder_score` and `encoder_taker` as in [`add_rds`]; null where a
        row carries no loss.

    Raises:
        ImportError: if sentence-transformers is not installed.
        OSError: if the encoder cannot be loaded.
        ValueError: as [`add_rds`].
    """
    encoder = load_encoder(encoder) if isinstance(encoder, str) else encoder
    dataset = _drop_clashes(dataset, _list_names("encoder"), overwrite)
    prepared = _prepare(dataset, preparation, "dataset", least=2)
    queries = _prepare(validation, preparation, "validation set", least=1)
    similarities = compute_encoder_similarities(prepared, queries, preparation.processing_class, encoder)
    reason = "the encoder tells none of them apart. Check that the rows differ and that it knows their language"
    return _add_similarities(dataset, prepared, "encoder", similarities, reason)


def select_length_matched(
    scored: Dataset,
    *,
    fraction: float | None = None,
    size: int | None = None,
    column: str = "influence",
    strategy: str = "top",
    seed: int = 0,
) -> Dataset:
    r"""
    Select random rows that are as long as those of a coreset: what of a coreset's gain is due to length alone.

    The rows that carry loss are cut into 20 bins of equal size by `num_loss_tokens`; from each bin as many rows are
    drawn as `select_coreset` with the same arguments takes from it. Rows of that coreset may be drawn too: where it
    takes a whole bin, there are no others of that length.

    Args:
        scored ([`~datasets.Dataset`]):
            Scored pool, with `num_loss_tokens`.
        fraction, size, column, strategy:
            As in [`select_coreset`]: the coreset whose lengths are matched.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw.

    Returns:
        [`~datasets.Dataset`]: the rows drawn, with all their columns, in the pool's order.

    Raises:
        ValueError: as [`select_coreset`], or if there is no `num_loss_tokens`.
    """
    coreset = select_positions(scored, fraction=fraction, size=size, column=column, strategy=strategy)
    return scored.select(match_lengths(scored, coreset, seed))


def _prepare(dataset: Any, preparation: Preparation, name: str, least: int) -> Dataset:
    if not isinstance(dataset, Dataset):
        kind = "a dict of datasets" if isinstance(dataset, Mapping) else f"a {type(dataset).__name__}"
        raise TypeError(f"The {name} is {kind}; pass one datasets.Dataset of raw rows.")
    prepared = prepare_rows(dataset, preparation) if len(dataset) else dataset
    if len(prepared) < least:
        raise ValueError(
            f"{len(prepared)} of the {len(dataset)} rows of the {name} carry loss, but at least {least} must. Check "
            "how it was loaded, its completions and `max_length`."
        )
    return prepared


def _keep_answers(batch: dict[str, list]) -> dict[str, list]:
    """The first token and the labelled ones of every row."""
    found: dict[str, list] = {"input_ids": [], "labels": []}
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        kept = [token for token, label in zip(ids[1:], labels[1:], strict=True) if label != -100]
        found["input_ids"].append([ids[0], *kept])
        found["labels"].append([-100, *kept])
    return found


def _list_names(method: str) -> list[str]:
    return [f"{method}_similarity", *list_method_columns([METHODS[method].column])]


def _drop_clashes(dataset: Dataset, names: list[str], overwrite: bool) -> Dataset:
    if not isinstance(dataset, Dataset):
        raise TypeError(f"The dataset is a {type(dataset).__name__}; pass one datasets.Dataset of raw rows.")
    clashes = [name for name in names if name in dataset.column_names]
    if clashes and not overwrite:
        raise ValueError(
            f"The dataset already has the column(s) {', '.join(clashes)}. Pass `overwrite=True` to replace them, or "
            "rename them."
        )
    return dataset.remove_columns(clashes)


def _add_similarities(
    dataset: Dataset, prepared: Dataset, name: str, similarities: np.ndarray, reason: str
) -> Dataset:
    """Add the mean of `[Q, n]` similarities and the turns of the round-robin between the queries."""
    # Hidden states of the same row differ in float32's last digits between batches.
    if np.ptp(similarities, axis=1).max() <= 1e-6 * np.abs(similarities).max():
        raise ValueError(f"All rows are equally similar to the validation set, so nothing ranks them: {reason}.")
    turns, records = make_turn_columns(name, similarities)
    columns = {f"{name}_similarity": similarities.mean(axis=0)} | turns
    return add_prepared_columns(dataset, prepared, columns, records)


def add_prepared_columns(
    dataset: Dataset, prepared: Dataset, columns: dict[str, np.ndarray], records: Mapping[str, str] | None = None
) -> Dataset:
    """Add columns of prepared rows to the raw ones, with what is recorded in their types; null where none is."""
    rows = prepared.with_format("numpy")["row"][:]
    for name, values in columns.items():
        convert: Callable[[Any], Any] = int if values.dtype == np.int64 else float
        column: list[Any] = [None] * len(dataset)
        for row, value in zip(rows, values, strict=True):
            column[row] = convert(value)
        dataset = dataset.add_column(name, column, feature=Value(str(values.dtype), id=(records or {}).get(name)))
    return dataset
