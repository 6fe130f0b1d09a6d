"""The length report against plain counting, plus its refusals."""

import numpy as np
import pytest
from datasets import Dataset

from hf_in2core import select_coreset
from hf_in2core.baselines import select_length_matched
from hf_in2core.lengths import compare_lengths


def make_scored(bias: float, num_rows: int = 400) -> Dataset:
    """Influence is noise minus `bias` times the length, and every tenth row carries no loss."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(1, 100, num_rows)
    tokens[::10] = 0
    influence = [
        float(x - bias * n) if n else None for x, n in zip(generator.normal(size=num_rows), tokens, strict=True)
    ]
    return Dataset.from_dict({"influence": influence, "num_loss_tokens": tokens, "flat": [1.0] * num_rows})


def naive_gap(first: list[int], second: list[int]) -> float:
    """Largest difference of the shares of rows up to any length."""
    return max(
        abs(sum(n <= length for n in first) / len(first) - sum(n <= length for n in second) / len(second))
        for length in range(101)
    )


def test_lengths_are_those_counted() -> None:
    scored = make_scored(bias=0.05)
    coreset = select_coreset(scored, fraction=0.25)
    found = compare_lengths(scored, coreset)
    pool = [n for n in scored["num_loss_tokens"] if n]
    kept = coreset["num_loss_tokens"][:]
    assert found["pool_tokens"] == pytest.approx(sum(pool) / len(pool))
    assert found["coreset_tokens"] == pytest.approx(sum(kept) / len(kept))
    assert found["ratio"] == pytest.approx(found["coreset_tokens"] / found["pool_tokens"])
    assert found["gap"] == pytest.approx(naive_gap(kept, pool))
    influence = [x for x in scored["influence"] if x is not None]
    ranks = [
        [sum(y < x for y in values) + sum(y == x for y in values) / 2 for x in values] for values in (influence, pool)
    ]
    assert found["spearman"] == pytest.approx(float(np.corrcoef(ranks)[0, 1]))


def test_a_coreset_of_long_or_short_rows_is_warned_of_and_no_other() -> None:
    longer = make_scored(bias=0.2)
    found = compare_lengths(longer, select_coreset(longer, fraction=0.25))
    assert found["spearman"] < -0.8
    assert "longer than the pool's" in found["warning"]
    shorter = make_scored(bias=-0.2)
    assert "shorter" in compare_lengths(shorter, select_coreset(shorter, fraction=0.25))["warning"]
    unbiased = make_scored(bias=0)
    assert compare_lengths(unbiased, select_coreset(unbiased, fraction=0.25))["warning"] is None
    # Rows matched to the long coreset are as long.
    matched = compare_lengths(longer, select_length_matched(longer, fraction=0.25))
    assert matched["gap"] == pytest.approx(found["gap"], abs=0.05)


def test_what_cannot_be_compared_is_refused() -> None:
    scored = make_scored(bias=1)
    assert compare_lengths(scored, scored, column="flat")["spearman"] is None
    with pytest.raises(ValueError, match="9 rows of the pool and 9 of the coreset"):
        compare_lengths(scored.select(range(10)), scored.select(range(10)))
    with pytest.raises(ValueError, match="The coreset has no column num_loss_tokens"):
        compare_lengths(scored, scored.remove_columns("num_loss_tokens"))
    with pytest.raises(ValueError, match="The pool has no column loss"):
        compare_lengths(scored, scored, column="loss")
