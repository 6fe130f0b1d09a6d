"""The gradient index: per-example gradients of a whole pool, kept on disk for this and any later validation set."""

from dataclasses import replace

import numpy as np
import torch
from datasets import Dataset
from scipy.stats import spearmanr
from torch import Tensor

from .batches import TokenBatch, read_lengths, read_token_rows
from .blocks import Blocks
from .curvature import MAX_CURVATURE_ELEMENTS, draw_blocks
from .encoding import decode, encode
from .gradients import GradientRecorder, Gradients, accumulation_dtype, check_finite, form_gradients
from .passes import Passes, cut_by_tokens, finish_together, run_batches
from .reductions import stack_on
from .state import logger
from .store import GradientStore
from .validation import run_per_example_validation_pass
from .verification import find_tolerances


# Rows of a chunk whose products with each other are compared before and after rounding.
MEASURED_ROWS = 32
# What rounding may do to the gradient of a row, of its norm; beside what two batches of the same row differ by.
ROUNDING = {torch.float64: 0.0, torch.float32: 0.0, torch.bfloat16: 2**-8, torch.int8: 0.05}


class StoreError:
    """
    What rounding does to the products of rows' gradients, measured on a few rows of a chunk.

    Influence is such a product, each block of it over its damping, which goes with the block's mean squared norm: so
    do the products here. They are taken of blocks that are drawn, as many as fit into memory.

    Args:
        blocks (`dict[str, Block]`):
            All blocks.
        dtype (`torch.dtype`):
            Precision of the store.
        num_rows (`int`):
            Rows of the chunk.
        seed (`int`):
            Draws rows and blocks.
    """

    def __init__(self, blocks: Blocks, dtype: torch.dtype, num_rows: int, seed: int) -> None:
        generator = np.random.default_rng(seed)
        count = min(MEASURED_ROWS, num_rows)
        self.dtype = dtype
        self.rows = np.sort(generator.choice(num_rows, count, replace=False))
        chosen = draw_blocks(blocks, MAX_CURVATURE_ELEMENTS // count, generator)
        self._kept: dict[str, Tensor] = {}
        if dtype in (torch.bfloat16, torch.int8):
            full = accumulation_dtype(next(iter(blocks.values())).tensor)
            self._kept = {name: torch.zeros(count, block.tensor.numel(), dtype=full) for name, block in chosen.items()}

    def keep(self, name: str, indices: np.ndarray, gradients: Tensor) -> None:
        """Keep those of the gradients `[B, elements]` of a block that were drawn, by their `indices` in the chunk."""
        if name in self._kept:
            for index in np.flatnonzero(np.isin(indices, self.rows)):
                self._kept[name][np.searchsorted(self.rows, indices[index])] = gradients[index].cpu()

    def measure(self) -> dict[str, float]:
        """
        Compare the products of different rows in full precision and as stored.

        Returns:
            `dict[str, float]`: `error`, the norm of their differences over their own norm; `agreement`, the mean over
            the rows of the rank correlation of the others' products with it. Empty where nothing is rounded, or where
            there are fewer than three rows.
        """
        count = len(self.rows)
        if not self._kept or count < 3:
            return {}
        full, stored = torch.zeros(2, count, count, dtype=torch.float64)
        for gradients in self._kept.values():
            weight = gradients.double().square().sum(1).mean() / gradients.shape[1]
            if weight > 0:
                rounded = decode(encode(gradients, self.dtype), gradients.shape[1], self.dtype).double()
                full += gradients.double() @ gradients.double().T / weight
                stored += rounded @ rounded.T / weight
        others = ~np.eye(count, dtype=bool)
        expected, found = (products.numpy()[others].reshape(count, -1) for products in (full, stored))
        varied = [pair for pair in zip(expected, found, strict=True) if np.ptp(pair[0]) > 0 and np.ptp(pair[1]) > 0]
        if not varied:
            return {}
        error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
        return {"error": error, "agreement": float(np.mean([spearmanr(*pair).statistic for pair in varied]))}


def fill_index(passes: Passes, prepared: Dataset) -> None:
    """
    Pass the rows of the pool that the index lacks through the model, chunk by chunk, and keep their gradients.

    The processes share the rows that are missing; all of them have to call. A run that was stopped goes on where it
    was.

    Args:
        passes ([`Passes`]):
            The pass, whose `store` is an index.
        prepared (`datasets.Dataset`):
            Prepared pool.

    Raises:
        ValueError: if a loss or gradient is not finite, naming the rows.
    """
    store: GradientStore = passes.store  # type: ignore[assignment]
    lacking, own = share_missing(passes, prepared)
    if passes.rank == 0:
        logger.info(
            "Gradient index %s: %d of %d rows are in it, in %s (%.3g GB in all).",
            *(store.folder, len(prepared) - lacking, len(prepared), str(store.dtype).removeprefix("torch.")),
            len(prepared) * store.row_bytes / 1e9,
        )
    if lacking == 0:
        store.remove_unusable()
        return
    chunks = [
        (first, min(first + passes.chunk_size, last))
        for run_first, last in own
        for first in range(run_first, last, passes.chunk_size)
    ]
    with (
        GradientRecorder(passes.model, passes.blocks, passes.autocast) as recorder,
        passes.progress(sum(last - first for first, last in chunks), "Influence: gradient index") as bar,
    ):
        # Another run may have filled a chunk meanwhile.
        for first, last in (left for chunk in chunks for left in store.list_missing(*chunk)):
            error = StoreError(passes.blocks, store.dtype, last - first, first)

            def step(batch: TokenBatch, error: StoreError = error) -> None:
                norms: list[Tensor] = []

                def reduce(name: str, found: Gradients) -> None:
                    gradients = form_gradients(found, recorder.accumulation_dtype).flatten(1)
                    store.keep(name, batch.indices, gradients)
                    error.keep(name, batch.indices, gradients)
                    norms.append(torch.linalg.vector_norm(gradients, dim=1))

                losses = recorder.run(batch, passes.loss_reduction, reduce)
                check_finite(losses, stack_on(norms, losses.device).T, batch)
                bar.update(len(batch.rows))

            with store.write(first, last) as notes:
                run_batches(passes, read_token_rows(prepared, first, last), step)
                notes |= error.measure()
        finish_together(passes, recorder)
    if passes.world_size > 1:
        passes.accelerator.wait_for_everyone()  # type: ignore[union-attr]
    store.remove_unusable()


def share_missing(passes: Passes, prepared: Dataset) -> tuple[int, list[tuple[int, int]]]:
    """
    Share out the rows that the index lacks, in runs with about as many tokens for each process.

    Shards of the pool would not do: where a run was stopped, or ran with another number of processes, all that is
    missing can be of one of them, for which the others would wait longer than a collective may take.

    Args:
        passes ([`Passes`]):
            The pass, whose `store` is an index with a folder.
        prepared (`datasets.Dataset`):
            Prepared pool.

    Returns:
        `tuple`: how many rows are missing altogether, and the runs `(first, one past the last)` of this process.
    """
    store: GradientStore = passes.store  # type: ignore[assignment]
    missing = store.list_missing(*passes.shard(prepared))
    if passes.world_size == 1:
        return sum(last - first for first, last in missing), missing
    # A disk of its own has another file: what the processes of a machine need then has to lie there.
    known = (store.folder / "identity.json").stat()
    found = passes.gather_objects([((known.st_ino, known.st_mtime_ns), missing)])
    lacking = sum(last - first for _, runs in found for first, last in runs)
    together = [rank for rank, (disk, _) in enumerate(found) if disk == found[passes.rank][0]]
    rows = [np.arange(*run) for rank in together for run in found[rank][1]]
    positions = np.concatenate([np.arange(0), *rows])
    starts = cut_by_tokens(read_lengths(prepared)[positions], len(together))
    part = together.index(passes.rank)
    own = positions[starts[part] : starts[part + 1]]
    runs = np.split(own, np.flatnonzero(np.diff(own) != 1) + 1) if len(own) else []
    return lacking, [(int(run[0]), int(run[-1]) + 1) for run in runs]


def check_index(passes: Passes, prepared: Dataset, seed: int) -> None:
    """
    Compare two rows of the index with the gradients that the model gives now.

    The base model's part of an index's fingerprint is a hash of some of its values, which a change of others would
    not move. All processes have to call; each looks at rows of its shard, which are on its disk.

    Args:
        passes ([`Passes`]):
            The pass, whose `store` is a filled index.
        prepared (`datasets.Dataset`):
            Prepared pool.
        seed (`int`):
            Draws the rows.

    Raises:
        ValueError: naming the index, the row and the difference, if that of each row is more than rounding. With
            `loss_reduction="max"` it is a warning: which token is the hardest may hang on rounding, which differs
            between batches.
    """
    store: GradientStore = passes.store  # type: ignore[assignment]
    start, end = passes.shard(prepared)
    rows = start + np.sort(np.random.default_rng(seed).choice(end - start, min(2, end - start), replace=False))
    stored = store.find(rows)
    if stored is None:  # taken away meanwhile
        rows = rows[:0]
    silent = replace(passes, folder=None, store=None, show_progress=False)
    squares = torch.zeros(2, len(rows), dtype=torch.float64)
    if len(rows):
        for name, found in run_per_example_validation_pass(silent, prepared.select(rows), "").items():
            now = found.flatten(1).double()
            difference = stored.read_all(name, now.device, torch.float64) - now  # type: ignore[union-attr]
            squares += torch.stack([difference, now]).square().sum(2).cpu()
    with GradientRecorder(passes.model, passes.blocks, passes.autocast) as recorder:
        finish_together(passes, recorder)
    accepted = max(find_tolerances(passes).values()) + ROUNDING[store.dtype]
    # A row with hardly any gradient is all rounding, and adds as little to the influence.
    norms, worst = squares[1].sqrt(), []
    if len(rows):
        errors = squares[0].sqrt() / torch.maximum(norms, 0.01 * norms.max()).clamp(min=torch.finfo(norms.dtype).tiny)
        # Another model differs in every row.
        nearest = int(errors.argmin())
        worst = [(float(errors[nearest]), prepared[int(rows[nearest])]["row"])]
    for error, row in passes.gather_objects(worst):
        if not error <= accepted:
            message = (
                f"The gradient index in {store.folder} does not fit the model: the gradient of row {row} differs by "
                f"{error:.1e} of its norm (at most {accepted:.1e} is accepted). The base model or the files were "
                "changed. Give the model that it was made with, or remove this folder, and it is made anew."
            )
            if passes.loss_reduction != "max":
                raise ValueError(message)
            if passes.rank == 0:
                logger.warning(message)
            return
