"""Trainings by DeepSpeed's ZeRO-3 and all else by FSDP2, in the same two processes (see sharded_on_cpu.py)."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import load_from_disk
from helpers import assert_same
from recipe_runs import NUM_POOL, Inputs, launch, read_results, run_command, write_config
from safetensors.torch import load_file


TRAINING = (
    "model_name_or_path", "pool", "learning_rate", "activation_checkpointing", "lora_r", "lora_dropout",
    "lora_target_modules",
)  # fmt: skip
WATCHED = ("tests/sharded_on_cpu.py", "tests/watch_zero.py")
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed: DS_ACCELERATOR=cpu pip install deepspeed"
)


def read_notes(tmp_path: Path, rank: int) -> list[tuple[str, dict[str, Any]]]:
    return json.loads((tmp_path / f"notes.{rank}.json").read_text(encoding="utf-8"))


@needs_deepspeed
@pytest.mark.slow
def test_from_the_reference_to_the_targets(inputs: Inputs, tmp_path: Path) -> None:
    """The scores, coresets and losses of one process with whole models, and no copy of the base too many."""
    settings = {
        "arms": ["full", "random", "coreset"], "budgets": ["steps"], "max_steps": 6, "strategy": "round_robin_rows",
        "gradient_accumulation_steps": 2, "activation_checkpointing": True,
        "fractions": [16 / NUM_POOL],  # no batch is filled up for one process of two
    }  # fmt: skip
    config = inputs[1] | settings | {"output_dir": str(tmp_path / "zero" / "run"), "per_device_train_batch_size": 2}
    (tmp_path / "zero").mkdir()
    command = ("recipes/in2core.py", "--config", write_config(tmp_path / "zero", config))
    launch(*WATCHED, str(tmp_path / "notes"), *command, processes=2, config="zero3.yaml")
    for rank in (0, 1):
        notes = read_notes(tmp_path, rank)
        steps = [found for what, found in notes if what == "step"]
        assert len(steps) == 4 * 6  # of the reference and three arms
        for found in steps:
            assert found["processes"] == 2 and found["held"] == found["elements"] / 2 > found["trained"] > 0
            assert found["sharded_by_fsdp"] == 0
        # The reference's checks, influence, the pool's losses, the base's and each arm's: what has trained is gone.
        living = [found["bytes"] for what, found in notes if what == "shard"]
        assert len(living) == 4 + 3 and max(living) < 1.01 * living[0]
    # Trained by one process with whole models, and scored by it through the very adapter.
    runs = {"zero": tmp_path / "zero" / "run"}
    for name, given in {"alone": None, "scored": str(runs["zero"] / "reference")}.items():
        runs[name] = tmp_path / name / "run"
        runs[name].parent.mkdir()
        own = {"output_dir": str(runs[name]), "per_device_train_batch_size": 4, "reference_adapter": given}
        run_command("run", "--config", write_config(tmp_path / name, config | own))
    scores = {name: load_from_disk(str(run / "scored"))["influence"][:] for name, run in runs.items()}
    assert_same(scores["zero"], scores["scored"], 1e-4)
    assert_same(scores["zero"], scores["alone"], 1e-3)
    coresets = {name: load_from_disk(str(next((run / "coresets").iterdir())))["id"][:] for name, run in runs.items()}
    assert coresets["zero"] == coresets["scored"] == coresets["alone"]
    zero, alone = read_results(tmp_path / "zero"), read_results(tmp_path / "alone")
    assert zero["machine"]["processes"] == 2
    assert zero["base"]["test_loss"] == pytest.approx(alone["base"]["test_loss"], rel=1e-5)
    for arm, expected in zip(zero["arms"], alone["arms"], strict=True):
        assert arm["test_loss"] == pytest.approx(expected["test_loss"], rel=1e-4)
        assert arm["test_loss"] < 0.99 * zero["base"]["test_loss"]  # it has learnt


@needs_deepspeed
@pytest.mark.slow
def test_a_process_that_ends_stops_the_other_and_the_training_goes_on(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"max_steps": 7, "save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 4}
    config = {name: inputs[1][name] for name in TRAINING} | settings | {"output_dir": str(tmp_path / "zero")}
    # The training's own precision holds, whatever the launcher's is.
    command: tuple[str, ...] = ("--mixed_precision", "bf16", *WATCHED, str(tmp_path / "notes"))
    command = (*command, "recipes/train_reference.py", "--config", write_config(tmp_path, config))
    monkeypatch.setenv("STOP_AT", "5")
    stopped = launch(*command, processes=2, config="zero3.yaml", check=False)
    assert stopped.returncode != 0 and "exitcode  : 9" in stopped.stderr
    assert not (tmp_path / "zero" / "training.json").exists()
    monkeypatch.delenv("STOP_AT")
    launch(*command, processes=2, config="zero3.yaml")
    for rank in (0, 1):
        assert [what for what, _ in read_notes(tmp_path, rank)] == ["step"] * (7 - 3)  # from the checkpoint on
    run_command(
        "train_reference",
        "--config",
        write_config(tmp_path, config | {"output_dir": str(tmp_path / "alone"), "per_device_train_batch_size": 8}),
    )
    zero, alone = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("zero", "alone"))
    assert zero.keys() == alone.keys()
    for name, tensor in alone.items():
        assert_same(zero[name], tensor, 1e-3)
    assert {path.name for path in (tmp_path / "zero").iterdir()} == {
        path.name for path in (tmp_path / "alone").iterdir()
    }
