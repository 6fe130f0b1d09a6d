"""The equations of DataInf (arXiv 2310.00902) as In2Core (arXiv 2408.03560) uses them; torch only.

Symbols, for every block `b` (one trainable tensor of the adapter, flattened to `d_b` elements):

- `g_kb`: gradient of the loss of training example `k` with respect to block `b`
- `v_qb`: mean gradient of the loss over validation set `q`
- `lambda_b = damping_scale * mean_i ||g_ib||^2 / d_b`: the damping
- `u_qb = (1 / lambda_b) * (v_qb - (1 / n) * sum_i (v_qb . g_ib) / (lambda_b + ||g_ib||^2) * g_ib)`: the preconditioned
  validation gradient, which is `mean_i (lambda_b I + g_ib g_ib^T)^-1 v_qb` by Sherman-Morrison (DataInf, eq. 5)
- `influence_qk = - sum_b u_qb . g_kb`

Sign: negative = proponent (training on the example lowers the validation loss), positive = opponent.
"""

import torch
from torch import Tensor


def compute_damping(mean_square_norm: float, num_elements: int, damping_scale: float) -> float:
    r"""
    Damping of one block, `damping_scale * mean_i ||g_ib||^2 / d_b` (DataInf, section 4).

    Args:
        mean_square_norm (`float`):
            Mean over the fitted examples of the squared norm of the per-example gradient of the block.
        num_elements (`int`):
            Number of elements `d_b` of the block.
        damping_scale (`float`):
            Relative damping; DataInf uses 0.1.

    Returns:
        `float`: the absolute damping `lambda_b`; 0.0 where every gradient of the block is zero.
    """
    return damping_scale * mean_square_norm / num_elements


def compute_coefficients(dots: Tensor, square_norms: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    r"""
    Sherman-Morrison coefficients of one block, and minus their derivative with respect to the damping.

    Args:
        dots (`torch.Tensor` of shape `[B, Q]`):
            Dot products of the per-example gradients with the validation gradients.
        square_norms (`torch.Tensor` of shape `[B]`):
            Squared norms of the per-example gradients.
        damping (`float`):
            Damping of the block.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`, both `[B, Q]`: `(v_qb . g_ib) / (lambda_b + ||g_ib||^2)`, and the same
        with the denominator squared; 0 where the per-example gradient is zero.
    """
    denominators = (square_norms + damping)[:, None]
    if damping == 0.0:
        # A zero gradient has a zero dot product: its term vanishes, also when the damping is zero too.
        denominators = torch.where(denominators > 0, denominators, torch.ones_like(denominators))
    coefficients = dots / denominators
    return coefficients, coefficients / denominators


def compute_ihvp(validation_gradient: Tensor, weighted_sum: Tensor, num_examples: int, damping: float) -> Tensor:
    r"""
    Preconditioned validation gradient `u` of one block (DataInf, eq. 5).

    Args:
        validation_gradient (`torch.Tensor` of shape `[Q, *block]`):
            Mean validation gradients `v`.
        weighted_sum (`torch.Tensor` of shape `[Q, *block]`):
            `sum_i coefficient_iq * g_i` over the fitted examples, from [`compute_coefficients`].
        num_examples (`int`):
            Number `n` of fitted examples.
        damping (`float`):
            Damping of the block.

    Returns:
        `torch.Tensor` of shape `[Q, *block]`: `u`; zeros where the damping is zero, that is where no fitted example
        has a gradient (through the `A` matrices of an adapter whose `B` is zero, for instance).
    """
    if damping == 0.0:
        return torch.zeros_like(validation_gradient)
    return (validation_gradient - weighted_sum / num_examples) / damping


def correct_damping(weighted_sum: Tensor, weighted_slope: Tensor, damping: float, inner_damping: float) -> Tensor:
    r"""
    The weighted sum of [`compute_ihvp`] at another damping than it was summed with, to first order.

    Args:
        weighted_sum (`torch.Tensor` of shape `[Q, *block]`):
            `sum_i (v_q . g_i) / (inner_damping + ||g_i||^2) * g_i`.
        weighted_slope (`torch.Tensor` of shape `[Q, *block]`):
            `sum_i (v_q . g_i) / (inner_damping + ||g_i||^2)^2 * g_i`, minus its derivative by the damping.
        damping (`float`):
            Damping from all fitted examples.
        inner_damping (`float`):
            Damping that both were summed with.

    Returns:
        `torch.Tensor` of shape `[Q, *block]`; [`compute_inner_damping_error`] bounds what is left.
    """
    return weighted_sum - (damping - inner_damping) * weighted_slope


def compute_inner_damping_error(
    error_weight: Tensor, num_examples: int, damping: float, inner_damping: float
) -> Tensor:
    r"""
    Upper bound on the error of `u` of one block, corrected to first order for the damping.

    The fit pass needs the damping before all gradients have been seen, so it takes the one of a pilot sample inside
    `1 / (damping + ||g_i||^2)`, and sums what the first derivative adds beside it. With `x = ||g_i||^2` and `delta =
    damping - inner`, what is left is `1 / (damping + x) - (1 / (inner + x) - delta / (inner + x)^2) = delta^2 /
    ((inner + x)^2 (damping + x))`, and `damping + x >= min(1, damping / inner) (inner + x)`, hence the bound.

    The error of a score is at most `sum_b ||error of u_b|| ||g_kb||`.

    Args:
        error_weight (`torch.Tensor` of shape `[Q]`):
            `sum_i |v_q . g_i| ||g_i|| / (inner_damping + ||g_i||^2)^3`.
        num_examples (`int`):
            Number of fitted examples.
        damping (`float`):
            Damping from all fitted examples.
        inner_damping (`float`):
            Damping from the pilot sample.

    Returns:
        `torch.Tensor` of shape `[Q]`: the bound; 0 when both dampings are equal.
    """
    if damping == 0.0 or damping == inner_damping:
        return torch.zeros_like(error_weight)
    shrinkage = min(1.0, damping / inner_damping) if inner_damping > 0.0 else 1.0
    return (damping - inner_damping) ** 2 / (damping * shrinkage * num_examples) * error_weight
