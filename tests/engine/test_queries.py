"""Every validation row a query of its own: the numbers of separate fits, in blocks, lists, or the strongest."""

import copy

import numpy as np
import pytest
import torch
from helpers import add_trained_adapter, assert_same, make_model, make_prompt_completion, make_tokens, make_trainer


@pytest.fixture
def model():
    return add_trained_adapter(make_model(), target_modules=["q_proj", "down_proj"])


def score_queries(folder, pool, validation, model, top_k=None, **options):
    trainer = make_trainer(folder, pool, validation, model=copy.deepcopy(model), **options)
    trainer.fit_influence(per_example=True)
    return trainer, trainer.score_influence(top_k=top_k)


@pytest.mark.parametrize("estimator", ["datainf", "gradient_dot", "gradient_cosine"])
def test_queries_equal_separate_fits(tmp_path, pool, validation, model, estimator) -> None:
    _, scored = score_queries(tmp_path / "all", pool, validation, model, estimator=estimator)
    matrix = np.array(scored["influence_per_query"])
    assert matrix.shape == (len(pool), len(validation))
    for query in (0, 3, 6):
        alone = make_trainer(
            tmp_path / str(query), pool, validation.select([query]), model=copy.deepcopy(model), estimator=estimator
        ).score_influence()
        assert_same(matrix[:, query], alone["influence"], 1e-6)  # directions are kept in float32


def test_the_mean_over_queries_is_the_influence_on_the_mean(tmp_path, pool, validation, model) -> None:
    sets = {"a": validation, "b": make_tokens(4, seed=8)}
    _, scored = score_queries(tmp_path / "queries", pool, sets, model)
    means = make_trainer(tmp_path / "means", pool, sets, model=copy.deepcopy(model)).score_influence()
    for column in ("influence", "influence_a", "influence_b"):
        assert_same(scored[column], means[column], 1e-6)
    assert scored.features["influence_per_query"].length == len(validation) + 4


def test_blocks_of_queries_change_nothing(tmp_path, pool, validation, model) -> None:
    _, together = score_queries(tmp_path / "a", pool, validation, model)
    trainer, apart = score_queries(tmp_path / "b", pool, validation, model, query_memory_gb=1.6e-4)
    assert 1 < trainer.count_queries_per_block(trainer.blocks) < len(validation)
    assert_same(apart["influence_per_query"], together["influence_per_query"], 1e-6)


@pytest.mark.parametrize("top_k", [3, 40])
def test_the_strongest_rows_are_those_of_the_whole_matrix(tmp_path, pool, validation, model, top_k) -> None:
    _, scored = score_queries(tmp_path / "a", pool, validation, model)
    trainer, top_scored = score_queries(tmp_path / "b", pool, validation, model, top_k=top_k, chunk_size=4)
    assert "influence_per_query" not in top_scored.column_names
    assert_same(top_scored["influence"], scored["influence"], 1e-6)
    matrix = np.array(scored["influence_per_query"])
    for query, row in enumerate(trainer.top_rows):
        order = np.argsort(matrix[:, query])
        assert row["validation_row"] == query
        assert row["proponents"] == order[:top_k].tolist()
        assert row["opponents"] == order[::-1][:top_k].tolist()
        assert_same(row["proponent_influence"], matrix[order[:top_k], query], 1e-6)
    trainer.score_influence()
    assert trainer.top_rows is None  # those of an earlier scoring are not this one's


def test_the_strongest_rows_resume(tmp_path, pool, validation, model) -> None:
    first, _ = score_queries(tmp_path, pool, validation, model, top_k=3, chunk_size=4)
    removed = sorted(tmp_path.rglob("top3-*.safetensors"))[2]
    removed.unlink()
    again, _ = score_queries(tmp_path, pool, validation, model, top_k=3, chunk_size=4)
    assert again.top_rows.to_list() == first.top_rows.to_list()


def test_a_query_scorer_maps_raw_rows(tmp_path, model) -> None:
    pool, validation = make_prompt_completion(23, seed=0), make_prompt_completion(7, seed=1)
    trainer, scored = score_queries(tmp_path, pool, validation, model)
    mapped = pool.map(trainer.fit_influence(per_example=True), batched=True)
    assert_same(mapped["influence_per_query"], scored["influence_per_query"], 1e-6)
    assert_same(mapped["influence"], scored["influence"], 1e-6)


def test_rows_without_loss_have_no_list(tmp_path, validation, model) -> None:
    rows = make_prompt_completion(6, seed=3).map(
        lambda row, i: {"prompt": "the cat " * 90 if i == 2 else row["prompt"]}, with_indices=True
    )
    _, scored = score_queries(tmp_path, rows, validation, model, max_length=60)
    assert [value is None for value in scored["influence_per_query"]] == [False, False, True, False, False, False]


def test_top_k_needs_queries(tmp_path, pool, validation, model) -> None:
    trainer = make_trainer(tmp_path, pool, validation, torch.float32, model=model)
    with pytest.raises(ValueError, match="per_example=True"):
        trainer.score_influence(top_k=3)
