"""Trainers against the naive loop, whatever it is that is trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from helpers import assert_same, make_prompt_completion, prepare
from naive import compute_datainf, compute_gradients, compute_whole_dots

from hf_in2core import InfluenceScorer


Gradients = list[dict[str, torch.Tensor]]


def compute_loops(
    trainer: Any, rows: Dataset, validation: Dataset, loss_reduction: str = "mean"
) -> tuple[Gradients, Gradients]:
    """The loop's gradients of every row of both; nothing trainable is left out."""
    train, held_out = (compute_gradients(trainer.model, prepare(part), loss_reduction) for part in (rows, validation))
    assert {name for name, tensor in trainer.model.named_parameters() if tensor.requires_grad} == set(train[0])
    return train, held_out


def keep_layers(loops: tuple[Gradients, Gradients], *layers: int) -> tuple[Gradients, Gradients]:
    """What the loop has of some layers alone."""
    parts = [f".layers.{layer}." for layer in layers]
    train, held_out = (
        [{name: value for name, value in row.items() if any(part in name for part in parts)} for row in rows]
        for rows in loops
    )
    assert train[0]
    return train, held_out


def assert_equals_loop(trainer: Any, rows: Dataset, validation: Dataset, tolerance: float = 1e-9) -> None:
    """The influence that a trainer gives its pool is the loop's, by its own estimator and loss."""
    influence, settings = trainer.score_influence()["influence"], trainer.args
    loops = compute_loops(trainer, rows, validation, settings.loss_reduction)
    datainf = settings.estimator == "datainf"
    assert_same(
        influence, compute_datainf(*loops) if datainf else compute_whole_dots(*loops, settings.estimator), tolerance
    )


def assert_queries_and_saved_scorer_equal_loop(
    folder: Path, make: Callable[..., Any], rows: Dataset, validation: Dataset, base: Any = None
) -> None:
    """Every validation row as a query, and a scorer that is saved and loaded beside a base model, if it needs one."""
    trainer = make(folder / "run", rows, validation)
    scorer = trainer.fit_influence(per_example=True)
    scored = trainer.score_influence()
    train, held_out = compute_loops(trainer, rows, validation)
    expected = np.stack([compute_datainf(train, [query]).numpy() for query in held_out], axis=1)
    assert_same(scored["influence_per_query"], expected, 1e-9)
    scorer.save_pretrained(folder / "scorer")
    loaded = InfluenceScorer.from_pretrained(folder / "scorer", model=base)
    assert set(loaded.blocks) == set(trainer.blocks)
    assert_same(rows.map(loaded, batched=True, batch_size=4)["influence"], expected.mean(1), 1e-9)


def assert_batches_and_order_do_not_matter(folder: Path, make: Callable[..., Any], validation: Dataset) -> None:
    rows = make_prompt_completion(12, seed=2)
    order = np.random.default_rng(0).permutation(12)
    scores = []
    for name, pool, tokens in (("alone", rows, 1), ("together", rows, 10_000), ("mixed", rows.select(order), 90)):
        trainer = make(folder / name, pool, validation, tokens_per_batch=tokens)
        scores.append(np.array(trainer.score_influence()["influence"]))
    assert_same(scores[1], scores[0], 1e-9)
    assert_same(scores[2], scores[0][order], 1e-9)
