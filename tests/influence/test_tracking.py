"""Watching a run: what trackers receive, and progress bars with the libraries' own switches."""

import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset, load_from_disk
from helpers import add_trained_adapter, make_model, make_prompt_completion, make_tokenizer, make_trainer
from recipe_runs import Inputs, run_command, write_config

from hf_in2core import InfluenceConfig, InfluenceTrainer
from hf_in2core.influence.tracking import summarize_influence
from hf_in2core.progress import get_bar_settings
from hf_in2core.selection.baselines import add_bm25, add_loss, add_rds


PASSES = ["Influence: validation set", "Influence: fit pass", "Influence: score pass"]


def read_scalars(folder: Path) -> dict[str, list[float]]:
    """Every scalar in the event files of a folder, by tag, in the order of their steps."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    scalars: dict[str, list[float]] = {}
    for path in sorted({file.parent for file in folder.rglob("events.out.tfevents.*")}):
        events = accumulator.EventAccumulator(str(path))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            scalars.setdefault(tag, []).extend(event.value for event in events.Scalars(tag))
    return scalars


# --- trackers ---


def test_statistics_are_those_of_the_rows() -> None:
    influence = np.array([-3.0, np.nan, 1.0, -1.0, 5.0, -2.0])
    tokens = np.array([6, 0, 2, 4, 1, 5])
    found = summarize_influence({"influence": influence, "influence_math": influence - 4}, tokens)
    values = np.array([-3.0, 1.0, -1.0, 5.0, -2.0])
    assert found["influence/rows"] == 6 and found["influence/rows_without_loss"] == 1
    assert (found["influence/minimum"], found["influence/median"], found["influence/maximum"]) == (-3, -1, 5)
    assert found["influence/mean"] == pytest.approx(values.mean())
    assert found["influence/quantile_05"] == pytest.approx(np.percentile(values, 5))
    assert found["influence/proponents"] == pytest.approx(3 / 5)
    assert found["influence_math/proponents"] == pytest.approx(4 / 5)
    assert found["influence/length_correlation"] == pytest.approx(-1)  # the longer, the stronger a proponent
    assert all(isinstance(value, float) and math.isfinite(value) for value in found.values())


def test_statistics_of_rows_that_do_not_vary_or_carry_no_loss() -> None:
    nothing = summarize_influence({"influence": np.full(3, np.nan)}, np.zeros(3))
    assert nothing == {"influence/rows": 3, "influence/rows_without_loss": 3}
    same = summarize_influence({"influence": np.ones(3)}, np.array([1, 2, 3]))
    assert same["influence/median"] == 1 and "influence/length_correlation" not in same


def check_scalars(scalars: dict[str, list[float]], scored: Dataset, num_validation: int) -> None:
    influence = np.array(scored["influence"][:])
    for name, value in {
        "median": np.median(influence),
        "minimum": influence.min(),
        "proponents": (influence < 0).mean(),
        "fit_rows": len(influence),
        "validation_rows": num_validation,
    }.items():
        assert scalars[f"train/influence/{name}"] == [pytest.approx(float(value), rel=1e-5)], name


def test_tensorboard_receives_the_statistics_beside_the_losses(
    tmp_path: Path, pool: Dataset, validation: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    monkeypatch.chdir(tmp_path)  # where a writer without a folder would leave its files
    trainer = make_trainer(
        tmp_path / "out", pool, validation, torch.float32, report_to="tensorboard", max_steps=2, logging_steps=1
    )
    trainer.train()
    scored = trainer.score_influence()
    scalars = read_scalars(tmp_path / "out")
    assert len(scalars["train/loss"]) == 2
    check_scalars(scalars, scored, len(validation))
    assert os.listdir(tmp_path) == ["out"]

    # What is fitted already is not told again; what is scored again is.
    trainer.fit_influence()
    assert read_scalars(tmp_path / "out") == scalars
    trainer.score_influence()
    assert len(read_scalars(tmp_path / "out")["train/influence/median"]) == 2


def test_tensorboard_without_a_training(
    tmp_path: Path, pool: Dataset, validation: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    monkeypatch.chdir(tmp_path)
    sets = {"math": validation, "code": make_prompt_completion(5, seed=3)}
    trainer = make_trainer(tmp_path / "out", pool, sets, torch.float32, report_to="tensorboard")
    scored = trainer.score_influence()
    scalars = read_scalars(tmp_path / "out")
    check_scalars(scalars, scored, len(validation) + 5)
    assert scalars["train/influence_code/median"] == [pytest.approx(np.median(scored["influence_code"][:]), rel=1e-5)]
    assert os.listdir(tmp_path) == ["out"]


def test_without_a_tracker_the_history_has_them(tmp_path: Path, pool: Dataset, validation: Dataset) -> None:
    trainer = make_trainer(tmp_path, pool, validation, torch.float32)
    scored = trainer.score_influence()
    history = {name: value for entry in trainer.state.log_history for name, value in entry.items()}
    assert history["influence/median"] == pytest.approx(np.median(scored["influence"][:]))
    assert history["influence/fit_rows"] == len(pool)
    assert not list(tmp_path.rglob("events.out.tfevents.*"))


# --- progress ---


@pytest.fixture
def bars() -> Iterator[None]:
    """The libraries' switches as a user finds them, and put back."""
    datasets.enable_progress_bars()
    transformers.logging.enable_progress_bar()
    verbosity = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()
    datasets.disable_progress_bars()


def make_watched_trainer(folder: Path, **kwargs: Any) -> InfluenceTrainer:
    return InfluenceTrainer(
        model=add_trained_adapter(make_model()),
        args=InfluenceConfig(
            output_dir=str(folder), bf16=False, use_cpu=True, activation_checkpointing=False, **kwargs
        ),
        train_dataset=make_prompt_completion(23, seed=0),
        eval_dataset=make_prompt_completion(7, seed=1),
        processing_class=make_tokenizer(),
    )


def test_every_pass_has_a_bar_that_a_log_can_bear(tmp_path: Path, bars: None, capfd: pytest.CaptureFixture) -> None:
    trainer = make_watched_trainer(tmp_path, tokens_per_batch=32)  # a batch for nearly every row
    capfd.readouterr()
    trainer.score_influence()
    shown = capfd.readouterr().err
    for name in PASSES:
        lines = [line for line in shown.splitlines() if line.startswith(name)]
        assert 1 <= len(lines) <= 3 and "row/s" in lines[-1], lines  # the last, and one a minute
        assert not any(": 0 of " in line for line in lines)
    assert "\r" not in shown and "█" not in shown
    trainer.fit_influence(per_example=True)
    trainer.score_influence()
    shown = capfd.readouterr().err
    assert all(name in shown for name in PASSES)


@pytest.mark.parametrize("switch", ["datasets", "transformers", "verbosity", "disable_tqdm"])
def test_the_libraries_switches_silence_them(
    tmp_path: Path, bars: None, capfd: pytest.CaptureFixture, switch: str
) -> None:
    kwargs: dict[str, Any] = {}
    if switch == "datasets":
        datasets.disable_progress_bars()
    elif switch == "transformers":
        transformers.logging.disable_progress_bar()
    elif switch == "verbosity":
        transformers.logging.set_verbosity_error()
    else:
        kwargs["disable_tqdm"] = True
    trainer = make_watched_trainer(tmp_path, **kwargs)
    capfd.readouterr()
    trainer.score_influence()
    assert "Influence:" not in capfd.readouterr().err


def test_baselines_have_bars_in_a_terminal(
    tmp_path: Path, bars: None, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_watched_trainer(tmp_path)
    pool, validation = make_prompt_completion(23, seed=0), make_prompt_completion(7, seed=1)

    def run_baselines() -> str:
        capfd.readouterr()
        add_loss(pool, trainer.model, trainer.preparation)
        add_rds(pool, validation, trainer.model, trainer.preparation)
        add_bm25(pool, validation, trainer.preparation)
        return capfd.readouterr().err

    names = ["Loss:", "RDS+: rows", "RDS+: validation rows", "BM25: validation rows"]
    assert not [name for name in names if name in run_baselines()]  # short ones leave nothing in a log
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    shown = run_baselines()
    assert [name for name in names if name not in shown] == []


def test_other_processes_show_nothing(bars: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not get_bar_settings()["disable"]
    monkeypatch.setenv("RANK", "1")
    assert get_bar_settings()["disable"]


def test_a_recipe_in_a_log(
    tmp_path: Path, model_folder: str, bars: None, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    make_prompt_completion(12, seed=0).to_json(tmp_path / "test.jsonl")
    capfd.readouterr()
    run_command("evaluate", "--model_name_or_path", model_folder, "--test", str(tmp_path / "test.jsonl"))
    shown = capfd.readouterr()
    assert "Test set" not in shown.err  # seconds of a log
    header, _, line = shown.out.splitlines()[:3]
    assert header.split()[:3] == ["adapter", "rows", "test_loss"] and line.split()[:2] == ["–", "12"]
    assert "\x1b" not in shown.out


def test_saving_rows_shows_nothing(
    inputs: Inputs, tmp_path: Path, bars: None, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = inputs[1] | {"strategy": "cosine", "arms": ["coreset"], "budgets": ["epochs"]}
    run, coreset = tmp_path / "run", tmp_path / "coreset"
    capfd.readouterr()
    run_command("run", "--config", write_config(tmp_path, config | {"output_dir": str(run)}))
    shown = capfd.readouterr().err
    assert all(name in shown for name in PASSES) and "\r" not in shown and "Saving" not in shown
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    flags = ["--model_name_or_path", config["model_name_or_path"], "--reference_adapter", str(run / "reference")]
    flags += ["--pool", config["pool"], "--validation", *config["validation"], "--activation_checkpointing", "false"]
    run_command("score", *flags, "--output_dir", str(tmp_path / "scored"))
    assert load_from_disk(tmp_path / "scored" / "scored")["influence"]
    for ending in ("", ".jsonl", ".parquet"):
        run_command("select", "--scored", str(run / "scored"), "--fraction", "0.25", "--output", f"{coreset}{ending}")
    shown = capfd.readouterr().err
    assert all(name in shown for name in PASSES) and "Saving" not in shown and "Creating" not in shown
    assert datasets.is_progress_bar_enabled() and transformers.logging.is_progress_bar_enabled()


def train_with_a_bar(folder: Path, model_folder: str) -> None:
    """A training as the commands start one, of eight steps."""
    folder.mkdir(exist_ok=True)
    make_prompt_completion(16, seed=0).to_json(folder / "pool.jsonl")
    flags = ["--model_name_or_path", model_folder, "--pool", str(folder / "pool.jsonl"), "--num_train_epochs", "1"]
    flags += ["--per_device_train_batch_size", "2", "--logging_steps", "2", "--output_dir", str(folder / "out")]
    run_command("train_reference", *flags)


def test_training_shows_its_loss_in_a_terminal(
    tmp_path: Path, model_folder: str, bars: None, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("hf_in2core.progress.OFTEN", 0.0)
    train_with_a_bar(tmp_path, model_folder)
    shown = [text for text in capfd.readouterr().err.split("\r") if text.startswith("Reference:")]
    assert "0/8" in shown[0] and re.search(r"8/8 .*loss=\d+\.\d+", shown[-1]), shown


def test_training_leaves_a_line_a_minute_in_a_log(
    tmp_path: Path, model_folder: str, bars: None, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_with_a_bar(tmp_path / "short", model_folder)
    assert "Reference:" not in capfd.readouterr().err
    monkeypatch.setattr("hf_in2core.progress.MINUTE", 0.001)
    train_with_a_bar(tmp_path / "long", model_folder)
    shown = capfd.readouterr().err
    lines = [line for line in shown.splitlines() if line.startswith("Reference:")]
    assert lines and re.fullmatch(r"Reference: 8 of 8 steps, .*step/?s?, about 00:00 left, loss=\d+\.\d+", lines[-1])
    assert "\r" not in "".join(lines)
    monkeypatch.setenv("RANK", "1")
    train_with_a_bar(tmp_path / "other", model_folder)
    assert "Reference:" not in capfd.readouterr().err
