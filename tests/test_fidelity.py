"""Agreement with retraining, against scipy row by row, on measurements whose noise is known."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from benchmarks.fidelity import compare_leave_one_out, compare_scores, compute_lds


def make_members(m: int, n: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return np.array([np.isin(np.arange(n), generator.choice(n, n // 2, replace=False)) for _ in range(m)])


def test_lds_is_the_rank_correlation_of_summed_influence() -> None:
    generator = np.random.default_rng(0)
    members = make_members(20, 12)
    influence, losses = generator.normal(size=(12, 3)), generator.normal(size=(20, 2, 3))
    by_hand = []
    for query in range(3):
        predicted = [sum(influence[i, query] for i in range(12) if subset[i]) for subset in members]
        by_hand.append(spearmanr(predicted, losses[:, :, query].mean(axis=1)).statistic)
    result = compute_lds(influence, members, losses)
    assert result.spearman == pytest.approx(np.mean(by_hand), abs=1e-12)
    agreement = [spearmanr(losses[:, 0, q], losses[:, 1, q]).statistic for q in range(3)]
    assert result.seed_agreement == pytest.approx(np.mean(agreement), abs=1e-12)
    single = compute_lds(influence[:, 0], members, losses[:, :, 0])
    assert single.spearman == pytest.approx(by_hand[0], abs=1e-12)


def test_a_perfect_prediction_reaches_the_ceiling_that_noise_leaves() -> None:
    generator = np.random.default_rng(1)
    influence, members = generator.normal(size=40), make_members(4000, 40)
    clean = members @ influence
    noisy = clean[:, None] + generator.normal(size=(4000, 3)) * clean.std()  # reliability of one seed: 1/2
    result = compute_lds(influence, members, noisy)
    assert result.seed_agreement == pytest.approx(0.48, abs=0.03)  # Spearman of a Pearson correlation of 1/2
    assert result.spearman == pytest.approx(result.ceiling, abs=0.02)
    exact = compute_lds(influence, members, np.stack([clean, clean], axis=1))
    assert exact.spearman == pytest.approx(1) and exact.ceiling == pytest.approx(1)
    assert compute_lds(-influence, members, noisy).spearman == pytest.approx(-result.spearman)


def test_leave_one_out_has_the_sign_of_influence() -> None:
    influence = np.linspace(-1, 1, 15)
    # Without a proponent the loss is higher.
    assert compare_leave_one_out(influence, (2.0 - influence)[:, None]).spearman == pytest.approx(1)


def test_noise_is_said_to_be_noise() -> None:
    generator = np.random.default_rng(3)
    result = compare_leave_one_out(np.arange(200.0), generator.normal(size=(200, 2)))
    assert result.ceiling is None and "mostly noise" in str(result.warning)
    one_seed = compare_leave_one_out(np.arange(200.0), generator.normal(size=(200, 1)))
    assert one_seed.seed_agreement is None and one_seed.ceiling is None


def test_two_scores_and_their_coresets() -> None:
    first = np.arange(100.0)
    same = compare_scores(first, first**3, fraction=0.25)
    assert (same.spearman, same.overlap, same.rows) == (pytest.approx(1), 1.0, 100)
    second = np.roll(first, 10)
    second[5] = np.nan
    result = compare_scores(first, second, fraction=0.2)
    both = ~np.isnan(second)
    kept = set(np.flatnonzero(both)[:20]) & set(np.argsort(np.where(both, second, np.inf))[:20])
    assert result.rows == 99 and result.overlap == len(kept) / 20
    assert result.spearman == pytest.approx(spearmanr(first[both], second[both]).statistic)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"members": make_members(9, 12), "losses": np.ones((9, 2))}, "9 subsets say nothing.*at least 10"),
        ({"members": make_members(20, 11)}, r"pass booleans of shape \[subsets, 12\]"),
        ({"members": make_members(20, 12).astype(int)}, "`members` is int64"),
        ({"influence": np.ones(12)}, "predictions are the same for all subsets"),
        ({"losses": np.ones((20, 2))}, "measurements are the same for all subsets"),
        ({"losses": np.full((20, 2), np.nan)}, "Some measurements are NaN"),
        ({"losses": np.random.default_rng(0).normal(size=20)}, "second axis for the seeds"),
    ],
)
def test_what_cannot_be_told_is_refused(change: dict, message: str) -> None:
    generator = np.random.default_rng(4)
    options = {"influence": generator.normal(size=12), "members": make_members(20, 12)}
    options["losses"] = generator.normal(size=(20, 2))
    with pytest.raises(ValueError, match=message):
        compute_lds(**(options | change))


def test_scores_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shapes \(5,\) and \(6,\)"):
        compare_scores(np.zeros(5), np.zeros(6), fraction=0.5)
    with pytest.raises(ValueError, match="fraction=1"):
        compare_scores(np.arange(20.0), np.arange(20.0), fraction=1)
    with pytest.raises(ValueError, match="3 rows with both scores say nothing"):
        compare_scores(np.arange(3.0), np.arange(3.0), fraction=0.5)
    with pytest.raises(ValueError, match="the same for all rows"):
        compare_scores(np.zeros(20), np.arange(20.0), fraction=0.5)
