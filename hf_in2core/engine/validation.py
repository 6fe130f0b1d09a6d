"""Gradients of the validation loss: the mean of a set, or those of its rows one by one."""

from collections.abc import Callable

import torch
from datasets import Dataset
from torch import Tensor

from .batches import TokenBatch, read_token_rows
from .gradients import GradientRecorder, Gradients, check_finite, form_gradients
from .passes import Passes, accumulate, make_zeros, run_batches
from .reductions import compute_gradient_sum, join_parts, stack_on


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
            parts: dict[str, list[Tensor]] = {key: [] for key in queries}

            def reduce(key: str, found: Gradients) -> None:
                gradients = form_gradients(found, recorder.accumulation_dtype)
                if found.row is None:
                    queries[key][torch.from_numpy(batch.indices)] = gradients
                else:
                    own = queries[key][int(batch.indices[found.row])]
                    own[slice(None) if found.tokens is None else found.tokens] = gradients[0]
                parts[key].append(torch.linalg.vector_norm(gradients, dim=(1, 2)))

            losses = recorder.run(batch, passes.loss_reduction, reduce)
            norms = [join_parts(found) for found in parts.values()]
            check_finite(losses, stack_on(norms, losses.device).T, batch)
            bar.update(len(batch.rows))

        run_batches(passes, token_rows, step)
    return queries
