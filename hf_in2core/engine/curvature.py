"""How far DataInf is from the exact damped inverse; torch only.

DataInf (arXiv 2310.00902) replaces the inverse of a mean by the mean of inverses:

    exact:    u = (damping I + (1/n) sum_i g_i g_i^T)^-1 v
    DataInf:  u = (1/n) sum_i (damping I + g_i g_i^T)^-1 v

Both are taken block by block. For the fitted rows themselves everything follows from the n x n products of their
gradients, whatever the size of a block.
"""

import torch
from torch import Tensor


def compute_exact_ihvp(gradients: Tensor, v: Tensor, damping: float) -> Tensor:
    r"""
    `(damping I + (1/n) G^T G)^-1 v` of one block, exactly, by algebra among the n rows (Woodbury).

        u = (1/damping) (v - G^T (n damping I + G G^T)^-1 G v)

    Args:
        gradients (`torch.Tensor` of shape `[n, d]`):
            Per-example gradients `G`; use float64.
        v (`torch.Tensor` of shape `[Q, d]`):
            Validation gradients.
        damping (`float`):
            Damping of the block, above 0.

    Returns:
        `torch.Tensor` of shape `[Q, d]`

    Raises:
        ValueError: if the damping is not above 0: the inverse does not exist where there are fewer rows than elements.
    """
    _check_damping(damping)
    gram = gradients @ gradients.T
    gram.diagonal().add_(len(gradients) * damping)
    return (v - torch.linalg.solve(gram, gradients @ v.T).T @ gradients) / damping


def score_fitted_rows(gram: Tensor, dots: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    r"""
    Influence of the fitted rows through one block, by DataInf and by the exact damped inverse.

        DataInf: -(1/damping) (c - K (c / (damping + diag K)) / n)
        exact:   -(1/damping) (c - K (n damping I + K)^-1 c)

    with `K = G G^T` and `c = G v`.

    Args:
        gram (`torch.Tensor` of shape `[n, n]`):
            `K`, the products of the rows' gradients with each other; use float64.
        dots (`torch.Tensor` of shape `[n]`):
            `c`, their products with the validation gradient.
        damping (`float`):
            Damping of the block, above 0.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: both `[n]`, negative = proponent.

    Raises:
        ValueError: if the damping is not above 0.
    """
    _check_damping(damping)
    n = len(dots)
    datainf = (dots - gram @ (dots / (damping + gram.diagonal())) / n) / damping
    damped = gram + n * damping * torch.eye(n, dtype=gram.dtype, device=gram.device)
    exact = (dots - gram @ torch.linalg.solve(damped, dots)) / damping
    return -datainf, -exact


def _check_damping(damping: float) -> None:
    if not damping > 0:
        raise ValueError(
            f"damping={damping} is not above 0, so there is no inverse (a block whose gradients are all zero has no "
            "influence: leave it out)."
        )
