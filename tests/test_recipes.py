"""The pipeline and the stage recipes on tiny models made on the spot: what they compute, keep, resume and refuse."""

import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import CHAT_TEMPLATE, WORDS, make_model, make_tokenizer
from datasets import Dataset, load_from_disk
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_in2core import InfluenceScorer, select_coreset


ROOT = Path(__file__).parents[1]
NUM_POOL, NUM_VALIDATION, NUM_TEST = 60, 8, 11


def load_recipe(name: str) -> ModuleType:
    """A recipe as a module, under a name that no library has (there is an `evaluate` among them)."""
    recipes = str(ROOT / "recipes")
    if recipes not in sys.path:
        sys.path.append(recipes)
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", ROOT / "recipes" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_recipe(name: str, *flags: str) -> None:
    module = load_recipe(name)
    module.main(module.make_parser().parse(flags))


def make_rows(task: str, num_rows: int, seed: int) -> list[dict[str, Any]]:
    generator = random.Random(seed)
    rows = []
    for number in range(num_rows):
        words = [generator.choice(WORDS) for _ in range(generator.randint(2, 6))]
        answer = words[::-1] if task == "reverse" else words
        row = {"prompt": " ".join(words) + " :", "completion": " " + " ".join(answer), "id": f"{task}-{seed}-{number}"}
        rows.append(row | {"task": task, "is_wrong": number % 7 == 0})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def make_inputs(folder: Path) -> dict[str, Any]:
    """A model and data in a folder, and the settings of a run on them."""
    make_model(num_layers=2).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    pool = make_rows("reverse", NUM_POOL // 2, seed=0) + make_rows("copy", NUM_POOL // 2, seed=1)
    random.Random(2).shuffle(pool)
    return {
        "model_name_or_path": str(folder / "model"),
        "pool": write_rows(folder / "pool.jsonl", pool),
        "validation": [write_rows(folder / "validation.jsonl", make_rows("reverse", NUM_VALIDATION, seed=3))],
        "test": write_rows(folder / "test.jsonl", make_rows("reverse", NUM_TEST, seed=4)),
        "output_dir": str(folder / "run"),
        "fractions": [0.25],
        "seeds": [0],
        "budgets": ["steps", "epochs"],
        "learning_rate": 3e-3,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 8,
        "activation_checkpointing": False,
        "lora_r": 4,
        "lora_dropout": 0.0,
        "lora_target_modules": ["all-linear"],
        "task_column": "task",
        "wrong_column": "is_wrong",
    }


def write_config(folder: Path, config: dict[str, Any]) -> str:
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return str(path)


def read_results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run" / "results.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("inputs")
    return folder, make_inputs(folder)


@pytest.fixture(scope="module")
def finished(inputs: tuple[Path, dict[str, Any]]) -> Path:
    """Folder of a finished run."""
    folder, config = inputs
    run_recipe("in2core", "--config", write_config(folder, config))
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Callable[..., Any]:
    """Run the pipeline again into a copy of the finished run, with other settings; returns its folder."""
    shutil.copytree(finished / "run", tmp_path / "run", symlinks=True)
    config = yaml.safe_load((finished / "settings.yaml").read_text(encoding="utf-8"))

    def rerun(*flags: str, **changes: Any) -> Path:
        changed = config | {"output_dir": str(tmp_path / "run")} | changes
        run_recipe("in2core", "--config", write_config(tmp_path, changed), *flags)
        return tmp_path

    return rerun


def stamp(folder: Path) -> dict[str, int]:
    """When each file of arms, reference and selection was written."""
    patterns = ("arms/*/*", "reference/*", "selection.json", "scored/*", "scorer/*")
    files = [path for pattern in patterns for path in (folder / "run").glob(pattern) if path.is_file()]
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in files}


def compute_naive_loss(model: torch.nn.Module, folder: Path, rows: list[dict[str, Any]]) -> tuple[float, int]:
    """Mean loss per completion token and the end-of-sequence token, one row at a time; and the number of tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    total, count = 0.0, 0
    for row in rows:
        prompt = tokenizer(row["prompt"]).input_ids
        ids = tokenizer(row["prompt"] + row["completion"]).input_ids + [tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].double()
        nll = -torch.log_softmax(logits[:-1], dim=-1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
        total += float(nll[len(prompt) - 1 :].sum())
        count += len(ids) - len(prompt)
    return total / count, count


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
    assert len(results["examples"]["proponents"]) == len(results["examples"]["opponents"]) == 10
    assert "config" in results and "command" in results and results["machine"]["torch"] == torch.__version__
    assert (finished / "run" / "config.yaml").is_file()


def test_the_full_arm_is_trained_once_for_both_budgets(finished: Path) -> None:
    names = {path.name for path in (finished / "run" / "arms").iterdir()}
    assert "steps-full-1-0" in names and "epochs-full-1-0" not in names
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
        folder = finished / "run" / "arms" / f"{arm['budget']}-{arm['arm']}-{arm['fraction']:g}-{arm['seed']}"
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(finished / "model"), folder).eval()
        assert arm["test_loss"] == pytest.approx(compute_naive_loss(model, finished, rows)[0], rel=1e-5)
        assert arm["test_loss"] != results["base"]["test_loss"]


def test_arms_train_on_the_rows_they_are_named_for(finished: Path) -> None:
    load_recipe("in2core")
    from comparison import Arm

    scored = load_from_disk(str(finished / "run" / "scored"))
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
        positions = Arm(arm["arm"], arm["fraction"], arm["seed"], arm["budget"]).select(scored)
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
    load_recipe("in2core")
    from stages import count_loss_tokens

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


def test_a_rerun_computes_nothing(finished: Path, copied: Callable[..., Path]) -> None:
    folder = copied()
    before = {name: time for name, time in stamp(finished).items()}
    # copytree keeps the times of files.
    assert stamp(folder) == before
    assert read_results(folder)["arms"] == read_results(finished)["arms"]


def test_the_written_config_replays(finished: Path, tmp_path: Path) -> None:
    run_recipe(
        "in2core", "--config", str(finished / "run" / "config.yaml"), "--output_dir", str(tmp_path / "run"),
        "--arms", "coreset", "full", "--budgets", "epochs",
    )  # fmt: skip
    wanted = {arm["arm"]: arm["test_loss"] for arm in read_results(finished)["arms"] if arm["budget"] == "epochs"}
    for arm in read_results(tmp_path)["arms"]:
        assert arm["test_loss"] == pytest.approx(wanted[arm["arm"]], rel=1e-6)


def test_lost_parts_are_made_again_alike(finished: Path, copied: Callable[..., Path], tmp_path: Path) -> None:
    # As a kill leaves them: an arm half written, a result file cut off, a selection without its mark.
    run = tmp_path / "run"
    shutil.move(run / "arms" / "steps-coreset-0.25-0", run / "arms" / ".steps-coreset-0.25-0.tmp")
    cut = run / "arms" / "steps-random-0.25-0" / "result.json"
    cut.write_text(cut.read_text(encoding="utf-8")[:40], encoding="utf-8")
    (run / "selection.json").unlink()
    (run / "results.json").unlink()
    folder = copied()
    before, after = read_results(finished), read_results(folder)
    assert [arm["test_loss"] for arm in after["arms"]] == [arm["test_loss"] for arm in before["arms"]]
    assert after["selection"]["resumed"]
    times, now = stamp(finished), stamp(folder)
    assert {Path(name).parts[2] for name in times if "arms" in name and times[name] != now[name]} == {
        "steps-coreset-0.25-0",
        "steps-random-0.25-0",
    }
    assert not [path for path in (folder / "run" / "arms").iterdir() if path.name.startswith(".")]


def test_arms_and_seeds_can_be_added(finished: Path, copied: Callable[..., Path]) -> None:
    folder = copied("--seeds", "0", "1", "--arms", "coreset", "random", "full")
    arms = read_results(folder)["arms"]
    assert {(arm["arm"], arm["seed"]) for arm in arms} == {
        (arm, seed) for arm in ("coreset", "random", "full") for seed in (0, 1)
    }
    times, now = stamp(finished), stamp(folder)
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
    with pytest.raises(ValueError, match="the content of the test changed"):
        copied(test=other)


def test_the_same_content_elsewhere_is_accepted(finished: Path, copied: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copy(finished / "test.jsonl", tmp_path / "moved.jsonl")
    assert stamp(copied(test=str(tmp_path / "moved.jsonl"))) == stamp(finished)


# --- what is refused before any work ---


def refuse(inputs: tuple[Path, dict[str, Any]], folder: Path, *flags: str, **changes: Any) -> str:
    """The message with which a run is refused; nothing may have been trained."""
    config = inputs[1] | {"output_dir": str(folder / "run")} | changes
    with pytest.raises((ValueError, OSError)) as raised:
        run_recipe("in2core", "--config", write_config(folder, config), *flags)
    assert not (folder / "run" / "reference").exists() and not (folder / "run" / "checkpoints").exists()
    return str(raised.value)


def test_overlap_is_counted_and_can_be_dropped(
    inputs: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder, config = inputs
    pool = [json.loads(line) for line in Path(config["pool"]).read_text(encoding="utf-8").splitlines()]
    # Rows that agree in what is trained on, whatever else they carry; one more validation row is in the test set.
    leaked = [row | {"id": "other"} for row in pool[:3]]
    validation = make_rows("reverse", NUM_VALIDATION, seed=3)
    test = make_rows("reverse", NUM_TEST, seed=4)
    sources = {
        "validation": [write_rows(tmp_path / "validation.jsonl", [*validation, *leaked, test[0]])],
        "test": write_rows(tmp_path / "test.jsonl", test),
        "output_dir": str(tmp_path / "run"),
    }
    flags = ["--arms", "coreset", "--budgets", "epochs"]
    run_recipe("in2core", "--config", write_config(tmp_path, config | sources), *flags)
    warned = capsys.readouterr().err
    assert f"3 of {NUM_POOL} rows of the pool set are in the validation set too" in warned
    assert f"1 of {NUM_VALIDATION + 4} rows of the validation set are in the test set too" in warned
    assert len(load_from_disk(str(tmp_path / "run" / "scored"))) == NUM_POOL
    dropped = config | sources | {"output_dir": str(tmp_path / "dropped")}
    run_recipe("in2core", "--config", write_config(tmp_path, dropped), "--drop_overlap", *flags)
    scored = load_from_disk(str(tmp_path / "dropped" / "scored"))
    assert scored["id"][:] == [row["id"] for row in pool[3:]]
    results = json.loads((tmp_path / "dropped" / "results.json").read_text(encoding="utf-8"))
    assert results["selection"]["validation_rows"] == {"validation": NUM_VALIDATION + 3}


def test_a_validation_set_that_is_the_test_set(inputs: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    message = refuse(inputs, tmp_path, "--drop_overlap", validation=[inputs[1]["test"]])
    assert f"{NUM_TEST} of {NUM_TEST} rows of the validation set are in the test set too" in message


def test_missing_and_clashing_columns(inputs: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    assert "no column kind" in refuse(inputs, tmp_path, task_column="kind")
    message = refuse(inputs, tmp_path, columns=["prompt=question", "completion=answer"])
    assert "question" in message and "prompt, completion" in message
    pool = [row | {"influence": 0.0} for row in make_rows("copy", 9, seed=7)]
    message = refuse(inputs, tmp_path, pool=write_rows(tmp_path / "scored.jsonl", pool))
    assert "already has the column(s) influence" in message


def test_empty_sets(inputs: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    for name in ("pool", "validation", "test"):
        empty: Any = str(tmp_path / "empty.jsonl")
        assert "has no rows" in refuse(inputs, tmp_path, **{name: [empty] if name == "validation" else empty})


def test_no_loss_left_in_the_test_set(inputs: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    rows = [{"prompt": " ".join(WORDS * 3), "completion": " cat"}]
    message = refuse(inputs, tmp_path, test=write_rows(tmp_path / "long.jsonl", rows), max_length=32)
    assert "No row of the test set (1 rows) carries loss at `max_length=32`" in message


def test_conversations_without_a_chat_template(inputs: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "cat"}, {"role": "assistant", "content": "mat"}]
    path = write_rows(tmp_path / "chat.jsonl", [{"messages": turns}] * 9)
    message = refuse(inputs, tmp_path, pool=path, task_column=None, wrong_column=None)
    assert "no chat template" in message


def test_adapters_that_cannot_be_trained_or_scored(inputs: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    assert "nothing_of_the_kind" in refuse(inputs, tmp_path, lora_target_modules=["nothing_of_the_kind"])
    assert "DoRA" in refuse(inputs, tmp_path, use_dora=True)
    assert "is no adapter that PEFT can load" in refuse(inputs, tmp_path, reference_adapter=str(tmp_path / "none"))


def test_a_fraction_that_keeps_no_row(inputs: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    assert "is no row" in refuse(inputs, tmp_path, fractions=[0.005])


def test_a_missing_setup_script(inputs: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    assert "no/script.py" in refuse(inputs, tmp_path, setup_script="no/script.py --rows 3")


def test_a_full_disk(tmp_path: Path) -> None:
    load_recipe("in2core")
    from job import check_disk

    pool = Dataset.from_list(make_rows("copy", 5, seed=0))
    check_disk(tmp_path / "new" / "run", pool, 1000, 3)
    with pytest.raises(ValueError, match="GB left"):
        check_disk(tmp_path / "new" / "run", pool, 10**15, 3)


# --- other shapes of a run ---


def test_several_validation_sets_a_given_adapter_and_another_target(finished: Path, tmp_path: Path) -> None:
    make_model(seed=5, num_layers=3).save_pretrained(tmp_path / "target")
    make_tokenizer().save_pretrained(tmp_path / "target")
    config = yaml.safe_load((finished / "settings.yaml").read_text(encoding="utf-8"))
    changes = {
        "target_model_name_or_path": str(tmp_path / "target"),
        "reference_adapter": str(finished / "run" / "reference"),
        "validation": [
            f"reverse={config['validation'][0]}",
            "copy=" + write_rows(tmp_path / "copy.jsonl", make_rows("copy", 6, seed=8)),
        ],
        "output_dir": str(tmp_path / "run"),
        "arms": ["coreset", "random"],
        "budgets": ["steps"],
        "max_steps": 3,
    }
    run_recipe("in2core", "--config", write_config(tmp_path, config | changes))
    scored = load_from_disk(str(tmp_path / "run" / "scored"))
    both = np.array([scored["influence_reverse"][:], scored["influence_copy"][:]])
    assert scored["influence"][:] == pytest.approx(both.mean(0))
    # The same adapter and validation set as in the finished run.
    before = load_from_disk(str(finished / "run" / "scored"))
    assert scored["influence_reverse"][:] == pytest.approx(before["influence"][:], rel=1e-5)
    results = read_results(tmp_path)
    assert results["selection"]["reference_seconds"] == 0
    assert results["selection"]["validation_rows"] == {"reverse": NUM_VALIDATION, "copy": 6}
    assert [arm["steps"] for arm in results["arms"]] == [3, 3]
    target = AutoModelForCausalLM.from_pretrained(tmp_path / "target").eval()
    loss, _ = compute_naive_loss(target, finished, make_rows("reverse", NUM_TEST, seed=4))
    assert results["base"]["test_loss"] == pytest.approx(loss, rel=1e-5)


def test_a_part_of_the_pool_for_the_reference(inputs: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    changes = {"output_dir": str(tmp_path / "run"), "arms": ["coreset"], "budgets": ["epochs"]}
    config = inputs[1] | changes | {"reference_fraction": 0.5, "reference_num_train_epochs": 2}
    run_recipe("in2core", "--config", write_config(tmp_path, config))
    selection = read_results(tmp_path)["selection"]
    # 30 rows in batches of 8, twice.
    assert (selection["reference_rows"], selection["reference_steps"], selection["rows"]) == (30, 8, NUM_POOL)


@pytest.mark.parametrize("form", ["messages", "conversational", "text", "alpaca", "sharegpt"])
def test_every_format(inputs: tuple[Path, dict[str, Any]], tmp_path: Path, form: str) -> None:
    shutil.copytree(inputs[0] / "model", tmp_path / "model")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(tmp_path / "model")

    def convert(path: str) -> str:
        rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
        converted: list[dict[str, Any]] = []
        for row in rows:
            user = {"role": "user", "content": row["prompt"]}
            assistant = {"role": "assistant", "content": row["completion"]}
            said = [{"from": "human", "value": row["prompt"]}, {"from": "gpt", "value": row["completion"]}]
            converted.append(
                {
                    "messages": {"messages": [user, assistant]},
                    "conversational": {"prompt": [user], "completion": [assistant]},
                    "text": {"text": row["prompt"] + row["completion"]},
                    "alpaca": {"instruction": row["prompt"], "input": "", "output": row["completion"]},
                    "sharegpt": {"conversations": said},
                }[form]
            )
        return write_rows(tmp_path / Path(path).name, converted)

    config = inputs[1] | {
        "model_name_or_path": str(tmp_path / "model"),
        "pool": convert(inputs[1]["pool"]),
        "validation": [convert(inputs[1]["validation"][0])],
        "test": convert(inputs[1]["test"]),
        "columns": [form] if form in ("alpaca", "sharegpt") else None,
        "task_column": None,
        "wrong_column": None,
        "output_dir": str(tmp_path / "run"),
        "arms": ["coreset"],
        "budgets": ["epochs"],
        "max_steps": 2,
    }
    run_recipe("in2core", "--config", write_config(tmp_path, config))
    results = read_results(tmp_path)
    assert results["arms"][0]["rows"] == 15
    assert results["examples"]["proponents"][0]["text"].strip()


# --- the stage recipes, one after the other ---


def test_stage_recipes_do_what_the_pipeline_does(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = yaml.safe_load((finished / "settings.yaml").read_text(encoding="utf-8"))
    model = ["--model_name_or_path", config["model_name_or_path"]]
    lora = ["--lora_r", "4", "--lora_dropout", "0", "--lora_target_modules", "all-linear"]
    training = [*lora, "--learning_rate", "3e-3", "--num_train_epochs", "1", "--per_device_train_batch_size", "8"]
    training += ["--activation_checkpointing", "false"]
    reference, scored, coreset, target = (
        str(tmp_path / name) for name in ("reference", "influence", "core", "target")
    )

    run_recipe("train_reference", *model, *training, "--pool", config["pool"], "--output_dir", reference)
    run_recipe(
        "score_influence", *model, "--reference_adapter", reference, "--pool", config["pool"],
        "--validation", config["validation"][0], "--output_dir", scored, "--activation_checkpointing", "false",
    )  # fmt: skip
    rows = load_from_disk(f"{scored}/scored")
    before = load_from_disk(str(finished / "run" / "scored"))
    assert rows["influence"][:] == pytest.approx(before["influence"][:], rel=1e-4)

    run_recipe("select_coreset", "--scored", f"{scored}/scored", "--fraction", "0.25", "--output", coreset)
    assert load_from_disk(coreset)["id"][:] == select_coreset(before, fraction=0.25)["id"][:]
    run_recipe("select_coreset", "--scored", f"{scored}/scored", "--size", "3", "--output", f"{coreset}.jsonl")
    assert len(Path(f"{coreset}.jsonl").read_text(encoding="utf-8").splitlines()) == 3

    pool_order = ["--scored", f"{scored}/scored", "--fraction", "0.25", "--order", "original", "--output", coreset]
    run_recipe("select_coreset", *pool_order)
    run_recipe("sft_coreset", *model, *training, "--dataset_name", coreset, "--output_dir", target, "--seed", "0")
    run_recipe(
        "evaluate", *model, "--adapters", target, "--test", config["test"], "--output_dir", f"{target}-evaluation"
    )
    base, adapter = json.loads(Path(f"{target}-evaluation/evaluation.json").read_text(encoding="utf-8"))
    results = read_results(finished)
    arm = next(arm for arm in results["arms"] if (arm["arm"], arm["budget"]) == ("coreset", "epochs"))
    assert base["test_loss"] == pytest.approx(results["base"]["test_loss"], rel=1e-6)
    assert adapter["test_loss"] == pytest.approx(arm["test_loss"], rel=1e-5)
    assert "test_loss" in capsys.readouterr().out

    # The fitted scorer alone scores another pool, here the same one.
    run_recipe("score_influence", "--scorer", f"{scored}/scorer", "--pool", config["pool"], "--output_dir", target)
    again = load_from_disk(f"{target}/scored")
    assert again["influence"][:] == pytest.approx(rows["influence"][:], rel=1e-5)
    assert again["influence_rank"][:] == rows["influence_rank"][:]


# --- through the launcher ---


def launch(*arguments: str, processes: int = 1, check: bool = True, **kwargs: Any) -> Any:
    """`accelerate launch` as users type it, on the CPU."""
    several = ["--multi_gpu", "--main_process_port", "0"] if processes > 1 else ["--cpu"]
    command = [
        sys.executable, "-m", "accelerate.commands.launch", *several, "--num_processes", str(processes),
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", *arguments,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=check, timeout=500, **kwargs
    )


@pytest.mark.slow
def test_launched_like_the_readme_says(inputs: tuple[Path, dict[str, Any]], finished: Path, tmp_path: Path) -> None:
    config = inputs[1] | {"output_dir": str(tmp_path / "run")}
    answer = launch("recipes/in2core.py", "--config", write_config(tmp_path, config))
    assert "Verdict:" in answer.stdout
    before, now = read_results(finished), read_results(tmp_path)
    for arm, again in zip(before["arms"], now["arms"], strict=True):
        assert again["test_loss"] == pytest.approx(arm["test_loss"], rel=1e-5)


@pytest.mark.slow
def test_two_processes(inputs: tuple[Path, dict[str, Any]], finished: Path, tmp_path: Path) -> None:
    """Half the batch on each of two processes is the same training, scoring and evaluation."""
    config = inputs[1] | {"output_dir": str(tmp_path / "run"), "per_device_train_batch_size": 4}
    answer = launch("recipes/in2core.py", "--config", write_config(tmp_path, config), processes=2)
    results = read_results(tmp_path)
    assert results["machine"]["processes"] == 2
    assert answer.stdout.count("[1/8]") == 1 and answer.stdout.count("Verdict:") == 1
    before = load_from_disk(str(finished / "run" / "scored"))
    scored = load_from_disk(str(tmp_path / "run" / "scored"))
    assert scored["id"][:] == before["id"][:]
    correlation = np.corrcoef(scored["influence"][:], before["influence"][:])[0, 1]
    assert correlation > 0.99
    assert results["base"]["test_loss"] == pytest.approx(read_results(finished)["base"]["test_loss"], rel=1e-6)
    assert [arm["steps"] for arm in results["arms"]] == [arm["steps"] for arm in read_results(finished)["arms"]]
    rerun = launch("recipes/in2core.py", "--config", write_config(tmp_path, config), processes=2)
    assert read_results(tmp_path)["arms"] == results["arms"]
    assert "[8/8]" in rerun.stdout


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill"])
def test_interrupted_and_resumed(
    inputs: tuple[Path, dict[str, Any]], finished: Path, tmp_path: Path, stop: signal.Signals
) -> None:
    config = inputs[1] | {"output_dir": str(tmp_path / "run")}
    command = [sys.executable, "-u", "recipes/in2core.py", "--config", write_config(tmp_path, config)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        for line in process.stdout:
            if line.startswith("[3/8]"):
                process.send_signal(stop)
                break
        process.stdout.read()
        said = process.stderr.read()
        code = process.wait()
    if stop == signal.SIGINT:
        assert code == 130
        assert "the same command goes on from there" in said and "Traceback" not in said
    partial = read_results(tmp_path)
    assert not partial["complete"] and "not finished" in partial["verdict"]["text"]
    kept = stamp(tmp_path)
    assert any("steps-random-0.25-0/result.json" in name for name in kept)
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=500)
    now = stamp(tmp_path)
    assert all(now[name] == kept[name] for name in kept if "arms" in name or "reference" in name)
    for arm, again in zip(read_results(finished)["arms"], read_results(tmp_path)["arms"], strict=True):
        assert again["test_loss"] == pytest.approx(arm["test_loss"], rel=1e-5)
