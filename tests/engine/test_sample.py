"""`fit_examples="auto"`: a sample that grows until its halves agree, and all rows where they do not."""

import numpy as np
import pytest
import torch
from helpers import add_trained_adapter, assert_same, make_model, make_tokens, make_trainer
from scipy.stats import spearmanr

from hf_in2core.engine.sample import MIN_AGREEMENT, compare_halves, is_sampled, list_sample_sizes


OPTIONS = {"tokens_per_batch": 4096, "chunk_size": 4096}


def score(folder, num_rows: int, fit_examples, damping_scale: float, per_example: bool = False, seed=1, **options):
    pool, validation = make_tokens(num_rows, seed=0), make_tokens(6, seed=1)
    model = add_trained_adapter(make_model(num_layers=3).to(torch.float64), seed)
    options = {**OPTIONS, "fit_examples": fit_examples, "damping_scale": damping_scale, **options}
    trainer = make_trainer(folder, pool, validation, model=model, **options)
    scorer = trainer.fit_influence(per_example)
    return scorer.config, np.array(trainer.score_influence()["influence"])


@pytest.mark.slow
def test_a_sample_whose_halves_agree_stands_for_the_pool(tmp_path) -> None:
    sampled, scores = score(tmp_path / "auto", 2000, "auto", 10.0, seed=3)
    whole, expected = score(tmp_path / "all", 2000, None, 10.0, seed=3)
    assert sampled.num_fit_examples < whole.num_fit_examples == 2000
    assert sampled.fit_agreement >= MIN_AGREEMENT and whole.fit_agreement is None
    # The whole sample is nearer to the pool than its halves are to each other.
    assert spearmanr(scores, expected).statistic >= sampled.fit_agreement
    assert not np.allclose(scores, expected, rtol=1e-9, atol=0)


def test_single_queries_are_fitted_on_a_sample(tmp_path, monkeypatch) -> None:
    """Their mean is the column that is written: its ranking is that of all rows."""
    monkeypatch.setattr("hf_in2core.engine.sample.MIN_SAMPLED_POOL", 400)
    monkeypatch.setattr("hf_in2core.engine.sample.MIN_AGREEMENT", 0.9)
    sampled, scores = score(tmp_path / "auto", 400, "auto", 100.0, per_example=True)
    whole, expected = score(tmp_path / "all", 400, None, 100.0, per_example=True)
    assert sampled.per_example and sampled.num_fit_examples < whole.num_fit_examples == 400
    assert sampled.fit_agreement >= 0.9 and whole.fit_agreement is None
    assert spearmanr(scores, expected).statistic >= sampled.fit_agreement
    assert not np.allclose(scores, expected, rtol=1e-9, atol=0)


def test_sizes_grow_by_their_number_and_not_by_the_pools() -> None:
    assert list_sample_sizes(1000) == [50, 100, 200, 400]
    assert list_sample_sizes(1_000_000)[:2] == [1024, 2048]
    assert list_sample_sizes(1_000_000)[-1] <= 400_000


def test_where_the_halves_do_not_agree_all_rows_are_fitted(tmp_path, caplog, monkeypatch) -> None:
    monkeypatch.setattr("hf_in2core.engine.sample.MIN_SAMPLED_POOL", 300)
    found, scores = score(tmp_path / "auto", 300, "auto", 1e-4)
    _, expected = score(tmp_path / "all", 300, None, 1e-4)
    assert found.num_fit_examples == 300 and found.fit_agreement is None
    assert_same(scores, expected, 1e-9)
    assert "fitting on all 300 rows" in caplog.text


def test_small_pools_and_stores_are_fitted_whole(tmp_path) -> None:
    assert is_sampled(1000, False) and not is_sampled(999, False) and not is_sampled(1000, True)
    config, scores = score(tmp_path / "small", 60, "auto", 10.0)
    assert config.num_fit_examples == 60 and config.fit_agreement is None
    assert scores.tolist() == score(tmp_path / "all", 60, None, 10.0)[1].tolist()
    # The same run: what one has computed the other finds.
    assert scores.tolist() == score(tmp_path / "small", 60, None, 10.0)[1].tolist()
    assert len(list((tmp_path / "small" / "influence").iterdir())) == 1


def test_agreement_is_the_worst_of_the_sets_and_of_a_tenth_of_their_queries() -> None:
    rising = np.arange(20.0)
    other = rising.copy()
    other[[0, 1]] = other[[1, 0]]
    swapped = spearmanr(rising, other).statistic
    columns = np.stack([rising] * 4, axis=1)
    assert compare_halves(np.hstack([columns, columns])) == 1.0
    # One query of its own set: the worst set counts.
    second = np.stack([rising, rising, rising, other], axis=1)
    assert compare_halves(np.hstack([columns, second])) == pytest.approx(swapped)
    # One query of a set of four: below their mean lies the tenth percentile.
    assert swapped < compare_halves(np.hstack([columns, second]), [4]) < (3 + swapped) / 4
    # Queries that agree one by one, whose large parts cancel: what is written is their mean, which does not agree.
    generator = np.random.default_rng(0)
    large, small = 1e3 * generator.normal(size=100), generator.normal(size=(2, 100))
    halves = [np.stack([large + noise, noise - large], axis=1) for noise in small]
    assert compare_halves(np.hstack(halves)) > 0.999
    assert compare_halves(np.hstack(halves), [2]) < 0.5
    # Scores that are all equal show no agreement.
    assert compare_halves(np.zeros((20, 2))) == -1.0
