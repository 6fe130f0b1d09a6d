"""Clusters of rows, as groups that a coreset holds some of each of."""

import numpy as np
import torch
from datasets import Dataset
from scipy.cluster.vq import kmeans2
from torch import nn

from hf_in2core.names import ANSWER_CLUSTER, CLUSTERS
from hf_in2core.rows.preparation import Preparation, prepare_rows

from .baselines import add_prepared_columns
from .similarities import compute_hidden_embeddings


MAX_CLUSTERS, ROUNDS = 50, 30


def count_clusters(num_rows: int) -> int:
    """How many clusters so many rows get by default: the square root of half their number, 2 to 50."""
    return min(max(round((num_rows / 2) ** 0.5), 2), MAX_CLUSTERS)


def add_clusters(
    dataset: Dataset,
    model: nn.Module,
    preparation: Preparation,
    column: str = ANSWER_CLUSTER,
    num_clusters: int | None = None,
    tokens_per_batch: int | None = None,
    autocast: torch.dtype | None = None,
) -> Dataset:
    r"""
    Add `answer_cluster` or `row_cluster`: rows alike by their hidden states, for `group_column` of `select_coreset`.

    A row is embedded as in [`~baselines.add_rds`] (`row_cluster`), or likewise with its labelled tokens alone, so that
    the prompt does not count (`answer_cluster`); the embeddings, scaled to length 1, are divided by k-means (seeded,
    k-means++). Chosen within clusters, a coreset holds some of each kind of row or answer, where a ranking alone may
    collapse onto one.

    ```python
    >>> scored = add_clusters(scored, model, trainer.preparation)
    >>> coreset = select_coreset(scored, fraction=0.25, group_column="answer_cluster")
    ```

    Args:
        dataset ([`~datasets.Dataset`]):
            Raw rows.
        model (`torch.nn.Module`):
            Causal language model, before fine-tuning on the rows or after.
        preparation ([`Preparation`]):
            How rows become tokens: `trainer.preparation` or `scorer.preparation`.
        column (`str`, *optional*, defaults to `"answer_cluster"`):
            `"answer_cluster"` or `"row_cluster"`.
        num_clusters (`int`, *optional*):
            At most; the square root of half the number of rows by default, 2 to 50. Rows that are all alike have one.
        tokens_per_batch (`int`, *optional*):
            Token budget of a batch, padding included.
        autocast (`torch.dtype`, *optional*):
            Mixed precision of the forward.

    Returns:
        [`~datasets.Dataset`]: the rows with the column (int64, 0 = the largest cluster); null where a row carries no
        loss.

    Raises:
        ValueError: if `column` is another name or is there already, or fewer rows than clusters carry loss.
    """
    if column not in CLUSTERS:
        raise ValueError(f"column={column!r} is not one of {', '.join(CLUSTERS)}.")
    if column in dataset.column_names:
        raise ValueError(f"The dataset has a column {column} already. Remove it, and it is made anew.")
    if num_clusters is not None and num_clusters < 1:
        raise ValueError(f"num_clusters={num_clusters} is no number of clusters. Give 1 or more, or leave it out.")
    prepared = prepare_rows(dataset, preparation)
    if len(prepared) < (least := num_clusters or 2):
        raise ValueError(f"{len(prepared)} of {len(dataset)} rows carry loss, which make no {least} clusters.")
    shown = prepared.map(_keep_labelled, batched=True) if column == ANSWER_CLUSTER else prepared
    description = f"Clusters of {CLUSTERS[column]}"
    embeddings = compute_hidden_embeddings(model, shown, tokens_per_batch, autocast, description).astype(np.float64)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    # No more centres than rows that differ: k-means++ cannot draw others.
    most = min(num_clusters or count_clusters(len(prepared)), len(np.unique(embeddings.round(6), axis=0)))
    _, found = kmeans2(embeddings, most, iter=ROUNDS, minit="++", seed=np.random.default_rng(0))
    names, sizes = np.unique(found, return_counts=True)
    numbers = np.empty(most, dtype=np.int64)
    numbers[names[np.argsort(-sizes, kind="stable")]] = np.arange(len(names))
    return add_prepared_columns(dataset, prepared, {column: numbers[found]})


def _keep_labelled(batch: dict[str, list]) -> dict[str, list]:
    """The labelled tokens of every row."""
    kept = [[label for label in labels if label != -100] for labels in batch["labels"]]
    return {"input_ids": kept, "labels": kept}
