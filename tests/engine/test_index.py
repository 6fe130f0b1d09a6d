"""Gradients kept for other validation sets: the scores of runs without an index, and no row of the pool in a model."""

import json
import random
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    add_trained_adapter,
    assert_same,
    launch_worker,
    make_config,
    make_model,
    make_tokens,
    prepare,
)
from indexed_runs import CHECKED, OTHER, POOL, PoolRows, list_index, make
from killed_runs import build, kill_after_progress
from naive import compute_datainf, compute_gradients
from scipy.stats import spearmanr

from hf_in2core.engine.encoding import GROUP, count_bytes, decode, encode
from hf_in2core.influence.cosines import compute_cosines
from hf_in2core.influence.plan import plan_influence


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """An index of the pool, made by a run on a validation set of its own; nobody writes into it."""
    folder = tmp_path_factory.mktemp("index")
    make(folder / "first", folder / "index", make_tokens(5, seed=1)).score_influence()
    return folder / "index"


def compare(tmp_path, filled, per_example=False, tolerance=1e-9, **options) -> PoolRows:
    """A run from the index against the same one without, on another validation set; the pool's rows that it passed."""
    without = make(tmp_path / "without", **options)
    indexed = make(tmp_path / "with", filled, **options)
    before = [path.stat().st_mtime_ns for path in list_index(filled)]
    rows = PoolRows(indexed)
    for trainer in (without, indexed):
        trainer.fit_influence(per_example)
    expected, found = without.score_influence(), indexed.score_influence()
    assert len({tuple(row["input_ids"]) for row in indexed.prepared_pool}) == len(POOL)
    assert_same(found["influence"], expected["influence"], tolerance)
    if per_example:
        assert_same(found["influence_per_query"], expected["influence_per_query"], tolerance)
    # What was whole is left alone.
    assert not before or [path.stat().st_mtime_ns for path in list_index(filled)] == before
    return rows


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"per_example": True, "query_memory_gb": 5e-4},
        {"estimator": "gradient_dot"},
        {"estimator": "gradient_cosine"},
        {"damping_scale": 10.0, "chunk_size": 9, "seed": 3},
        {"fit_examples": 9},
    ],
    ids=["mean", "per example", "dot", "cosine", "other settings", "a sample"],
)
def test_another_validation_set_is_scored_without_the_pool(tmp_path, filled, options) -> None:
    rows = compare(tmp_path, filled, **options)
    assert rows.passed <= 2 * CHECKED and len(rows.seen) <= CHECKED


def test_from_an_index_influence_is_that_of_a_loop(tmp_path, filled) -> None:
    trainer = make(tmp_path, filled)
    scored = trainer.score_influence()["influence"]
    train, held_out = (compute_gradients(trainer.model, prepare(rows)) for rows in (POOL, OTHER))
    assert_same(scored, compute_datainf(train, held_out), 1e-6)


def test_the_first_run_has_the_scores_of_later_ones(tmp_path) -> None:
    rows = compare(tmp_path, tmp_path / "new", dtype=torch.float32, tolerance=1e-5)
    assert len(rows.seen) == len(POOL)
    first = make(tmp_path / "with", tmp_path / "new", dtype=torch.float32).score_influence()
    again = make(tmp_path / "again", tmp_path / "new", dtype=torch.float32).score_influence()
    assert again["influence"] == first["influence"]


def test_cosines_of_single_rows_come_from_the_index(tmp_path, filled) -> None:
    without, indexed = make(tmp_path / "without"), make(tmp_path / "with", filled)
    rows = PoolRows(indexed)
    expected, found = (compute_cosines(trainer, "").per_query for trainer in (without, indexed))
    assert len(rows.seen) <= CHECKED
    assert_same(found, expected, 1e-9)


def test_rows_without_loss_are_null(tmp_path) -> None:
    tokens = {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}
    rows = [
        tokens,
        {**tokens, "labels": [5, -100, -100, -100]},
        {"input_ids": [9, 8, 7, 6], "labels": [-100, -100, 7, 6]},
    ]
    pool = type(POOL).from_list(rows)
    expected = make(tmp_path / "without", pool=pool, validation=pool).score_influence()["influence"]
    found = make(tmp_path / "with", tmp_path / "index", pool=pool, validation=pool).score_influence()["influence"]
    assert found[1] is None and expected[1] is None
    assert_same(found[::2], expected[::2], 1e-9)


@pytest.mark.parametrize("bytes_each", [2.1, 1.1], ids=["bfloat16", "int8"])
def test_what_does_not_fit_in_full_is_rounded_and_the_error_told(tmp_path, bytes_each) -> None:
    expected = np.array(make(tmp_path / "without", dtype=torch.float32).score_influence()["influence"])
    trainer = make(tmp_path / "with", dtype=torch.float32)
    elements = sum(block.tensor.numel() for block in trainer.blocks.values())
    budget = bytes_each * elements * len(POOL) / 1e9
    trainer = make(tmp_path / "with", tmp_path / "index", dtype=torch.float32, budget=budget)
    found = np.array(trainer.score_influence()["influence"])
    size = sum(path.stat().st_size for path in list_index(tmp_path))
    assert (bytes_each - 1) * elements * len(POOL) < size
    # Its header beside the budget: blocks of a few elements have a scale each too.
    assert size < budget * 1e9 + 64_000
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    config = trainer.fit_influence().config
    told = config.store_error
    assert 0 < told < 0.02 and 0 < error < 4 * told
    assert spearmanr(found, expected).statistic > 0.999 and 0.99 < config.store_agreement <= 1
    # The same from the index, and told again where the fit is read back.
    again = make(tmp_path / "again", tmp_path / "index", dtype=torch.float32, budget=budget)
    assert again.score_influence()["influence"] == found.tolist()
    assert again.fit_influence().config.store_error == told
    scorer = json.loads((save(again, tmp_path) / "config.json").read_text())
    assert scorer["store_error"] == told
    # And not of a run in full precision, whose state lies beside it.
    assert_same(make(tmp_path / "with", dtype=torch.float32).score_influence()["influence"], expected, 1e-5)


def save(trainer, folder):
    trainer.fit_influence().save_pretrained(folder / "scorer")
    return folder / "scorer"


def test_a_whole_index_tells_no_error(tmp_path, filled) -> None:
    trainer = make(tmp_path, filled)
    assert trainer.fit_influence().config.store_error is None
    assert "store_error" not in json.loads((save(trainer, tmp_path) / "config.json").read_text())


@pytest.mark.parametrize("num_elements", [1, GROUP, 3 * GROUP + 5])
def test_8_bits_are_off_by_half_a_step(num_elements) -> None:
    generator = torch.Generator().manual_seed(num_elements)
    gradients = torch.randn(4, num_elements, generator=generator) * torch.tensor([[1e-12], [1.0], [0.0], [1e20]])
    data = encode(gradients, torch.int8)
    assert data.shape == (4, count_bytes(num_elements, torch.int8))
    found = decode(data, num_elements, torch.int8)
    for start in range(0, num_elements, GROUP):
        group = slice(start, start + GROUP)
        largest = gradients[:, group].abs().amax(1, keepdim=True)
        # Half of a step, and float32's own rounding.
        assert ((found - gradients)[:, group].abs() <= largest * (0.5 / 127 + 1e-6)).all()
        assert torch.equal(found[2], gradients[2])


@pytest.mark.parametrize("damage", ["content", "truncated", "foreign", "missing", "note"])
def test_a_damaged_file_is_named_and_made_again(tmp_path, filled, caplog, damage) -> None:
    shutil.copytree(filled, tmp_path / "index")
    path = list_index(tmp_path / "index")[2]
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[:-9])
    elif damage == "foreign":
        path.write_bytes(content.replace(b'"fingerprint": "', b'"fingerprint":"x'))
    elif damage == "note":
        path.write_bytes(content.replace(b'"error": "         nan"', b'"error": " 1.00000e-9"'))
    else:
        path.write_bytes(content[:-2000] + bytes([content[-2000] ^ 1]) + content[-1999:])
    assert damage == "missing" or path.read_bytes() != content
    expected = make(tmp_path / "without").score_influence()["influence"]
    trainer = make(tmp_path / "with", tmp_path / "index")
    rows = PoolRows(trainer)
    assert_same(trainer.score_influence()["influence"], expected, 1e-9)
    assert damage == "missing" or path.name in caplog.text
    assert 7 <= len(rows.seen) <= 7 + CHECKED  # its chunk, and the rows of the checks
    caplog.clear()
    make(tmp_path / "again", tmp_path / "index").fit_influence()
    assert path.name not in caplog.text and len(list_index(tmp_path / "index")) == len(list_index(filled))


@pytest.mark.parametrize("other", ["pool", "adapter", "base", "loss"])
def test_an_index_of_something_else_is_named_and_not_used(tmp_path, filled, caplog, other) -> None:
    shutil.copytree(filled, tmp_path / "index")
    options: dict[str, Any] = {"model": add_trained_adapter(make_model())}
    if other == "pool":
        options["pool"] = POOL.select(range(39))
    elif other == "adapter":
        options["model"] = add_trained_adapter(make_model(), seed=2)
    elif other == "base":
        options["model"] = add_trained_adapter(make_model(seed=5))
    else:
        options["loss_reduction"] = "sum"
    expected = make(tmp_path / "without", **options).score_influence()["influence"]
    trainer = make(tmp_path / "with", tmp_path / "index", **options)
    rows = PoolRows(trainer)
    assert_same(trainer.score_influence()["influence"], expected, 1e-9)
    assert len(rows.seen) == len(trainer.prepared_pool)
    word = {"pool": "pool", "adapter": "adapter", "base": "base model", "loss": "loss reduction"}[other]
    assert f"another {word}" in caplog.text and len(list((tmp_path / "index").iterdir())) == 2


def test_a_base_whose_hash_does_not_move_is_refused(tmp_path) -> None:
    # Large enough that the hash takes one value of several.
    model = add_trained_adapter(make_model(hidden_size=128, num_layers=1))
    make(tmp_path / "first", tmp_path / "index", model=model, pool=POOL.select(range(8))).fit_influence()
    weight = model.get_base_model().model.layers[0].mlp.down_proj.base_layer.weight
    assert weight.numel() > 2048
    with torch.no_grad():
        weight.flatten()[1::2] += 0.5
    trainer = make(tmp_path / "second", tmp_path / "index", model=model, pool=POOL.select(range(8)))
    with pytest.raises(ValueError, match=r"index in .* does not fit the model.*remove this folder"):
        trainer.fit_influence()


def test_settings_that_cannot_be_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="gradient_store_gb=0.*GB"):
        make_config(tmp_path, gradient_store_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"gradient_store_gb=1e-05.*8 bits"):
        make(tmp_path, tmp_path / "index", budget=1e-5)
    assert not (tmp_path / "index").exists()


def test_a_full_disk_is_noticed_before_the_passes(tmp_path, monkeypatch) -> None:
    trainer = make(tmp_path, tmp_path / "index")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(ValueError, match="gradient_store_dir"):
        trainer.fit_influence()


def test_the_plan_names_the_index(tmp_path, filled) -> None:
    new, known = (
        plan_influence(make(tmp_path / name, index), timed_batches=1)
        for name, index in (("new", tmp_path / "index"), ("known", filled))
    )
    assert [part.name for part in new.passes] == ["validation", "index"]
    assert new.passes[1].rows == len(POOL) and known.passes[1].rows == 0
    size = sum(path.stat().st_size for path in list_index(filled))
    assert known.store <= size < 1.1 * known.store
    assert f"40 of 40 rows are in {filled}" in str(known)
    assert not (tmp_path / "index").exists()


@pytest.mark.slow
def test_killed_runs_leave_an_index_that_is_gone_on_with(tmp_path) -> None:
    options: dict[str, Any] = {"gradient_store_gb": 1.0}
    expected = build(tmp_path / "whole", **options, gradient_store_dir=str(tmp_path / "whole-index")).score_influence()
    options["gradient_store_dir"] = str(tmp_path / "killed" / "index")
    generator = random.Random(5)
    for _ in range(12):
        kill_after_progress(tmp_path / "killed", generator, **options)
    assert list_index(tmp_path / "killed")
    assert build(tmp_path / "killed", **options).score_influence()["influence"] == expected["influence"]
    assert not list((tmp_path / "killed" / "index").rglob(".*.tmp"))


@pytest.mark.slow
def test_other_numbers_of_processes_read_the_same_index(tmp_path) -> None:
    options: dict[str, Any] = {"num_rows": 35, "chunk_size": 4, "dtype": "float64"}
    expected = launch_worker("influence_worker.py", tmp_path, "without", 1, **options)[0]["influence"]
    options |= {"gradient_store_gb": 1, "gradient_store_dir": str(tmp_path / "index")}
    files = []
    for name, count in (("two", 2), ("one", 1), ("three", 3)):
        found = launch_worker("influence_worker.py", tmp_path, name, count, **options)
        files.append([(path, path.stat().st_mtime_ns) for path in list_index(tmp_path / "index")])
        for process in found:
            assert_same([*map(float.fromhex, process["influence"])], [*map(float.fromhex, expected)], 1e-9)
    assert files[0] == files[1] == files[2]  # the first wrote all of them, and nobody another
