"""How far DataInf is from the exact damped inverse; torch only.

DataInf (arXiv 2310.00902) replaces the inverse of a mean by the mean of inverses:

    exact:    u = (lambda I + (1/n) sum_i g_i g_i^T)^-1 v
    DataInf:  u = (1/n) sum_i (lambda I + g_i g_i^T)^-1 v

Both are taken block by block, with the damping `lambda = damping_scale * mean_i ||g_i||^2 / d` of the block.
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
    if not damping > 0:
        raise ValueError(
            f"damping={damping} is not above 0, so there is no inverse (a block whose gradients are all zero has no "
            "influence: leave it out)."
        )
    n = len(gradients)
    gram = gradients @ gradients.T
    gram.diagonal().add_(n * damping)
    return (v - torch.linalg.solve(gram, gradients @ v.T).T @ gradients) / damping
