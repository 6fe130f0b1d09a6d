"""The exact damped inverse against dense linear algebra in float64, and how far a fit says DataInf is from it."""

import logging
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_same, make_tokens, make_trainer, prepare
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import compute_loops
from naive import compute_dense_ihvp, compute_gradients, draw_gradients
from scipy.stats import spearmanr

from hf_in2core.engine.blocks import count_elements
from hf_in2core.engine.curvature import (
    compute_exact_ihvp,
    draw_blocks,
    draw_curvature_sample,
    measure_curvature,
    score_fitted_rows,
)
from hf_in2core.engine.fit import fit_directions, read_fit


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 12), st.floats(0.01, 10), st.integers(0, 10_000))
def test_both_inverses_equal_dense_algebra(n: int, d: int, damping: float, seed: int) -> None:
    g, v = draw_gradients(n, d, 3, seed)
    dense = torch.linalg.inv(damping * torch.eye(d, dtype=torch.float64) + g.T @ g / n)
    u = compute_exact_ihvp(g, v, damping)
    torch.testing.assert_close(u, v @ dense, rtol=1e-8, atol=1e-9 * float(u.abs().max()))

    datainf, exact = score_fitted_rows(g @ g.T, g @ v[0], damping)
    by_hand = -g @ compute_dense_ihvp(g, v[0], damping)
    torch.testing.assert_close(datainf, by_hand, rtol=1e-8, atol=1e-9 * float(by_hand.abs().max()))
    by_hand = -g @ dense @ v[0]
    torch.testing.assert_close(exact, by_hand, rtol=1e-7, atol=1e-8 * float(u.abs().max()))


def test_one_row_and_large_damping_leave_no_difference() -> None:
    g, v = draw_gradients(1, 6, 1, seed=3)
    datainf, exact = score_fitted_rows(g @ g.T, g @ v[0], 0.1)
    torch.testing.assert_close(datainf, exact)
    g, v = draw_gradients(20, 6, 1, seed=3)
    datainf, exact = score_fitted_rows(g @ g.T, g @ v[0], 1e6)
    torch.testing.assert_close(datainf, exact, rtol=1e-4, atol=0)


def test_no_damping_has_no_inverse() -> None:
    g, v = draw_gradients(4, 6, 1, seed=0)
    for call in (lambda: compute_exact_ihvp(g, v, 0.0), lambda: score_fitted_rows(g @ g.T, g @ v[0], 0.0)):
        with pytest.raises(ValueError, match=r"damping=0\.0 is not above 0.*leave it out"):
            call()


def fit_and_measure(trainer) -> float:
    """What a fit tells, which is what is measured from what it has left on the disk."""
    told = trainer.fit_influence().config.exact_agreement
    job = trainer.make_passes(trainer.blocks, trainer.fingerprint)
    result = read_fit(job)
    assert result is not None and result.exact_agreement == told
    found = measure_curvature(job, trainer.prepared_pool, result, trainer.args.damping_scale, trainer.args.seed)
    assert told is None or told == pytest.approx(found, abs=0.01)
    return found if told is None else told


def test_a_fit_measures_what_single_backwards_give(tmp_path, caplog) -> None:
    pool, validation = make_tokens(40, seed=5), make_tokens(6, seed=6)
    trainer = make_trainer(tmp_path, pool, validation)
    with caplog.at_level(logging.WARNING):
        agreement = fit_and_measure(trainer)
    assert "inverse" not in caplog.text  # nobody can act on it: it is told with the method
    rows, queries = compute_loops(trainer, pool, validation)
    datainf, exact = (torch.zeros(40, dtype=torch.float64) for _ in range(2))
    for name in rows[0]:
        g = torch.stack([row[name] for row in rows]).double()
        v = torch.stack([query[name] for query in queries]).double().mean(0)
        damping = 0.1 * float(g.square().sum(1).mean()) / g.shape[1]
        u = compute_dense_ihvp(g, v, damping) * damping  # what stands for v
        datainf -= g @ compute_dense_ihvp(g, u, damping)
        exact -= g @ torch.linalg.solve(damping * torch.eye(g.shape[1]).double() + g.T @ g / 40, u)
    # The whole pool is the sample; the fit's own damping and directions are float64 here.
    assert agreement == pytest.approx(spearmanr(datainf, exact).statistic, abs=1e-9)


def test_a_larger_damping_brings_both_together(tmp_path) -> None:
    pool, validation = make_tokens(40, seed=5), make_tokens(6, seed=6)
    apart = fit_and_measure(make_trainer(tmp_path / "a", pool, validation, damping_scale=1e-4))
    near = fit_and_measure(make_trainer(tmp_path / "b", pool, validation, damping_scale=1e4))
    assert apart < 0.7 < 0.99 < near


@pytest.mark.parametrize(("num_rows", "estimator"), [(23, "datainf"), (40, "gradient_dot")])
def test_few_rows_or_no_curvature_conclude_nothing(tmp_path, validation, num_rows, estimator) -> None:
    trainer = make_trainer(tmp_path, make_tokens(num_rows, seed=5), validation, estimator=estimator)
    assert np.isnan(fit_and_measure(trainer)) and trainer.fit_influence().config.exact_agreement is None


@pytest.mark.parametrize("share", [0.2, 0.5, 0.0, 1.0])
def test_blocks_that_fit_are_of_every_kind(tmp_path, pool, validation, share) -> None:
    blocks = make_trainer(tmp_path, pool, validation).blocks
    most = int(share * count_elements(blocks))
    chosen = draw_blocks(blocks, most, np.random.default_rng(0))
    assert list(chosen) == [name for name in blocks if name in chosen]
    if share in (0.0, 1.0):
        assert len(chosen) == (len(blocks) if share else 1)
        return
    largest = max(block.tensor.numel() for block in blocks.values())
    assert most - largest < count_elements(chosen) <= most
    assert all(any(kind in name for name in chosen) for kind in ("lora_A", "lora_B", "mlp", "self_attn"))


@pytest.mark.parametrize(
    ("num_rows", "options"),
    [
        (80, {}),
        (80, {"fit_examples": 50}),
        (80, {"tokens_per_batch": 40, "chunk_size": 7}),
        (300, {"fit_examples": "auto", "tokens_per_batch": 4096}),
    ],
)
def test_the_fit_keeps_the_gradients_of_the_sample(tmp_path, monkeypatch, num_rows, options) -> None:
    """So the check passes no row of its own."""
    monkeypatch.setattr("hf_in2core.engine.sample.MIN_SAMPLED_POOL", 300)
    pool, validation = make_tokens(num_rows, seed=5), make_tokens(6, seed=6)
    trainer = make_trainer(tmp_path, pool, validation, **options)
    job = trainer.make_passes(trainer.blocks, "")
    job.folder = None
    sample = draw_curvature_sample(job, len(pool), seed=0)
    assert sample is not None and sample.gather(job, 32) is None
    args = {"estimator": "datainf", "damping_scale": 0.1, "fit_examples": trainer.args.fit_examples, "seed": 0}
    fit_directions(job, trainer.prepared_pool, trainer.prepared_validation, **args, sample=sample)
    kept = sample.gather(job, 32)
    assert kept is not None and len(sample._wanted) == (50 if num_rows == 80 and options.get("fit_examples") else 64)
    expected = compute_gradients(trainer.model, prepare(pool.select(sample._wanted)))
    for name, gradients in kept.items():
        rows = torch.stack([row[name.replace(".weight", ".default.weight")] for row in expected])
        assert_same(gradients.flatten(), rows.flatten(), 1e-9)


def test_a_part_of_the_sample_is_enough_if_it_is_large(tmp_path) -> None:
    """A fit that went on where another stopped has not passed all of the rows."""
    pool, validation = make_tokens(80, seed=5), make_tokens(6, seed=6)
    trainer = make_trainer(tmp_path, pool, validation)
    job = trainer.make_passes(trainer.blocks, "")
    job.folder = None
    sample = draw_curvature_sample(job, len(pool), seed=0)
    assert sample is not None
    args: dict[str, Any] = {"estimator": "datainf", "damping_scale": 0.1, "fit_examples": None, "seed": 0}
    fit_directions(job, trainer.prepared_pool, trainer.prepared_validation, **args, sample=sample)
    for rows in sample._kept.values():
        for row in sample._wanted[:20]:
            del rows[row]
    assert sample.gather(job, 45) is None
    kept = sample.gather(job, 44)
    assert kept is not None and {len(rows) for rows in kept.values()} == {44}
    assert sample.gather(job, 1) is None  # what was handed over is not kept beside it
