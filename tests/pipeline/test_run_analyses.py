"""`--analyses` of the pipeline: what it adds to a run, how it goes on, and what it refuses."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from peft import PeftModel
from recipe_runs import (
    NUM_POOL,
    NUM_TEST,
    compute_naive_loss,
    launch,
    make_rows,
    read_results,
    run_command,
    stamp,
    write_config,
    write_rows,
)
from report_runs import Page, print_results
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_in2core import InfluenceConfig, InfluenceTrainer
from hf_in2core.evaluation.formats import describe_calibration
from hf_in2core.rows.sources import load_rows


@pytest.fixture(scope="module")
def config(finished: Path) -> dict[str, Any]:
    return yaml.safe_load((finished / "settings.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def analysed(finished: Path, config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, and all analyses added by a rerun."""
    folder = tmp_path_factory.mktemp("analysed")
    shutil.copytree(finished / "run", folder / "run", symlinks=True)
    changed = config | {"output_dir": str(folder / "run"), "analyses": ["layers", "coverage", "calibration"]}
    run_command("run", "--config", write_config(folder, changed), pictures=True)
    return folder


def test_analyses_are_added_to_a_finished_run(finished: Path, analysed: Path) -> None:
    assert stamp(analysed) == stamp(finished)
    before, after = read_results(finished), read_results(analysed)
    assert after["arms"] == before["arms"] and not {"layers", "coverage", "calibration"} & before.keys()
    names = sorted(path.stem for path in (analysed / "run" / "analyses").iterdir())
    assert names == ["calibration", "coverage", "layers"]
    words = Page(analysed / "run" / "report.html").words
    assert "Least covered test rows" in words and "layers rank 60 rows of a pilot sample most like" in words


def test_layers_are_chosen_under_half_of_the_memory(analysed: Path) -> None:
    layers = read_results(analysed)["layers"]
    candidates = {tuple(entry["layers"]): entry for entry in layers["candidates"]}
    assert set(candidates) == {(0,), (1,), (0, 1)} and layers["all_layers"] == [0, 1] and layers["rows"] == NUM_POOL
    assert (candidates[0, 1]["memory"], candidates[0, 1]["spearman"]) == (1, pytest.approx(1))
    assert layers["layers"] in ([0], [1]) and layers["memory"] == pytest.approx(0.5)
    assert layers["spearman"] == max(candidates[0,]["spearman"], candidates[1,]["spearman"])
    assert 0 <= layers["overlap"] <= 1 and layers["low"] < layers["spearman"] < layers["high"]


def test_influence_is_told_in_nats_where_steps_follow_it(analysed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = read_results(analysed)
    page = Page(analysed / "run" / "report.html")
    assert describe_calibration(results["calibration"]) in page.words and results["calibration"]["rows"] == 16
    told = {"nats_per_influence": 1e-3, "error": 0.02, "spearman": 0.9, "rows": 16, "agrees": True}
    path = analysed / "told"
    shutil.copytree(analysed / "run", path, symlinks=True)
    (path / "results.json").write_text(json.dumps(results | {"calibration": told}), encoding="utf-8")
    run_command("report", "--run", str(path))
    page = Page(path / "report.html")
    first = page.data["influence"][0]
    assert page.data["steps"][0] == f"{first * 1e-3:+.1g} nats by one more step on it, within 0.02"
    print_results(results | {"calibration": told})
    strongest = results["examples"]["proponents"][0]["influence"]
    said = f"{strongest * 1e-3:+.1g} nats by one more step on it, within 0.02"
    assert said in " ".join(capsys.readouterr().out.split())


def test_coverage_is_of_the_test_rows(finished: Path, config: dict[str, Any], analysed: Path, tmp_path: Path) -> None:
    coverage = read_results(analysed)["coverage"]
    rows = make_rows("reverse", NUM_TEST, seed=4)
    points = coverage["points"]
    assert points["row"] == list(range(NUM_TEST)) and coverage["test_rows"] == NUM_TEST
    base = AutoModelForCausalLM.from_pretrained(finished / "model")
    reference = PeftModel.from_pretrained(base, finished / "run" / "reference", is_trainable=True)
    losses = [compute_naive_loss(reference.eval(), finished, [row])[0] for row in rows]
    assert points["loss"] == pytest.approx(losses, rel=1e-4)
    assert coverage["correlations"]["coverage_top_k"]["n"] == NUM_TEST
    least = coverage["least_covered"]
    assert [entry["row"] for entry in least] == np.argsort(points["coverage"])[:10].tolist()
    assert least[0]["text"] == rows[least[0]["row"]]["prompt"] + rows[least[0]["row"]]["completion"]
    # A test row as the only validation row: its strongest proponents, and the mean of ten of them.
    trainer = InfluenceTrainer(
        model=reference,
        args=InfluenceConfig(output_dir=str(tmp_path / "fit"), bf16=False, activation_checkpointing=False),
        train_dataset=load_rows(config["pool"]),
        eval_dataset=load_rows(config["test"]).select([least[0]["row"]]),
        processing_class=AutoTokenizer.from_pretrained(finished / "model"),
    )
    influence = np.array(trainer.score_influence()["influence"][:])
    assert least[0]["coverage"] == pytest.approx(-np.sort(influence)[:10].mean(), rel=1e-3)
    strongest = [row for row in np.argsort(influence)[:3].tolist() if influence[row] < 0]
    assert [pair["row"] for pair in least[0]["proponents"]] == strongest


def test_of_many_test_rows_a_sample_is_analysed(
    finished: Path, config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished / "run", tmp_path / "run", symlinks=True)
    monkeypatch.setattr("hf_in2core.pipeline.analyses.MAX_TEST_ROWS", NUM_TEST - 1)
    changed = config | {"output_dir": str(tmp_path / "run"), "analyses": ["coverage"]}
    run_command("run", "--config", write_config(tmp_path, changed))
    coverage = read_results(tmp_path)["coverage"]
    chosen = coverage["points"]["row"]
    assert len(set(chosen)) == NUM_TEST - 1 and coverage["test_rows"] == NUM_TEST
    assert chosen != list(range(NUM_TEST - 1))  # not the first ones, whose positions would tell nothing
    base = AutoModelForCausalLM.from_pretrained(finished / "model")
    reference = PeftModel.from_pretrained(base, finished / "run" / "reference").eval()
    rows = make_rows("reverse", NUM_TEST, seed=4)
    losses = [compute_naive_loss(reference, finished, [rows[row]])[0] for row in chosen]
    assert coverage["points"]["loss"] == pytest.approx(losses, rel=1e-4)
    for entry in coverage["least_covered"]:
        assert entry["text"] == rows[entry["row"]]["prompt"] + rows[entry["row"]]["completion"]


def test_a_rerun_keeps_them_and_computes_nothing(analysed: Path, config: dict[str, Any]) -> None:
    files = sorted((analysed / "run" / "analyses").iterdir())
    times, before = [path.stat().st_mtime_ns for path in files], read_results(analysed)
    # Whether it asks for them again or not.
    run_command("run", "--config", write_config(analysed, config | {"output_dir": str(analysed / "run")}))
    after = read_results(analysed)
    assert [path.stat().st_mtime_ns for path in files] == times
    assert (after["layers"], after["coverage"]) == (before["layers"], before["coverage"])


def test_what_is_half_written_is_computed_again(analysed: Path, config: dict[str, Any]) -> None:
    path = analysed / "run" / "analyses" / "layers.json"
    before = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(path.read_text(encoding="utf-8")[:100], encoding="utf-8")
    changed = config | {"output_dir": str(analysed / "run"), "analyses": ["layers"]}
    run_command("run", "--config", write_config(analysed, changed))
    assert json.loads(path.read_text(encoding="utf-8")) | {"seconds": before["seconds"]} == before


def test_what_cannot_be_analysed_is_said_and_the_run_is_finished(
    finished: Path, config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    changed = config | {
        "output_dir": str(tmp_path / "run"),
        "pool": write_rows(tmp_path / "pool.jsonl", make_rows("copy", 29, seed=7)),
        "test": write_rows(tmp_path / "test.jsonl", make_rows("reverse", 9, seed=8)),
        "reference_adapter": str(finished / "run" / "reference"),
        "analyses": ["layers", "coverage"],
    }
    flags = ("--arms", "coreset", "random", "--budgets", "epochs", "--max_steps", "1")
    run_command("run", "--config", write_config(tmp_path, changed), *flags)
    results = read_results(tmp_path)
    assert results["complete"] and len(results["arms"]) == 2
    assert "29 rows are left to compare layers by" in results["layers"]["refused"]
    assert "the test set has 9 rows" in results["coverage"]["refused"]
    assert "warning: No layers in the results: 29 rows" in capsys.readouterr().err
    words = Page(tmp_path / "run" / "report.html").words
    assert "Not computed. 29 rows are left" in words and "Not computed. the test set has 9 rows" in words


@pytest.mark.slow
def test_two_processes_find_the_same(finished: Path, config: dict[str, Any], analysed: Path, tmp_path: Path) -> None:
    changed = config | {
        "output_dir": str(tmp_path / "run"),
        "reference_adapter": str(finished / "run" / "reference"),
        "analyses": ["layers", "coverage"],
    }
    flags = ("--arms", "coreset", "random", "--budgets", "epochs", "--max_steps", "1")
    answer = launch("recipes/in2core.py", "--config", write_config(tmp_path, changed), *flags, processes=2)
    assert answer.stdout.count("Coverage: 11 test rows") == 1
    one, two = read_results(analysed), read_results(tmp_path)
    for name in ("coverage", "loss"):
        assert two["coverage"]["points"][name] == pytest.approx(one["coverage"]["points"][name], rel=1e-4)
    assert two["layers"]["layers"] == one["layers"]["layers"]
    assert two["layers"]["spearman"] == pytest.approx(one["layers"]["spearman"], abs=1e-3)


def test_names_of_analyses_are_checked(config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for flags, message in ((["layer"], "layers"), (["layers", "layers"], "--analyses has a value twice")):
        with pytest.raises(SystemExit):
            run_command("run", "--config", write_config(tmp_path, config), "--analyses", *flags)
        assert message in capsys.readouterr().err
