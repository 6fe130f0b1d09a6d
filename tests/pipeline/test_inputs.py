"""The pipeline: what it refuses before any work, and the shapes of input it takes."""

import html
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from datasets import Dataset, Features, load_from_disk
from families import FAMILIES
from families import make_config as make_family
from helpers import CHAT_TEMPLATE, WORDS, make_model, make_tokenizer
from recipe_runs import (
    NUM_POOL,
    NUM_TEST,
    NUM_VALIDATION,
    Inputs,
    compute_naive_loss,
    make_rows,
    read_results,
    run_command,
    write_config,
    write_rows,
)
from transformers import AutoModelForCausalLM

from hf_in2core import select_coreset
from hf_in2core.cards.dataset import render_influence_section
from hf_in2core.pipeline.inputs import draw_halves
from hf_in2core.rows.preparation import Preparation


# --- what is refused before any work ---


def refuse(inputs: Inputs, folder: Path, *flags: str, **changes: Any) -> str:
    """The message with which a run is refused; nothing may have been trained."""
    config = inputs[1] | {"output_dir": str(folder / "run")} | changes
    with pytest.raises((ValueError, OSError)) as raised:
        run_command("run", "--config", write_config(folder, config), *flags)
    assert not (folder / "run" / "reference").exists() and not (folder / "run" / "checkpoints").exists()
    return str(raised.value)


def leak(inputs: Inputs, folder: Path) -> dict[str, Any]:
    """Settings with three rows of the pool in the validation set, and one row of that in the test set."""
    pool = [json.loads(line) for line in Path(inputs[1]["pool"]).read_text(encoding="utf-8").splitlines()]
    # Rows that say the same, whatever else they carry and however they are written.
    leaked = [row | {"id": "other", "prompt": row["prompt"].upper().replace(" ", "  ")} for row in pool[:3]]
    test = make_rows("reverse", NUM_TEST, seed=4)
    validation = [*make_rows("reverse", NUM_VALIDATION, seed=3), *leaked, test[5]]
    return inputs[1] | {
        "validation": [write_rows(folder / "validation.jsonl", validation)],
        "output_dir": str(folder / "run"),
        "arms": ["coreset"],
        "budgets": ["epochs"],
    }


LEAKED = [
    f"3 of {NUM_POOL} rows of the pool are in the validation set too (row 0 of the pool is row {NUM_VALIDATION} of "
    "the validation set)",
    f"1 of {NUM_VALIDATION + 4} rows of the validation set are in the test set too (row {NUM_VALIDATION + 3} of the "
    "validation set is row 5 of the test set)",
]


def test_shared_rows_are_refused(inputs: Inputs, tmp_path: Path) -> None:
    message = refuse(inputs, tmp_path, **leak(inputs, tmp_path))
    assert all(found in message for found in [*LEAKED, "--drop_overlap", "--allow_overlap"])


def test_shared_rows_are_dropped(inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run_command("run", "--config", write_config(tmp_path, leak(inputs, tmp_path)), "--drop_overlap")
    warned = capsys.readouterr().err
    assert all(f"{found}; they are dropped" in warned for found in LEAKED)
    scored = load_from_disk(str(tmp_path / "run" / "scored"))
    pool = [json.loads(line) for line in Path(inputs[1]["pool"]).read_text(encoding="utf-8").splitlines()]
    assert scored["id"][:] == [row["id"] for row in pool[3:]]
    results = read_results(tmp_path)
    assert results["selection"]["validation_rows"] == {"validation": NUM_VALIDATION + 3}
    assert results["data"]["pool"]["shared"] == {"validation": 0, "test": 0}
    assert not any(found.partition(" (row")[0] in results["verdict"]["text"] for found in LEAKED)
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "judged on the test set, which neither trained nor selected anything." in page


def test_shared_rows_are_told_of_wherever_the_run_is(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run_command("run", "--config", write_config(tmp_path, leak(inputs, tmp_path)), "--allow_overlap")
    out, err = capsys.readouterr()
    assert all(f"warning: {found}" in err for found in LEAKED)
    results = read_results(tmp_path)
    assert results["selection"]["rows"] == NUM_POOL
    assert results["data"]["pool"]["shared"] == {"validation": 3, "test": 0}
    assert results["data"]["validation"]["shared"] == {"test": 1}
    in_pool, in_test = (found.partition(" (row")[0] for found in LEAKED)
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    card = render_influence_section("ada/rows", features=Features(), splits={"train": NUM_POOL}, results=results)
    section = html.unescape(card)
    for text in (results["verdict"]["text"], " ".join(out.split()), page, section):
        assert "WARNING" in text and in_pool in text and in_test in text
    for text in (page, section):
        assert f"on the test set, which is not apart from what trained and selected: {in_test}." in text
        assert "neither trained" not in text


@pytest.mark.parametrize("name", ["test", "pool"])
def test_two_sets_of_one_source(inputs: Inputs, tmp_path: Path, name: str) -> None:
    # The same file by another path.
    source = str(Path(inputs[1][name]).parent / "." / ".." / inputs[0].name / Path(inputs[1][name]).name)
    for flag in ("--drop_overlap", "--dry_run"):
        message = refuse(inputs, tmp_path, flag, validation=["one=" + inputs[1]["validation"][0], f"two={source}"])
        assert message.startswith(f"--validation and --{name} name the same source ({source})")


def test_a_set_of_which_nothing_is_left(inputs: Inputs, tmp_path: Path) -> None:
    copied = shutil.copy(inputs[1]["test"], tmp_path / "copy.jsonl")
    message = refuse(inputs, tmp_path, "--drop_overlap", validation=[str(copied)])
    assert f"{NUM_TEST} of {NUM_TEST} rows of the validation set are in the test set too" in message
    assert "nothing is left of the validation set" in message


def test_dropping_and_allowing_at_once(inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        run_command("run", "--config", write_config(tmp_path, inputs[1]), "--drop_overlap", "--allow_overlap")
    assert "Give one" in capsys.readouterr().err


def test_near_copies_are_counted_and_shown(inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pool = [json.loads(line) for line in Path(inputs[1]["pool"]).read_text(encoding="utf-8").splitlines()]
    words = [f"word{number}" for number in range(12)]
    known = {"prompt": " ".join(words), "completion": " <b>cat</b>"}
    changed = known | {"prompt": " ".join([*words[:11], "Another!"])}
    test = make_rows("reverse", NUM_TEST, seed=4)
    changes = {
        "pool": write_rows(tmp_path / "pool.jsonl", [*pool, pool[0] | known]),
        # The last one is no near-copy but the same row.
        "test": write_rows(tmp_path / "test.jsonl", [*test, test[0] | changed, test[0] | known]),
        "arms": ["coreset"],
        "budgets": ["epochs"],
        "output_dir": str(tmp_path / "run"),
    }
    run_command("run", "--config", write_config(tmp_path, inputs[1] | changes), "--allow_overlap")
    said = f"1 of {NUM_TEST + 2} rows of the test set have a near-copy in the pool"
    assert said in capsys.readouterr().err
    found = read_results(tmp_path)["data"]
    assert found["pool"]["shared"] == {"validation": 0, "test": 1}
    assert found["validation"]["near_copies"] == {"rows": 0, "pairs": []}
    assert found["test"]["near_copies"]["rows"] == 1
    (pair,) = found["test"]["near_copies"]["pairs"]
    assert (pair["row"], pair["pool_row"]) == (NUM_TEST, NUM_POOL)
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert said in page and "word10 Another! &lt;b&gt;cat&lt;/b&gt;" in page


def test_missing_and_clashing_columns(inputs: Inputs, tmp_path: Path) -> None:
    assert "no column kind" in refuse(inputs, tmp_path, task_column="kind")
    # After hours it would not be known which tasks count.
    bare = [{name: row[name] for name in ("prompt", "completion")} for row in make_rows("reverse", 8, seed=3)]
    sets = [f"told={inputs[1]['validation'][0]}", f"bare={write_rows(tmp_path / 'bare.jsonl', bare)}"]
    message = refuse(inputs, tmp_path, validation=sets)
    assert "The validation bare set has no column task; it has: prompt, completion" in message
    assert "leave out --task_column" in message
    message = refuse(inputs, tmp_path, columns=["prompt=question", "completion=answer"])
    assert "question" in message and "prompt, completion" in message
    pool = [row | {"influence": 0.0} for row in make_rows("copy", 9, seed=7)]
    message = refuse(inputs, tmp_path, pool=write_rows(tmp_path / "scored.jsonl", pool))
    assert "already has the column(s) influence" in message


def test_empty_sets(inputs: Inputs, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    for name in ("pool", "validation", "test"):
        empty: Any = str(tmp_path / "empty.jsonl")
        assert "has no rows" in refuse(inputs, tmp_path, **{name: [empty] if name == "validation" else empty})


def test_no_loss_left_in_the_test_set(inputs: Inputs, tmp_path: Path) -> None:
    rows = [{"prompt": " ".join(WORDS * 3), "completion": " cat"}]
    message = refuse(inputs, tmp_path, test=write_rows(tmp_path / "long.jsonl", rows), max_length=32)
    assert "No row of the test set (1 rows) carries loss at `max_length=32`" in message


def test_conversations_without_a_chat_template(inputs: Inputs, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "cat"}, {"role": "assistant", "content": "mat"}]
    path = write_rows(tmp_path / "chat.jsonl", [{"messages": turns}] * 9)
    message = refuse(inputs, tmp_path, pool=path, task_column=None, wrong_column=None)
    assert "no chat template" in message


def test_adapters_that_cannot_be_trained_or_scored(inputs: Inputs, tmp_path: Path) -> None:
    assert "nothing_of_the_kind" in refuse(inputs, tmp_path, lora_target_modules=["nothing_of_the_kind"])
    assert "lm_head" in refuse(inputs, tmp_path, lora_target_modules=["lm_head"])
    assert "there is no such file or folder" in refuse(inputs, tmp_path, reference_adapter=str(tmp_path / "none"))
    AutoModelForCausalLM.from_config(make_family("mixtral", **FAMILIES["mixtral"])).save_pretrained(tmp_path / "moe")
    make_tokenizer().save_pretrained(tmp_path / "moe")
    message = refuse(inputs, tmp_path, model_name_or_path=str(tmp_path / "moe"), lora_dropout=0.05)
    assert "`lora_dropout=0.05` cannot work" in message and "--lora_dropout 0" in message


def test_a_fraction_that_keeps_no_row(inputs: Inputs, tmp_path: Path) -> None:
    assert "is no row" in refuse(inputs, tmp_path, fractions=[0.005])


def test_a_missing_setup_script(inputs: Inputs, tmp_path: Path) -> None:
    assert "no/script.py" in refuse(inputs, tmp_path, setup_script="no/script.py --rows 3")


def test_a_full_disk(tmp_path: Path) -> None:
    from hf_in2core.pipeline.job import check_disk

    pool = Dataset.from_list(make_rows("copy", 5, seed=0))
    check_disk(tmp_path / "new" / "run", pool, 1000, 3, 1000)
    for too_much in ((10**15, 3, 0), (1000, 3, 10**15)):
        with pytest.raises(ValueError, match="GB left"):
            check_disk(tmp_path / "new" / "run", pool, *too_much)


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
    run_command("run", "--config", write_config(tmp_path, config | changes))
    scored = load_from_disk(str(tmp_path / "run" / "scored"))
    both = np.array([scored["influence_reverse"][:], scored["influence_copy"][:]])
    assert scored["influence"][:] == pytest.approx(both.mean(0))
    # The same adapter and validation set as in the finished run.
    before = load_from_disk(str(finished / "run" / "scored"))
    assert scored["influence_reverse"][:] == pytest.approx(before["influence"][:], rel=1e-5, abs=1e-3)
    results = read_results(tmp_path)
    assert results["selection"]["reference_seconds"] == 0
    assert results["selection"]["validation_rows"] == {"reverse": NUM_VALIDATION, "copy": 6}
    assert [arm["steps"] for arm in results["arms"]] == [3, 3]
    target = AutoModelForCausalLM.from_pretrained(tmp_path / "target").eval()
    loss, _ = compute_naive_loss(target, finished, make_rows("reverse", NUM_TEST, seed=4))
    assert results["base"]["test_loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("strategy", ["round_robin_rows", "greedy"])
def test_a_coreset_in_turn_over_validation_rows(inputs: Inputs, tmp_path: Path, strategy: str) -> None:
    changes = {"arms": ["coreset", "opponents"], "budgets": ["steps"], "max_steps": 2, "strategy": strategy}
    run_command(
        "in2core", "--config", write_config(tmp_path, inputs[1] | {"output_dir": str(tmp_path / "run")} | changes)
    )
    scored = load_from_disk(str(tmp_path / "run" / "scored"))
    assert {len(row) for row in scored["influence_per_query"]} == {NUM_VALIDATION}
    coreset = select_coreset(scored, fraction=0.25, strategy=strategy)
    left = scored.filter(lambda row: row["id"] not in coreset["id"][:])
    results = read_results(tmp_path)
    assert {arm["arm"]: arm["loss_tokens"] for arm in results["arms"]} == {
        "coreset": sum(coreset["num_loss_tokens"]),
        "opponents": sum(select_coreset(left, size=len(coreset), strategy="bottom")["num_loss_tokens"]),
    }
    examples = results["examples"]
    assert not {row["id"] for row in examples["opponents"]} & set(coreset["id"])
    assert all("best rank" in row["standing"] for kind in examples.values() for row in kind)
    assert {"taken" in row for row in examples["proponents"] if row["id"] in coreset["id"][:]} == {True}
    assert f"in turn by {NUM_VALIDATION} validation rows" in results["choice"]["how"]
    assert set(coreset["id"]) != set(select_coreset(scored, fraction=0.25)["id"])
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "the cut keeps" not in page


def test_one_validation_set_cannot_take_turns(inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    settings = write_config(tmp_path, inputs[1] | {"strategy": "round_robin"})
    with pytest.raises(SystemExit):
        run_command("run", "--config", settings)
    assert "--strategy round_robin_rows" in capsys.readouterr().err


def test_a_part_of_the_pool_for_the_reference(inputs: Inputs, tmp_path: Path) -> None:
    changes = {"output_dir": str(tmp_path / "run"), "arms": ["coreset"], "budgets": ["epochs"]}
    config = inputs[1] | changes | {"reference_fraction": 0.5, "reference_num_train_epochs": 2}
    run_command("run", "--config", write_config(tmp_path, config))
    selection = read_results(tmp_path)["selection"]
    # 30 rows in batches of 8, twice.
    assert (selection["reference_rows"], selection["reference_steps"], selection["rows"]) == (30, 8, NUM_POOL)


@pytest.mark.parametrize("form", ["messages", "conversational", "text", "alpaca", "sharegpt", "field"])
def test_every_format(inputs: Inputs, tmp_path: Path, form: str) -> None:
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
                    "field": {"content": row["prompt"] + row["completion"], "text": "x"},
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
        "dataset_text_field": "content" if form == "field" else "text",
        "task_column": None,
        "wrong_column": None,
        "output_dir": str(tmp_path / "run"),
        "arms": ["coreset"],
        "budgets": ["epochs"],
        "max_steps": 1,
        "reference_max_steps": 1,
    }
    run_command("run", "--config", write_config(tmp_path, config))
    results = read_results(tmp_path)
    assert results["arms"][0]["rows"] == 15
    first = results["examples"]["proponents"][0]
    raw = json.loads(Path(inputs[1]["pool"]).read_text(encoding="utf-8").splitlines()[first["row"]])
    assert all(said.strip() in first["text"] for said in (raw["prompt"], raw["completion"]))
    # What carries loss: of a text every token but its first, and otherwise the answer.
    whole, answer = (len(tokenizer(said)["input_ids"]) for said in (raw["prompt"], raw["completion"]))
    assert first["num_loss_tokens"] >= (whole + answer - 1 if form in ("text", "field", "messages") else answer)


@pytest.mark.parametrize("num_answers", [4, 7, 40])
def test_halves_hold_every_answer_where_answers_are_few(num_answers: int) -> None:
    rows = Dataset.from_list([{"prompt": f"q {n}", "completion": f"a {n * 7 % num_answers}"} for n in range(40)])
    preparation = Preparation(make_tokenizer(), completion_only_loss=True)
    halves = draw_halves(rows, 5, preparation)
    assert sorted(np.concatenate(halves)) == list(range(40)) and [len(half) for half in halves] == [20, 20]
    counts = [Counter(rows.select(half)["completion"]) for half in halves]
    if num_answers == 40:  # as random as before
        assert halves[0].tolist() == sorted(np.random.default_rng(5).permutation(40)[:20])
    else:
        assert all(abs(counts[0][answer] - counts[1][answer]) <= 1 for answer in set(rows["completion"]))
    again = draw_halves(rows, 5, preparation)
    assert all(half.tolist() == other.tolist() for half, other in zip(halves, again, strict=True))
    assert draw_halves(rows, 6, preparation)[0].tolist() != halves[0].tolist()
