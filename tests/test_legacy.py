"""What version 0.1.0 wrote (commit eecc9d2, `data/legacy`) is loaded, scores equally and is shown."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import trl
import yaml
from datasets import Dataset, load_dataset, load_from_disk
from helpers import ROOT
from recipe_runs import load_command, run_command, stamp

from hf_in2core import InfluenceScorer, select_coreset
from hf_in2core.pipeline.comparison import Arm
from hf_in2core.selection.record import take_coresets


LEGACY = ROOT / "tests" / "data" / "legacy"


@pytest.fixture
def legacy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the folder, which is the working directory: its files name the model by a relative path."""
    shutil.copytree(LEGACY, tmp_path / "legacy")
    monkeypatch.chdir(tmp_path / "legacy")
    yield tmp_path / "legacy"


@pytest.mark.parametrize(
    ("folder", "scores", "column"),
    [
        ("run/scorer", "scores.json", "mapped"),
        ("published/scorer", "scores.json", "mapped"),
        ("scorer_named", "scores_named.json", "influence"),
        ("scorer_named", "scores_named.json", "influence_copy"),
    ],
)
def test_scorers_score_equally(legacy: Path, folder: str, scores: str, column: str) -> None:
    pool = load_dataset("json", data_files="inputs/pool.jsonl", split="train")
    expected = json.loads((legacy / scores).read_text(encoding="utf-8"))
    mapped = pool.map(InfluenceScorer.from_pretrained(folder), batched=True)
    assert mapped["id"][:] == expected["id"]
    influence = mapped["influence" if column == "mapped" else column][:]
    assert influence == pytest.approx(expected[column], rel=1e-5, abs=1e-6 * np.abs(expected[column]).max())


def test_a_run_is_shown_with_the_rows_it_trained_on(legacy: Path) -> None:
    run_command("report", "run")
    page = (legacy / "run" / "report.html").read_text(encoding="utf-8")
    results = json.loads((legacy / "run" / "results.json").read_text(encoding="utf-8"))
    assert results["verdict"]["text"].split(".")[0][:60] in page
    scored = load_from_disk("run/scored")
    coreset = take_coresets(legacy / "run", scored, {})["coreset_25"]
    assert coreset.take_from(scored)["id"][:] == select_coreset(scored, fraction=0.25)["id"][:]


@pytest.mark.skipif(trl.__version__.startswith("1.14."), reason="TRL 1.14 has other defaults: it is another run")
def test_nothing_of_a_finished_run_is_computed_again(legacy: Path) -> None:
    before = stamp(legacy)
    assert {"run/selection.json", "run/arms/steps-coreset-0.25-1/result.json"} <= set(before)
    run_command("run", "--config", "inputs/settings.yaml", "--strategy", "top")  # the default of then
    after = stamp(legacy)
    # The models get cards, which they did not have.
    assert {name for name in before if after[name] != before[name]} == {
        name for name in before if name.endswith("README.md") and name.startswith(("run/arms/", "run/reference/"))
    }
    assert {path.name for path in (legacy / "run" / "arms").iterdir()} == {
        Path(name).parts[2] for name in before if "/arms/" in name
    }


def test_the_folders_of_arms_are_found(legacy: Path) -> None:
    for arm in json.loads((legacy / "run" / "results.json").read_text(encoding="utf-8"))["arms"]:
        if (arm["arm"], arm["budget"]) != ("full", "epochs"):
            folder = Arm(arm["arm"], arm["fraction"], arm["seed"], arm["budget"]).find_folder(legacy / "run")
            assert (folder / "result.json").is_file()
    assert Arm("coreset", 0.25, 7, "steps").find_folder(legacy / "run").name == "coreset_25-steps-seed7"


def test_what_is_published_loads_and_has_the_splits_of_its_record(legacy: Path) -> None:
    card = (legacy / "published" / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---")[1])
    published = load_dataset("./published")
    assert {name["split"] for name in front["configs"][0]["data_files"]} == set(published)
    record = json.loads((legacy / "published" / "splits.json").read_text(encoding="utf-8"))
    choices = load_command("grow").choose_splits(list(published), None, record)
    for name, choice in choices.items():
        again: Dataset = select_coreset(published["train"], **choice)
        assert sorted(again["id"][:]) == sorted(published[name]["id"][:])
    assert {"coreset_25", "random_25"} <= set(choices)
