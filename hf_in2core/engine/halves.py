"""How far halves of a validation set rank the pool alike: one question asked twice, whose answers should agree."""

from dataclasses import replace

import numpy as np
import torch
from datasets import Dataset
from scipy.stats import spearmanr
from torch import Tensor

from hf_in2core.names import describe_set

from .curvature import CURVATURE_ROWS, MIN_CURVATURE_ROWS
from .passes import Passes
from .validation import run_per_example_validation_pass


MIN_QUERIES = 10
HALVES = 50
# On the data of docs/benchmarks/when_to_read.md every reading above it found the rows of the task, and few below it.
MIN_AGREEMENT = 0.75


def correlate_halves(influence: np.ndarray, seed: int) -> list[float]:
    """
    Rank correlations over the pool between the mean influence on one half of the queries and on the other.

    Args:
        influence (`numpy.ndarray` of shape `[Q, n]`):
            Influence of each row of the pool on each query, without NaN.
        seed (`int`):
            Seed of the halves.

    Returns:
        `list[float]`: one for each of 50 random halves; NaN where a half gives every row the same influence.
    """
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(HALVES):
        half, other = np.array_split(generator.permutation(len(influence)), 2)
        means = influence[half].mean(0), influence[other].mean(0)
        constant = np.ptp(means[0]) == 0 or np.ptp(means[1]) == 0
        found.append(float("nan") if constant else float(spearmanr(*means).statistic))
    return found


def measure_halves(
    passes: Passes,
    gradients: dict[str, Tensor] | None,
    validation: dict[str, Dataset],
    damping: dict[str, float],
    seed: int,
) -> dict[str, float]:
    """
    Agreement of the halves of each validation set on the sample of the pool's rows that [`curvature`] looks at.

    No row of the pool is passed for it: of each set at most 64 rows are, drawn by the seed, through the blocks of the
    sample. Influence is the dot product of gradients with each block divided by its damping, whose ranking is that of
    DataInf (Spearman of 0.984 and more in every reading of `benchmarks/exact.py`). Of a set with more rows than were
    drawn, the agreement is told that halves of all of them are to be expected to have.

    Args:
        passes ([`Passes`]):
            The fit pass.
        gradients (`dict[str, torch.Tensor]`, *optional*):
            Of the sample, `[rows, out * in]` per block; nothing is measured without them.
        validation (`dict[str, datasets.Dataset]`):
            Prepared validation sets.
        damping (`dict[str, float]`):
            Damping of each block; empty for estimators without curvature, whose blocks count as they are.
        seed (`int`):
            Seed of the rows and of the halves.

    Returns:
        `dict[str, float]`: the mean over 50 random halves, by set; a set of fewer than 10 rows says nothing.
    """
    if gradients is None or len(next(iter(gradients.values()))) < MIN_CURVATURE_ROWS:
        return {}
    chosen = {name: block for name, block in passes.blocks.items() if name in gradients and damping.get(name, 1) > 0}
    silent = replace(passes, blocks=chosen, folder=None, store=None)
    agreements = {}
    for name, prepared in validation.items():
        if len(prepared) < MIN_QUERIES or not chosen:
            continue
        count = min(len(prepared), CURVATURE_ROWS)
        rows = np.sort(np.random.default_rng(seed).choice(len(prepared), count, replace=False))
        queries = run_per_example_validation_pass(
            silent, prepared.select(rows), f"Influence: sample of the {describe_set(name)} set"
        )
        influence = torch.zeros(count, len(next(iter(gradients.values()))), dtype=torch.float64)
        for key, found in queries.items():
            dots = found.flatten(1).double() @ gradients[key].flatten(1).to(found.device).double().T
            influence -= dots.cpu() / damping.get(key, 1.0)
        agreement = float(np.mean(correlate_halves(influence.numpy(), seed)))
        if np.isfinite(agreement):
            agreements[name] = extrapolate(agreement, len(prepared) / count)
    return agreements


def extrapolate(agreement: float, times: float) -> float:
    """The agreement of halves of `times` as many rows, by Spearman and Brown's formula, which holds above 0."""
    return agreement if agreement <= 0 else times * agreement / (1 + (times - 1) * agreement)


def say_disagreement(agreement: float, what: str = "validation set") -> str | None:
    """What it means and what to do where halves rank the pool differently; `None` where they agree."""
    if agreement >= MIN_AGREEMENT:
        return None
    return (
        f"Halves of the {what} rank the pool differently (Spearman {agreement:.2f}; 1 = alike), so the ranking by "
        "`influence` is largely noise, which is what a reference trained past its useful point gives: use more "
        'validation rows, let them choose in turn (`strategy="round_robin_rows"`), or read influence at an earlier '
        "checkpoint (`score_influence(checkpoints=[...])`)."
    )
