"""Influence split by layer against fits of those layers alone, and the choice of layers against exhaustive search."""

import copy
import itertools
from dataclasses import replace

import numpy as np
import pytest
from datasets import concatenate_datasets
from helpers import add_trained_adapter, assert_same, make_model, make_prompt_completion, make_trainer
from loops import compute_loops, keep_layers
from naive import compute_datainf
from scipy.stats import spearmanr

from hf_in2core.analysis.layers import (
    LayerScores,
    choose_layers,
    compute_layer_scores,
    grow_layers,
    list_layer_sets,
    select_layers,
)


@pytest.fixture(scope="module")
def model():
    return add_trained_adapter(make_model(num_layers=4), target_modules=["q_proj", "down_proj"])


def make_scores(strengths: list[float], num_rows: int = 200, elements: list[int] | None = None) -> LayerScores:
    """Random parts, one column a layer, each as large as its strength says."""
    parts = np.random.default_rng(0).normal(size=(num_rows, 1, len(strengths))) * np.array(strengths)
    layers = list(range(len(strengths)))
    return LayerScores(layers, elements or [10] * len(layers), np.arange(num_rows), parts)


def test_any_set_of_layers_has_the_influence_of_the_naive_loop(tmp_path, validation, model, monkeypatch) -> None:
    rows = make_prompt_completion(31, seed=0)
    monkeypatch.setattr("hf_in2core.engine.fit.PILOT_ROWS", len(rows))  # the pilot's damping is then the exact one
    trainer = make_trainer(tmp_path, rows, validation, model=copy.deepcopy(model))
    scores = compute_layer_scores(trainer)
    loops = compute_loops(trainer, rows, validation)
    for layers in ([0], [1, 3], [0, 1, 2, 3]):
        kept = keep_layers(loops, *layers)
        assert_same(scores.compute_influence(layers), compute_datainf(*kept), 1e-9)
    assert sum(scores.elements) == sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)


@pytest.mark.parametrize("estimator", ["datainf", "gradient_dot", "gradient_cosine"])
def test_layers_of_the_scores_are_those_of_the_config(tmp_path, validation, model, estimator) -> None:
    rows = make_prompt_completion(35, seed=0)
    sets = {"a": validation, "b": make_prompt_completion(3, seed=9)}
    options = {"estimator": estimator, "tokens_per_batch": 150}
    trainer = make_trainer(tmp_path / "all", rows, sets, model=copy.deepcopy(model), **options)
    scores = compute_layer_scores(trainer)
    for layers in (None, [2], [1, 3]):
        alone = make_trainer(
            tmp_path / str(layers), rows, sets, model=copy.deepcopy(model), influence_layers=layers, **options
        )
        assert_same(scores.compute_influence(layers), alone.score_influence()["influence"], 1e-9)


def test_a_pilot_is_a_pool_of_its_own(tmp_path, validation, model) -> None:
    rows = make_prompt_completion(50, seed=0)
    trainer = make_trainer(tmp_path / "a", rows, validation, model=copy.deepcopy(model))
    pilot = compute_layer_scores(trainer, pilot_rows=32, seed=3)
    assert len(set(pilot.rows)) == 32
    alone = make_trainer(tmp_path / "b", rows.select(pilot.rows), validation, model=copy.deepcopy(model))
    assert_same(pilot.compute_influence(), alone.score_influence()["influence"], 1e-9)
    assert not (tmp_path / "a" / "influence").exists()


def test_the_best_pair_is_found_and_costs_what_it_says() -> None:
    scores = make_scores([0.1, 3.0, 0.2, 2.0, 0.3, 0.1])
    choice = choose_layers(scores, budget=0.34)
    everything = scores.compute_influence()
    pairs = {
        spearmanr(scores.compute_influence(pair), everything).statistic: list(pair)
        for pair in itertools.combinations(range(6), 2)
    }
    assert choice.layers == pairs[max(pairs)] == [1, 3]
    assert choice.spearman == pytest.approx(max(pairs))
    assert choice.low < choice.spearman < choice.high
    assert choice.memory == pytest.approx(1 / 3)
    assert choice.memory_efficiency == pytest.approx(3)
    assert choice.backward_layers == 5
    assert choice.overlap == 1
    assert choice.held_out_spearman == pytest.approx(choice.spearman, abs=0.03)
    assert max(entry["memory"] for entry in choice.candidates) <= 0.34
    assert "[1, 3]" in str(choice)


def test_layers_that_say_the_same_are_chosen_by_chance_and_it_shows() -> None:
    choice = choose_layers(make_scores([1.0] * 8), budget=0.5)
    assert choice.overlap < 0.9
    # What one half finds best holds less on the other.
    assert choice.held_out_spearman < choice.spearman


def test_budgets_count_elements_and_equals_prefer_the_shorter_backward() -> None:
    uneven = make_scores([1.0, 5.0, 1.0], elements=[10, 70, 20])
    assert [choose_layers(uneven, budget=budget).memory <= budget for budget in (0.1, 0.3, 0.9, 1.0)] == [True] * 4
    assert choose_layers(uneven, budget=1.0).layers == [0, 1, 2]
    assert [sorted(step) for step in grow_layers(uneven, 0.31)][-1] == [0, 2]
    same = make_scores([1.0, 1.0, 1.0])
    same = replace(same, parts=np.repeat(same.parts[:, :, :1], 3, axis=2))
    choice = choose_layers(same, budget=0.5)
    assert (choice.layers, choice.backward_layers) == ([2], 1)


@pytest.mark.parametrize(("num_layers", "count"), [(5, 2), (12, 5), (3, 3), (7, 1)])
def test_named_sets_have_as_many_different_layers(num_layers, count) -> None:
    layers = list(range(10, 10 + num_layers))
    for chosen in list_layer_sets(layers, count).values():
        assert len(set(chosen)) == count
        assert set(chosen) <= set(layers)
        assert chosen == sorted(chosen)
    middle = list_layer_sets(layers, count)["middle"]
    assert abs((middle[0] - layers[0]) - (layers[-1] - middle[-1])) <= 1


def test_validation_rows_in_the_pool_take_no_part(tmp_path, validation, model) -> None:
    rows = make_prompt_completion(40, seed=0)
    both = concatenate_datasets([rows, validation.select([0, 4])])
    trainer = make_trainer(tmp_path / "a", both, validation, model=copy.deepcopy(model))
    assert compute_layer_scores(trainer).rows.tolist() == list(range(40))
    few = make_trainer(tmp_path / "b", concatenate_datasets([validation] * 6), validation, model=copy.deepcopy(model))
    with pytest.raises(ValueError, match="0 rows are left"):
        select_layers(few, budget=0.5)


def test_what_cannot_be_chosen_is_refused(tmp_path, pool, validation) -> None:
    with pytest.raises(ValueError, match=r"budget=1.5 is outside \(0, 1\]"):
        select_layers(None, budget=1.5)  # type: ignore[arg-type]
    scores = make_scores([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=r"the smallest of 3 layers takes 0.333"):
        choose_layers(scores, budget=0.2)
    with pytest.raises(ValueError, match="names \\[7\\]"):
        scores.compute_influence([1, 7])
    with pytest.raises(ValueError, match="12 rows cannot compare"):
        choose_layers(make_scores([1.0, 2.0], num_rows=12), budget=0.5)
    with pytest.raises(ValueError, match="the same influence"):
        choose_layers(replace(scores, parts=np.zeros_like(scores.parts)), budget=0.5)
    trainer = make_trainer(tmp_path / "few", pool, validation)
    with pytest.raises(ValueError, match="23 rows are left"):
        select_layers(trainer, budget=0.5)
    single = make_trainer(tmp_path / "one", pool, validation, influence_layers=[1])
    with pytest.raises(ValueError, match=r"covers the decoder layers \[1\]"):
        select_layers(single, budget=0.5)
