"""`in2core run` on a file of each kind that people have: what works goes through, what cannot is named."""

import gzip
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, load_from_disk
from helpers import CHAT_TEMPLATE, make_tokenizer
from recipe_runs import Inputs, load_command, make_rows, read_results, run_command, write_config, write_rows


Rows = list[dict[str, Any]]
Turns = list[dict[str, Any]]


def make_turns(row: dict[str, Any], **answer: Any) -> Turns:
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"], **answer}]


def call_tools(rows: Rows) -> Rows:
    arguments: list[Any] = [{"city": "a"}, {"n": 1, "b": 2}, {}]
    return [
        {
            "messages": [
                *make_turns(row, tool_calls=[{"type": "function", "function": {"name": "f", "arguments": given}}]),
                {"role": "tool", "content": "ok"},
                {"role": "assistant", "content": row["completion"]},
            ],
            "note": [None, 1, "a", {"b": 2}][number % 4],
        }
        for number, (row, given) in enumerate(zip(rows, arguments * len(rows), strict=False))
    ]


def use_parts(rows: Rows) -> Rows:
    made = [{"messages": make_turns(row)} for row in rows]
    for number, row in enumerate(made):
        if number % 2:
            row["messages"][0]["content"] = [{"type": "text", "text": row["messages"][0]["content"]}]
    return made


def write_alpaca(folder: Path, name: str, rows: Rows) -> str:
    table = Dataset.from_list([{"instruction": row["prompt"], "input": "", "output": "0123"} for row in rows])
    table.to_csv(folder / f"{name}.csv")
    return str(folder / f"{name}.csv")


def share(rows: Rows) -> Rows:
    names = {"user": "human", "assistant": "gpt"}
    return [
        {
            "system": "Be kind.",
            "conversations": [{"from": names[turn["role"]], "value": turn["content"]} for turn in make_turns(row)],
        }
        for row in rows
    ]


def rename(rows: Rows) -> Rows:
    return [{"instruction": row["prompt"], "context": "", "response": row["completion"]} for row in rows]


def call_in_text(rows: Rows) -> Rows:
    call = {"from": "function_call", "value": json.dumps({"name": "f", "arguments": {"a": 1}})}
    made = share(rows)
    return [
        {"items": [row["conversations"][0], call, {"from": "observation", "value": "ok"}, row["conversations"][1]]}
        for row in made
    ]


def write_openai(folder: Path, name: str, rows: Rows) -> str:
    made = [{"messages": [*make_turns(row, weight=0), *make_turns(row)]} for row in rows]
    path = folder / f"{name}.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in made).encode()))
    return str(path)


def leave_some_unanswered(rows: Rows) -> Rows:
    return [{"messages": make_turns(row)[: 1 if number == 1 else 2]} for number, row in enumerate(rows)]


def write_splits(folder: Path, name: str, rows: Rows) -> str:
    DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(folder / name)
    return str(folder / name)


def write_parts(folder: Path, name: str, rows: Rows) -> str:
    (folder / name).mkdir()
    for number in range(2):
        write_rows(folder / name / f"part-{number}.ndjson", rows[number::2])
    return str(folder / name)


def as_lines(change: Callable[[Rows], Rows], ending: str = ".jsonl") -> Callable[[Path, str, Rows], str]:
    return lambda folder, name, rows: write_rows(folder / f"{name}{ending}", change(rows))


# How the sets are written, and the settings.
GOOD: dict[str, tuple[Callable[[Path, str, Rows], str], dict[str, Any]]] = {
    "tool calls": (as_lines(call_tools), {}),
    "parts": (as_lines(use_parts, ".JSONL"), {}),
    "alpaca as CSV": (write_alpaca, {"columns": ["alpaca"]}),
    "ShareGPT": (as_lines(share), {"columns": ["sharegpt"]}),
    "Dolly": (as_lines(rename), {"columns": ["alpaca", "input=context", "output=response"]}),
    "calls in ShareGPT": (
        as_lines(call_in_text),
        {"columns": ["sharegpt", "conversations=items"], "assistant_only_loss": True},
    ),
    "OpenAI, packed": (write_openai, {"columns": ["openai"], "assistant_only_loss": True}),
    "rows without an answer": (as_lines(leave_some_unanswered, ".ndjson"), {"assistant_only_loss": True}),
    "a folder of splits": (write_splits, {}),
    "a folder of parts": (write_parts, {}),
}


def start(inputs: Inputs, folder: Path, write: Callable[[Path, str, Rows], str], *flags: str, **changes: Any) -> None:
    """A short run on three sets, written by `write`."""
    shutil.copytree(inputs[0] / "model", folder / "model", dirs_exist_ok=True)
    tokenizer = make_tokenizer()
    # Parts and calls are shown as they are; what counts here is that they go through.
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    sizes = {"pool": 24, "validation": 5, "test": 6}
    paths = {name: write(folder, name, make_rows("copy", size, seed=size)) for name, size in sizes.items()}
    config = inputs[1] | paths | {"validation": [f"my-set={paths['validation']}"], "task_column": None}
    config |= {"model_name_or_path": str(folder / "model"), "output_dir": str(folder / "run"), "wrong_column": None}
    config |= {"arms": ["coreset", "full"], "budgets": ["steps"], "max_steps": 1} | changes
    run_command("run", "--config", write_config(folder, config), *flags)


@pytest.mark.slow
@pytest.mark.parametrize("kind", GOOD)
def test_a_file_of_each_kind_goes_through(inputs: Inputs, tmp_path: Path, kind: str) -> None:
    write, settings = GOOD[kind]
    start(inputs, tmp_path, write, **settings)
    results, scored = read_results(tmp_path), load_from_disk(str(tmp_path / "run" / "scored"))
    assert results["complete"] and len(results["arms"]) == 2
    data = results["data"]
    assert data["pool"]["rows"] == len(scored) == 24
    assert data["pool"]["loss_tokens"] == sum(scored["num_loss_tokens"])
    assert data["validation my-set"]["loss_tokens"] > 0 and data["test"]["loss_tokens"] > 0
    without = sum(value is None for value in scored["influence"])
    assert data["pool"].get("without_label", 0) == without == (kind == "rows without an answer")
    assert "influence_my-set" in scored.column_names


def spoil(rows: Rows) -> Rows:
    """One bad row of several kinds in each set, the last of each."""
    made = [{"messages": make_turns(row), "id": row["id"]} for row in rows]
    made[1]["messages"] = []
    made[-1]["messages"][0]["role"] = "narrator"
    return made


def test_bad_rows_are_refused_before_any_work_or_dropped(inputs: Inputs, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(ValueError, match="Rows that cannot be trained on") as raised:
        # Also those that the reference is not trained on.
        start(inputs, tmp_path, as_lines(spoil), reference_fraction=0.1)
    message = str(raised.value)
    for what, last in (("pool", 23), ("test set", 5), ("validation my-set set", 4)):
        named = rf"2 of {last + 1} rows of the {what}:\n  - row 1 \(id '.*'\): `messages` is an empty conversation\n"
        assert re.search(named + rf"  - row {last} .*: `messages` has the unknown role 'narrator' in turn 0", message)
    assert "--bad_rows drop" in message and not (tmp_path / "run" / "reference").exists()

    start(inputs, tmp_path, as_lines(spoil), "--bad_rows", "drop")
    results = read_results(tmp_path)
    assert results["data"]["pool"]["rows"] == 22 == len(load_from_disk(str(tmp_path / "run" / "scored")))
    assert {facts["dropped"] for facts in results["data"].values()} == {2}
    assert "2 of 24 rows of the pool cannot be trained on and are dropped, the first: row 1" in capsys.readouterr().err
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "2 malformed ones dropped, the first row 1" in page


def test_judging_is_masked_as_selecting(inputs: Inputs, tmp_path: Path, capsys: Any) -> None:
    """A pool of messages, and other sets of prompts and completions with the same turns."""

    def write(folder: Path, name: str, rows: Rows) -> str:
        turns = [make_turns(row) for row in rows]
        made: Rows = [{"messages": turn} for turn in turns]
        if name != "pool":
            made = [{"prompt": turn[:1], "completion": turn[1:]} for turn in turns]
        return write_rows(folder / f"{name}.jsonl", made)

    start(inputs, tmp_path, write)
    told = capsys.readouterr().err
    assert "Loss is on every token of the test set" in told and "every token of the validation my-set set" in told
    apart = read_results(tmp_path)["data"]
    shutil.rmtree(tmp_path / "run")
    start(inputs, tmp_path, as_lines(lambda rows: [{"messages": make_turns(row)} for row in rows]))
    assert {name: facts["loss_tokens"] for name, facts in read_results(tmp_path)["data"].items()} == {
        name: facts["loss_tokens"] for name, facts in apart.items()
    }
    assert "Loss is on" not in capsys.readouterr().err


def test_sets_that_cannot_be_masked_alike_are_refused(inputs: Inputs, tmp_path: Path) -> None:
    def write(folder: Path, name: str, rows: Rows) -> str:
        made = rows if name == "pool" else [{"text": row["prompt"] + row["completion"]} for row in rows]
        return write_rows(folder / f"{name}.jsonl", made)

    with pytest.raises(ValueError, match="on completions in the pool .*on every token in the test set"):
        start(inputs, tmp_path, write)
    assert not (tmp_path / "run").exists()
    start(inputs, tmp_path, write, "--completion_only_loss", "false")
    assert read_results(tmp_path)["complete"]


def test_what_sft_takes_without_a_word_is_told_before_any_work(
    inputs: Inputs, tmp_path: Path, capsys: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Axolotl's marks on turns, in pool, validation and test set."""
    turns = as_lines(lambda rows: [{"messages": [*make_turns(row, train=False), *make_turns(row)]} for row in rows])
    start(inputs, tmp_path, turns, "--dry_run", assistant_only_loss=True)
    told = capsys.readouterr().err
    for what, count in (("pool", 24), ("validation my-set set", 5), ("test set", 6)):
        assert f"{count} assistant turns of the {what} have `train` false, but carry loss" in told
    assert not list((tmp_path / "run").glob("*"))
    # The trainers of the steps find the same again: the console tells it once.
    assert "assistant turns of the pool have" in caplog.text
    caplog.clear()
    command = load_command("run")
    command.PARSER.run(command.main, ["--config", str(tmp_path / "settings.yaml"), "--dry_run"])
    assert capsys.readouterr().err.count("assistant turns of the pool have") == 1
    assert "assistant turns of the" not in caplog.text
    pictures = as_lines(lambda rows: [row | {"image": "a.png"} for row in rows])
    with pytest.raises(ValueError, match=r"24 of 24 rows of the pool:\n  - row 0 .*: `image` is not empty"):
        start(inputs, tmp_path, pictures)
