"""Coverage of test rows against plain loops over naive influence and similarity, plus what it refuses to conclude."""

import copy
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from helpers import add_trained_adapter, assert_same, make_model, make_prompt_completion, make_trainer, prepare
from loops import compute_loops
from naive import compute_datainf, compute_loss, embed, score_bm25

from hf_in2core.analysis.coverage import (
    compute_coverage,
    compute_similarity_coverage,
    correlate_coverage,
    measure_coverage,
)


@pytest.fixture(scope="module")
def model():
    return add_trained_adapter(make_model())


def naive_coverage(strengths: list[float], top_k: int) -> dict[str, float]:
    proponents = sum(x for x in strengths if x > 0)
    return {
        "coverage_sum": proponents,
        "coverage_top_k": sum(sorted(strengths)[-top_k:]) / top_k,
        "coverage_mean": sum(strengths) / len(strengths),
        "coverage_share": proponents / sum(abs(x) for x in strengths),
    }


def test_coverage_equals_a_loop_over_naive_influence(tmp_path, validation, model, monkeypatch) -> None:
    rows = make_prompt_completion(14, seed=0)
    monkeypatch.setattr("hf_in2core.engine.fit.PILOT_ROWS", len(rows))  # the pilot's damping is then the exact one
    trainer = make_trainer(tmp_path, rows, validation, model=copy.deepcopy(model))
    coverage = compute_coverage(trainer, top_k=3)
    train, tests = compute_loops(trainer, rows, validation)
    for query, (row, gradient) in enumerate(zip(coverage, tests, strict=True)):
        influence = compute_datainf(train, [gradient]).tolist()
        for name, expected in naive_coverage([-x for x in influence], 3).items():
            assert row[name] == pytest.approx(expected, rel=1e-9), name
        assert row["proponents"] == np.argsort(influence)[:3].tolist()
        assert_same(row["proponent_influence"], sorted(influence)[:3], 1e-9)
        assert (row["test_set"], row["test_row"]) == ("validation", query)
        loss = compute_loss(trainer.model.eval(), prepare(validation)[query])
        assert row["loss"] == pytest.approx(loss.item())


def test_rows_without_loss_keep_the_positions_of_the_others(tmp_path, model) -> None:
    def cut(rows: Dataset, position: int) -> Dataset:
        long = {"id": "long", "prompt": "the cat " * 90, "completion": " mat"}
        before, after = rows.select(range(position)), rows.select(range(position, len(rows)))
        return concatenate_datasets([before, Dataset.from_list([long]), after])

    rows, tests = make_prompt_completion(12, seed=0), make_prompt_completion(4, seed=1)
    options = {"max_length": 60, "model": copy.deepcopy(model)}
    plain = compute_coverage(make_trainer(tmp_path / "a", rows, tests, **options), top_k=2)
    sets = {"one": cut(tests, 1), "two": make_prompt_completion(2, seed=5)}
    gappy = compute_coverage(make_trainer(tmp_path / "b", cut(rows, 0), sets, **options), top_k=2)
    assert gappy["test_set"] == ["one"] * 4 + ["two"] * 2
    assert gappy["test_row"] == [0, 2, 3, 4, 0, 1]
    assert gappy["proponents"][:4] == [[row + 1 for row in proponents] for proponents in plain["proponents"]]
    assert_same(gappy["coverage_sum"][:4], plain["coverage_sum"], 1e-9)


def test_similarity_coverage_equals_loops(tmp_path, pool, validation, model) -> None:
    pytest.importorskip("bm25s")
    trainer = make_trainer(tmp_path, pool, validation, torch.float32, model=copy.deepcopy(model))
    nearest = compute_similarity_coverage(trainer, "rds", top_k=4)
    assert not {"coverage_sum", "coverage_share"} & set(nearest.column_names)
    with trainer.model.disable_adapter():
        rows, tests = (
            [embed(trainer.model, row["input_ids"]) for row in prepare(part)] for part in (pool, validation)
        )
    words = [[(row["prompt"] + row["completion"]).lower().split() for row in part] for part in (pool, validation)]
    words = [[[word for word in row if word != ":"] for row in part] for part in words]
    by_words = compute_similarity_coverage(trainer, "bm25", top_k=4)
    for query in range(len(validation)):
        similarities = [float(torch.cosine_similarity(tests[query], row, dim=0)) for row in rows]
        assert nearest["coverage_top_k"][query] == pytest.approx(sum(sorted(similarities)[-4:]) / 4, rel=1e-5)
        assert nearest["coverage_mean"][query] == pytest.approx(sum(similarities) / len(rows), rel=1e-5)
        assert nearest["nearest"][query][0] == int(np.argmax(similarities))
        assert nearest["nearest_similarity"][query] == pytest.approx(sorted(similarities)[::-1][:4], rel=1e-5)
        scores = score_bm25(words[1][query], words[0])
        assert by_words["coverage_top_k"][query] == pytest.approx(sum(sorted(scores)[-4:]) / 4, rel=1e-4)


def test_sentence_embeddings_need_their_library(tmp_path, pool, validation, model, monkeypatch) -> None:
    trainer = make_trainer(tmp_path, pool, validation, torch.float32, model=copy.deepcopy(model))
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match=r"hf-in2core\[baselines\]"):
        compute_similarity_coverage(trainer, "embedding")


def test_sentence_embeddings_are_compared_by_cosine(tmp_path, pool, validation, model, model_folder) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    encoder = sentence_transformers.SentenceTransformer(model_folder, device="cpu")
    trainer = make_trainer(tmp_path, pool, validation, torch.float32, model=copy.deepcopy(model))
    coverage = compute_similarity_coverage(trainer, "embedding", top_k=2, encoder=encoder)
    texts = [[row["prompt"] + row["completion"] for row in part] for part in (pool, validation)]
    rows, tests = (torch.tensor(encoder.encode(part)) for part in texts)
    expected = [torch.cosine_similarity(test[None], rows).sort().values[-2:].mean() for test in tests]
    assert_same(coverage["coverage_top_k"], expected, 1e-4)


def test_aggregations_keep_what_they_promise() -> None:
    strength = np.random.default_rng(0).normal(size=(6, 40))
    found = measure_coverage(strength, 5)
    for query in range(6):
        for name, expected in naive_coverage(strength[query].tolist(), 5).items():
            assert found[name][query] == pytest.approx(expected)
    # A larger gradient of the test row changes all but the share.
    larger = measure_coverage(strength * 7, 5)
    np.testing.assert_allclose(larger["coverage_share"], found["coverage_share"])
    np.testing.assert_allclose(larger["coverage_sum"], 7 * found["coverage_sum"])
    # Another proponent never lowers the sum, and a row without gradient is covered by nothing.
    assert (measure_coverage(np.hstack([strength, np.ones((6, 1))]))["coverage_sum"] > found["coverage_sum"]).all()
    assert measure_coverage(np.zeros((2, 12)))["coverage_share"].tolist() == [0.5, 0.5]


def test_correlations_conclude_only_what_the_interval_says() -> None:
    generator = np.random.default_rng(0)
    loss = generator.normal(size=300)
    columns = {
        "loss": loss,
        "coverage_good": -loss + 0.5 * generator.normal(size=300),
        "coverage_bad": loss + 0.5 * generator.normal(size=300),
        "coverage_none": generator.normal(size=300),
        "coverage_flat": np.ones(300),
        "gain": [None, *range(299)],
    }
    coverage = Dataset.from_dict(columns)
    found = correlate_coverage(coverage)
    conclusions = {name: entry.conclusion for name, entry in found.items()}
    assert conclusions == {
        "coverage_good": "negative",
        "coverage_bad": "positive",
        "coverage_none": "none",
        "coverage_flat": "none",
    }
    assert found["coverage_flat"].estimate is None
    assert correlate_coverage(coverage, "gain")["coverage_good"].n == 299
    with pytest.raises(ValueError, match="9 test rows have a `loss`"):
        correlate_coverage(coverage.select(range(9)))
    with pytest.raises(ValueError, match="no column accuracy"):
        correlate_coverage(coverage, "accuracy")
    with pytest.raises(ValueError, match=r"no column coverage_\*"):
        correlate_coverage(coverage.select_columns(["loss"]))


def test_what_says_nothing_is_refused(tmp_path, pool, validation, model) -> None:
    both = concatenate_datasets([pool, validation.select([2])])
    trainer = make_trainer(tmp_path, both, {"mine": validation}, model=copy.deepcopy(model))
    for compute in (compute_coverage, compute_similarity_coverage):
        with pytest.raises(ValueError, match=r"1 of the 7 rows of the test set `mine` also stand in the pool .*\[2\]"):
            compute(trainer)
        with pytest.raises(ValueError, match="top_k=25 does not fit: 24 rows"):
            compute(trainer, top_k=25)
    with pytest.raises(ValueError, match="by='words' does not exist"):
        compute_similarity_coverage(trainer, "words")
    with pytest.raises(ValueError, match="not finite"):
        measure_coverage(np.array([[1.0, np.nan]]), 1)
    assert not list(tmp_path.rglob("*.safetensors"))
