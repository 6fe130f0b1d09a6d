"""What a run says at its end: which rows to train on, and commands that do what they say."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import ROOT
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from recipe_runs import read_results, run_command, write_config
from safetensors.torch import load_file

from hf_in2core.evaluation.judge import judge
from hf_in2core.evaluation.verdict import Verdict
from hf_in2core.pipeline.next_steps import change_run, recommend, write_sft_settings
from hf_in2core.pipeline.parser import make_run_parser
from hf_in2core.pipeline.run_folder import find_command


# A full pool, random rows and opponents of these mean losses; the seeds differ by noise that is the same in all arms.
UNTRAINED, NOISE = 4.0, (0.0, 0.01, 0.02)


def make_verdict(
    arms: dict[str, float],
    base_loss: float | None = UNTRAINED,
    seeds: int = 3,
    epochs: dict[str, float] | None = None,
) -> Verdict:
    entries = [
        {
            "arm": arm, "fraction": 1.0 if arm == "full" else 0.25, "seed": seed, "budget": budget,
            "test_loss": loss + NOISE[seed] + 0.001 * (seed * len(arm) % 3), "seconds": 1.0,
        }
        for budget, losses in (("steps", arms), ("epochs", epochs or {}))
        for arm, loss in losses.items()
        for seed in range(seeds)
    ]  # fmt: skip
    return judge(entries, {"seconds": 1.0, "reference_seconds": 1.0}, base_loss=base_loss)


@pytest.mark.parametrize(
    "arms, rows, budget, reason",
    [
        ({"coreset": 1.0, "random": 1.5, "full": 1.2}, "coreset", "steps", "worth it at equal steps"),
        ({"coreset": 1.0, "random": 1.5}, "coreset", "steps", "not compared with the full pool"),
        ({"coreset": 1.0, "random": 1.5, "full": 0.5}, "full", "", "the coreset was worse than it"),
        ({"coreset": 1.0, "random": 1.0, "full": 1.5}, "random", "steps", "not shown to beat"),
        ({"coreset": 1.0, "random": 0.8, "full": 1.5}, "random", "steps", "beat the coreset"),
        ({"coreset": 1.0, "random": 0.8, "full": 0.5}, "full", "", "the coreset was worse than it"),
        ({"coreset": 1.0, "random": 1.0}, "full", "", "not shown to be worth it"),
        ({"coreset": 1.0, "random": 1.5, "full": 1.2, "opponents": 0.9}, "full", "", "not point the right way"),
        ({"full": 1.0, "random": 1.5}, "full", "", "no coreset"),
    ],
)
def test_the_coreset_is_recommended_only_where_it_is_worth_it(
    arms: dict[str, float], rows: str, budget: str, reason: str
) -> None:
    chosen = recommend(make_verdict(arms))
    assert (chosen.rows, chosen.budget, chosen.undecided) == (rows, budget, None)
    assert reason in chosen.reason


def test_a_win_at_one_budget_is_told_with_the_other() -> None:
    wins, loses = {"coreset": 1.0, "random": 1.5, "full": 1.2}, {"coreset": 1.0, "random": 0.8, "full": 0.5}
    assert "at equal steps, not at equal epochs" in recommend(make_verdict(wins, epochs=loses)).reason
    shorter = recommend(make_verdict(wins, epochs=wins))
    assert shorter.budget == "epochs" and "not at" not in shorter.reason


@pytest.mark.parametrize(
    "verdict, settings, flags",
    [
        ({"base_loss": 1.02}, {"learning_rate": 2e-4, "num_train_epochs": 2}, "--num_train_epochs 6"),
        ({"base_loss": 1.02}, {"learning_rate": 2e-4, "max_steps": 10}, "--max_steps 30"),
        ({"base_loss": 1.02}, {"learning_rate": 2e-6}, "--learning_rate 0.0002"),
        ({"base_loss": 0.5}, {"learning_rate": 1e-3}, "--learning_rate 0.0001"),
        ({"seeds": 1}, {"seeds": [4]}, "--seeds 4 5 6"),
        ({"arms": {"coreset": 0.99}}, {}, "--arms full coreset random opponents"),
    ],
)
def test_where_nothing_is_concluded_another_run_comes_first(
    verdict: dict[str, Any], settings: dict[str, Any], flags: str, tmp_path: Path
) -> None:
    chosen = recommend(make_verdict(**{"arms": {"coreset": 0.99, "random": 1.0, "full": 1.0}} | verdict))
    assert chosen.rows == "full" and chosen.undecided is not None
    given = {
        "model_name_or_path": "m",
        "pool": "p",
        "validation": ["v"],
        "test": "t",
        "arms": ["coreset", "opponents"],
    }
    config = write_config(tmp_path, given | {"output_dir": "runs/first"} | settings)
    said = " ".join(change_run(chosen.undecided, make_run_parser().parse(["--config", config])))
    assert said.startswith(flags)
    # What changes a result cannot go on in the same folder.
    assert ("--output_dir runs/first-again" in said) == (flags.split()[0] not in ("--seeds", "--arms"))


@pytest.mark.slow
def test_the_printed_command_trains_the_arm_again(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its settings alone a training in another process gives the very weights of the run's own arms."""
    monkeypatch.setenv("COLUMNS", "100000")
    shutil.copytree(finished / "run", tmp_path / "run", symlinks=True)
    run_command("run", "--config", str(finished / "settings.yaml"), "--output_dir", str(tmp_path / "run"))
    lines = capsys.readouterr().out.rstrip().splitlines()
    assert lines[-1] == f"Verdict: {read_results(tmp_path)['verdict']['text']}"
    labels = ["Recommended", "It lies in", "Run again", "Train on it", "Publish the run"]
    assert all(line.startswith(label) for line, label in zip(lines[-6:-1], labels, strict=True))
    assert "the whole pool, for now: this run concludes nothing" in lines[-6]
    said = {label: shlex.split(line.partition(": ")[2]) for label, line in zip(labels[2:], lines[-4:-1], strict=True)}
    run_command(*said["Run again"][1:])
    again = json.loads((tmp_path / "run-again" / "results.json").read_text(encoding="utf-8"))
    assert again["complete"] and again["config"]["num_train_epochs"] == 3 and again["verdict"]["gain"]["clear"]
    steps = str(read_results(tmp_path)["base"]["steps"])
    coreset = ["--dataset_name", str(tmp_path / "run" / "coresets" / "coreset_25"), "--max_steps"]
    others = {"full-steps": [], "coreset_25-steps": [*coreset, steps], "coreset_25-epochs": [*coreset, "-1"]}
    for arm, flags in others.items():
        train(*said["Train on it"], *flags, "--output_dir", str(tmp_path / arm))
        trained = load_file(tmp_path / arm / SAFETENSORS_WEIGHTS_NAME)
        expected = load_file(tmp_path / "run" / "arms" / f"{arm}-seed0" / SAFETENSORS_WEIGHTS_NAME)
        assert trained.keys() == expected.keys() and all(trained[name].equal(expected[name]) for name in trained)


def train(*command: str) -> None:
    """A command line as it was printed, in a process of its own."""
    assert command[1] == "sft"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True, timeout=500)


def test_the_printed_command_is_one_that_the_shell_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of this environment, active or not, and not another installation's that comes first."""
    scripts, others = tmp_path / "venv" / "bin", tmp_path / "others"
    for folder in (scripts, others):
        folder.mkdir(parents=True)
        (folder / "in2core").touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(scripts / "python"))
    monkeypatch.setenv("PATH", str(scripts))
    assert find_command() == "in2core"
    monkeypatch.setenv("PATH", str(others))
    assert find_command() == str(scripts / "in2core")
    monkeypatch.chdir(tmp_path)
    assert find_command() == "venv/bin/in2core"
    (scripts / "in2core").unlink()
    assert find_command() == "in2core"


def test_the_settings_of_a_training_hold_nothing_of_influence(tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "model_name_or_path": "m", "pool": "p", "validation": ["v"], "test": "t", "output_dir": "run"
    }  # fmt: skip
    given |= {"fit_examples": "all", "damping_scale": 0.2, "learning_rate": 3e-4, "columns": "alpaca"}
    settings = make_run_parser().parse(["--config", write_config(tmp_path, given)])
    write_sft_settings(settings, tmp_path / "sft.yaml", max_steps=7)
    written = yaml.safe_load((tmp_path / "sft.yaml").read_text(encoding="utf-8"))
    assert written.pop("columns") == ["alpaca"]
    assert written == {"model_name_or_path": "m", "test": "t", "learning_rate": 3e-4, "max_steps": 7}
