"""The validation and fit passes: mean validation gradients, preconditioned by DataInf over the pool."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from .batches import TokenBatch, read_token_rows
from .datainf import compute_damping, compute_ihvp, compute_inner_damping_error, correct_damping
from .gradients import (
    FitTerms,
    GradientRecorder,
    accumulation_dtype,
    compute_block_fit_terms,
    compute_fit_terms,
    compute_gradient_sum,
    compute_per_example_gradients,
    compute_square_norms,
)
from .passes import Passes, accumulate, check_finite, make_zeros, run_batches
from .state import read_tensors, write_tensors
from .store import GradientStore, StoredChunk


logger = logging.getLogger(__name__)

FITTED_FILE = "fitted.safetensors"
# Pilot rows, from few rows on and up to many: a hundredth of a pass, which spares most runs a second fit pass.
PILOT_ROWS, MAX_PILOT_ROWS = 4, 64
# Largest accepted bound on the relative error of u from taking the inner damping from the pilot rows, by the precision
# of the gradients: the noise of float32, and well below it where there is none.
MAX_INNER_DAMPING_ERROR = {torch.float64: 1e-6, torch.float32: 1e-5}


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


def run_per_example_validation_pass(passes: Passes, prepared: Dataset, description: str) -> dict[str, Tensor]:
    """
    Gradient of every validation row on its own.

    Returns:
        `dict[str, torch.Tensor]`: float32 (float64 for a float64 model) `[Q, out, in]` per block, in the rows' order.
    """
    queries: dict[str, Tensor] = {}
    token_rows = read_token_rows(prepared)
    with (
        GradientRecorder(passes.model, passes.blocks, passes.autocast) as recorder,
        passes.progress(len(token_rows), description) as bar,
    ):
        for key, block in passes.blocks.items():
            queries[key] = make_zeros(block.tensor, (len(token_rows),), recorder.accumulation_dtype)

        def step(batch: TokenBatch) -> None:
            def reduce(key: str, x: Tensor, grad_output: Tensor) -> None:
                gradients = compute_per_example_gradients(x, grad_output, recorder.accumulation_dtype)
                queries[key][torch.from_numpy(batch.indices)] = gradients

            recorder.run(batch, passes.loss_reduction, reduce)
            check_finite((query[torch.from_numpy(batch.indices)].flatten(1) for query in queries.values()), batch)
            bar.update(len(batch.rows))

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
            Bound on the relative error of `u` that the pilot's damping leaves, corrected to first order; 0 where the
            exact one was used.
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
    name: str = "fit",
    is_stored: bool = False,
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
        name (`str`, *optional*, defaults to `"fit"`):
            Name of its state file.
        is_stored (`bool`, *optional*, defaults to `False`):
            Whether an earlier fit pass has filled the gradient store, if there is one; else this pass fills it.

    Returns:
        [`FitResult`]
    """
    generator = np.random.default_rng(seed)
    pilot = np.sort(generator.choice(len(prepared), count_pilot_rows(len(prepared)), replace=False))
    positions = None
    if fit_examples is not None and fit_examples < len(prepared):
        positions = np.sort(generator.choice(len(prepared), fit_examples, replace=False))
    inner = _compute_pilot_damping(passes, prepared.select(pilot), damping_scale)
    result = fit_rows(passes, name, prepared, positions, validation_gradients, inner, damping_scale, is_stored)
    if (
        result.inner_damping_error
        > MAX_INNER_DAMPING_ERROR[accumulation_dtype(next(iter(passes.blocks.values())).tensor)]
    ):
        logger.warning(
            "The pilot's damping may be off by up to %.1e of the result: fitting again with the exact damping.",
            result.inner_damping_error,
        )
        result = fit_rows(
            passes, f"{name}-exact", prepared, positions, validation_gradients, result.damping, damping_scale, True
        )
    return result


def count_pilot_rows(num_rows: int) -> int:
    """Rows of the pilot that the inner damping comes from: a hundredth of the pool, 4 to 64."""
    return min(max(num_rows // 100, PILOT_ROWS), MAX_PILOT_ROWS, num_rows)


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


def fit_rows(
    passes: Passes,
    name: str,
    prepared: Dataset,
    positions: np.ndarray | None,
    validation_gradients: dict[str, Tensor],
    inner_damping: dict[str, float],
    damping_scale: float,
    is_stored: bool,
) -> FitResult:
    num_queries = next(iter(validation_gradients.values())).shape[0]
    sums: dict[str, Tensor] = {}
    for key, block in passes.blocks.items():
        device = block.tensor.device
        sums[f"{key}/weighted_sum"] = make_zeros(block.tensor, (num_queries,))
        # A correction, which needs no more than the precision of the gradients.
        sums[f"{key}/weighted_slope"] = make_zeros(block.tensor, (num_queries,), accumulation_dtype(block.tensor))
        sums[f"{key}/square_norm"] = torch.zeros((), dtype=torch.float64, device=device)
        sums[f"{key}/error_weight"] = torch.zeros(num_queries, dtype=torch.float64, device=device)

    dtype = accumulation_dtype(next(iter(passes.blocks.values())).tensor)
    v = {key: value.to(dtype) for key, value in validation_gradients.items()}
    store = passes.store if positions is None else None

    def add(key: str, term: FitTerms) -> None:
        sums[f"{key}/weighted_sum"] += term.weighted_sum
        sums[f"{key}/weighted_slope"] += term.weighted_slope
        sums[f"{key}/square_norm"] += term.square_norms.double().sum()
        sums[f"{key}/error_weight"] += term.error_weight

    def make_step(recorder: GradientRecorder) -> Callable[[TokenBatch], None]:
        def step(batch: TokenBatch) -> None:
            keep = None if store is None else partial(_keep, store, batch.indices)
            terms = compute_fit_terms(recorder, batch, passes.loss_reduction, v, inner_damping, keep)
            check_finite((term.square_norms for term in terms.values()), batch)
            for key, term in terms.items():
                add(key, term)

        return step

    def add_stored(chunk: StoredChunk) -> None:
        for key, value in v.items():
            for _, gradients in chunk.read(key):
                add(key, compute_block_fit_terms(gradients.to(value.device, dtype), value, inner_damping[key]))

    sums = accumulate(
        passes,
        name,
        "Influence: fit pass",
        prepared,
        positions,
        sums,
        make_step,
        store,
        add_stored if is_stored else None,
    )
    num_examples = len(prepared) if positions is None else len(positions)
    ihvp, damping = {}, {}
    squared_error, squared_norm = torch.zeros(num_queries).double(), torch.zeros(num_queries).double()
    for key, block in passes.blocks.items():
        mean_square_norm = float(sums[f"{key}/square_norm"]) / num_examples
        damping[key] = compute_damping(mean_square_norm, block.tensor.numel(), damping_scale)
        weighted_sum = correct_damping(
            sums[f"{key}/weighted_sum"], sums[f"{key}/weighted_slope"], damping[key], inner_damping[key]
        )
        ihvp[key] = compute_ihvp(validation_gradients[key].double(), weighted_sum, num_examples, damping[key])
        weight = sums[f"{key}/error_weight"].cpu()
        error = compute_inner_damping_error(weight, num_examples, damping[key], inner_damping[key])
        squared_error += error.square()
        squared_norm += ihvp[key].flatten(1).square().sum(1).cpu()
    relative = torch.where(squared_norm > 0, (squared_error / squared_norm).sqrt(), torch.zeros_like(squared_norm))
    return FitResult(ihvp, damping, num_examples, float(relative.max()))


def _keep(store: GradientStore, indices: np.ndarray, name: str, gradients: Tensor) -> None:
    store.keep(name, indices, gradients)


def fit_directions(
    passes: Passes,
    pool: Dataset,
    validation: dict[str, Dataset],
    *,
    estimator: str,
    damping_scale: float,
    fit_examples: int | None,
    seed: int,
    queries_per_block: int | None = None,
) -> FitResult:
    """
    The directions that rows are scored with: `u` for DataInf, `v` for the estimators without curvature.

    Args:
        passes ([`Passes`]):
            The pass.
        pool (`datasets.Dataset`):
            Prepared pool.
        validation (`dict[str, datasets.Dataset]`):
            Prepared validation sets.
        estimator (`str`):
            `"datainf"`; the others score with the validation gradients as they are.
        damping_scale (`float`):
            Relative damping.
        fit_examples (`int`, *optional*):
            Size of the seeded sample to fit on; all rows where `None`.
        seed (`int`):
            Seed of the pilot rows and of the sample.
        queries_per_block (`int`, *optional*):
            If given, every validation row is a query of its own, so many of them in memory at a time; by default each
            validation set is one through its mean gradient.

    Returns:
        [`FitResult`] with directions in float32 (float64 for a float64 model); on the CPU where rows are queries.
    """
    dtype = accumulation_dtype(next(iter(passes.blocks.values())).tensor)

    def precondition(gradients: dict[str, Tensor], name: str, is_stored: bool = False) -> FitResult:
        result = FitResult(ihvp=gradients, damping={}, num_examples=0, inner_damping_error=0.0)
        if estimator == "datainf":
            result = run_fit_pass(passes, pool, gradients, damping_scale, fit_examples, seed, name, is_stored)
        result.ihvp = {key: value.to(dtype) for key, value in result.ihvp.items()}
        return result

    results = []
    if queries_per_block is None:
        means = [
            run_validation_pass(passes, rows, f"validation-{index}", f"Influence: validation set {name}")
            for index, (name, rows) in enumerate(validation.items())
        ]
        v = {key: torch.stack([mean[key] for mean in means]) for key in passes.blocks}
        results.append(precondition(v, "fit"))
    else:
        for index, (set_name, rows) in enumerate(validation.items()):
            for start in range(0, len(rows), queries_per_block):
                queries = rows.select(range(start, min(start + queries_per_block, len(rows))))
                v = run_per_example_validation_pass(passes, queries, f"Influence: validation set {set_name}")
                result = precondition(v, f"fit-{index}-{start}", is_stored=bool(results))
                result.ihvp = {key: value.cpu() for key, value in result.ihvp.items()}
                results.append(result)
    return FitResult(
        ihvp={key: torch.cat([result.ihvp[key] for result in results]) for key in passes.blocks},
        damping=results[0].damping,
        num_examples=results[0].num_examples,
        inner_damping_error=max(result.inner_damping_error for result in results),
    )


def write_fit(passes: Passes, result: FitResult) -> None:
    """Keep a finished fit in the pass's folder."""
    metadata = {
        "fingerprint": passes.fingerprint,
        "damping": json.dumps(result.damping),
        "num_examples": str(result.num_examples),
        "inner_damping_error": repr(result.inner_damping_error),
    }
    write_tensors(passes.folder / FITTED_FILE, result.ihvp, metadata)  # type: ignore[operator]


def read_fit(passes: Passes) -> FitResult | None:
    """The finished fit in the pass's folder, if every process finds one."""
    stored = read_tensors(passes.folder / FITTED_FILE, passes.fingerprint)  # type: ignore[operator]
    if not passes.everywhere(stored is not None):
        return None
    tensors, metadata = stored  # type: ignore[misc]
    return FitResult(
        ihvp={name: tensors[name] for name in passes.blocks},
        damping=json.loads(metadata["damping"]),
        num_examples=int(metadata["num_examples"]),
        inner_damping_error=float(metadata["inner_damping_error"]),
    )
