"""The plan before the work: its counts are those of the data, its disk that of the run, and it writes nothing."""

import re

import numpy as np
import pytest
import torch
from helpers import add_trained_adapter, make_prompt_completion, make_tokenizer, make_trainer, prepare
from recipe_runs import NUM_POOL, NUM_TEST, NUM_VALIDATION, make_inputs, make_rows, run_command, write_config
from transformers import AutoModelForCausalLM

from hf_in2core.engine.fit import PILOT_ROWS
from hf_in2core.engine.validation import run_per_example_validation_pass
from hf_in2core.influence.plan import plan_influence


OPTIONS = {"tokens_per_batch": 60, "chunk_size": 8}


def list_files(folder) -> list:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_counts_are_those_of_the_data(tmp_path, pool, validation) -> None:
    trainer = make_trainer(tmp_path, pool, {"a": validation, "b": validation}, torch.float32, **OPTIONS)
    plan = plan_influence(trainer, timed_batches=2)
    lengths = np.array([len(row["input_ids"]) for row in prepare(pool)])
    assert (plan.rows, plan.tokens) == (23, lengths.sum())
    assert plan.loss_tokens == sum(token != -100 for row in prepare(pool) for token in row["labels"][1:])
    for low, high, rows in plan.length_histogram:
        assert rows == ((lengths >= low) & (lengths <= high)).sum()
    assert sum(rows for *_, rows in plan.length_histogram) == 23
    assert [item.name for item in plan.passes] == ["validation", "validation", "fit", "score"]
    assert [item.rows for item in plan.passes] == [7, 7, 23 + PILOT_ROWS, 23]
    assert all(item.seconds > 0 and item.tokens >= item.rows for item in plan.passes)
    assert plan.passes[-1].tokens >= plan.tokens  # padding comes on top
    assert plan.reduced == 0
    assert list_files(tmp_path) == []
    assert "23 rows" in str(plan)


@pytest.mark.parametrize("per_example", [False, True])
def test_the_disk_is_that_of_the_run(tmp_path, validation, per_example) -> None:
    trainer = make_trainer(tmp_path, make_prompt_completion(60, seed=0), validation, torch.float32, **OPTIONS)
    plan = plan_influence(trainer, per_example, timed_batches=1)
    trainer.fit_influence(per_example)
    trainer.score_influence()
    used = sum(path.stat().st_size for path in (tmp_path / "influence").rglob("*.safetensors"))
    headers = 16_000  # names of tensors, on this tiny model a good part
    assert plan.disk <= used <= plan.disk + headers * (len(list_files(tmp_path)) + 1)
    assert used < 1.5 * plan.disk


def test_every_block_of_queries_is_a_pass(tmp_path, pool, validation) -> None:
    trainer = make_trainer(tmp_path, pool, validation, torch.float32, query_memory_gb=5e-4, **OPTIONS)
    at_once = trainer.count_queries_per_block(trainer.blocks)
    assert 1 < at_once < len(validation)
    blocks = -(-len(validation) // at_once)
    names = [item.name for item in plan_influence(trainer, per_example=True, timed_batches=1).passes]
    assert names == ["validation", *["fit"] * blocks, *["score"] * blocks]


@pytest.mark.parametrize("options", [{}, {"estimator": "gradient_dot"}, {"estimator": "gradient_cosine"}])
def test_the_checks_that_cost_passes_are_counted(tmp_path, monkeypatch, options) -> None:
    """As many rows as the run will pass for them alone."""
    monkeypatch.setattr("hf_in2core.influence.quality.MAX_CHECKED_SHARE", 0.5)
    pool, sets = make_prompt_completion(80, seed=0), {"a": make_prompt_completion(12, seed=1)}
    sets["b"] = make_prompt_completion(9, seed=2)  # too few to be halved
    trainer = make_trainer(tmp_path, pool, sets, torch.float32, **options, **OPTIONS)
    plan = plan_influence(trainer, timed_batches=1)
    passed = []

    def count(passes, rows, text):
        passed.append(len(rows))
        return run_per_example_validation_pass(passes, rows, text)

    for module in ("curvature", "halves"):
        monkeypatch.setattr(f"hf_in2core.engine.{module}.run_per_example_validation_pass", count)
    trainer.fit_influence()
    planned = [item for item in plan.passes if item.name == "checks"]
    assert [item.rows for item in planned] == ([sum(passed)] if passed else [])
    assert sum(passed) == {"gradient_dot": 40 + 12, "gradient_cosine": 0}.get(trainer.args.estimator, 12)
    assert all(item.seconds > 0 for item in planned) and plan.passes[-1].name == "score"


def test_batches_and_blocks_of_queries_are_told(tmp_path, pool, validation) -> None:
    trainer = make_trainer(tmp_path, pool, validation, torch.float32, query_memory_gb=5e-4)
    plan = plan_influence(trainer, per_example=True, timed_batches=1)
    assert plan.tokens_per_batch == trainer.make_passes(trainer.blocks, "").tokens_per_batch > 0
    assert plan.queries_per_block == trainer.count_queries_per_block(trainer.blocks)
    told = f"Batches: up to {plan.tokens_per_batch:,} tokens, padding included; {plan.queries_per_block} queries"
    assert told in str(plan)
    plan = plan_influence(trainer, timed_batches=1)
    assert plan.queries_per_block == 0 and "queries at a time" not in str(plan)


def test_a_plan_leaves_the_model_as_it_was(tmp_path, pool, validation) -> None:
    trainer = make_trainer(tmp_path / "a", pool, validation, torch.float32)
    expected = make_trainer(tmp_path / "b", pool, validation, torch.float32).score_influence()["influence"]
    plan_influence(trainer, timed_batches=1)
    assert trainer.score_influence()["influence"] == expected


def test_dry_runs_print_the_plan_and_write_nothing(tmp_path, capsys) -> None:
    config = make_inputs(tmp_path)
    config_path = write_config(tmp_path, config)
    model = AutoModelForCausalLM.from_pretrained(config["model_name_or_path"])
    add_trained_adapter(model).save_pretrained(tmp_path / "adapter")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    tokenizer = make_tokenizer()
    shared = [f"--{name}={config[name]}" for name in ("model_name_or_path", "pool", "output_dir")]
    shared += ["--validation", *config["validation"], "--reference_adapter", str(tmp_path / "adapter"), "--dry_run"]
    for recipe, flags in (("score", shared), ("run", ["--config", config_path, "--dry_run"])):
        run_command(recipe, *flags)
        printed = capsys.readouterr().out
        assert f"Pool: {NUM_POOL} rows" in printed
        tokens = sum(
            len(tokenizer(row["completion"]).input_ids) + 1 for row in make_rows("reverse", NUM_VALIDATION, 3)
        )
        assert f"Validation set validation: {NUM_VALIDATION} rows, {tokens} tokens with loss." in printed
        assert "Peak memory" in printed and "Disk" in printed
    assert "Targets" in printed and f"Test set: {NUM_TEST} rows, " in printed
    every = ["--arms", "full", "coreset", "rds", "cosine", "--reference_fraction", "0.5", "--strategy", "auto"]
    every += ["--auto_budget", "20", "--analyses", "layers", "coverage", "calibration"]
    run_command("run", "--config", config_path, "--dry_run", *every)
    printed = capsys.readouterr().out
    for part in ("reference", "influence", "columns of methods", "analyses", "tournament", "targets"):
        assert re.search(rf"Altogether: .*[(, ]{part} \d+ s", printed), printed
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
