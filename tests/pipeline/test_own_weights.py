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
    card = (run / "arms" / "coreset_25-steps-seed0" / "README.md").read_text(encoding="utf-8")
    assert "library_name: transformers" in card and "fine-tuned on 15 rows" in card
    # What the run says to train next trains the arm again.
    flags = ["--config", str(run / "sft.yaml"), "--dataset_name", str(run / "coresets" / "coreset_25")]
    steps = read_results(tmp_path)["base"]["steps"]
    run_command("sft", *flags, "--max_steps", str(steps), "--output_dir", str(tmp_path / "target"))
    again = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "target").double().named_parameters())
    assert all(np.allclose(again[name].detach(), tensor.detach()) for name, tensor in trained.items())


def test_what_only_adapters_have_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reference_checkpoints=2.*use_peft=False"):
        run_command("run", "--config", make_settings(inputs, tmp_path, reference_checkpoints=2))
    assert not (tmp_path / "run" / "reference").exists()
