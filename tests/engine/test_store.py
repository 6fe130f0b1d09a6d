"""Gradients kept on disk: the numbers of the passes that run the model, whole chunks only, and nothing left behind."""

import copy
import json
import random
import shutil

import numpy as np
import pytest
import torch
from helpers import add_trained_adapter, assert_same, make_config, make_model, make_tokens, make_trainer
from killed_runs import build, count_batches, kill_after_progress, start_two_processes

from hf_in2core.influence.plan import plan_influence


def find_stored(folder) -> list:
    return sorted(folder.rglob("gradients-*.safetensors"))


def make_pair(tmp_path, pool, validation, dtype=torch.float32, budget=1.0, **options):
    """The same run without a store and with one."""
    model = add_trained_adapter(make_model(), target_modules=["q_proj", "down_proj"])
    return [
        make_trainer(
            tmp_path / name, pool, validation, dtype, copy.deepcopy(model), gradient_store_gb=budget_, **options
        )
        for name, budget_ in (("plain", 0.0), ("stored", budget))
    ]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_stored_gradients_change_nothing(tmp_path, pool, validation, monkeypatch, dtype, tolerance) -> None:
    plain, stored = make_pair(tmp_path, pool, validation, dtype, chunk_size=5, tokens_per_batch=90)
    expected = plain.score_influence()["influence"]
    stored.fit_influence()
    assert len(find_stored(tmp_path / "stored")) == 5
    counted = count_batches(monkeypatch)
    assert_same(stored.score_influence()["influence"], expected, tolerance)
    assert counted == []  # the score pass never ran the model
    assert find_stored(tmp_path) == []


def test_rows_without_loss_are_null_with_a_store(tmp_path, validation) -> None:
    tokens = {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}
    others = {"input_ids": [9, 8, 7, 6], "labels": [-100, -100, 7, 6]}
    rows = [tokens, {**tokens, "labels": [5, -100, -100, -100]}, others]
    pool = type(validation).from_list(rows)
    plain, stored = (trainer.score_influence() for trainer in make_pair(tmp_path, pool, pool))
    assert stored["influence"][1] is None and plain["influence"][1] is None
    assert_same(stored["influence"][::2], plain["influence"][::2], 1e-5)


def test_bfloat16_where_float32_does_not_fit(tmp_path, pool, validation) -> None:
    plain, stored = make_pair(tmp_path, pool, validation)
    row_bytes = stored.make_passes(stored.blocks, "").store.row_bytes
    stored.args.gradient_store_gb = 0.7 * row_bytes * len(pool) / 1e9
    expected = np.array(plain.score_influence()["influence"])
    stored.fit_influence()
    size = sum(path.stat().st_size for path in find_stored(tmp_path))
    assert row_bytes * len(pool) / 2 < size < 0.7 * row_bytes * len(pool)
    actual = np.array(stored.score_influence()["influence"])
    # Rounding to 8 bits is 2^-9 at most for an element; over thousands of them it averages out.
    assert 0 < np.linalg.norm(actual - expected) < 2**-9 * np.linalg.norm(expected)
    stored.args.gradient_store_gb = 1.0
    assert_same(stored.score_influence()["influence"], expected, 1e-5)  # not the scores of the coarser store


def test_later_query_blocks_read_the_store(tmp_path, pool, validation, monkeypatch) -> None:
    plain, stored = make_pair(tmp_path, pool, validation, query_memory_gb=1.6e-4)
    plain.fit_influence(per_example=True)
    expected = plain.score_influence()["influence_per_query"]
    counted = count_batches(monkeypatch)
    stored.fit_influence(per_example=True)
    at_once = stored.count_queries_per_block(stored.blocks)
    assert 1 < at_once < len(validation)
    # The pool ran through the model once; every block has its queries and its pilot beside it.
    assert counted.count(len(pool)) == 1
    assert_same(stored.score_influence()["influence_per_query"], expected, 1e-5)
    assert counted.count(len(pool)) == 1


@pytest.mark.parametrize("damage", ["truncated", "foreign", "missing"])
def test_a_damaged_chunk_is_named_and_computed_again(tmp_path, pool, validation, caplog, damage) -> None:
    plain, stored = make_pair(tmp_path, pool, validation, chunk_size=5)
    expected = plain.score_influence()["influence"]
    stored.fit_influence()
    path = find_stored(tmp_path)[2]
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(
            content[:-9] if damage == "truncated" else content.replace(b'"fingerprint": "', b'"fingerprint":"x')
        )
    assert_same(stored.score_influence()["influence"], expected, 1e-5)
    assert damage == "missing" or path.name in caplog.text


def test_a_store_that_cannot_be_is_off_with_a_warning(tmp_path, pool, validation, caplog) -> None:
    for name, options in (("sample", {"fit_examples": 9}), ("small", {"budget": 1e-5})):
        plain, stored = make_pair(tmp_path / name, pool, validation, **options)
        caplog.clear()
        scored = stored.score_influence()
        assert "No gradients are stored" in caplog.text
        assert scored["influence"] == plain.score_influence()["influence"]


def test_a_full_disk_is_noticed_before_the_passes(tmp_path, pool, validation, monkeypatch) -> None:
    _, stored = make_pair(tmp_path, pool, validation)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(ValueError, match="gradient_store_gb=0"):
        stored.fit_influence()


def test_a_store_without_a_fit_pass_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="estimator='datainf'"):
        make_config(tmp_path, gradient_store_gb=1.0, estimator="gradient_dot")


@pytest.mark.slow
def test_killed_runs_with_a_store_end_with_the_same_bits(tmp_path) -> None:
    expected = build(tmp_path / "whole", gradient_store_gb=1.0).score_influence()
    generator = random.Random(5)
    for _ in range(20):
        kill_after_progress(tmp_path / "killed", generator, gradient_store_gb=1.0)
    assert build(tmp_path / "killed", gradient_store_gb=1.0).score_influence()["influence"] == expected["influence"]
    assert find_stored(tmp_path) == []


@pytest.mark.slow
def test_two_processes_with_a_store(tmp_path) -> None:
    expected = build(tmp_path / "one").score_influence()["influence"]
    for process in start_two_processes(tmp_path / "two", gradient_store_gb=1.0):
        process.join()
        assert process.exitcode == 0
    values = [float.fromhex(value) for value in json.loads((tmp_path / "two" / "1.json").read_text())]
    assert_same(values, expected, 1e-5)
    assert find_stored(tmp_path) == []


def test_the_plan_names_the_store(tmp_path, pool, validation) -> None:
    _, stored = make_pair(tmp_path, make_tokens(30, seed=0), validation)
    plan = plan_influence(stored, timed_batches=1)
    stored.fit_influence()
    size = sum(path.stat().st_size for path in find_stored(tmp_path))
    assert plan.store <= size < 1.1 * plan.store
