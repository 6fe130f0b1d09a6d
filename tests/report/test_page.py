"""The report page of a run: what it says, that nothing in the data is markup, and folders that are no runs."""

import base64
import copy
import hashlib
import itertools
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import scipy.stats
from datasets import Dataset
from helpers import ROOT, make_prompt_completion
from recipe_runs import no_pictures
from report_runs import (
    HOSTILE,
    NUM_ROWS,
    Page,
    get_scored_run,
    list_paths,
    make_analyses,
    make_pool,
    make_results,
    make_scored,
    write_run,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import hf_in2core.report.page as report_page
from hf_in2core import select_coreset
from hf_in2core.commands.main import main
from hf_in2core.evaluation.judge import judge
from hf_in2core.names import LOSS_REDUCTIONS
from hf_in2core.report.page import write_report
from hf_in2core.report.rows import LIMITS, MAX_ROWS
from hf_in2core.report.run import ReportError
from hf_in2core.report.tokens import split_by_loss
from hf_in2core.selection.lengths import compare_lengths


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, model_folder: str) -> Path:
    return get_scored_run(tmp_path_factory.getbasetemp(), model_folder)


@pytest.fixture(scope="session")
def page(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(write_report(run, tmp_path_factory.mktemp("page") / "page.html"))


@pytest.fixture
def undrawn() -> Iterator[None]:
    with no_pictures():
        yield


@pytest.fixture(scope="session")
def scored(run: Path) -> Dataset:
    return Dataset.load_from_disk(str(run / "scored"))


TASKS = {
    "mmlu": {
        "metrics": {"acc": 0.3125},
        "stderr": {"acc": 0.0456},
        "questions": 1200,
        "num_fewshot": 5,
        "limit": 10.0,
        "cut_prompts": 3,
        "subtasks": {},
    }
}


def plain(folder: Path, scored: Dataset, results: dict[str, Any] | None = None, pictures: bool = False) -> Page:
    """The page of made-up rows; pictures take most of the time, and few tests look at them."""
    run = write_run(folder, scored, results or make_results())
    with nullcontext() if pictures else no_pictures():
        return Page(write_report(run))


# --- what it says ---


def test_the_page_says_what_the_run_found(page: Page, run: Path) -> None:
    results = json.loads((run / "results.json").read_text())
    assert results["verdict"]["text"] in page.words and results["verdict"]["headline"] in page.words
    assert "Negative influence = proponent" in page.words
    assert "nats per labelled token: lower is better" in page.words
    losses = [
        e["test_loss"] for e in results["arms"] if (e["arm"], e["budget"], e["fraction"]) == ("coreset", "steps", 0.5)
    ]
    assert f"{np.mean(losses):.3f} ±" in page.words
    pictures = [attributes["aria-label"] for tag, attributes in page.elements if tag == "svg"]
    assert len(pictures) == 6 and all(pictures)  # arms, influence, length, tasks, layers, coverage


def test_the_head_weighs_both_budgets(tmp_path: Path) -> None:
    won = make_results()
    lost = make_results(coreset=3.6)
    arms = [arm for arm in won["arms"] if arm["budget"] == "steps"]
    arms += [arm for arm in lost["arms"] if arm["budget"] == "epochs"]
    mixed = won | {"arms": arms, "verdict": asdict(judge(arms, won["selection"]))}
    for name, results, kind in (("won", won, "good"), ("mixed", mixed, "open")):
        page = plain(tmp_path / name, make_scored(20), results)
        assert [a["class"] for tag, a in page.elements if "verdict" in (a.get("class") or "")] == [f"verdict {kind}"]
        answers = {line: "Yes" if kind == "good" else "No" for line in ("at equal epochs", "selecting pays")}
        assert "Yes: beats random rows beyond noise at equal steps" in page.words
        assert f"{answers['at equal epochs']}: beats random rows beyond noise at equal epochs" in page.words
        assert f"{answers['selecting pays']}: selecting pays" in page.words


def test_rows_are_those_of_the_pool(page: Page, scored: Dataset) -> None:
    data = page.data
    assert data["rows"] == list(range(NUM_ROWS))
    assert data["rank"] == scored["influence_rank"][:] and data["tokens"] == scored["num_loss_tokens"][:]
    np.testing.assert_allclose(data["influence"], scored["influence"][:], rtol=1e-5)
    assert data["columns"]["prompt"] == scored["prompt"][:] and data["columns"]["id"] == scored["id"][:]
    assert data["textColumns"] == ["prompt", "completion"] and data["cut"] == []
    numbered = scored.add_column("row", np.arange(NUM_ROWS))
    for fraction in (0.25, 0.5):
        kept = {row for row, smallest in enumerate(data["coreset"]) if smallest is not None and smallest <= fraction}
        assert kept == set(select_coreset(numbered, fraction=fraction)["row"])
    [group] = data["groups"]
    assert [group["names"][code] for code in group["codes"]] == scored["task"][:]


def test_the_mask_is_the_completion(page: Page, run: Path, scored: Dataset) -> None:
    masks = page.data["masks"]
    assert len(masks) == NUM_ROWS
    tokenizer = AutoTokenizer.from_pretrained(run / "scorer" / "tokenizer")
    for position in (3, 10, 60, 117):  # 10 and 60 are hostile, of several bytes a character
        row = scored[position]
        num_tokens, *parts = masks[str(position)]
        assert parts == [[row["prompt"], 0], [row["completion"] + tokenizer.eos_token, 1]]
        assert num_tokens == len(tokenizer(row["prompt"] + row["completion"]).input_ids) + 1


def test_parts_of_a_row_keep_the_blanks_between_them() -> None:
    vocabulary = {"<unk>": 0, "\u2581the": 1, "\u2581cat": 2, "\u2581sat": 3}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    assert tokenizer.decode([2, 3]) == "cat sat"  # on its own, a part loses the blank that it begins with
    parts = split_by_loss([1, 2, 3, 1], np.array([False, True, True, False]), tokenizer)
    assert parts == [["the", 0], [" cat sat", 1], [" the", 0]]


def test_groups_are_summed_up(page: Page, scored: Dataset) -> None:
    tasks, influence = np.array(scored["task"][:]), np.array(scored["influence"][:])
    kept = np.argsort(np.argsort(influence)) < round(0.25 * NUM_ROWS)
    for task in ("task 0", "task 2"):
        share = f"{kept[tasks == task].mean():.0%}".replace("%", " %")
        proponents = f"{(influence[tasks == task] < 0).mean():.0%}".replace("%", " %")
        assert f"{task} {(tasks == task).sum()} {share} {proponents}" in page.words


def test_validation_rows_name_who_helps_and_hurts(page: Page, scored: Dataset) -> None:
    influence = np.array(scored["influence_per_query"][:])
    validation = make_prompt_completion(9, seed=1)
    queries = page.data["queries"]
    assert [query["row"] for query in queries] == list(range(9))
    for query in queries:
        values = influence[:, query["row"]]
        helpers, hurters = query["proponents"], query["opponents"]
        assert [row for row, _ in helpers] == np.argsort(values)[: len(helpers)].tolist() and len(helpers) == 8
        assert [row for row, _ in hurters] == np.argsort(-values)[: len(hurters)].tolist() and len(hurters) == 8
        assert helpers[0][1] == pytest.approx(values.min()) and helpers[0][1] < 0 < hurters[0][1]
        assert validation[query["row"]]["prompt"] in query["text"]


def test_the_same_run_gives_the_same_file(run: Path, tmp_path: Path) -> None:
    first, second = (write_report(run, tmp_path / name).read_bytes() for name in ("a.html", "b.html"))
    assert first == second
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "b.html"]


# --- nothing in the data is markup ---


def test_hostile_rows_are_text(page: Page, scored: Dataset) -> None:
    assert len(page.raw["script"]) == 2 and len(page.raw["style"]) == 1
    assert not set("<>&") & set(page.raw["script"][0])  # browsers end a script in more ways than this parser
    assert page.data["columns"]["completion"] == scored["completion"][:]
    assert sum(text.strip() in HOSTILE.values() for text in page.data["columns"]["completion"]) == len(HOSTILE)
    used = {tag for tag, _ in page.elements}
    assert not used & {"img", "i", "iframe", "object"}
    assert "<b>bold</b>" in page.words  # as markup it would have lost its tags
    assert "<i>$hostile$</i>" in page.words and "--pool '</script>'" in page.words
    handlers = [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert handlers == []


def test_only_the_page_itself_may_run_and_nothing_is_fetched(page: Page) -> None:
    [policy] = [a["content"] or "" for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    for name, content in (("script-src", page.raw["script"][1]), ("style-src", page.raw["style"][0])):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules[name] == f"'sha256-{digest}'"
    assert rules["default-src"] == "'none'" and "unsafe" not in policy
    for tag, attributes in page.elements:
        assert "style" not in attributes, (tag, attributes)  # the policy would drop it
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:,")), (tag, attributes)


def test_the_script_never_reads_text_as_markup() -> None:
    script = report_page.load_asset("page.js")
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "new Function",
        "</script",
    ):
        assert word not in script


# --- large, damaged and odd pools ---


def test_a_large_pool_is_sampled_with_a_note(tmp_path: Path) -> None:
    num_rows = 12_000
    scored = make_scored(num_rows)
    page = plain(tmp_path / "run", scored, pictures=True)
    rows = page.data["rows"]
    order = np.argsort(scored["influence"][:])
    assert len(rows) == MAX_ROWS and rows == sorted(set(rows))
    assert set(order[: MAX_ROWS // 4]) | set(order[-MAX_ROWS // 4 :]) <= set(rows)
    assert f"holds 5,000 of {num_rows:,} rows" in page.words and "12,000 rows" in page.words


def test_texts_that_are_no_utf8_or_enormous(tmp_path: Path) -> None:
    texts = pa.array([b"fine", b"\xff\xfe broken", "é".encode() * 3_000_000, b"", None], pa.binary())
    broken = pa.Array.from_buffers(pa.string(), 5, texts.buffers())
    nested = pa.array([[{"role": "user", "content": "hi"}]] * 5)
    table = pa.table({"text": broken, "note": nested, "influence": [0.5, -1.0, 2.0, math.nan, None]})
    page = plain(tmp_path / "run", Dataset(table), pictures=True)
    column = page.data["columns"]["text"]
    assert column[0] == "fine" and column[1] == "\N{REPLACEMENT CHARACTER}" * 2 + " broken"
    assert column[2] == "é" * LIMITS[0] and page.data["cut"] == [2] and column[3:] == ["", None]
    assert page.data["columns"]["note"][0] == "user: hi"
    assert page.data["influence"][3:] == [None, None] == page.data["rank"][3:]
    assert "2 carry no loss" in page.words


def test_many_long_texts_are_cut_further(tmp_path: Path) -> None:
    page = plain(tmp_path / "run", make_scored(1000, text=["x" * 15_000] * 1000))
    lengths = {len(text) for text in page.data["columns"]["text"]}
    assert lengths == {page.data["limit"]} and page.data["limit"] * 1000 <= 8_000_000
    assert len(page.data["cut"]) == 1000


def test_conversations_and_flags(tmp_path: Path) -> None:
    turns = [
        [{"role": "user", "content": f"question {n}"}, {"role": "assistant", "content": "answer"}] for n in range(6)
    ]
    scored = make_scored(6, messages=turns, is_wrong=[True, False] * 3).remove_columns("text")
    data = plain(tmp_path / "run", scored).data
    assert data["textColumns"] == ["messages"]
    assert data["columns"]["messages"][4] == "user: question 4\n\nassistant: answer"
    assert data["groups"][0]["column"] == "is_wrong" and sorted(data["groups"][0]["names"]) == ["false", "true"]


@pytest.mark.usefixtures("undrawn")
def test_without_scorer_or_rows_the_page_says_so(tmp_path: Path) -> None:
    page = plain(tmp_path / "run", make_scored(20))
    assert page.data["masks"] == {} and "has no scorer/" in page.data["maskNote"]
    shutil.rmtree(tmp_path / "run" / "scored")
    page = Page(write_report(tmp_path / "run"))
    assert "has no scored/, so no example can be shown" in page.words and page.data == {}
    (tmp_path / "run" / "scored").mkdir()
    (tmp_path / "run" / "scored" / "state.json").write_text("{")
    assert "scored/ cannot be read" in Page(write_report(tmp_path / "run")).words


@pytest.mark.usefixtures("undrawn")
def test_a_damaged_scorer_or_another_tokenizer_shows_no_mask(run: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    config = json.loads((copied / "scorer" / "config.json").read_text())
    assert LOSS_REDUCTIONS[config["loss_reduction"]] in Page(write_report(copied)).words
    config["preparation"]["completion_only_loss"] = False
    (copied / "scorer" / "config.json").write_text(json.dumps(config))
    data = Page(write_report(copied)).data
    assert data["masks"] == {} and "not those that were scored" in data["maskNote"]
    (copied / "scorer" / "tokenizer" / "tokenizer.json").write_text("{")
    assert "scorer/ cannot be used" in Page(write_report(copied)).data["maskNote"]
    (copied / "scorer" / "config.json").write_text(json.dumps(config | {"loss_reduction": ["a list"]}))
    assert "Loss of a row" not in Page(write_report(copied)).words


def test_rows_of_another_run_are_noticed(tmp_path: Path) -> None:
    results = make_results()
    results["selection"]["rows"] = 21
    assert (
        "scored/ has 20 rows, but results.json was written for 21"
        in plain(tmp_path / "run", make_scored(20), results).words
    )


def test_a_coreset_of_other_lengths_is_warned_of(tmp_path: Path) -> None:
    scored = make_scored(40).remove_columns("num_loss_tokens").add_column("num_loss_tokens", list(range(1, 41)))
    for name, rows, is_warned in (("long", range(30, 40), True), ("all", range(40), False)):
        lengths = compare_lengths(scored, scored.select(rows))
        page = plain(tmp_path / name, scored, make_results() | {"lengths": asdict(lengths)})
        assert (lengths.warning is not None) == is_warned == ("rows are longer than the pool's" in page.words)


def test_an_unfinished_comparison(tmp_path: Path) -> None:
    results = make_results(seeds=1) | {
        "complete": False,
        "verdict": {"text": "The comparison is not finished: 1 of 2."},
    }
    page = plain(tmp_path / "run", make_scored(20), results, pictures=True)
    assert "The comparison is not finished: 1 of 2." in page.words and "1 seed (none can be given)" in page.words


def test_without_matplotlib_there_are_no_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_page, "find_spec", lambda name: None)
    page = plain(tmp_path / "run", make_scored(20), pictures=True)
    assert "pip install hf-in2core[report]" in page.words and "svg" not in {tag for tag, _ in page.elements}
    assert len(page.data["rows"]) == 20


def test_benchmarks_are_means_over_the_seeds_that_were_evaluated(tmp_path: Path) -> None:
    results = make_results(seeds=3, budgets=("steps",)) | {"base": {"tasks": TASKS}}
    assert "Benchmarks" not in plain(tmp_path / "none", make_scored(20), make_results()).words
    for entry in results["arms"]:
        if entry["arm"] == "coreset" and entry["fraction"] == 0.25 and entry["seed"] < 2:
            score = {"metrics": {"acc": 0.25 + 0.5 * entry["seed"], "<b>f1": 0.125}}
            entry["tasks"] = {"mmlu": TASKS["mmlu"] | score}
    page = plain(tmp_path / "run", make_scored(20), results)
    low, high = scipy.stats.t.interval(0.95, 1, 0.5, scipy.stats.sem([0.25, 0.75]))
    assert f"before training 0.312 – coreset 0.25 0.500 ± {(high - low) / 2:.3f} 0.125" in page.words
    assert "mmlu acc mmlu <b>f1" in page.words
    note = "mmlu: 1,200 questions (a part: limit 10 per task), 5 examples before each, standard error of one model "
    assert note + "over questions 0.046, 3 prompts cut to the model's context." in page.words
    assert "random 0.25 0.500" not in page.words


# --- folders that are no runs ---


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no results.json, so no run has finished there"),
        (b'{"arms": [{"arm": "full", "fra', "it is half-written or damaged"),
        (b"\xff\xfe\x00", "it is half-written or damaged"),
        (b"[" * 100_000, "it is half-written or damaged"),
        (b"[1, 2]", "it holds a list, not an object"),
        (b'{"format_version": 2, "arms": []}', "has format version 2, but this hf_in2core reads up to 1. Upgrade"),
        (b'{"arms": []}', "holds no arms"),
        (b'{"arms": [{"arm": "full"}]}', "arms[0] has no usable `fraction`"),
    ],
)
def test_no_run_is_a_clear_message(tmp_path: Path, capsys: Any, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(SystemExit) as left:
        main(["report", str(tmp_path)])
    assert left.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == "" and len(captured.err) < 1000
    assert not (tmp_path / "report.html").exists()


@pytest.mark.slow
def test_the_command_line(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", make_scored(20), make_results())
    command = [sys.executable, "-m", "hf_in2core.commands", "report"]
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "report.html" in done.stdout and (folder / "report.html").is_file()
    done = subprocess.run([*command, str(tmp_path / "no")], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "there is no such file or folder" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("share", [pytest.param(1, marks=pytest.mark.slow), 41])
def test_results_of_any_shape_give_a_page_or_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: int
) -> None:
    """Each value of the results wrong in eight ways: all of them, or one in `share`."""
    monkeypatch.setattr(report_page, "find_spec", lambda name: None)  # pictures take most of the time
    results = make_results(seeds=2, budgets=("steps",)) | {
        "config": {"columns": ["text=text"], "task_column": "task", "validation": ["a"], "pool": "p"},
        "auc": {"kind": {"influence": 0.5}},
        "auc_rows": {"kind": 3},
        "machine": {"cpu": "c", "cores": 2, "gpu": None, "processes": 1, "torch": "2"},
        "command": "c",
        "complete": True,
        "base": {"tasks": TASKS},
        **make_analyses(),
    }
    folder = write_run(tmp_path / "run", make_scored(12, task=["a", "b"] * 6), results)
    num_pages = 0
    wrongs: list[Any] = [None, "x", [], {"y": [1]}, [7], -1.5, True, 10**400]
    for path, wrong in list(itertools.product(list_paths(results)[1:], wrongs))[::share]:
        damaged = copy.deepcopy(results)
        parent = damaged
        for name in path[:-1]:
            parent = parent[name]
        parent[path[-1]] = wrong
        (folder / "results.json").write_text(json.dumps(damaged))
        try:
            write_report(folder)
            num_pages += 1
        except ReportError as error:
            assert "results.json" in str(error), (path, wrong)  # noqa: PT017
    assert num_pages > 200 / share


def test_pool_for_these_tests_is_hostile_enough() -> None:
    assert len([row for row in make_pool() if row["id"].startswith("hostile")]) == len(HOSTILE)
