"""Pools that grow: merged rows are what one scoring of all of them gives."""

import logging

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from helpers import add_trained_adapter, assert_same, make_model, make_prompt_completion, make_trainer

from hf_in2core.influence.pools import check_fitted_pool, merge_scored


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A pool, its validation set, its scores and its scorer."""
    pool, validation = make_prompt_completion(23, seed=0), make_prompt_completion(7, seed=1)
    trainer = make_trainer(tmp_path_factory.mktemp("run"), pool, validation, torch.float32)
    return pool, validation, trainer.score_influence(), trainer.fit_influence()


def test_appended_rows_are_ranked_among_the_old_ones(fitted) -> None:
    pool, _, scored, scorer = fitted
    more = make_prompt_completion(9, seed=5)
    long = Dataset.from_dict({"id": ["long"], "prompt": ["the cat " * 600], "completion": [" sat"]})
    more = concatenate_datasets([more, long])  # the last one carries no loss
    merged = merge_scored([scored, more.map(scorer, batched=True)])
    at_once = concatenate_datasets([pool, more]).map(scorer, batched=True)
    assert merged.column_names == scored.column_names and merged.features == scored.features
    assert merged["id"][:] == at_once["id"][:]
    expected = np.array(at_once["influence"][:])
    assert merged["influence"][-1] is None and merged["influence_rank"][-1] is None
    assert_same(merged["influence"][:-1], expected[:-1], 1e-5)
    order = [merged["id"][row] for row in np.argsort(expected)[:-1]]
    assert [row["id"] for row in sorted(list(merged)[:-1], key=lambda row: row["influence_rank"])] == order
    assert merged["num_loss_tokens"][:] == at_once["num_loss_tokens"][:]


def test_rows_that_are_there_already_are_left_out(fitted) -> None:
    pool, _, scored, scorer = fitted
    again = pool.select([3, 20, 4]).map(scorer, batched=True)
    assert merge_scored([scored, again]).to_dict() == scored.to_dict()
    mixed = concatenate_datasets([pool.select([3]), make_prompt_completion(2, seed=6)]).map(scorer, batched=True)
    merged = merge_scored([scored, mixed])
    assert merged["id"][:] == [*pool["id"], "6-0", "6-1"]
    assert merge_scored([merged, mixed]).to_dict() == merged.to_dict()


def test_pools_of_other_scorers_or_columns_are_refused(fitted, tmp_path) -> None:
    pool, validation, scored, scorer = fitted
    other = make_trainer(tmp_path, pool, validation, torch.float32, model=add_trained_adapter(make_model(), seed=9))
    with pytest.raises(ValueError, match="another influence"):
        merge_scored([scored, pool.map(other.fit_influence(), batched=True)])
    with pytest.raises(ValueError, match="differ in the columns topic"):
        merge_scored([scored, pool.map(scorer, batched=True).add_column("topic", ["x"] * 23)])
    with pytest.raises(ValueError, match="differ in the columns influence"):
        merge_scored([scored, pool])


@pytest.mark.parametrize(
    ("first", "second", "merged"),
    [
        (None, "x", [None, "x"]),
        ("x", None, ["x", None]),
        (1, 2.5, [1.0, 2.5]),
        ({"a": 1}, {"b": "y"}, [{"a": 1, "b": None}, {"a": None, "b": "y"}]),
        ([{"a": None}], [{"a": "z"}], [[{"a": None}], [{"a": "z"}]]),
        ([], ["x"], [[], ["x"]]),
    ],
)
def test_types_keys_and_nulls_of_new_rows_are_taken_in(fitted, first, second, merged, caplog) -> None:
    _, _, _, scorer = fitted
    notes = enumerate((first, second))
    rows = [Dataset.from_list([{"prompt": f"{n} :", "completion": "a", "note": note}]) for n, note in notes]
    pools = [part.map(scorer, batched=True) for part in rows]
    grown = merge_scored(pools)
    assert grown["note"][:] == merged
    changes = rows[0].features["note"] != grown.features["note"]
    assert ("`note` from" in caplog.text) == changes


@pytest.mark.parametrize(("first", "second"), [(1, "x"), ("x", {"a": 1}), ([1], ["x"]), ({"a": 1}, {"a": "x"})])
def test_types_that_make_no_one_column_are_named(fitted, first, second) -> None:
    _, _, _, scorer = fitted
    pools = [
        Dataset.from_list([{"prompt": "a :", "completion": "a", "note": note}]).map(scorer, batched=True)
        for note in (first, second)
    ]
    with pytest.raises(ValueError, match="Column `note` holds .* in the first pool and .* in pool 2"):
        merge_scored(pools)


def test_several_sets_and_queries_grow_too(fitted, tmp_path) -> None:
    pool, validation, _, _ = fitted
    sets = {"second": validation, "first": make_prompt_completion(3, seed=2)}
    more = make_prompt_completion(4, seed=8)
    for per_example in (False, True):
        trainer = make_trainer(tmp_path / str(per_example), pool, sets, torch.float32)
        scorer = trainer.fit_influence(per_example=per_example)
        scored = trainer.score_influence()
        merged = merge_scored([scored, more.map(scorer, batched=True)])
        assert merged.column_names == scored.column_names and merged.features == scored.features
        at_once = concatenate_datasets([pool, more]).map(scorer, batched=True)
        for name in scorer.column_names:
            assert_same(merged[name][:], at_once[name][:], 1e-5)


# Fitted on another pool


def test_its_own_pool_needs_no_warning(fitted, caplog) -> None:
    _, validation, scored, scorer = fitted
    assert check_fitted_pool(scorer, scored, validation) is None
    assert not caplog.records


def test_another_pool_is_warned_of_with_a_measured_correlation(fitted, caplog) -> None:
    pool, validation, _, scorer = fitted
    # The same rows in another order: a refit gives the same u, so the ranking must be the same.
    with caplog.at_level(logging.WARNING):
        assert check_fitted_pool(scorer, pool.select(range(22, -1, -1)), validation) == pytest.approx(1.0)
    assert "correlates 1.000" in caplog.text
    # Rows whose gradients are of another kind: long sequences of one word.
    strange = [{"id": str(i), "prompt": "birds " * (i + 1), "completion": " walls" * (40 - i)} for i in range(20)]
    correlation = check_fitted_pool(scorer, Dataset.from_list(strange), validation)
    assert correlation is not None and -1 <= correlation < 0.9999
    caplog.clear()
    assert check_fitted_pool(scorer, Dataset.from_list(strange)) is None
    assert "pass the validation set" in caplog.text
    with pytest.raises(ValueError, match="not those that the scorer was fitted with"):
        check_fitted_pool(scorer, pool, validation.select(range(3)))


def test_validation_rows_in_another_pool_are_warned_of(fitted, caplog) -> None:
    pool, validation, _, scorer = fitted
    check_fitted_pool(scorer, concatenate_datasets([pool, validation.select([6])]), validation)
    assert "1 of 24 rows of the pool are in the validation set too (row 23 of the pool is row 6 of" in caplog.text


def test_an_estimator_without_curvature_is_fitted_on_no_pool(fitted, tmp_path, caplog) -> None:
    pool, validation, _, _ = fitted
    trainer = make_trainer(tmp_path, pool, validation, torch.float32, estimator="gradient_dot")
    assert check_fitted_pool(trainer.fit_influence(), make_prompt_completion(5, seed=3), validation) is None
    assert not [record for record in caplog.records if "another pool" in record.getMessage()]
