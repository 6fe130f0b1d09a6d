"""Greedy selection: the influence of a row given the rows that are chosen already. Needs numpy only."""

import numpy as np

from .turns import TakenRows


# Relative damping of the curvature, as `damping_scale` of influence itself.
DAMPING_SCALE = 0.1


def take_greedy(influence: np.ndarray, candidates: np.ndarray, count: int) -> TakenRows:
    r"""
    Let each validation row in turn take the row that helps it most, given all rows taken before.

    Plain influence is that of a row added to the pool on its own: two copies of a row have the same, though training
    on one leaves little to learn from the other. Here the curvature of the chosen rows is added as they are chosen, so
    that gradients along directions that they cover count for less. All of it happens in the space of the Q validation
    rows, where a row i of the pool is `a_i = -influence_per_query_i / s`, with `s` the root mean square of each
    validation row's influence over the pool (each weighs the same). There the pool's damped curvature is

        M = (1/n) sum_i a_i a_i^T + 0.1 tr(.) / Q I

    (with `a_i = V^T H^-1 g_i` and `H` the pool's curvature, `(1/n) sum_i a_i a_i^T = V^T H^-1 V` up to the damping of
    `H`). Training on k chosen rows S adds theirs, `H_S = M + (1/k) sum_{j in S} a_j a_j^T`, so that a whole coreset
    weighs as much as the pool, and the influence of row i on validation row q given S is

        -a_i^T H_S^-1 M e_q

    which is `-a_iq` for an empty S. Each row taken updates `P = H_S^-1` by Sherman-Morrison,

        P <- P - c P a_j a_j^T P / (1 + c a_j^T P a_j),    c = 1/k,

    which divides the influence of further copies of j by `1 + c a_j^T P a_j`, that of rows similar to it by less, and
    leaves that of rows with `a_i^T P a_j = 0` as it was. Costs `n Q + Q^2` multiplications per row taken.

    Args:
        influence (`numpy.ndarray` of shape `[n, Q]`):
            Influence of every row of the pool on every validation row; negative = proponent. Rows that are NaN carry
            no loss and count for nothing.
        candidates (`numpy.ndarray` of shape `[m]`, int64):
            Rows that may be taken, none of them NaN.
        count (`int`):
            Rows to take, at most `m`.

    Returns:
        [`TakenRows`]: the rows in the order in which they were taken, the influence of each given those before it on
        the validation row that took it (in units of `influence`), and which of the Q that was. Ties go to the first of
        `candidates`. A smaller selection is not the beginning of a larger one, since c depends on k.

    Raises:
        ValueError: if fewer than two validation rows have any influence.
    """
    scored = influence[~np.isnan(influence).any(axis=1)]
    scale = np.sqrt((scored**2).mean(axis=0))
    queries = np.flatnonzero(scale > 0)
    if len(queries) < 2:
        raise ValueError(
            f"{len(queries)} of {len(scale)} validation rows have any influence, but what the chosen rows leave to "
            'learn is told by several: at least 2 are needed. Use more validation rows, or strategy="top".'
        )
    scored = scored[:, queries] / scale[queries]
    moment = scored.T @ scored / len(scored)
    moment.flat[:: len(moment) + 1] += DAMPING_SCALE * np.trace(moment) / len(moment)
    precision = np.linalg.inv(moment)
    features = -influence[candidates][:, queries] / scale[queries]
    left = np.ones(len(candidates), dtype=bool)
    taken, scores = np.empty(count, dtype=np.int64), np.empty(count)
    takers = queries[np.arange(count) % len(queries)]
    for step in range(count):
        direction = precision @ moment[:, step % len(queries)]
        gains = np.where(left, features @ direction, -np.inf)
        best = int(gains.argmax())
        left[best] = False
        taken[step], scores[step] = candidates[best], -gains[best] * scale[takers[step]]
        covered = precision @ features[best]
        precision -= np.outer(covered, covered) / (count + features[best] @ covered)
    return TakenRows(taken, scores, takers)
