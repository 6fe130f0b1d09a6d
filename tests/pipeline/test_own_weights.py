"""`in2core run --no_use_peft`: the models' own weights are trained, from the reference to the targets."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import load_from_disk
from helpers import assert_same, prepare
from naive import compute_datainf, compute_gradients
from recipe_runs import Inputs, compute_naive_loss, make_rows, read_results, run_command, write_config
from transformers import AutoModelForCausalLM


def make_settings(inputs: Inputs, folder: Path, **changes: Any) -> str:
    config = {name: value for name, value in inputs[1].items() if not name.startswith("lora_")}
    config |= {"output_dir": str(folder / "run"), "use_peft": False, "budgets": ["steps"], "arms": ["coreset"]}
    return write_config(folder, config | {"learning_rate": 1e-3, "task_column": None, "wrong_column": None} | changes)


def test_reference_and_targets_are_trained_whole(inputs: Inputs, tmp_path: Path) -> None:
    run_command("run", "--config", make_settings(inputs, tmp_path))
    run = tmp_path / "run"
    scored = load_from_disk(str(run / "scored"))
    # What stands in the folders are models, and the scores are those of the reference's.
    reference = AutoModelForCausalLM.from_pretrained(run / "reference").double()
    validation = make_rows("reverse", 8, seed=3)
    gradients = [compute_gradients(reference, prepare(rows)) for rows in (scored, type(scored).from_list(validation))]
    assert_same(scored["influence"], compute_datainf(*gradients), 1e-3)
    (arm,) = read_results(tmp_path)["arms"]
    model = AutoModelForCausalLM.from_pretrained(run / "arms" / "coreset_25-steps-seed0").double()
    loss, _ = compute_naive_loss(model, inputs[0], make_rows("reverse", 11, seed=4))
    assert arm["test_loss"] == pytest.approx(loss, rel=1e-4)
    base = AutoModelForCausalLM.from_pretrained(inputs[0] / "model")
    trained = dict(model.named_parameters())
    assert all(not np.allclose(t.detach().numpy(), trained[n].detach().numpy()) for n, t in base.named_parameters())


def test_what_only_adapters_have_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reference_checkpoints=2.*use_peft=False"):
        run_command("run", "--config", make_settings(inputs, tmp_path, reference_checkpoints=2))
    flags = ["--model_name_or_path", "m", "--dataset_name", "d.jsonl", "--output_dir", str(tmp_path / "sft")]
    with pytest.raises(ValueError, match="use_peft=False.*trl sft"):
        run_command("sft", *flags, "--no_use_peft", "--use_cpu", "true", "--bf16", "false")
    assert not (tmp_path / "run" / "reference").exists()
