"""How far DataInf is from the exact damped inverse.

DataInf (arXiv 2310.00902) replaces the inverse of a mean by the mean of inverses:

    exact:    u = (damping I + (1/n) sum_i g_i g_i^T)^-1 v
    DataInf:  u = (1/n) sum_i (damping I + g_i g_i^T)^-1 v

Both are taken block by block. For the fitted rows themselves everything follows from the n x n products of their
gradients, whatever the size of a block.
"""

from dataclasses import replace

import numpy as np
import torch
from datasets import Dataset
from scipy.stats import spearmanr
from torch import Tensor

from .blocks import VOCABULARY_KINDS, Blocks, count_elements
from .datainf import compute_damping
from .fit_sums import FitResult, GradientSample
from .gradients import accumulation_dtype
from .passes import Passes
from .validation import run_per_example_validation_pass


# Rows on which DataInf is compared with the exact damped inverse; fewer say nothing about a rank correlation.
CURVATURE_ROWS, MIN_CURVATURE_ROWS = 64, 32
# Elements of their gradients in memory, or those of four adapters if more: as many blocks are looked at as fit.
MAX_CURVATURE_ELEMENTS = 2**24
CURVATURE_ADAPTERS = 4


def compute_exact_ihvp(gradients: Tensor, v: Tensor, damping: float) -> Tensor:
    r"""
    `(damping I + (1/n) G^T G)^-1 v` of one block, exactly, by algebra among the n rows (Woodbury).

        u = (1/damping) (v - G^T (n damping I + G G^T)^-1 G v)

    Args:
        gradients (`torch.Tensor` of shape `[n, d]`):
            Per-example gradients `G`; use float64.
        v (`torch.Tensor` of shape `[Q, d]`):
            Validation gradients.
        damping (`float`):
            Damping of the block, above 0.

    Returns:
        `torch.Tensor` of shape `[Q, d]`

    Raises:
        ValueError: if the damping is not above 0: the inverse does not exist where there are fewer rows than elements.
    """
    _check_damping(damping)
    gram = gradients @ gradients.T
    gram.diagonal().add_(len(gradients) * damping)
    return (v - torch.linalg.solve(gram, gradients @ v.T).T @ gradients) / damping


def score_fitted_rows(gram: Tensor, dots: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    r"""
    Influence of the fitted rows through one block, by DataInf and by the exact damped inverse.

        DataInf: -(1/damping) (c - K (c / (damping + diag K)) / n)
        exact:   -(1/damping) (c - K (n damping I + K)^-1 c)

    with `K = G G^T` and `c = G v`.

    Args:
        gram (`torch.Tensor` of shape `[n, n]`):
            `K`, the products of the rows' gradients with each other; use float64.
        dots (`torch.Tensor` of shape `[n]`):
            `c`, their products with the validation gradient.
        damping (`float`):
            Damping of the block, above 0.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: both `[n]`, negative = proponent.

    Raises:
        ValueError: if the damping is not above 0.
    """
    _check_damping(damping)
    n = len(dots)
    datainf = (dots - gram @ (dots / (damping + gram.diagonal())) / n) / damping
    damped = gram + n * damping * torch.eye(n, dtype=gram.dtype, device=gram.device)
    exact = (dots - gram @ torch.linalg.solve(damped, dots)) / damping
    return -datainf, -exact


def _check_damping(damping: float) -> None:
    if not damping > 0:
        raise ValueError(
            f"damping={damping} is not above 0, so there is no inverse (a block whose gradients are all zero has no "
            "influence: leave it out)."
        )


def draw_curvature_sample(passes: Passes, num_rows: int, seed: int) -> GradientSample | None:
    """What the fit has to keep for [`check_curvature`]; `None` for a pool in which nothing can be concluded."""
    if num_rows < MIN_CURVATURE_ROWS:
        return None
    # The fit never holds the gradients of a vocabulary's matrix together.
    blocks = {name: block for name, block in passes.blocks.items() if block.kind not in VOCABULARY_KINDS}
    if not blocks:
        return None
    count = min(CURVATURE_ROWS, num_rows)
    generator = np.random.default_rng(seed)
    most = max(MAX_CURVATURE_ELEMENTS, CURVATURE_ADAPTERS * count_elements(blocks))
    return GradientSample(draw_blocks(blocks, most // count, generator), count, generator)


def take_curvature_sample(
    passes: Passes, prepared: Dataset, seed: int, sample: GradientSample | None, max_rows: int | None = None
) -> dict[str, Tensor] | None:
    """
    Gradients of the sample's rows: as a fit has kept them, as they stand in an index, or of a pass over as many; all
    processes have to call.

    Args:
        passes ([`Passes`]):
            The fit pass.
        prepared (`datasets.Dataset`):
            Prepared pool.
        seed (`int`):
            Seed of the rows, where they are passed.
        sample ([`GradientSample`], *optional*):
            What the fit has kept.
        max_rows (`int`, *optional*):
            Rows that a pass for them alone may have; where fewer than 32 are left, there is none.

    Returns:
        `dict[str, torch.Tensor]` or `None`: `[rows, ...]` per block; `None` where nothing can be concluded.
    """
    if sample is not None and (kept := sample.gather(passes, MIN_CURVATURE_ROWS)) is not None:
        return kept
    drawn = draw_curvature_sample(passes, len(prepared), seed)
    if drawn is None:
        return None
    rows = np.sort(np.random.default_rng(seed).choice(len(prepared), drawn.num_rows, replace=False))
    indexed = passes.find_indexed(rows)
    if indexed is not None:
        tensors = {name: block.tensor for name, block in drawn.blocks.items()}
        return {name: indexed.read_all(name, t.device, accumulation_dtype(t)) for name, t in tensors.items()}
    if max_rows is not None and max_rows < len(rows):
        if max_rows < MIN_CURVATURE_ROWS:
            return None
        rows = rows[np.sort(np.random.default_rng(seed).choice(len(rows), max_rows, replace=False))]
    silent = replace(passes, blocks=drawn.blocks, folder=None, store=None)
    return run_per_example_validation_pass(silent, prepared.select(rows), "Influence: sample of the pool")


def measure_curvature(
    passes: Passes,
    prepared: Dataset,
    result: FitResult,
    damping_scale: float,
    seed: int,
    gradients: dict[str, Tensor] | None = None,
) -> float:
    """
    Rank correlation of DataInf with the exact damped inverse on a seeded sample of 64 rows, fitted and scored on it.

    In `benchmarks/exact.py` it is within 0.2 of the agreement on 384 rows, at LoRA ranks of 1 to 16 and any damping.
    `damping * u` stands for the validation gradient `v`: it ranks nearly alike, and `v` is not kept.

    Args:
        passes ([`Passes`]):
            The fit pass.
        prepared (`datasets.Dataset`):
            Prepared pool.
        result ([`FitResult`]):
            Its outcome; several queries count by their mean.
        damping_scale (`float`):
            Relative damping.
        seed (`int`):
            Seed of the sample.
        gradients (`dict[str, torch.Tensor]`, *optional*):
            Of the sample, `[rows, out * in]` per block, as the fit has kept them; by default the rows are passed.

    Returns:
        `float` in [-1, 1]; NaN where nothing can be concluded: fewer than 32 rows, no gradients, or equal scores.
    """
    if not any(value > 0 for value in result.damping.values()):
        return float("nan")
    if gradients is None:
        gradients = take_curvature_sample(passes, prepared, seed, None)
    if gradients is None:
        return float("nan")
    # A block in which no row has a gradient has no inverse.
    chosen = [name for name in gradients if result.damping[name] > 0]
    count = len(next(iter(gradients.values())))
    if count < MIN_CURVATURE_ROWS:
        return float("nan")
    totals = torch.zeros(2, count, dtype=torch.float64)
    for name in chosen:
        g = gradients[name].flatten(1).double()
        gram = g @ g.T
        v = result.ihvp[name].to(g.device, torch.float64).mean(0).flatten() * result.damping[name]
        damping = compute_damping(float(gram.diagonal().mean()), g.shape[1], damping_scale)
        if damping > 0:
            totals += torch.stack(score_fitted_rows(gram, g @ v, damping)).cpu()
    datainf, exact = totals.numpy()
    return float("nan") if np.ptp(datainf) == 0 or np.ptp(exact) == 0 else float(spearmanr(datainf, exact).statistic)


def draw_blocks(blocks: Blocks, max_elements: int, generator: np.random.Generator) -> Blocks:
    """
    Draw blocks at random, as many as `max_elements` hold and one at least; in their order.

    Not every so many of them: their order has a period (`lora_A`, `lora_B`, projection by projection), so that all
    would be of one kind.
    """
    names = generator.permutation(list(blocks))
    fits = np.cumsum([blocks[name].tensor.numel() for name in names]) <= max_elements
    kept = {str(name) for name in names[: max(int(fits.sum()), 1)]}
    return {name: block for name, block in blocks.items() if name in kept}
