"""Agreement of halves of the validation set against what made-up influence must have, plus its refusals."""

import math

import numpy as np
import pytest
from datasets import Dataset
from helpers import add_trained_adapter, make_model, make_prompt_completion, make_trainer
from scipy.stats import spearmanr

from hf_in2core.analysis.agreement import measure_agreement
from hf_in2core.names import PER_QUERY
from hf_in2core.rows.scored import add_list_column


def make_scored(signal: float, num_rows: int = 2000, num_queries: int = 40, seed: int = 0) -> Dataset:
    """Every validation row sees the same signal and noise of its own."""
    generator = np.random.default_rng(seed)
    influence = signal * generator.normal(size=(num_rows, 1)) + generator.normal(size=(num_rows, num_queries))
    return add_list_column(Dataset.from_dict({"id": range(num_rows)}), PER_QUERY, influence)


@pytest.mark.parametrize("signal", [0.0, 0.1, 0.3, 1.0])
def test_agreement_is_that_of_signal_and_noise(signal) -> None:
    found = measure_agreement(make_scored(signal))
    pearson = signal**2 / (signal**2 + 1 / 20)  # of the means over 20 rows
    spearman = 6 / math.pi * math.asin(pearson / 2)
    assert found.agreement == pytest.approx(spearman, abs=0.05)
    assert found.low <= found.agreement <= found.high
    assert (found.warning is None) == (spearman > 0.75)
    # Two whole validation sets of that size agree as `reliability` says.
    both = make_scored(signal, num_queries=80, seed=1)
    halves = np.array(both["influence_per_query"]).reshape(len(both), 2, 40).mean(2)
    expected = spearmanr(halves[:, 0], halves[:, 1]).statistic
    assert found.reliability == pytest.approx(expected, abs=0.07)


def test_rows_without_loss_and_a_seed_change_little() -> None:
    scored = make_scored(0.3)
    matrix = np.array(scored["influence_per_query"])
    matrix[5] = np.nan
    gappy = measure_agreement(add_list_column(scored.select_columns(["id"]), PER_QUERY, matrix))
    assert gappy.num_rows == 1999
    assert gappy.agreement == pytest.approx(measure_agreement(scored).agreement, abs=0.01)
    assert measure_agreement(scored, seed=1).agreement == pytest.approx(gappy.agreement, abs=0.03)
    assert measure_agreement(scored) == measure_agreement(scored)


def test_a_validation_set_of_copies_agrees_with_itself(tmp_path) -> None:
    rows, one = make_prompt_completion(40, seed=0), make_prompt_completion(1, seed=1)
    copies = Dataset.from_list(one.to_list() * 12)
    trainer = make_trainer(tmp_path, rows, copies, model=add_trained_adapter(make_model()))
    trainer.fit_influence(per_example=True)
    assert measure_agreement(trainer.score_influence()).agreement == pytest.approx(1)


def test_what_says_nothing_is_refused() -> None:
    scored = make_scored(1.0)
    with pytest.raises(ValueError, match="needs the column influence_per_query"):
        measure_agreement(scored.select_columns(["id"]))
    with pytest.raises(ValueError, match="40 validation rows and 29 rows"):
        measure_agreement(scored.select(range(29)))
    with pytest.raises(ValueError, match="9 validation rows"):
        measure_agreement(make_scored(1.0, num_queries=9))
    with pytest.raises(ValueError, match="the same influence"):
        measure_agreement(add_list_column(scored.select_columns(["id"]), PER_QUERY, np.ones((2000, 12))))
