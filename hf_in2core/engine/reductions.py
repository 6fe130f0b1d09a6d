"""What passes make of recorded gradients: sums, dot products with directions, the terms of DataInf's fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .batches import TokenBatch
from .blocks import Block
from .datainf import compute_coefficients
from .gradients import GradientRecorder, Gradients, check_finite, compute_per_example_gradients, form_gradients


def compute_gradient_sum(recorder: GradientRecorder, batch: TokenBatch, loss_reduction: str) -> dict[str, Tensor]:
    """
    Sum of the per-example gradients of a batch.

    Returns:
        `dict[str, torch.Tensor]`: `[out, in]` (a bias: `[out, 1]`) per block.

    Raises:
        ValueError: if a loss or the sum is not finite, naming the rows.
    """
    sums: dict[str, Tensor] = {}

    def reduce(name: str, found: Gradients) -> None:
        dtype = recorder.accumulation_dtype
        if found.grad_output is None:
            sums[name] = _add_part(sums.get(name), found.x.to(dtype), found, recorder.blocks[name])
            return
        # The whole batch as one example.
        x, grad_output = found.x.flatten(0, 1)[None], found.grad_output.flatten(0, 1)[None]
        sums[name] = compute_per_example_gradients(x, grad_output, dtype)

    losses = recorder.run(batch, loss_reduction, reduce)
    norms = stack_on([value.norm() for value in sums.values()], losses.device)
    check_finite(losses, norms.sum().expand(len(losses), 1), batch)
    return {name: value[0] for name, value in sums.items()}


def _add_part(total: Tensor | None, values: Tensor, found: Gradients, block: Block) -> Tensor:
    """Add what came of a part of a block's gradients, `[S, m, in]`, to the sum of the parts before, `[S, out, in]`."""
    if found.tokens is None:
        return values if total is None else total.add_(values)
    if total is None:
        total = values.new_zeros(len(values), len(block.tensor), values.shape[2])
    return total.index_add_(1, found.tokens, values)


def join_parts(parts: list[Tensor]) -> Tensor:
    """What the rows of a batch gave, of a block that was handed over at once or row after row."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def stack_on(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Stack small tensors of blocks; layers of one model can lie on several devices (`device_map`)."""
    return torch.stack([tensor.to(device) for tensor in tensors])


class FitTerms(NamedTuple):
    """What some examples add to the sums of the fit pass."""

    square_norms: Tensor  # [blocks]
    error_weights: Tensor  # [blocks, Q], see compute_inner_damping_error


class FitDirections:
    """
    Validation gradients and dampings of all blocks as the fit pass uses them.

    Args:
        validation_gradients (`dict[str, torch.Tensor]`):
            `v`, `[Q, out, in]` per block.
        damping (`dict[str, float]`):
            Damping of each block inside the fraction (the pilot's).
    """

    def __init__(self, validation_gradients: dict[str, Tensor], damping: dict[str, float]) -> None:
        self.columns = {name: v.flatten(1).T.contiguous() for name, v in validation_gradients.items()}
        self.damping = damping
        first = next(iter(validation_gradients.values()))
        self._all_damping = torch.tensor([damping[name] for name in self.columns], device=first.device).double()

    def compute_block_sums(
        self, name: str, gradients: Tensor, tokens: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """
        Sums over some examples of one block.

        Args:
            name (`str`):
                The block.
            gradients (`torch.Tensor` of shape `[B, out * in]`):
                Their per-example gradients.
            tokens (`torch.Tensor`, *optional*):
                Rows of a vocabulary's matrix that the gradients have, `[m]`; then they are `[B, m * in]`, and so are
                the sums. All by default.

        Returns:
            `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: `sum_i (v_q . g_i) / (damping + ||g_i||^2) * g_i` and
            the same with the denominator squared, `[2 * Q, out * in]`; the norms `[B]`; the dots `[B, Q]`.
        """
        norms = torch.linalg.vector_norm(gradients, dim=1)
        columns = self.columns[name]
        if tokens is not None:
            columns = columns.unflatten(0, (-1, gradients.shape[1] // len(tokens)))[tokens].flatten(0, 1)
        dots = gradients @ columns
        weights = torch.cat(compute_coefficients(dots, norms.square(), self.damping[name]), dim=1)
        return weights.T @ gradients, norms, dots

    def summarize(self, norms: list[Tensor], dots: list[Tensor], device: torch.device) -> FitTerms:
        """The other sums, of the blocks in their order, from the norms and dots of the same examples."""
        all_norms, all_dots = stack_on(norms, device).double(), stack_on(dots, device).double()
        squares = all_norms.square()
        denominators = self._all_damping.to(device)[:, None] + squares
        denominators = torch.where(denominators > 0, denominators, torch.ones_like(denominators))
        error_weights = (all_dots.abs() * (all_norms / denominators.pow(3))[..., None]).sum(1)
        return FitTerms(squares.sum(1), error_weights)


def compute_fit_terms(
    recorder: GradientRecorder,
    batch: TokenBatch,
    loss_reduction: str,
    directions: FitDirections,
    keep: Callable[[str, Tensor], None] | None = None,
) -> tuple[dict[str, Tensor], FitTerms]:
    """
    The terms of DataInf's sum over training examples for one batch.

    Args:
        recorder ([`GradientRecorder`]):
            An entered recorder.
        batch ([`TokenBatch`]):
            Training rows.
        loss_reduction (`str`):
            `"mean"`, `"sum"`, `"sqrt"` or `"max"`.
        directions ([`FitDirections`]):
            Validation gradients and dampings.
        keep (`Callable`, *optional*):
            Called with each block's name and its per-example gradients, `[B, out * in]`; not for the matrices of a
            vocabulary, whose gradients are never held together.

    Returns:
        `tuple[dict[str, torch.Tensor], FitTerms]`: the sums of [`FitDirections.compute_block_sums`] by block, and
        what the batch adds to those that are not per element.

    Raises:
        ValueError: if a loss or gradient is not finite, naming the rows.
    """
    sums: dict[str, Tensor] = {}
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in directions.columns}

    def reduce(name: str, found: Gradients) -> None:
        gradients = form_gradients(found, directions.columns[name].dtype)
        width = gradients.shape[2]
        gradients = gradients.flatten(1)
        if keep is not None and found.row is None:
            keep(name, gradients)
        values, *norms_and_dots = directions.compute_block_sums(name, gradients, found.tokens)
        sums[name] = _add_part(sums.get(name), values.unflatten(1, (-1, width)), found, recorder.blocks[name])
        parts[name].append((norms_and_dots[0], norms_and_dots[1]))

    losses = recorder.run(batch, loss_reduction, reduce)
    norms, dots = ([join_parts([part[index] for part in found]) for found in parts.values()] for index in (0, 1))
    check_finite(losses, stack_on(norms, losses.device).T, batch)
    return {name: value.flatten(1) for name, value in sums.items()}, directions.summarize(norms, dots, losses.device)


def compute_square_norms(recorder: GradientRecorder, batch: TokenBatch, loss_reduction: str) -> np.ndarray:
    """Squared norms of the per-example gradients of a batch, float64 `[B, blocks]`."""
    parts: dict[str, list[Tensor]] = {name: [] for name in recorder.blocks}

    def reduce(name: str, found: Gradients) -> None:
        gradients = form_gradients(found, recorder.accumulation_dtype)
        parts[name].append(torch.linalg.vector_norm(gradients, dim=(1, 2)))

    losses = recorder.run(batch, loss_reduction, reduce)
    norms = stack_on([join_parts(found) for found in parts.values()], losses.device)
    return np.square(check_finite(losses, norms.T, batch))


def compute_dots(
    recorder: GradientRecorder,
    batch: TokenBatch,
    loss_reduction: str,
    directions: dict[str, Tensor],
    with_norms: bool = False,
) -> tuple[np.ndarray, np.ndarray | None]:
    """
    Dot products of the per-example gradients of a batch with `Q` directions, summed over blocks.

    Args:
        recorder ([`GradientRecorder`]):
            An entered recorder.
        batch ([`TokenBatch`]):
            The rows.
        loss_reduction (`str`):
            `"mean"`, `"sum"`, `"sqrt"` or `"max"`.
        directions (`dict[str, torch.Tensor]`):
            Shape `[Q, out, in]` per block.
        with_norms (`bool`, *optional*, defaults to `False`):
            Whether to return the squared norms of the whole (concatenated) per-example gradients too.

    Returns:
        `tuple[numpy.ndarray, numpy.ndarray | None]`: dots `[B, Q]` and squared norms `[B]` (or `None`), both float64.

    Raises:
        ValueError: if a loss or gradient is not finite, naming the rows.
    """
    losses, found = compute_dots_by_block(recorder, batch, loss_reduction, directions, with_norms)
    dots = check_finite(losses, stack_on(list(found.values()), losses.device).sum(0, dtype=torch.float64), batch)
    return (dots[:, :-1], dots[:, -1]) if with_norms else (dots, None)


def compute_dots_by_block(
    recorder: GradientRecorder,
    batch: TokenBatch,
    loss_reduction: str,
    directions: dict[str, Tensor],
    with_norms: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """
    [`compute_dots`] before the sum over blocks.

    Returns:
        `tuple[torch.Tensor, dict[str, torch.Tensor]]`: losses `[B]`, and by block what [`compute_block_dots`] gives.
    """
    parts: dict[str, list[Tensor]] = {}

    def reduce(name: str, found: Gradients) -> None:
        parts.setdefault(name, []).append(compute_block_dots(found, directions[name], with_norms))

    losses = recorder.run(batch, loss_reduction, reduce)
    return losses, {name: join_parts(found) for name, found in parts.items()}


def compute_block_dots(found: Gradients, u: Tensor, with_norms: bool = False) -> Tensor:
    """
    Dot products of the per-example gradients of one block with `Q` directions.

    With one direction `U` no per-example gradient need be formed: `<U, G_k> = sum_t g_kt . (U x_kt)`, one thin matrix
    product on the smaller side.

    Args:
        found ([`Gradients`]):
            The per-example gradients.
        u (`torch.Tensor` of shape `[Q, out, in]`):
            Directions.
        with_norms (`bool`, *optional*, defaults to `False`):
            Whether to return the squared norms of the per-example gradients too.

    Returns:
        `torch.Tensor` of shape `[B, Q]`, or `[B, Q + 1]` with the squared norms last, in the dtype of the directions.
    """
    if found.tokens is not None:
        u = u[:, found.tokens]
    x, grad_output = found.x, found.grad_output
    # In half precision on a GPU the gradients come out of one product in float32; else two inputs would be copied.
    if grad_output is not None and u.shape[0] == 1 and not with_norms and not (x.is_cuda and x.dtype != u.dtype):
        x, grad_output = x.to(u.dtype), grad_output.to(u.dtype)
        if u.shape[1] <= u.shape[2]:  # the product that ends on the smaller side
            return torch.linalg.vecdot((x @ u[0].T).flatten(1), grad_output.flatten(1))[:, None]
        return torch.linalg.vecdot((grad_output @ u[0]).flatten(1), x.flatten(1))[:, None]
    gradients = form_gradients(found, u.dtype).flatten(1)
    dots = gradients @ u.flatten(1).T
    if not with_norms:
        return dots
    return torch.cat([dots, torch.linalg.vector_norm(gradients, dim=1).square()[:, None]], dim=1)
