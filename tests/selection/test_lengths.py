"""The length report and the reductions of a row's loss against plain counting, plus refusals."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from hf_in2core import select_coreset
from hf_in2core.engine.batches import TokenRows, collate
from hf_in2core.engine.losses import compute_token_weights
from hf_in2core.names import LOSS_REDUCTIONS
from hf_in2core.selection.baselines import select_length_matched
from hf_in2core.selection.lengths import compare_lengths


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
    assert found.pool_tokens == pytest.approx(sum(pool) / len(pool))
    assert found.coreset_tokens == pytest.approx(sum(kept) / len(kept))
    assert found.ratio == pytest.approx(found.coreset_tokens / found.pool_tokens)
    assert found.gap == pytest.approx(naive_gap(kept, pool))
    influence = [x for x in scored["influence"] if x is not None]
    ranks = [
        [sum(y < x for y in values) + sum(y == x for y in values) / 2 for x in values] for values in (influence, pool)
    ]
    assert found.spearman == pytest.approx(float(np.corrcoef(ranks)[0, 1]))


def test_a_coreset_of_long_or_short_rows_is_warned_of_and_no_other() -> None:
    longer = make_scored(bias=0.2)
    found = compare_lengths(longer, select_coreset(longer, fraction=0.25))
    assert (found.spearman or 0) < -0.8
    assert "longer than the pool's" in str(found.warning)
    shorter = make_scored(bias=-0.2)
    assert "shorter" in str(compare_lengths(shorter, select_coreset(shorter, fraction=0.25)).warning)
    unbiased = make_scored(bias=0)
    assert compare_lengths(unbiased, select_coreset(unbiased, fraction=0.25)).warning is None
    # Rows matched to the long coreset are as long.
    matched = compare_lengths(longer, select_length_matched(longer, fraction=0.25))
    assert matched.gap == pytest.approx(found.gap, abs=0.05)


def test_what_cannot_be_compared_is_refused() -> None:
    scored = make_scored(bias=1)
    assert compare_lengths(scored, scored, column="flat").spearman is None
    with pytest.raises(ValueError, match="9 rows of the pool and 9 of the coreset"):
        compare_lengths(scored.select(range(10)), scored.select(range(10)))
    with pytest.raises(ValueError, match="The coreset has no column num_loss_tokens"):
        compare_lengths(scored, scored.remove_columns("num_loss_tokens"))
    with pytest.raises(ValueError, match="The pool has no column loss"):
        compare_lengths(scored, scored, column="loss")


# --- reductions ---


def make_token_rows(num_loss_tokens: list[int], prompt: int = 2) -> TokenRows:
    """Rows of `prompt` tokens without loss and then as many with it."""
    lengths = [prompt + n for n in num_loss_tokens]
    labels = np.concatenate([[-100] * prompt + [5] * n for n in num_loss_tokens])
    rows = np.arange(len(lengths))
    return TokenRows(rows, np.concatenate([[0], np.cumsum(lengths)]), np.full(sum(lengths), 5), labels)


def naive_loss(losses: list[float], loss_reduction: str) -> float:
    n = len(losses)
    return {"mean": sum(losses) / n, "sum": sum(losses), "sqrt": sum(losses) / n**0.5, "max": max(losses)}[
        loss_reduction
    ]


@pytest.mark.parametrize("loss_reduction", LOSS_REDUCTIONS)
def test_weights_of_tokens_give_the_loss_of_the_row(loss_reduction: str) -> None:
    counts = [3, 1, 7, 2]
    nll = np.random.default_rng(0).exponential(size=sum(counts))
    starts = np.cumsum([0, *counts])
    token_rows = make_token_rows(counts)
    expected = [naive_loss(nll[a:b].tolist(), loss_reduction) for a, b in zip(starts, starts[1:], strict=False)]
    # In any order and however they are cut into batches.
    for rows in ([0, 1, 2, 3], [2], [3, 0], [1, 2]):
        batch = collate(token_rows, np.array(rows))
        own = torch.from_numpy(np.concatenate([nll[starts[row] : starts[row + 1]] for row in rows]))
        weights = compute_token_weights(batch, loss_reduction, own)
        found = torch.zeros(len(rows), dtype=own.dtype).index_add(0, batch.row_of_target, weights * own)
        np.testing.assert_allclose(found.numpy(), [expected[row] for row in rows], rtol=1e-15)


def test_the_first_of_equally_hard_tokens_counts_alone() -> None:
    batch = collate(make_token_rows([4, 3, 2]), np.arange(3))
    nll = torch.tensor([1.0, 2.0, 0.5, 2.0, 3.0, 3.0, 3.0, 0.0, 0.0], requires_grad=True)
    weights = compute_token_weights(batch, "max", nll)
    assert not weights.requires_grad
    assert weights.tolist() == [0, 1, 0, 0, 1, 0, 0, 1, 0]


@pytest.mark.parametrize("loss_reduction", LOSS_REDUCTIONS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stays_so(loss_reduction: str, bad: float) -> None:
    """What the passes refuse must reach them, whichever token it is."""
    batch = collate(make_token_rows([3, 2]), np.arange(2))
    for position in range(3):
        nll = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
        nll[position] = bad
        weighted = nll * compute_token_weights(batch, loss_reduction, nll)
        assert not torch.isfinite(weighted[:3].sum()) and torch.isfinite(weighted[3:].sum())


def test_another_reduction_is_no_mean() -> None:
    batch = collate(make_token_rows([3, 2]), np.arange(2))
    with pytest.raises(KeyError, match="median"):
        compute_token_weights(batch, "median", torch.ones(5))
