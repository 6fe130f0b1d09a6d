"""The passes over the data: validation, fit, score. Chunked, resumable, one shard per process, one reduction each."""

import gc
import logging
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils.memory import should_reduce_batch_size
from datasets import Dataset
from torch import Tensor, nn
from tqdm.auto import tqdm

from .batches import TokenBatch, TokenRows, collate, plan_batches, read_token_rows
from .datainf import compute_damping, compute_ihvp, compute_inner_damping_error
from .gradients import (
    Blocks,
    GradientRecorder,
    compute_dots,
    compute_fit_terms,
    compute_gradient_sum,
    compute_square_norms,
)
from .state import read_tensors, write_tensors


logger = logging.getLogger(__name__)

PILOT_ROWS = 16
# Largest accepted bound on the relative error of u from taking the inner damping from the pilot rows.
MAX_INNER_DAMPING_ERROR = 1e-3


@dataclass
class Passes:
    """
    What every pass over the data needs.

    Attributes:
        model (`torch.nn.Module`):
            Unwrapped model.
        blocks (`dict[str, Block]`):
            Blocks that count.
        loss_reduction (`str`):
            `"mean"` or `"sum"`.
        tokens_per_batch (`int`):
            Token budget, halved in place when memory runs out.
        chunk_size (`int`):
            Rows per resumable chunk.
        autocast (`torch.dtype`, *optional*):
            Mixed precision of the forward.
        accelerator ([`~accelerate.Accelerator`], *optional*):
            Tells the processes; without it a pass runs in this process alone.
        folder (`pathlib.Path`, *optional*):
            Where finished chunks are kept; nothing is kept without it.
        fingerprint (`str`):
            Identity of the run, written into every state file.
        show_progress (`bool`):
            Whether to show a progress bar (main process only).
    """

    model: nn.Module
    blocks: Blocks
    loss_reduction: str
    tokens_per_batch: int
    chunk_size: int = 1024
    autocast: torch.dtype | None = None
    accelerator: Accelerator | None = None
    folder: Path | None = None
    fingerprint: str = ""
    show_progress: bool = True

    @property
    def rank(self) -> int:
        """Index of this process."""
        return 0 if self.accelerator is None else self.accelerator.process_index

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return 1 if self.accelerator is None else self.accelerator.num_processes

    def shard(self, num_rows: int) -> tuple[int, int]:
        """First row and one past the last row of this process's contiguous shard."""
        return self.rank * num_rows // self.world_size, (self.rank + 1) * num_rows // self.world_size

    def sum_over_processes(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sum named tensors over all processes; every process gets the result."""
        return tensors if self.world_size == 1 else self.accelerator.reduce(tensors, "sum")  # type: ignore[union-attr]

    def everywhere(self, flag: bool) -> bool:
        """Whether `flag` is true on every process."""
        if self.world_size == 1:
            return flag
        device = self.accelerator.device  # type: ignore[union-attr]
        flags = self.sum_over_processes({"flag": torch.tensor(int(flag), device=device)})
        return int(flags["flag"]) == self.world_size

    def progress(self, total: int, description: str, initial: int = 0) -> tqdm:
        """Progress bar over rows with an ETA, on the main process; one line a minute outside a terminal."""
        return tqdm(
            total=total,
            initial=initial,
            desc=description,
            unit="row",
            disable=self.rank != 0 or not self.show_progress,
            mininterval=0.2 if sys.stderr.isatty() else 60.0,
        )


def run_batches(passes: Passes, token_rows: TokenRows, step: Callable[[TokenBatch], None]) -> None:
    """
    Run `step` on token batches of some rows; when memory runs out, halve the budget and go on from the same batch.

    Args:
        passes ([`Passes`]):
            The pass; its `tokens_per_batch` is lowered in place when memory runs out.
        token_rows ([`TokenRows`]):
            The rows.
        step (`Callable`):
            Work on one batch; it must change nothing until it cannot fail any more.

    Raises:
        RuntimeError: if one row alone does not fit in memory; it is named with its length.
    """
    vocab_size = passes.model.get_output_embeddings().weight.shape[0]  # type: ignore[operator, union-attr]
    pending = plan_batches(token_rows, passes.tokens_per_batch, vocab_size)[::-1]
    while pending:
        indices = pending.pop()
        batch = collate(token_rows, indices)
        if batch.input_ids.numel() > passes.tokens_per_batch and len(indices) > 1:
            pending += [indices[len(indices) // 2 :], indices[: len(indices) // 2]]
            continue
        try:
            step(batch)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            if len(indices) == 1:
                raise RuntimeError(
                    f"Row {batch.rows[0]} alone, with {batch.input_ids.shape[1]} tokens, does not fit in memory. "
                    "Lower `max_length`, drop the row, or use fewer layers (`influence_layers`)."
                ) from error
            passes.tokens_per_batch = max(batch.input_ids.numel() // 2, 1)
            logger.warning(
                "Out of memory on a batch of %d tokens: going on with `tokens_per_batch=%d`.",
                batch.input_ids.numel(),
                passes.tokens_per_batch,
            )
            pending.append(indices)
        else:
            continue
        # Outside the handler: the exception no longer holds the tensors of the failed batch.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def accumulate(
    passes: Passes,
    name: str,
    description: str,
    prepared: Dataset,
    positions: np.ndarray | None,
    sums: dict[str, Tensor],
    make_step: Callable[[GradientRecorder], Callable[[TokenBatch], None]],
) -> dict[str, Tensor]:
    """
    Run a pass that only adds to sums, chunk by chunk, keeping them on disk after each chunk.

    Args:
        passes ([`Passes`]):
            The pass.
        name (`str`):
            Name of its state file.
        description (`str`):
            What the progress bar says.
        prepared (`datasets.Dataset`):
            Prepared rows.
        positions (`numpy.ndarray`, *optional*):
            Sorted positions of the rows to use; all by default.
        sums (`dict[str, torch.Tensor]`):
            Zeroed sums, changed in place.
        make_step (`Callable`):
            Given the recorder, returns the work on one batch, which adds to `sums`.

    Returns:
        `dict[str, torch.Tensor]`: the sums over all rows and all processes.
    """
    start, end = passes.shard(len(prepared) if positions is None else len(positions))
    path = None
    next_row = start
    if passes.folder is not None:
        path = passes.folder / f"{name}-{passes.rank}-of-{passes.world_size}.safetensors"
        stored = read_tensors(path, passes.fingerprint)
        if stored is not None:
            next_row = int(stored[1]["next_row"])
            for key, tensor in stored[0].items():
                sums[key].copy_(tensor)
    with GradientRecorder(passes.model, passes.blocks, passes.autocast) as recorder:
        step = make_step(recorder)
        with passes.progress(end - start, description, initial=next_row - start) as bar:


            def step_and_report(batch: TokenBatch) -> None:
                step(batch)
                bar.update(len(batch.rows))

            while next_row < end:
                # Chunk borders are counted from the shard's start, so that a resumed run makes the same batches.
                chunk_end = min(start + ((next_row - start) // passes.chunk_size + 1) * passes.chunk_size, end)
                if positions is None:
                    token_rows = read_token_rows(prepared, next_row, chunk_end)
                else:
                    token_rows = read_token_rows(prepared.select(positions[next_row:chunk_end]))

                run_batches(passes, token_rows, step_and_report)
                next_row = chunk_end
                if path is not None:
                    metadata = {"fingerprint": passes.fingerprint, "next_row": str(next_row)}
                    write_tensors(path, sums, metadata)
    return passes.sum_over_processes(sums)


def run_validation_pass(passes: Passes, prepared: Dataset, name: str, description: str) -> dict[str, Tensor]:
    """
    Mean validation gradient `v` of one validation set.

    Returns:
        `dict[str, torch.Tensor]`: float64 `[out, in]` per block.

    Raises:
        ValueError: if a gradient is not finite.
    """
    sums = {key: _zeros(block.tensor, ()) for key, block in passes.blocks.items()}

    def make_step(recorder: GradientRecorder) -> Callable[[TokenBatch], None]:
        def step(batch: TokenBatch) -> None:
            gradients = compute_gradient_sum(recorder, batch, passes.loss_reduction)
            _check_finite(gradients.values(), batch, per_row=False)
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
            queries[key] = _zeros(block.tensor, (len(token_rows),), recorder.accumulation_dtype)

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
        sums[f"{key}/weighted_sum"] = _zeros(block.tensor, (num_queries,))
        sums[f"{key}/square_norm"] = torch.zeros((), dtype=torch.float64, device=device)
        sums[f"{key}/error_weight"] = torch.zeros(num_queries, dtype=torch.float64, device=device)

    def make_step(recorder: GradientRecorder) -> Callable[[TokenBatch], None]:
        v = {key: value.to(recorder.accumulation_dtype) for key, value in validation_gradients.items()}

        def step(batch: TokenBatch) -> None:
            terms = compute_fit_terms(recorder, batch, passes.loss_reduction, v, inner_damping)
            _check_finite((term.square_norms for term in terms.values()), batch)
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


def score_token_rows(
    passes: Passes,
    recorder: GradientRecorder,
    token_rows: TokenRows,
    directions: dict[str, Tensor],
    cosine: bool,
    report: Callable[[int], object] | None = None,
) -> np.ndarray:
    """
    Influence of some rows.

    Args:
        passes ([`Passes`]):
            The pass.
        recorder ([`GradientRecorder`]):
            An entered recorder.
        token_rows ([`TokenRows`]):
            The rows.
        directions (`dict[str, torch.Tensor]`):
            `u` (or `v`), `[Q, out, in]` per block.
        cosine (`bool`):
            Whether to divide by the norms of both gradients.
        report (`Callable`, *optional*):
            Called with the number of rows of each batch done.

    Returns:
        `numpy.ndarray` of shape `[n, Q]`, float64; negative = proponent, NaN for a row without a loss token.
    """
    num_queries = next(iter(directions.values())).shape[0]
    influence = np.full((len(token_rows), num_queries), np.nan)
    direction_norm = torch.zeros(num_queries, dtype=torch.float64)
    if cosine:
        for u in directions.values():
            direction_norm += u.flatten(1).double().square().sum(1).cpu()
        direction_norm = direction_norm.sqrt()

    def step(batch: TokenBatch) -> None:
        dots, square_norms = compute_dots(recorder, batch, passes.loss_reduction, directions, with_norms=cosine)
        if square_norms is not None:
            norms = (square_norms.sqrt()[:, None] * direction_norm).clamp(min=torch.finfo(torch.float64).tiny)
            dots = dots / norms
        _check_finite([dots], batch)
        influence[batch.indices] = -dots.numpy()
        if report is not None:
            report(len(batch.rows))

    run_batches(passes, token_rows, step)
    return influence


def run_score_pass(passes: Passes, prepared: Dataset, directions: dict[str, Tensor], cosine: bool) -> np.ndarray:
    """
    Influence of every prepared row, chunk by chunk, each chunk kept on disk.

    Returns:
        `numpy.ndarray` of shape `[rows, Q]`, float64, on every process; negative = proponent.
    """
    num_queries = next(iter(directions.values())).shape[0]
    influence = np.zeros((len(prepared), num_queries))
    start, end = passes.shard(len(prepared))
    done = np.zeros(len(prepared), dtype=bool)
    if passes.folder is not None:
        for path in sorted(passes.folder.glob("scores-*.safetensors")):
            stored = read_tensors(path, passes.fingerprint)
            if stored is not None:
                first, last = int(stored[1]["start"]), int(stored[1]["end"])
                influence[first:last] = stored[0]["influence"].numpy()
                done[first:last] = True
    with (
        GradientRecorder(passes.model, passes.blocks, passes.autocast) as recorder,
        passes.progress(end - start, "Influence: score pass", initial=int(done[start:end].sum())) as bar,
    ):
        for chunk_start in range(start, end, passes.chunk_size):
            chunk_end = min(chunk_start + passes.chunk_size, end)
            if done[chunk_start:chunk_end].all():
                continue
            token_rows = read_token_rows(prepared, chunk_start, chunk_end)
            influence[chunk_start:chunk_end] = score_token_rows(
                passes, recorder, token_rows, directions, cosine, bar.update
            )
            if passes.folder is not None:
                write_tensors(
                    passes.folder / f"scores-{chunk_start:09d}-{chunk_end:09d}.safetensors",
                    {"influence": torch.from_numpy(influence[chunk_start:chunk_end])},
                    {"fingerprint": passes.fingerprint, "start": str(chunk_start), "end": str(chunk_end)},
                )
    influence[:start], influence[end:] = 0.0, 0.0
    device = None if passes.accelerator is None else passes.accelerator.device
    total = passes.sum_over_processes({"influence": torch.from_numpy(influence).to(device)})
    return total["influence"].cpu().numpy()


def _zeros(tensor: Tensor, leading: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    shape = tuple(tensor.shape) if tensor.dim() == 2 else (tensor.numel(), 1)
    return torch.zeros(*leading, *shape, dtype=dtype, device=tensor.device)


def _check_finite(values: Iterable[Tensor], batch: TokenBatch, per_row: bool = True) -> None:
    """Raise on a NaN or infinite gradient, naming the rows (`values` are `[B, ...]`, or sums over the whole batch)."""
    bad = np.zeros(len(batch.rows), dtype=bool)
    for value in values:
        finite = torch.isfinite(value)
        bad |= ~(finite.flatten(1).all(1) if per_row and value.dim() > 1 else finite if per_row else finite.all()).cpu().numpy()
    if bad.any():
        raise ValueError(
            f"The gradient of row(s) {batch.rows[bad].tolist()[:10]} is not finite, so they have no influence. Look at "
            "these rows, or run the influence passes in float32 (`bf16=False`, `fp16=False`)."
        )
