"""The pipeline: what a run leaves, and how it goes on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, load_from_disk
from peft import PeftModel
from recipe_runs import (
    NUM_POOL,
    NUM_TEST,
    compute_naive_loss,
    make_rows,
    read_results,
    run_command,
    stamp,
    write_config,
    write_rows,
)
from transformers import AutoModelForCausalLM

from hf_in2core import InfluenceScorer, select_coreset
from hf_in2core.cards.publish import _choose_splits
from hf_in2core.names import name_coreset
from hf_in2core.pipeline.coreset_folders import write_coresets
from hf_in2core.report.rows import read_pool
from hf_in2core.report.run import read_run
from hf_in2core.selection.record import read_record, take_coresets


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Callable[..., Any]:
    """Run the pipeline again into a copy of the finished run, with other settings; returns its folder."""
    shutil.copytree(finished / "run", tmp_path / "run", symlinks=True)
    config = yaml.safe_load((finished / "settings.yaml").read_text(encoding="utf-8"))

    def rerun(*flags: str, **changes: Any) -> Path:
        changed = config | {"output_dir": str(tmp_path / "run")} | changes
        run_command("run", "--config", write_config(tmp_path, changed), *flags)
        return tmp_path

    return rerun


# --- what a run leaves ---


def test_results_have_every_arm_and_its_figures(finished: Path) -> None:
    results = read_results(finished)
    assert results["complete"]
    found = {(arm["budget"], arm["arm"], arm["fraction"], arm["seed"]): arm for arm in results["arms"]}
    assert len(found) == len(results["arms"]) == 8
    for budget in ("steps", "epochs"):
        assert (budget, "full", 1.0, 0) in found
        assert all((budget, arm, 0.25, 0) in found for arm in ("coreset", "random", "opponents"))
    for (budget, name, _, _), arm in found.items():
        assert arm["rows"] == (NUM_POOL if name == "full" else round(0.25 * NUM_POOL))
        # 60 rows in batches of 8 are 8 steps, 15 rows 2.
        assert arm["steps"] == (8 if budget == "steps" or name == "full" else 2)
        assert arm["seconds"] > 0 and arm["loss_tokens"] > arm["rows"]
        assert arm["test_perplexity"] == pytest.approx(np.exp(arm["test_loss"]))
    assert results["selection"]["seconds"] > 0 and results["selection"]["reference_seconds"] > 0
    assert results["selection"]["rows"] == NUM_POOL
    assert {"text", "beats_random", "matches_full", "intervals"} <= results["verdict"].keys()
    scored = load_from_disk(str(finished / "run" / "scored"))["influence"][:]
    examples = {kind: [row["influence"] for row in rows] for kind, rows in results["examples"].items()}
    assert examples["proponents"] == sorted(value for value in scored if value < 0)[:10]
    assert examples["opponents"] == sorted((value for value in scored if value > 0), reverse=True)[:10]
    pool_tokens = [row["num_loss_tokens"] for row in load_from_disk(str(finished / "run" / "scored"))]
    assert results["lengths"]["pool_tokens"] == pytest.approx(np.mean(pool_tokens))
    assert "config" in results and "command" in results and results["machine"]["torch"] == torch.__version__
    assert (finished / "run" / "config.yaml").is_file()
    drawn = sorted(path.name for path in (finished / "run").glob("*.png"))
    assert drawn == ["arms.png", "influence.png", "influence_by_length.png"]


def test_the_full_arm_is_trained_once_for_both_budgets(finished: Path) -> None:
    names = {path.name for path in (finished / "run" / "arms").iterdir()}
    assert "full-steps-seed0" in names and "full-epochs-seed0" not in names
    full = [arm for arm in read_results(finished)["arms"] if arm["arm"] == "full"]
    assert len(full) == 2 and full[0] | {"budget": "epochs"} == full[1]


def test_test_losses_equal_a_naive_loop(finished: Path) -> None:
    rows = make_rows("reverse", NUM_TEST, seed=4)
    results = read_results(finished)
    base = AutoModelForCausalLM.from_pretrained(finished / "model").eval()
    loss, count = compute_naive_loss(base, finished, rows)
    assert results["base"]["test_loss"] == pytest.approx(loss, rel=1e-5)
    assert results["base"]["test_tokens"] == count
    for arm in results["arms"]:
        if arm["arm"] == "full" and arm["budget"] == "epochs":
            continue
        folder = finished / "run" / "arms" / f"{name_coreset(arm['fraction'], arm['arm'])}-{arm['budget']}-seed0"
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(finished / "model"), folder).eval()
        assert arm["test_loss"] == pytest.approx(compute_naive_loss(model, finished, rows)[0], rel=1e-5)
        assert arm["test_loss"] != results["base"]["test_loss"]


def test_arms_train_on_the_rows_they_are_named_for(finished: Path) -> None:
    scored = load_from_disk(str(finished / "run" / "scored"))
    _, recorded = read_record(finished / "run" / "coresets.json", len(scored))
    base = AutoModelForCausalLM.from_pretrained(finished / "model").eval()
    order = np.argsort(scored["influence"][:])
    expected = {
        "coreset": scored.select(order[:15]),
        "opponents": scored.select(order[-15:]),
        "random": select_coreset(scored, fraction=0.25, strategy="random", seed=0),
        "full": scored,
    }
    for arm in read_results(finished)["arms"]:
        rows = expected[arm["arm"]].to_list()
        name = {"coreset": "coreset_25", "opponents": "opponents_25", "random": "random_25-seed0", "full": "full"}
        positions = recorded[name[arm["arm"]]].positions
        assert set(scored.select(positions)["id"][:]) == {row["id"] for row in rows}
        assert positions == sorted(positions)
        assert arm["loss_tokens"] == compute_naive_loss(base, finished, rows)[1]
        assert arm["loss_tokens"] == sum(row["num_loss_tokens"] for row in rows)


def test_the_annotated_pool_is_the_pool(finished: Path) -> None:
    scored = load_from_disk(str(finished / "run" / "scored"))
    pool = [json.loads(line) for line in (finished / "pool.jsonl").read_text(encoding="utf-8").splitlines()]
    assert scored.select_columns(list(pool[0])).to_list() == pool
    assert sorted(scored["influence_rank"]) == list(range(NUM_POOL))
    # Nothing but the dataset itself lies there.
    names = {path.name for path in (finished / "run" / "scored").iterdir()}
    assert names == {"data-00000-of-00001.arrow", "dataset_info.json", "state.json"}


def test_a_coreset_is_a_dataset_of_the_rows_of_its_record(finished: Path, tmp_path: Path) -> None:
    scored = load_from_disk(str(finished / "run" / "scored"))
    _, recorded = read_record(finished / "run" / "coresets.json", len(scored))
    shutil.copytree(finished / "run" / "coresets", tmp_path / "coresets")
    assert [path.name for path in (tmp_path / "coresets").iterdir()] == ["coreset_25"]
    coreset = load_from_disk(str(tmp_path / "coresets" / "coreset_25"))
    assert coreset.to_list() == [scored[position] for position in recorded["coreset_25"].positions]
    # Whole in its own folder, wherever that is moved.
    assert all(Path(file["filename"]).is_relative_to(tmp_path) for file in coreset.cache_files)


def test_a_coreset_folder_is_written_once_and_again_where_it_is_not_its_record(finished: Path, tmp_path: Path) -> None:
    scored = load_from_disk(str(finished / "run" / "scored"))
    _, recorded = read_record(finished / "run" / "coresets.json", len(scored))
    wanted = {"coreset_25": recorded["coreset_25"]}
    folder = write_coresets(tmp_path, scored, wanted)["coreset_25"]
    written = (folder / "state.json").stat().st_mtime_ns
    write_coresets(tmp_path, scored, wanted)
    assert (folder / "state.json").stat().st_mtime_ns == written
    other = sorted(set(range(NUM_POOL)) - set(recorded["coreset_25"].positions))[:15]
    shutil.rmtree(folder)
    scored.select(other).save_to_disk(str(folder))
    write_coresets(tmp_path, scored, wanted)
    assert load_from_disk(str(folder))["id"][:] == scored.select(recorded["coreset_25"].positions)["id"][:]
    next(folder.glob("*.arrow")).write_bytes(b"cut")
    write_coresets(tmp_path, scored, wanted)
    assert len(load_from_disk(str(folder))) == 15


def test_the_scorer_scores_like_the_run(finished: Path) -> None:
    scored = load_from_disk(str(finished / "run" / "scored"))
    scorer = InfluenceScorer.from_pretrained(finished / "run" / "scorer")
    rows = scored.select(range(10)).select_columns(["prompt", "completion"])
    again = rows.map(scorer, batched=True)
    assert again["influence"][:] == pytest.approx(scored["influence"][:10], rel=1e-5)


def test_auc_of_tasks_and_wrong_answers(finished: Path) -> None:
    from sklearn.metrics import roc_auc_score

    scored = load_from_disk(str(finished / "run" / "scored"))
    influence = np.array(scored["influence"][:])
    interest = np.array([task == "reverse" for task in scored["task"]])
    wrong = np.array(scored["is_wrong"][:])
    auc = read_results(finished)["auc"]
    assert auc["tasks of interest"]["influence"] == pytest.approx(roc_auc_score(interest, -influence))
    assert auc["wrong answers"]["influence"] == pytest.approx(roc_auc_score(wrong, influence))
    assert auc["wrong answers in tasks of interest"]["influence"] == pytest.approx(
        roc_auc_score(wrong[interest], influence[interest])
    )
    reference = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(finished / "model"), finished / "run" / "reference"
    ).eval()
    losses = [compute_naive_loss(reference, finished, [row])[0] for row in scored.to_list()]
    assert auc["wrong answers"]["loss"] == pytest.approx(roc_auc_score(wrong, losses), abs=1e-3)


@pytest.mark.parametrize("packing", [False, True])
def test_loss_tokens_are_counted_packed_or_not(packing: bool) -> None:
    from hf_in2core.pipeline.training import count_loss_tokens

    # A first token is labelled but never predicted, and packing changes neither rows nor tokens.
    rows = [[5, 6, 7, 8], [5, -100, 7], [9], [-100, 4]]
    prepared: list[dict[str, Any]] = [{"labels": row} for row in rows]
    if packing:
        prepared = [
            {"labels": rows[0] + rows[2] + rows[1], "seq_lengths": [4, 1, 3]},
            {"labels": rows[3], "seq_lengths": [2]},
        ]
    assert count_loss_tokens(Dataset.from_list(prepared)) == {"rows": 4, "loss_tokens": 3 + 1 + 0 + 1}


# --- going on ---


def stamp_models(folder: Path) -> dict[str, int]:
    """Of [`stamp`] all but the cards, which tell of the comparison and change with it."""
    return {name: time for name, time in stamp(folder).items() if not name.endswith("README.md")}


def test_a_rerun_computes_nothing(finished: Path, copied: Callable[..., Path]) -> None:
    folder = copied()
    before = {name: time for name, time in stamp(finished).items()}
    # copytree keeps the times of files.
    assert stamp(folder) == before
    assert read_results(folder)["arms"] == read_results(finished)["arms"]


def test_the_written_config_replays(finished: Path, tmp_path: Path) -> None:
    run_command(
        "in2core", "--config", str(finished / "run" / "config.yaml"), "--output_dir", str(tmp_path / "run"),
        "--arms", "coreset", "full", "--budgets", "epochs",
    )  # fmt: skip
    wanted = {arm["arm"]: arm["test_loss"] for arm in read_results(finished)["arms"] if arm["budget"] == "epochs"}
    for arm in read_results(tmp_path)["arms"]:
        assert arm["test_loss"] == pytest.approx(wanted[arm["arm"]], rel=1e-6)


def test_trained_is_shown_is_published_is_what_the_record_says(
    finished: Path, copied: Callable[..., Path], tmp_path: Path
) -> None:
    record = tmp_path / "run" / "coresets.json"
    content = json.loads(record.read_text(encoding="utf-8"))
    chosen = content["coresets"]["coreset_25"]["positions"]
    other = sorted(set(range(NUM_POOL)) - set(chosen))[: len(chosen)]
    content["coresets"]["coreset_25"]["positions"] = other
    record.write_text(json.dumps(content), encoding="utf-8")
    folder = copied()
    scored = load_from_disk(str(folder / "run" / "scored"))
    rows = scored.select(other).to_list()
    base = AutoModelForCausalLM.from_pretrained(finished / "model").eval()
    trained = [arm for arm in read_results(folder)["arms"] if arm["arm"] == "coreset"]
    assert len(trained) == 2
    assert all(arm["loss_tokens"] == compute_naive_loss(base, finished, rows)[1] for arm in trained)
    before = [arm for arm in read_results(finished)["arms"] if arm["arm"] == "coreset"]
    assert [arm["test_loss"] for arm in trained] != [arm["test_loss"] for arm in before]
    shown = read_pool(read_run(folder / "run"), scored)
    assert np.flatnonzero(shown.coreset == 0.25).tolist() == other
    coreset = take_coresets(folder / "run", scored, {})["coreset_25"]
    splits, _ = _choose_splits(scored, {"coreset_25": coreset}, None)
    assert set(splits["coreset_25"]["id"][:]) == {row["id"] for row in rows}


def test_lost_parts_are_made_again_alike(finished: Path, copied: Callable[..., Path], tmp_path: Path) -> None:
    # As a kill leaves them: an arm half written, a result file cut off, a selection without its mark.
    run = tmp_path / "run"
    shutil.move(run / "arms" / "coreset_25-steps-seed0", run / "arms" / ".coreset_25-steps-seed0.tmp")
    cut = run / "arms" / "random_25-steps-seed0" / "result.json"
    cut.write_text(cut.read_text(encoding="utf-8")[:40], encoding="utf-8")
    (run / "selection.json").unlink()
    (run / "results.json").unlink()
    folder = copied()
    before, after = read_results(finished), read_results(folder)
    assert [arm["test_loss"] for arm in after["arms"]] == [arm["test_loss"] for arm in before["arms"]]
    assert after["selection"]["resumed"]
    times, now = stamp_models(finished), stamp_models(folder)
    assert {Path(name).parts[2] for name in times if "arms" in name and times[name] != now[name]} == {
        "coreset_25-steps-seed0",
        "random_25-steps-seed0",
    }
    assert not [path for path in (folder / "run" / "arms").iterdir() if path.name.startswith(".")]


def test_arms_and_seeds_can_be_added(finished: Path, copied: Callable[..., Path]) -> None:
    folder = copied("--seeds", "0", "1", "--arms", "coreset", "random", "full")
    arms = read_results(folder)["arms"]
    assert {(arm["arm"], arm["seed"]) for arm in arms} == {
        (arm, seed) for arm in ("coreset", "random", "full") for seed in (0, 1)
    }
    times, now = stamp_models(finished), stamp_models(folder)
    assert all(times[name] == now[name] for name in times)
    # Another seed gives another adapter and other random rows.
    losses = {arm["seed"]: arm["test_loss"] for arm in arms if arm["arm"] == "coreset" and arm["budget"] == "steps"}
    assert losses[0] != losses[1]


def test_another_configuration_is_refused_and_can_be_forced(finished: Path, copied: Callable[..., Path]) -> None:
    with pytest.raises(ValueError) as raised:
        copied(learning_rate=1e-3)
    assert "learning_rate was 0.003 and is 0.001" in str(raised.value)
    assert "--overwrite_output_dir" in str(raised.value)
    folder = copied("--overwrite_output_dir", "--arms", "coreset", "--budgets", "epochs", learning_rate=1e-3)
    assert read_results(folder)["arms"][0]["test_loss"] != read_results(finished)["arms"][5]["test_loss"]
    assert stamp(folder)["run/reference/training.json"] != stamp(finished)["run/reference/training.json"]


def test_other_content_of_the_same_files_is_refused(copied: Callable[..., Path], tmp_path: Path) -> None:
    other = write_rows(tmp_path / "test.jsonl", make_rows("reverse", NUM_TEST, seed=99))
    with pytest.raises(ValueError, match="the content of the test changed, or how this version reads it"):
        copied(test=other)


def test_the_same_content_elsewhere_is_accepted(finished: Path, copied: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copy(finished / "test.jsonl", tmp_path / "moved.jsonl")
    assert stamp(copied(test=str(tmp_path / "moved.jsonl"))) == stamp(finished)
