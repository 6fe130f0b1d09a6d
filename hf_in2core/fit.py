"""The validation and fit passes: mean validation gradients, preconditioned by DataInf over the pool."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from .batches import TokenBatch, read_token_rows
from .datainf import compute_damping, compute_ihvp, compute_inner_damping_error
from .gradients import GradientRecorder, compute_fit_terms, compute_gradient_sum, compute_square_norms
from .passes import Passes, accumulate, check_finite, make_zeros, run_batches


logger = logging.getLogger(__name__)

PILOT_ROWS = 16
# Largest accepted bound on the relative error of u from taking the inner damping from the pilot rows.
MAX_INNER_DAMPING_ERROR = 1e-3


def run_validation_pass(passes: Passes, prepared: Dataset, name: str, description: str) -> dict[str, Tensor]:
    """
    Mean validation gradient `v` of one validation set.

    Returns:
        `dict[str, torch.Tensor]`: float64 `[out, in]` per block.

    Raises:
        ValueError: if a gradient is not finite.
    """
    sums = {key: make_zeros(block.tensor, ()) for key, block in passes.blocks.items()}

    def make_step(recorder: GradientRecorder) -> Callable[[TokenBatch], None]:
        def step(batch: TokenBatch) -> None:
            gradients = compute_gradient_sum(recorder, batch, passes.loss_reduction)
            check_finite(gradients.values(), batch, per_row=False)
            for key, gradient in gradients.items():
                sums[key] += gradient

        return step

    sums = accumulate(passes, name, description, prepared, None, sums, make_step)
    return {key: value / len(prepared) for key, value in sums.items()}


def run_per_example_validation_pass(passes: Passes, prepared: Dataset) -> dict[str, Tensor]:
    """
    Gradient of every validation row on its own.

    Returns:
        `dict[str, torch.Tensor]`: float32 (float64 for a float64 model) `[Q, out, in]` per block, in the rows' order.
    """
    queries: dict[str, Tensor] = {}
    token_rows = read_token_rows(prepared)
    with GradientRecorder(passes.model, passes.blocks, passes.autocast) as recorder:
        for key, block in passes.blocks.items():
            queries[key] = make_zeros(block.tensor, (len(token_rows),), recorder.accumulation_dtype)

        def step(batch: TokenBatch) -> None:
            def reduce(key: str, x: Tensor, grad_output: Tensor) -> None:
                gradients = torch.bmm(grad_output.to(queries[key].dtype).transpose(1, 2), x.to(queries[key].dtype))
                queries[key][torch.from_numpy(batch.indices)] = gradients

            recorder.run(batch, passes.loss_reduction, reduce)

        run_batches(passes, token_rows, step)
    return queries


@dataclass
class FitResult:
    """
    Outcome of the fit pass.

    Attributes:
        ihvp (`dict[str, torch.Tensor]`):
            Preconditioned validation gradients `u`, float64 `[Q, out, in]` per block.
        damping (`dict[str, float]`):
            Damping of each block.
        num_examples (`int`):
            Number of training rows fitted.
        inner_damping_error (`float`):
            Bound on the relative error of `u` from the pilot's damping; 0 where the exact one was used.
    """

    ihvp: dict[str, Tensor]
    damping: dict[str, float]
    num_examples: int
    inner_damping_error: float


def run_fit_pass(
    passes: Passes,
    prepared: Dataset,
    validation_gradients: dict[str, Tensor],
    damping_scale: float,
    fit_examples: int | None,
    seed: int,
) -> FitResult:
    """
    DataInf's preconditioned validation gradients, in one pass over the pool and without stored gradients.

    Args:
        passes ([`Passes`]):
            The pass.
        prepared (`datasets.Dataset`):
            Prepared pool.
        validation_gradients (`dict[str, torch.Tensor]`):
            `v`, `[Q, out, in]` per block.
        damping_scale (`float`):
            Relative damping.
        fit_examples (`int`, *optional*):
            Size of the seeded sample to fit on; all rows by default.
        seed (`int`):
            Seed of the pilot rows and of the sample.

    Returns:
        [`FitResult`]
    """
    generator = np.random.default_rng(seed)
    pilot = np.sort(generator.choice(len(prepared), min(PILOT_ROWS, len(prepared)), replace=False))
    positions = None
    if fit_examples is not None and fit_examples < len(prepared):
        positions = np.sort(generator.choice(len(prepared), fit_examples, replace=False))
    inner = _compute_pilot_damping(passes, prepared.select(pilot), damping_scale)
    result = _fit(passes, "fit", prepared, positions, validation_gradients, inner, damping_scale)
    if result.inner_damping_error > MAX_INNER_DAMPING_ERROR:
        logger.warning(
            "The pilot's damping may be off by up to %.1e of the result: fitting again with the exact damping.",
            result.inner_damping_error,
        )
        result = _fit(passes, "fit-exact", prepared, positions, validation_gradients, result.damping, damping_scale)
    return result


def _compute_pilot_damping(passes: Passes, pilot: Dataset, damping_scale: float) -> dict[str, float]:
    totals = dict.fromkeys(passes.blocks, 0.0)
    with GradientRecorder(passes.model, passes.blocks, passes.autocast) as recorder:

        def step(batch: TokenBatch) -> None:
            norms = compute_square_norms(recorder, batch, passes.loss_reduction)
            for key, value in norms.items():
                totals[key] += float(value.double().sum())

        run_batches(passes, read_token_rows(pilot), step)
    return {
        key: compute_damping(total / len(pilot), passes.blocks[key].tensor.numel(), damping_scale)
        for key, total in totals.items()
    }


def _fit(
    passes: Passes,
    name: str,
    prepared: Dataset,
    positions: np.ndarray | None,
    validation_gradients: dict[str, Tensor],
    inner_damping: dict[str, float],
    damping_scale: float,
) -> FitResult:
    num_queries = next(iter(validation_gradients.values())).shape[0]
    sums: dict[str, Tensor] = {}
    for key, block in passes.blocks.items():
        device = block.tensor.device
        sums[f"{key}/weighted_sum"] = make_zeros(block.tensor, (num_queries,))
        sums[f"{key}/square_norm"] = torch.zeros((), dtype=torch.float64, device=device)
        sums[f"{key}/error_weight"] = torch.zeros(num_queries, dtype=torch.float64, device=device)

    def make_step(recorder: GradientRecorder) -> Callable[[TokenBatch], None]:
        v = {key: value.to(recorder.accumulation_dtype) for key, value in validation_gradients.items()}

        def step(batch: TokenBatch) -> None:
            terms = compute_fit_terms(recorder, batch, passes.loss_reduction, v, inner_damping)
            check_finite((term.square_norms for term in terms.values()), batch)
            for key, term in terms.items():
                sums[f"{key}/weighted_sum"] += term.weighted_sum
                sums[f"{key}/square_norm"] += term.square_norms.double().sum()
                sums[f"{key}/error_weight"] += term.error_weight

        return step

    sums = accumulate(passes, name, "Influence: fit pass", prepared, positions, sums, make_step)
    num_examples = len(prepared) if positions is None else len(positions)
    ihvp, damping = {}, {}
    squared_error, squared_norm = torch.zeros(num_queries).double(), torch.zeros(num_queries).double()
    for key, block in passes.blocks.items():
        mean_square_norm = float(sums[f"{key}/square_norm"]) / num_examples
        damping[key] = compute_damping(mean_square_norm, block.tensor.numel(), damping_scale)
        ihvp[key] = compute_ihvp(
            validation_gradients[key].double(), sums[f"{key}/weighted_sum"], num_examples, damping[key]
        )
        weight = sums[f"{key}/error_weight"].cpu()
        error = compute_inner_damping_error(weight, num_examples, damping[key], inner_damping[key])
        squared_error += error.square()
        squared_norm += ihvp[key].flatten(1).square().sum(1).cpu()
    relative = torch.where(squared_norm > 0, (squared_error / squared_norm).sqrt(), torch.zeros_like(squared_norm))
    return FitResult(ihvp, damping, num_examples, float(relative.max()))
