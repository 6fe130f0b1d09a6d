"""The validation and fit passes: mean validation gradients, preconditioned by DataInf over the pool."""

import json
import logging
from dataclasses import fields

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from hf_in2core.names import describe_set

from .batches import TokenBatch, read_token_rows
from .datainf import compute_damping
from .fit_sums import FitResult, GradientSample, fit_rows
from .gradients import GradientRecorder, accumulation_dtype
from .passes import Passes, run_batches
from .reductions import compute_square_norms
from .sample import fit_sample, is_sampled
from .state import read_tensors, write_tensors
from .validation import run_per_example_validation_pass, run_validation_pass


logger = logging.getLogger(__name__)

FITTED_FILE = "fitted.safetensors"
# What such a file tells beside the directions, each as JSON.
_FACTS = [field.name for field in fields(FitResult) if field.name != "ihvp"]
# Pilot rows, from few rows on and up to many: a hundredth of a pass, which spares most runs a second fit pass.
PILOT_ROWS, MAX_PILOT_ROWS = 4, 64
# Largest accepted bound on the relative error of u from taking the inner damping from the pilot rows, by the precision
# of the gradients: the noise of float32. In float64 nothing hides it, and scores can lose several times as much as u,
# whose product with a gradient may be small beside both norms: a millionth of the largest score needs far less of u.
MAX_INNER_DAMPING_ERROR = {torch.float64: 1e-8, torch.float32: 1e-5}


def run_fit_pass(
    passes: Passes,
    prepared: Dataset,
    validation_gradients: dict[str, Tensor],
    damping_scale: float,
    fit_examples: int | str | None,
    seed: int,
    name: str = "fit",
    is_stored: bool = False,
    set_sizes: list[int] | None = None,
    sample: GradientSample | None = None,
) -> FitResult:
    """
    DataInf's preconditioned validation gradients, in one pass over the pool or over a sample of it, and without stored
    gradients.

    Args:
        passes ([`Passes`]):
            The pass.
        prepared (`datasets.Dataset`):
            Prepared pool.
        validation_gradients (`dict[str, torch.Tensor]`):
            `v`, `[Q, out, in]` per block.
        damping_scale (`float`):
            Relative damping.
        fit_examples (`int` or `str`, *optional*):
            Size of the seeded sample to fit on; all rows where `None`; `"auto"` for as many as it takes until the
            scores by its two halves agree, see [`fit_sample`].
        seed (`int`):
            Seed of the pilot rows and of the sample.
        name (`str`, *optional*, defaults to `"fit"`):
            Name of its state file.
        is_stored (`bool`, *optional*, defaults to `False`):
            Whether an earlier fit pass has filled the gradient store, if there is one; else this pass fills it.
        set_sizes (`list[int]`, *optional*):
            Queries of each validation set, where validation rows are queries; by default each query is a set.
        sample ([`GradientSample`], *optional*):
            Keeps gradients of a few of the rows.

    Returns:
        [`FitResult`]
    """
    generator = np.random.default_rng(seed)
    pilot = np.sort(generator.choice(len(prepared), count_pilot_rows(len(prepared)), replace=False))
    inner = _compute_pilot_damping(passes, prepared, pilot, damping_scale)
    positions = None
    if fit_examples == "auto" and is_sampled(len(prepared), passes.store is not None):
        order = generator.permutation(len(prepared))
        result = fit_sample(
            passes, name, prepared, order, validation_gradients, inner, damping_scale, set_sizes, sample
        )
    else:
        if isinstance(fit_examples, int) and fit_examples < len(prepared):
            positions = np.sort(generator.choice(len(prepared), fit_examples, replace=False))
        result = fit_rows(
            passes, name, prepared, positions, validation_gradients, inner, damping_scale, is_stored, sample
        )
    bound = MAX_INNER_DAMPING_ERROR[accumulation_dtype(next(iter(passes.blocks.values())).tensor)]
    # Of a sample that grew it is far below what the sample leaves.
    if result.agreement is None and result.inner_damping_error > bound:
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


def _compute_pilot_damping(
    passes: Passes, prepared: Dataset, pilot: np.ndarray, damping_scale: float
) -> dict[str, float]:
    totals = np.zeros(len(passes.blocks))
    indexed = passes.find_indexed(pilot)
    if indexed is not None:
        for index, (key, block) in enumerate(passes.blocks.items()):
            for _, gradients in indexed.read(key, block.tensor.device, accumulation_dtype(block.tensor)):
                totals[index] += float(torch.linalg.vector_norm(gradients, dim=1).double().square().sum())
    else:
        with GradientRecorder(passes.model, passes.blocks, passes.autocast) as recorder:

            def step(batch: TokenBatch) -> None:
                nonlocal totals
                totals += compute_square_norms(recorder, batch, passes.loss_reduction).sum(axis=0)

            run_batches(passes, read_token_rows(prepared.select(pilot)), step)
    return {
        key: compute_damping(float(total) / len(pilot), block.tensor.numel(), damping_scale)
        for (key, block), total in zip(passes.blocks.items(), totals, strict=True)
    }


def fit_directions(
    passes: Passes,
    pool: Dataset,
    validation: dict[str, Dataset],
    *,
    estimator: str,
    damping_scale: float,
    fit_examples: int | str | None,
    seed: int,
    queries_per_block: int | None = None,
    sample: GradientSample | None = None,
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
        fit_examples (`int` or `str`, *optional*):
            See [`run_fit_pass`].
        seed (`int`):
            Seed of the pilot rows and of the sample.
        queries_per_block (`int`, *optional*):
            If given, every validation row is a query of its own, so many of them in memory at a time; by default each
            validation set is one through its mean gradient.
        sample ([`GradientSample`], *optional*):
            Keeps gradients of a few rows of the pool, from the first fit pass.

    Returns:
        [`FitResult`] with directions in float32 (float64 for a float64 model); on the CPU where rows are queries.
    """
    dtype = accumulation_dtype(next(iter(passes.blocks.values())).tensor)

    results: list[FitResult] = []

    def precondition(
        gradients: dict[str, Tensor], name: str, is_stored: bool = False, set_sizes: list[int] | None = None
    ) -> FitResult:
        result = FitResult(ihvp=gradients, damping={}, num_examples=0, inner_damping_error=0.0)
        if estimator == "datainf":
            result = run_fit_pass(
                passes,
                pool,
                gradients,
                damping_scale,
                fit_examples,
                seed,
                name,
                is_stored,
                set_sizes,
                None if results else sample,
            )
        result.ihvp = {key: value.to(dtype) for key, value in result.ihvp.items()}
        return result

    if queries_per_block is None:
        means = [
            run_validation_pass(passes, rows, f"validation-{index}", f"Influence: {describe_set(name)} set")
            for index, (name, rows) in enumerate(validation.items())
        ]
        v = {key: torch.stack([mean.pop(key) for mean in means]) for key in passes.blocks}
        results.append(precondition(v, "fit"))
    else:
        for index, (set_name, rows) in enumerate(validation.items()):
            for start in range(0, len(rows), queries_per_block):
                queries = rows.select(range(start, min(start + queries_per_block, len(rows))))
                v = run_per_example_validation_pass(passes, queries, f"Influence: {describe_set(set_name)} set")
                result = precondition(v, f"fit-{index}-{start}-{len(queries)}", bool(results), [len(queries)])
                result.ihvp = {key: value.cpu() for key, value in result.ihvp.items()}
                results.append(result)
    return FitResult(
        ihvp={key: torch.cat([result.ihvp[key] for result in results]) for key in passes.blocks},
        damping=results[0].damping,
        # Blocks of queries may have taken samples of their own.
        num_examples=min(result.num_examples for result in results),
        inner_damping_error=max(result.inner_damping_error for result in results),
        agreement=min((result.agreement for result in results if result.agreement is not None), default=None),
    )


def write_fit(passes: Passes, result: FitResult) -> None:
    """Keep a finished fit in the pass's folder."""
    facts = {name: json.dumps(getattr(result, name)) for name in _FACTS}
    metadata = {"fingerprint": passes.fingerprint, **facts}
    write_tensors(passes.folder / FITTED_FILE, result.ihvp, metadata)  # type: ignore[operator]


def read_fit(passes: Passes) -> FitResult | None:
    """The finished fit in the pass's folder, if every process finds one."""
    stored = read_tensors(passes.folder / FITTED_FILE, passes.fingerprint)  # type: ignore[operator]
    if not passes.everywhere(stored is not None):
        return None
    tensors, metadata = stored  # type: ignore[misc]
    facts = {name: json.loads(metadata[name]) for name in _FACTS}
    return FitResult(ihvp={name: tensors[name] for name in passes.blocks}, **facts)
