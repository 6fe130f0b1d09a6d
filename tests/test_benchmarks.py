"""The benchmarks that read a trained reference run on anybody's files and write what they print."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from recipe_runs import ROOT, make_inputs, write_config


pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="a source distribution has no benchmarks")


def run_benchmark(name: str, folder: Path, *more: str, results: str | None = None) -> tuple[str, dict]:
    inputs = make_inputs(folder)
    # Flags that begin like those of the benchmarks themselves (`--test_rows`, `--validation_tasks`).
    test, validation = inputs.pop("test"), inputs.pop("validation")[0]
    script = ROOT / "benchmarks" / f"{name}.py"
    flags = ["--quick", "--config", write_config(folder, inputs), "--output_dir", str(folder / "run")]
    flags += ["--test", test, "--validation", validation, *more]
    done = subprocess.run(
        [sys.executable, str(script), *flags], cwd=ROOT, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (folder / "run" / f"{name}.png").stat().st_size > 5000
    return done.stdout, json.loads((folder / "run" / (results or f"{name}.json")).read_text())


@pytest.mark.slow
def test_layers(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    table, found = run_benchmark("layers", tmp_path)
    sets = {(row["chosen"], row["count"]): row for row in found["sets"]}
    assert set(sets) == {(name, 1) for name in ("first", "last", "middle", "spread", "greedy", "best")}
    # With one layer at a time, trying all of them is what adding the best one does.
    assert sets["best", 1]["spearman"] == sets["greedy", 1]["spearman"] >= sets["last", 1]["spearman"]
    assert f"{sets['last', 1]['spearman']:.3f}" in table
    assert set(found["seconds"]) == {"all", "first 1", "last 1", "middle 1", "spread 1"}


@pytest.mark.slow
def test_coverage(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("bm25s")
    table, found = run_benchmark("coverage", tmp_path)
    assert {row["method"] for row in found["rows"]} == {
        "influence (DataInf)",
        "gradient cosine",
        "RDS+",
        "BM25",
        "number of loss tokens",
    }
    # One task: within tasks is among all rows.
    by_place = {
        (row["method"], row["coverage"], row["outcome"], row["among"]): row["estimate"] for row in found["rows"]
    }
    for (method, coverage, outcome, among), estimate in by_place.items():
        assert estimate == pytest.approx(by_place[method, coverage, outcome, "within tasks"]), among
    assert "share of proponents" in table


@pytest.mark.slow
def test_checkpoints(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    table, found = run_benchmark("checkpoints", tmp_path)
    assert [row["step"] for row in found["diagnostics"]] == [2, 5]
    assert {row["step"] for row in found["rows"]} == {2, 5, "averaged", "averaged, scaled"}
    assert all(0 <= row["AUC"] <= 1 for row in found["rows"])
    assert "agreement of halves" in table


@pytest.mark.slow
def test_selection(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("bm25s")
    methods = ["random", "coreset", "turns", "bm25", "length"]
    table, found = run_benchmark("selection", tmp_path, "--methods", *methods, results="selection_results.json")
    assert [arm["arm"] for arm in found["arms"]] == methods * (len(found["arms"]) // len(methods))
    losses = {arm["arm"]: arm["test_loss"] for arm in found["arms"]}
    # Equal losses would be arms that trained on the same rows.
    assert len(set(losses.values())) == len(methods)
    assert "influence, validation rows in turn" in table


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "model", "data"),
    [
        ("exact", "model", ["pool", "validation"]),
        ("retraining", "model", ["pool", "validation"]),
        ("groups", "model", ["pool", "validation", "test"]),
        ("transfer", "target", ["pool", "validation", "test"]),
    ],
)
def test_benchmarks_of_a_plain_loop(name: str, model: str, data: list[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    inputs = make_inputs(tmp_path)
    sources = {"pool": inputs["pool"], "validation": inputs["validation"][0], "test": inputs["test"]}
    flags = [
        f"--{model}",
        inputs["model_name_or_path"],
        *(item for part in data for item in (f"--{part}", sources[part])),
    ]
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), "--quick", *flags, "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / f"{name}.png").stat().st_size > 5000
    rows = json.loads((tmp_path / f"{name}.json").read_text())["rows"]
    labels = {"exact": "rank", "retraining": "score", "groups": "kept by", "transfer": "reference"}
    for row in rows:
        assert f"| {row[labels[name]]} |" in done.stdout
