"""Columns made of other columns."""

import numpy as np
import pytest
from datasets import Dataset

from hf_in2core import select_coreset
from hf_in2core.selection.combined import add_clean_rank, add_fused_rank


def test_fused_ranks_are_those_of_reciprocal_rank_fusion() -> None:
    generator = np.random.default_rng(0)
    first, second = generator.normal(size=50), generator.normal(size=50)
    scored = Dataset.from_dict({"a": first, "b": second})
    ranks = [sorted(range(50), key=lambda row: column[row]) for column in (first, second)]
    by_hand = sorted(range(50), key=lambda row: -sum(1 / (60 + order.index(row)) for order in ranks))
    assert np.argsort(add_fused_rank(scored, ["a", "b"])["fused_rank"]).tolist() == by_hand


def test_rows_without_a_value_have_no_rank_and_take_none_away() -> None:
    scored = Dataset.from_dict({"a": [3.0, None, 1.0, 2.0], "b": [1.0, 0.0, None, 2.0], "influence": [0.0] * 4})
    fused = add_fused_rank(scored, ["a", "b"], "both")
    assert fused["both"] == [0, None, None, 1]
    assert select_coreset(fused, size=2, column="both")["both"] == [0, 1]


def test_relevance_then_quality_puts_the_worst_quarter_last() -> None:
    relevance, losses = list(range(8)), [9.0, 0.1, 0.2, 0.3, 0.4, 8.0, 0.5, 0.6]
    scored = Dataset.from_dict({"rank": relevance, "loss": losses})
    clean = add_clean_rank(scored, "rank", "loss", "clean")
    assert np.argsort(clean["clean"]).tolist() == [1, 2, 3, 4, 6, 7, 0, 5]


def test_one_column_is_not_fused() -> None:
    with pytest.raises(ValueError, match="at least two"):
        add_fused_rank(Dataset.from_dict({"a": [1.0]}), ["a"])
