"""The score pass: influence of rows as dot products with a fitted direction."""

from collections.abc import Callable

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from .batches import TokenBatch, TokenRows, read_token_rows
from .gradients import GradientRecorder, compute_dots
from .passes import Passes, check_finite, run_batches
from .state import read_tensors, write_tensors


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
        check_finite([dots], batch)
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
