"""What every pass over the data is made of: chunked, resumable, one shard per process, one reduction each."""

import gc
import logging
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from accelerate.utils.memory import should_reduce_batch_size
from datasets import Dataset
from torch import Tensor, nn
from tqdm import tqdm

from hf_in2core.progress import make_bar

from .batches import (
    TokenBatch,
    TokenRows,
    collate,
    make_dummy_rows,
    plan_batches,
    read_lengths,
    read_token_rows,
)
from .blocks import Blocks
from .forwards import checkpointed_layers, find_checkpointable_layers
from .gradients import GradientRecorder, Gradients, ScaleTooLargeError, Transform
from .losses import find_max_loss_tokens
from .sharding import is_sharded
from .state import read_tensors, write_tensors
from .store import GradientStore, StoredRows


logger = logging.getLogger(__name__)


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
            `"mean"`, `"sum"`, `"sqrt"` or `"max"`; see [`losses.compute_token_weights`].
        tokens_per_batch (`int`):
            Token budget, halved in place when memory runs out.
        checkpointed_tokens (`int`, *optional*):
            Batches of more tokens than this, padding included, run with activation checkpointing; 0 for all of them,
            none by default. Set in place when one row alone does not fit in memory.
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
            Whether to show progress bars (on the main process, unless the libraries' switches are off).
        store ([`GradientStore`], *optional*):
            Where the gradients of the whole pool are kept: by the fit pass, or in an index that is filled before it.
        transform (`Callable`, *optional*):
            What the score pass makes of the rows' gradients first, as of [`~gradients.GradientRecorder`].
    """

    model: nn.Module
    blocks: Blocks
    loss_reduction: str
    tokens_per_batch: int
    checkpointed_tokens: int | None = None
    chunk_size: int = 1024
    autocast: torch.dtype | None = None
    accelerator: Accelerator | None = None
    folder: Path | None = None
    fingerprint: str = ""
    show_progress: bool = True
    store: GradientStore | None = None
    transform: Transform | None = None

    @property
    def rank(self) -> int:
        """Index of this process."""
        return 0 if self.accelerator is None else self.accelerator.process_index

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return 1 if self.accelerator is None else self.accelerator.num_processes

    def shard(self, prepared: Dataset, positions: np.ndarray | None = None) -> tuple[int, int]:
        """
        First row and one past the last row of this process's contiguous shard.

        Shards have equal numbers of tokens and not of rows: in a pool sorted by length the processes with the short
        rows would wait for the others, longer than a collective may take.

        Args:
            prepared (`datasets.Dataset`):
                Prepared rows.
            positions (`numpy.ndarray`, *optional*):
                Positions of the rows to share out; all by default.
        """
        if self.world_size == 1:
            return 0, len(prepared) if positions is None else len(positions)
        lengths = read_lengths(prepared)
        starts = cut_by_tokens(lengths if positions is None else lengths[positions], self.world_size)
        return int(starts[self.rank]), int(starts[self.rank + 1])

    def sum_over_processes(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sum named tensors over all processes; every process gets the result."""
        return tensors if self.world_size == 1 else self.accelerator.reduce(tensors, "sum")  # type: ignore[union-attr]

    def find_indexed(self, positions: np.ndarray) -> StoredRows | None:
        """The rows of the pool at sorted `positions` in the gradient index, if every process finds them in one."""
        if self.store is None or not self.store.kept:
            return None
        found = self.store.find(positions)
        return found if self.everywhere(found is not None) else None

    @property
    def device(self) -> torch.device:
        """Device of this process."""
        first = next(iter(self.blocks.values())).tensor
        return first.device if self.accelerator is None else self.accelerator.device

    def gather_objects(self, items: list[Any]) -> list[Any]:
        """Gather lists of picklable objects from all processes into one list, in the order of the ranks."""
        return items if self.world_size == 1 else gather_object(items)

    def everywhere(self, flag: bool) -> bool:
        """Whether `flag` is true on every process."""
        if self.world_size == 1:
            return flag
        flags = self.sum_over_processes({"flag": torch.tensor(int(flag), device=self.device)})
        return int(flags["flag"]) == self.world_size

    @cached_property
    def is_sharded(self) -> bool:
        """Whether weights are sharded over the processes: each forward then needs all of them."""
        return is_sharded(self.model)

    @property
    def max_loss_tokens(self) -> int | None:
        """Labelled tokens that a batch may have."""
        # The gradients of a tied matrix are whole when the backward has come to the embedding; the logits wait for it.
        tied = any(block.kind == "tied" for block in self.blocks.values())
        return find_max_loss_tokens(self.model, self.autocast, whole=tied)

    def start_round(self, has_batch: bool) -> bool:
        """Whether any process has a batch to run, once all have asked; where weights are sharded they run together."""
        if not self.is_sharded or self.world_size == 1:
            return has_batch
        working = self.sum_over_processes({"working": torch.tensor(int(has_batch), device=self.device)})
        return int(working["working"]) > 0

    def is_checkpointed(self, batch: TokenBatch) -> bool:
        """Whether a batch runs with activation checkpointing."""
        return self.checkpointed_tokens is not None and batch.input_ids.numel() > self.checkpointed_tokens

    def progress(self, total: int, description: str, initial: int = 0) -> tqdm:
        """Progress bar over rows with an ETA, on the main process."""
        return make_bar(total, description, shown=self.rank == 0 and self.show_progress, initial=initial)


def cut_by_tokens(lengths: np.ndarray, count: int) -> np.ndarray:
    """Where each of `count` runs of rows with about as many tokens begins, `[count + 1]`; the last is their end."""
    num_rows = len(lengths)
    ends = np.cumsum(lengths, dtype=np.float64)
    shares = np.arange(1, count) / count * (ends[-1] if num_rows else 0)
    # The border lies where the tokens before it are nearest to their share.
    borders = np.searchsorted((ends[:-1] + ends[1:]) / 2 if num_rows > 1 else ends, shares) + 1
    return np.concatenate([[0], np.minimum(borders, num_rows), [num_rows]])


def run_batches(passes: Passes, token_rows: TokenRows, step: Callable[[TokenBatch], None]) -> None:
    """
    Run `step` on token batches of some rows; when memory runs out, halve the budget and go on from the same batch.

    Half the budget costs hardly any time, activation checkpointing costs another forward: it comes last, where one
    row alone does not fit, and then for the rows more than half as long as that one.

    Args:
        passes ([`Passes`]):
            The pass; its `tokens_per_batch` and `checkpointed_tokens` are set in place when memory runs out.
        token_rows ([`TokenRows`]):
            The rows.
        step (`Callable`):
            Work on one batch; it must change nothing until it cannot fail any more.

    Raises:
        RuntimeError: if one row alone does not fit in memory, with activation checkpointing (it is named with its
            length), or if memory runs out where base weights are sharded.
    """
    pending = plan_batches(token_rows, passes.tokens_per_batch, passes.max_loss_tokens)[::-1]
    while pending:
        indices = pending.pop()
        batch = collate(token_rows, indices)
        if batch.input_ids.numel() > passes.tokens_per_batch and len(indices) > 1:
            pending += [indices[len(indices) // 2 :], indices[: len(indices) // 2]]
            continue
        tokens, is_checkpointed = batch.input_ids.numel(), passes.is_checkpointed(batch)
        passes.start_round(True)
        try:
            with checkpointed_layers(passes.model) if is_checkpointed else nullcontext():
                step(batch)
        except ScaleTooLargeError:
            pending.append(indices)
            continue
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            if passes.is_sharded:
                raise RuntimeError(
                    f"Out of memory on a batch of {tokens} tokens. The base weights are sharded, so that all "
                    "processes run their batches together and none can try again alone. Lower `tokens_per_batch` "
                    f"({passes.tokens_per_batch}), or set `influence_activation_checkpointing=True`."
                ) from error
            if len(indices) > 1:
                passes.tokens_per_batch = max(tokens // 2, 1)
                logger.warning(
                    "Out of memory on a batch of %d tokens: going on with `tokens_per_batch=%d`.",
                    tokens,
                    passes.tokens_per_batch,
                )
            elif not is_checkpointed and find_checkpointable_layers(passes.model):
                passes.checkpointed_tokens = tokens // 2
                passes.tokens_per_batch = max(min(passes.tokens_per_batch, tokens // 2), 1)
                logger.warning(
                    "Out of memory on row %d alone, with %d tokens: going on with activation checkpointing for rows "
                    "of more than %d tokens.",
                    batch.rows[0],
                    tokens,
                    passes.checkpointed_tokens,
                )
            else:
                raise RuntimeError(
                    f"Row {batch.rows[0]} alone, with {tokens} tokens, does not fit in memory"
                    f"{', even with activation checkpointing' if is_checkpointed else ''}. Lower `max_length`, drop "
                    "the row, or use fewer layers (`influence_layers`)."
                ) from error
            pending.append(indices)
        else:
            continue
        # Outside the handler: the exception no longer holds the tensors of the failed batch.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def finish_together(passes: Passes, recorder: GradientRecorder) -> None:
    """Where base weights are sharded: take part in the batches that other processes still have, adding nothing."""

    def ignore(name: str, found: Gradients) -> None:
        pass

    while passes.start_round(False):
        with suppress(ScaleTooLargeError):
            recorder.run(collate(make_dummy_rows(), np.array([0])), passes.loss_reduction, ignore)


def accumulate(
    passes: Passes,
    name: str,
    description: str,
    prepared: Dataset,
    positions: np.ndarray | None,
    sums: dict[str, Tensor],
    make_step: Callable[[GradientRecorder], Callable[[TokenBatch], None]],
    store: GradientStore | None = None,
    add_stored: Callable[[StoredRows], None] | None = None,
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
        store ([`GradientStore`], *optional*):
            Written to by the work on each batch, or read with `add_stored`.
        add_stored (`Callable`, *optional*):
            Adds stored rows to `sums`. Chunks that are not in the store run through the model.

    Returns:
        `dict[str, torch.Tensor]`: the sums over all rows and all processes.
    """
    start, end = passes.shard(prepared, positions)
    path = None
    next_row = start
    if passes.folder is not None:
        # Version 0.1 shared rows out, and not tokens: what it left of several processes is of other rows.
        shared = "" if passes.world_size == 1 else "-by-tokens"
        path = passes.folder / f"{name}-{passes.rank}-of-{passes.world_size}{shared}.safetensors"
        stored = read_tensors(path, passes.fingerprint)
        if stored is not None and stored[0].keys() == sums.keys():  # else of a version with other sums
            next_row = int(stored[1]["next_row"])
            for key, tensor in stored[0].items():
                sums[key].copy_(tensor)
    with GradientRecorder(passes.model, passes.blocks, passes.autocast) as recorder:
        step = make_step(recorder)
        with passes.progress(end - start, description, initial=next_row - start) as bar:

            def step_and_report(batch: TokenBatch) -> None:
                step(batch)
                bar.update(len(batch.rows))

            rested = time.monotonic()
            saving = 0.0

            def save() -> None:
                nonlocal rested, saving
                # Large sums take seconds to write: a tenth of the time at most, and the last ones always.
                if path is None or (time.monotonic() - rested < 10 * saving and next_row < end):
                    return
                started = time.monotonic()
                metadata = {"fingerprint": passes.fingerprint, "next_row": str(next_row)}
                write_tensors(path, sums, metadata)
                rested = time.monotonic()
                saving = rested - started

            while next_row < end:
                # Chunk borders are counted from the shard's start, so that a resumed run makes the same batches.
                chunk_end = min(start + ((next_row - start) // passes.chunk_size + 1) * passes.chunk_size, end)
                rows = np.arange(next_row, chunk_end) if positions is None else positions[next_row:chunk_end]
                found = store.find(rows) if store is not None and add_stored is not None else None
                if found is not None:
                    add_stored(found)  # type: ignore[misc]
                    bar.update(chunk_end - next_row)
                    next_row = chunk_end
                    save()
                    continue
                if positions is None:
                    token_rows = read_token_rows(prepared, next_row, chunk_end)
                else:
                    token_rows = read_token_rows(prepared.select(positions[next_row:chunk_end]))

                # The gradients come to rest before the sums say that the chunk is done.
                writing = store is not None and add_stored is None
                with store.write(next_row, chunk_end) if writing else nullcontext():  # type: ignore[union-attr]
                    run_batches(passes, token_rows, step_and_report)
                next_row = chunk_end
                save()
        finish_together(passes, recorder)
    return passes.sum_over_processes(sums)


def make_zeros(tensor: Tensor, leading: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    """Zeros of shape `[*leading, out, in]` on the device of a block's tensor (a bias is `[out, 1]`)."""
    shape = tuple(tensor.shape) if tensor.dim() == 2 else (tensor.numel(), 1)
    return torch.zeros(*leading, *shape, dtype=dtype, device=tensor.device)
