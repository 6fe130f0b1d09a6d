"""The benchmarks that read a trained reference run on anybody's files and write what they print."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from helpers import ROOT
from recipe_runs import make_inputs, make_rows, write_config, write_rows


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
    # 8 of its 12 rows: another test set has another loss.
    more = write_rows(tmp_path / "more.jsonl", make_rows("reverse", 12, seed=7)[4:])
    flags = ["--methods", *methods, "--more_tests", more, "--budgets", "steps", "epochs"]
    table, found = run_benchmark("selection", tmp_path, *flags, results="selection_results.json")
    arms = found["arms"]
    assert [arm["arm"] for arm in arms] == methods * (len(arms) // len(methods))
    by_budget = {
        budget: {arm["arm"]: arm["test_loss"] for arm in arms if arm["budget"] == budget}
        for budget in ("steps", "epochs")
    }
    # Equal losses would be arms that trained on the same rows, or for as long.
    assert len({loss for losses in by_budget.values() for loss in losses.values()}) == 2 * len(methods)
    for arm in arms:
        assert arm["tests"]["test"]["loss"] == pytest.approx(arm["test_loss"])
        assert arm["tests"]["test"]["tokens_right"] == pytest.approx(arm["test_accuracy"])
        assert arm["tests"]["more"]["loss"] != arm["tests"]["test"]["loss"]
        assert 0 <= arm["tests"]["more"]["answers_right"] <= arm["tests"]["more"]["tokens_right"] <= 1
    assert "influence, validation rows in turn" in table
    assert "equal epochs" in table


@pytest.mark.slow
def test_wrong_answers(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    flags = ["--wrong_fraction", "0.3", "--train", "full", "random", "right", "low_ifd", "--fractions", "0.7"]
    table, found = run_benchmark("wrong_answers", tmp_path, *flags)
    pool = [json.loads(line) for line in (tmp_path / "run/wrong-0.3-0/pool.jsonl").read_text().splitlines()]
    raw = [json.loads(line) for line in Path(make_inputs(tmp_path)["pool"]).read_text().splitlines()]
    changed = [ours["completion"] != theirs["completion"] for ours, theirs in zip(pool, raw, strict=True)]
    assert [row["is_wrong"] for row in pool] == changed
    assert 0.2 * len(pool) < sum(changed) <= 0.3 * len(pool)
    for task in {row["task"] for row in raw}:
        # Answers are dealt to other rows of the same task, so that nothing but the row tells.
        assert Counter(r["completion"] for r in pool if r["task"] == task) == Counter(
            r["completion"] for r in raw if r["task"] == task
        )
    assert {row["method"] for row in found["rows"]} == {"coreset", "dot", "cosine", "low_loss", "low_ifd"}
    wrong = {arm["arm"]: arm["wrong"] for arm in found["arms"]}
    assert wrong["full"] == pytest.approx(sum(changed) / len(pool))
    assert wrong["right"] == 0 < wrong["random"]
    assert "only right answers (oracle)" in table


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


def call_lengths(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    inputs = make_inputs(folder)
    flags = ["--model", inputs["model_name_or_path"], "--pool", inputs["pool"], "--test", inputs["test"]]
    flags += ["--validation", inputs["validation"][0], "--output", str(folder / "run"), "--quick", *more]
    command = [sys.executable, str(ROOT / "benchmarks" / "lengths.py"), *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)


@pytest.mark.slow
def test_lengths(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = call_lengths(tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "lengths.png").stat().st_size > 5000
    rows = json.loads((tmp_path / "run" / "lengths.json").read_text())["rows"]
    top = {row["ranked by"]: row for row in rows if row["strategy"] == "top"}
    assert set(top) == {"mean", "sum", "sqrt", "max", "cosine (unit norm)", "random rows"}
    # What does not divide by the length takes longer rows.
    assert top["mean"]["spearman"] > top["sum"]["spearman"]
    assert top["mean"]["overlap"] == 1 and len({row["test_loss"] for row in rows}) > 10
    matched = [row for row in rows if row["strategy"] == "as long as top"]
    assert {row["ranked by"] for row in matched} == set(top) - {"random rows"}
    table = done.stdout
    assert f"{top['max']['spearman']:+.2f}" in table and f"{top['random rows']['test_loss']:.3f}" in table
    again = call_lengths(tmp_path)
    assert again.returncode == 0 and again.stdout == table.split("\n", 1)[1]  # found, without another training

    one_task = [row | {"task": "reverse"} for row in map(json.loads, (tmp_path / "pool.jsonl").open())]
    flags = ["--pool", write_rows(tmp_path / "one.jsonl", one_task), "--output", str(tmp_path / "other")]
    done = call_lengths(tmp_path, *flags)
    assert "nothing is concluded about which tasks" in done.stdout and "of the task" not in done.stdout


@pytest.mark.slow
def test_lengths_refuses_what_says_nothing_about_length(tmp_path: Path) -> None:
    constant = [{"prompt": f"the cat {n} :", "completion": " sat", "task": "reverse"} for n in range(60)]
    for flags, message in (
        (["--pool", write_rows(tmp_path / "constant.jsonl", constant)], "no ranking can go with length"),
        (["--fraction", "0.1"], "too few to compare their lengths"),
        (["--task_column", "kind"], "has no column 'kind'"),
    ):
        done = call_lengths(tmp_path, *flags)
        assert done.returncode != 0 and message in done.stderr
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_gpu_runs_end_to_end_without_one(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--quick", "--out", str(tmp_path / "gpu.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["sharded"]["skipped"]
    assert found["trainer"]["float32"]["relative_to_cpu"] < 1e-4
    for part in ("speed_0.6B", "speed_7B"):
        assert set(found[part]["of_plain"]) == {"plain", "score", "fit", "validation"}
    assert found["precision"]["bf16_and_float32"]["spearman"] > 0.99
    assert found["precision"]["ours_and_published"]["relative"] < 1e-2


# As on a machine that the tree was copied to: it finds no psutil (TRL may have its own), and nobody knows its version.
BARE = """
import builtins, importlib.metadata, pathlib, runpy, sys
find, known = builtins.__import__, importlib.metadata.version
def find_all_but_one(name, globals=None, *rest, **options):
    if name == "psutil" and (globals or {}).get("__name__", "").startswith("hf_in2core"):
        raise ImportError(name)
    return find(name, globals, *rest, **options)
def know_all_but_one(name):
    if name.replace("-", "_") == "hf_in2core":
        raise importlib.metadata.PackageNotFoundError(name)
    return known(name)
builtins.__import__, importlib.metadata.version = find_all_but_one, know_all_but_one
sys.argv = sys.argv[1:]
sys.path.insert(0, str(pathlib.Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_gpu_runs_from_a_tree_that_is_not_installed(tmp_path: Path) -> None:
    script, out = str(ROOT / "benchmarks" / "gpu.py"), str(tmp_path / "gpu.json")
    command = [sys.executable, "-c", BARE, script, "--quick", "--only", "trainer", "--out", out]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "gpu.json").read_text())["trainer"]["float32"]["relative_to_cpu"] < 1e-4


@pytest.mark.slow
def test_calls_and_memory_stay_within_their_targets(tmp_path: Path) -> None:
    """Counted, not timed: what a GPU is asked for in each batch."""
    command = [sys.executable, str(ROOT / "benchmarks" / "calls.py"), "--quick", "--output_dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    calls = json.loads((tmp_path / "calls.json").read_text())["rows"]
    for row in calls:
        limit = float(row["target"].removeprefix("<= ") or "inf")
        assert row["of a plain step"] <= limit, row
    assert {row["one batch of"] for row in calls} == {"plain step", "score", "validation", "fit"}
    assert len(json.loads((tmp_path / "kept_memory.json").read_text())["rows"]) == 4


@pytest.mark.slow
def test_an_index_rounds_as_it_says_and_answers_a_second_set(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path)
    command = [sys.executable, str(ROOT / "benchmarks" / "index.py"), "--quick", "--output_dir", str(tmp_path / "out")]
    command += ["--model", inputs["model_name_or_path"], "--pool", inputs["pool"]]
    command += ["--validation", inputs["validation"][0], "--second", inputs["test"]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "out" / "index.json").read_text())
    full, half, eighth, coarse = found["rounding"]
    assert full["store_error"] is None and full["relative error of the scores"] < 1e-5
    assert full["bytes per row"] > 1.9 * half["bytes per row"] > 3.4 * eighth["bytes per row"]
    assert 0 < half["store_error"] < eighth["store_error"] < coarse["store_error"] < 0.02
    for row in (half, eighth, coarse):
        assert row["relative error of the scores"] < 4 * row["store_error"] and row["Spearman of the scores"] > 0.999
    assert len(found["times"]) == 2 + 3 * 3
