"""What passes make of recorded gradients: sums, dot products with directions, the terms of DataInf's fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .batches import TokenBatch
from .datainf import compute_coefficients
from .gradients import GradientRecorder, check_finite, compute_per_example_gradients


def compute_gradient_sum(recorder: GradientRecorder, batch: TokenBatch, loss_reduction: str) -> dict[str, Tensor]:
    """
    Sum of the per-example gradients of a batch.

    Returns:
        `dict[str, torch.Tensor]`: `[out, in]` (a bias: `[out, 1]`) per block.

    Raises:
        ValueError: if a loss or the sum is not finite, naming the rows.
    """
    sums: dict[str, Tensor] = {}

    def reduce(name: str, x: Tensor, grad_output: Tensor) -> None:
        # The whole batch as one example.
        x, grad_output = x.flatten(0, 1)[None], grad_output.flatten(0, 1)[None]
        sums[name] = compute_per_example_gradients(x, grad_output, recorder.accumulation_dtype)[0]

    losses = recorder.run(batch, loss_reduction, reduce)
    norms = stack_on([value.norm() for value in sums.values()], losses.device)
    check_finite(losses, norms.sum().expand(len(losses), 1), batch)
    return sums


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

    def compute_block_sums(self, name: str, gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """
        Sums over some examples of one block.

        Args:
            name (`str`):
                The block.
            gradients (`torch.Tensor` of shape `[B, out * in]`):
                Their per-example gradients.

        Returns:
            `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: `sum_i (v_q . g_i) / (damping + ||g_i||^2) * g_i` and
            the same with the denominator squared, `[2 * Q, out * in]`; the norms `[B]`; the dots `[B, Q]`.
        """
        norms = torch.linalg.vector_norm(gradients, dim=1)
        dots = gradients @ self.columns[name]
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
            Called with each block's name and its per-example gradients, `[B, out * in]`.

    Returns:
        `tuple[dict[str, torch.Tensor], FitTerms]`: the sums of [`FitDirections.compute_block_sums`] by block, and
        what the batch adds to those that are not per element.

    Raises:
        ValueError: if a loss or gradient is not finite, naming the rows.
    """
    found: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def reduce(name: str, x: Tensor, grad_output: Tensor) -> None:
        dtype = directions.columns[name].dtype
        gradients = compute_per_example_gradients(x, grad_output, dtype).flatten(1)
        if keep is not None:
            keep(name, gradients)
        found[name] = directions.compute_block_sums(name, gradients)

    losses = recorder.run(batch, loss_reduction, reduce)
    _, norms, dots = (list(parts) for parts in zip(*(found[name] for name in directions.columns), strict=True))
    check_finite(losses, stack_on(norms, losses.device).T, batch)
    return {name: sums for name, (sums, _, _) in found.items()}, directions.summarize(norms, dots, losses.device)


def compute_square_norms(recorder: GradientRecorder, batch: TokenBatch, loss_reduction: str) -> np.ndarray:
    """Squared norms of the per-example gradients of a batch, float64 `[B, blocks]`."""
    norms: dict[str, Tensor] = {}

    def reduce(name: str, x: Tensor, grad_output: Tensor) -> None:
        gradients = compute_per_example_gradients(x, grad_output, recorder.accumulation_dtype)
        norms[name] = torch.linalg.vector_norm(gradients, dim=(1, 2))

    losses = recorder.run(batch, loss_reduction, reduce)
    return np.square(check_finite(losses, stack_on([norms[n] for n in recorder.blocks], losses.device).T, batch))


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
    found: list[Tensor] = []

    def reduce(name: str, x: Tensor, grad_output: Tensor) -> None:
        found.append(compute_block_dots(x, grad_output, directions[name], with_norms))

    losses = recorder.run(batch, loss_reduction, reduce)
    dots = check_finite(losses, stack_on(found, losses.device).sum(0, dtype=torch.float64), batch)
    return (dots[:, :-1], dots[:, -1]) if with_norms else (dots, None)


def compute_block_dots(x: Tensor, grad_output: Tensor, u: Tensor, with_norms: bool = False) -> Tensor:
    """
    Dot products of the per-example gradients of one block with `Q` directions.

    With one direction `U` no per-example gradient need be formed: `<U, G_k> = sum_t g_kt . (U x_kt)`, one thin matrix
    product on the smaller side.

    Args:
        x (`torch.Tensor` of shape `[B, T, in]`):
            Input of the linear.
        grad_output (`torch.Tensor` of shape `[B, T, out]`):
            Gradient of the summed loss with respect to its output.
        u (`torch.Tensor` of shape `[Q, out, in]`):
            Directions.
        with_norms (`bool`, *optional*, defaults to `False`):
            Whether to return the squared norms of the per-example gradients too.

    Returns:
        `torch.Tensor` of shape `[B, Q]`, or `[B, Q + 1]` with the squared norms last, in the dtype of the directions.
    """
    # In half precision on a GPU the gradients come out of one product in float32; else two inputs would be copied.
    if u.shape[0] == 1 and not with_norms and not (x.is_cuda and x.dtype != u.dtype):
        x, grad_output = x.to(u.dtype), grad_output.to(u.dtype)
        if u.shape[1] <= u.shape[2]:  # the product that ends on the smaller side
            return torch.linalg.vecdot((x @ u[0].T).flatten(1), grad_output.flatten(1))[:, None]
        return torch.linalg.vecdot((grad_output @ u[0]).flatten(1), x.flatten(1))[:, None]
    gradients = compute_per_example_gradients(x, grad_output, u.dtype).flatten(1)
    dots = gradients @ u.flatten(1).T
    if not with_norms:
        return dots
    return torch.cat([dots, torch.linalg.vector_norm(gradients, dim=1).square()[:, None]], dim=1)
