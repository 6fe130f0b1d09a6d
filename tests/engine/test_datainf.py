"""The equations against dense linear algebra, in float64."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import compute_dense_ihvp, draw_gradients

from hf_in2core.engine.datainf import (
    compute_coefficients,
    compute_damping,
    compute_ihvp,
    compute_inner_damping_error,
    correct_damping,
)


def fit(g: torch.Tensor, v: torch.Tensor, damping: float, inner_damping: float | None = None) -> torch.Tensor:
    """`u` from the package's pieces; `g` is `[n, d]`, `v` is `[Q, d]`."""
    inner = damping if inner_damping is None else inner_damping
    coefficients, slopes = compute_coefficients(g @ v.T, g.square().sum(1), inner)
    return compute_ihvp(v, correct_damping(coefficients.T @ g, slopes.T @ g, damping, inner), len(g), damping)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 9),
    d=st.integers(1, 12),
    q=st.integers(1, 3),
    scale=st.floats(0.01, 10),
    seed=st.integers(0, 10_000),
)
def test_ihvp_equals_averaged_dense_inverses(n: int, d: int, q: int, scale: float, seed: int) -> None:
    g, v = draw_gradients(n, d, q, seed)
    damping = compute_damping(float(g.square().sum(1).mean()), d, scale)
    expected = torch.stack([compute_dense_ihvp(g, direction, damping) for direction in v])
    torch.testing.assert_close(fit(g, v, damping), expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


def test_ihvp_of_one_example_is_the_exact_damped_inverse() -> None:
    g, v = draw_gradients(1, 6, 1, seed=3)
    damping = 0.37
    matrix = damping * torch.eye(6, dtype=torch.float64) + torch.outer(g[0], g[0])
    torch.testing.assert_close(matrix @ fit(g, v, damping)[0], v[0], rtol=1e-10, atol=1e-12)


def test_damping_is_relative_to_the_mean_square_per_element() -> None:
    g, _ = draw_gradients(5, 8, 1, seed=0)
    by_hand = 0.1 * sum(float(x @ x) for x in g) / 5 / 8
    assert abs(compute_damping(float(g.square().sum(1).mean()), 8, 0.1) - by_hand) < 1e-15


def test_scaling_every_gradient_keeps_the_ranking() -> None:
    g, v = draw_gradients(40, 10, 1, seed=1)
    rankings = []
    for c in (1.0, 1e-3, 70.0):
        damping = compute_damping(float((c * g).square().sum(1).mean()), 10, 0.1)
        rankings.append(torch.argsort(-(c * g) @ fit(c * g, c * v, damping)[0]))
    assert torch.equal(rankings[0], rankings[1])
    assert torch.equal(rankings[0], rankings[2])


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), factor=st.floats(0.2, 5.0))
def test_inner_damping_error_bounds_the_true_error(seed: int, factor: float) -> None:
    g, v = draw_gradients(6, 9, 2, seed)
    damping = compute_damping(float(g.square().sum(1).mean()), 9, 0.1)
    inner = factor * damping
    norms = g.norm(dim=1)
    weight = ((g @ v.T).abs() * (norms / (inner + norms.square()) ** 3)[:, None]).sum(0)
    bound = compute_inner_damping_error(weight, len(g), damping, inner)
    error = (fit(g, v, damping) - fit(g, v, damping, inner)).norm(dim=1)
    assert bool((error <= bound * (1 + 1e-9) + 1e-12).all())
    # Not merely true: within the spread that the triangle inequality over six random directions can lose.
    assert bool((bound <= 1e3 * error + 1e-9).all())


def test_a_block_without_gradients_counts_for_nothing() -> None:
    g, v = torch.zeros(3, 4, dtype=torch.float64), torch.ones(1, 4, dtype=torch.float64)
    assert compute_damping(0.0, 4, 0.1) == 0.0
    coefficients, slopes = compute_coefficients(g @ v.T, g.square().sum(1), 0.0)
    assert not slopes.any()
    assert torch.equal(compute_ihvp(v, coefficients.T @ g, 3, 0.0), torch.zeros(1, 4, dtype=torch.float64))
