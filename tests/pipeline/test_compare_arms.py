"""`compare_arms` does in Python what `in2core run` does once the pool is scored, and refuses what cannot work."""

import html
import json
import subprocess
import sys
from copy import copy
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, load_dataset, load_from_disk
from helpers import make_model
from hub_client import make_env
from loopback_hub import LoopbackHub
from peft import LoraConfig
from recipe_runs import no_pictures, read_results
from trl import SFTConfig

from hf_in2core import InfluenceConfig, compare_arms
from hf_in2core.report.page import write_report


def make_arguments(finished: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """The arguments that say what the settings of the finished run do."""
    settings: dict[str, Any] = {"learning_rate": 3e-3, "num_train_epochs": 1, "activation_checkpointing": False}
    settings |= {"bf16": False, "use_cpu": True}
    args = InfluenceConfig(str(folder), report_to="none", **settings | changes)
    return {
        "model": str(finished / "model"),
        "args": args,
        # In memory: maps of it would leave their files in the run that other tests look at.
        "scored": load_from_disk(str(finished / "run" / "scored"), keep_in_memory=True),
        "test": load_dataset("json", data_files=str(finished / "test.jsonl"), split="train"),
        "peft_config": LoraConfig(r=4, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear"),
        "seeds": [0],
        "budgets": ["steps", "epochs"],
    }


@pytest.fixture(scope="module")
def compared(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """A folder, the arguments, and what came back; pictures are drawn here alone."""
    folder = tmp_path_factory.mktemp("compared")
    arguments = make_arguments(finished, folder)
    return folder, arguments, compare_arms(**arguments)


def test_arms_are_those_of_the_pipeline(finished: Path, compared) -> None:
    folder, _, results = compared
    expected = read_results(finished)
    names = ("arm", "fraction", "seed", "budget", "rows", "loss_tokens", "steps")
    assert [[arm[name] for name in names] for arm in results["arms"]] == [
        [arm[name] for name in names] for arm in expected["arms"]
    ]
    for arm, other in zip(results["arms"], expected["arms"], strict=True):
        assert arm["test_loss"] == pytest.approx(other["test_loss"], rel=1e-6)
    assert results["base"]["test_loss"] == pytest.approx(expected["base"]["test_loss"], rel=1e-6)
    assert results["verdict"]["headline"].split(";")[0] == expected["verdict"]["headline"].split(";")[0]
    assert [row["row"] for row in results["examples"]["opponents"]] == [
        row["row"] for row in expected["examples"]["opponents"]
    ]
    kept = load_from_disk(str(folder / "coresets" / "coreset_25"))
    assert kept["id"] == load_from_disk(str(finished / "run" / "coresets" / "coreset_25"))["id"]
    assert json.loads((folder / "results.json").read_text(encoding="utf-8")) == results
    assert "What selecting cost was not recorded" in results["verdict"]["text"]
    for name in ("full-steps-seed0", "coreset_25-steps-seed0", "coreset_25-epochs-seed0"):
        card = (folder / "arms" / name / "README.md").read_text(encoding="utf-8")
        assert "The comparison that this model is of" in card and "fine-tuned with LoRA" in card
    with no_pictures():
        page = write_report(folder).read_text(encoding="utf-8")
    # Whether the rows that judge have selected is not known here.
    assert "judged on the test set, of which no row is in the pool." in page
    assert results["data"]["test"]["near_copies"]["rows"] == 0


def test_the_same_call_trains_nothing_and_another_setting_all(compared, capsys: pytest.CaptureFixture[str]) -> None:
    folder, arguments, results = compared
    stamps = {path: path.stat().st_mtime_ns for path in folder.glob("arms/*/*") if path.name != "README.md"}
    with no_pictures():
        again = compare_arms(**arguments | {"selection": {"seconds": 5.0, "reference_seconds": 2.0}})
    assert {path: path.stat().st_mtime_ns for path in folder.glob("arms/*/*") if path.name != "README.md"} == stamps
    assert [arm["test_loss"] for arm in again["arms"]] == [arm["test_loss"] for arm in results["arms"]]
    assert "Selecting cost 7" in again["verdict"]["text"]
    printed = capsys.readouterr().out
    assert printed.split()[-1] == again["verdict"]["text"].split()[-1]
    assert f"It lies in {folder}" in printed and f"publish --run {folder}" in printed
    args = copy(arguments["args"])
    args.learning_rate = 1e-3
    with no_pictures():
        other = compare_arms(**arguments | {"args": args, "arms": ["coreset"]})
    for arm in other["arms"]:
        before = next(
            entry for entry in again["arms"] if (entry["arm"], entry["budget"]) == ("coreset", arm["budget"])
        )
        assert arm["test_loss"] != before["test_loss"]


def test_rows_of_the_test_set_in_the_pool_are_told(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = make_arguments(finished, tmp_path, max_steps=1) | {"arms": ["coreset", "random"], "budgets": ["steps"]}
    row = {name: arguments["scored"][3][name] for name in ("prompt", "completion")}
    long = "write down the names of all planets in the order of their size"
    near = {"prompt": f"{long} please", "completion": " none"}
    test = Dataset.from_list([row, near, *({name: row[name] for name in row} for row in arguments["test"])])
    prompts = [f"{long} now", *arguments["scored"]["prompt"][1:]]
    scored = arguments["scored"].remove_columns("prompt").add_column("prompt", prompts)
    with no_pictures():
        results = compare_arms(**arguments | {"test": test, "scored": scored})
    assert results["data"]["pool"]["shared"] == {"test": 1}
    assert "have a near-copy in the pool" in capsys.readouterr().err
    found = results["data"]["test"]["near_copies"]
    assert found["rows"] == 1 and [(pair["row"], pair["pool_row"]) for pair in found["pairs"]] == [(1, 0)]
    assert results["verdict"]["text"].startswith("WARNING: sets that should have no row in common share some")


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"model": make_model()}, "every arm starts from the untrained model anew"),
        ({"args": SFTConfig("out", bf16=False)}, "Give an InfluenceConfig"),
        ({"peft_config": None}, "arms train adapters"),
        ({"scored": Dataset.from_dict({"prompt": ["a"], "completion": ["b"]})}, "Score it first"),
        ({"arms": ["coreset", "best"]}, "arms has 'best'. Known are full, coreset"),
        ({"arms": ["bm25"]}, "bm25_rank"),
        ({"seeds": [1, 1]}, "seeds has a value twice"),
        ({"fractions": [50]}, r"fraction 50 is outside \(0, 1\]"),
    ],
)
def test_what_cannot_work_is_refused_before_any_training(
    finished: Path, tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        compare_arms(**make_arguments(finished, tmp_path) | changes)
    assert not (tmp_path / "arms").exists()


@pytest.mark.slow
def test_its_folder_is_published_like_that_of_a_run(compared, tmp_path: Path) -> None:
    with LoopbackHub() as hub:
        hub.add_user("hf_writing", "user")
        command = "from hf_in2core.commands.main import main; main()"
        subprocess.run(
            [sys.executable, "-c", command, "publish", "--run", str(compared[0]), "--hub_id", "user/compared"],
            env=make_env(hub, tmp_path / "home", "hf_writing"),
            check=True,
            timeout=300,
        )
        files = hub.repos["dataset", "user/compared"].files()
    card = html.unescape(files["README.md"].decode())
    assert "`coreset_25` | 15 | 25.0 %" in card and "> WARNING: nothing is concluded" in card
    results = json.loads(files["results.json"])
    assert results["config"]["model_name_or_path"] == "model" and str(compared[0]) not in card
