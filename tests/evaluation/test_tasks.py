"""Tasks of lm-eval: scores against a loop over questions, local files of MMLU, and what the recipes make of them."""

import csv
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, WORDS, add_trained_adapter, make_model, make_tokenizer
from huggingface_hub import ModelCard
from recipe_runs import Inputs, read_results, run_command, stamp
from report_runs import Page

from hf_in2core.cards.model import add_task_results
from hf_in2core.evaluation.tasks import check_task_settings, evaluate_tasks, load_tasks


pytest.importorskip("lm_eval", reason="lm-eval is not installed (the extra `eval`)")

SUBJECTS = {"stone_walls": 23, "slow_rivers": 14}
NUM_EXAMPLES = 3
HEADER = ["question", "choice0", "choice1", "choice2", "choice3", "answer"]
LETTERS = "ABCD"


def make_questions(num_questions: int, seed: int) -> list[list[str]]:
    generator = random.Random(seed)
    return [
        [
            " ".join(generator.choice(WORDS) for _ in range(generator.randint(2, 5))) + ' "?", or',
            *(generator.choice(WORDS) for _ in range(4)),
            str(generator.randrange(4)),
        ]
        for _ in range(num_questions)
    ]


def write_mmlu(folder: Path, as_published: bool = False) -> Path:
    """Generated questions as MMLU's csv files, with a header or as the authors publish them."""
    for index, (subject, count) in enumerate(SUBJECTS.items()):
        for split, number in (("dev", NUM_EXAMPLES), ("test", count)):
            (folder / split).mkdir(parents=True, exist_ok=True)
            lines = make_questions(number, seed=100 * index + number)
            if as_published:
                lines = [[*line[:-1], LETTERS[int(line[-1])]] for line in lines]
            with (folder / split / f"{subject}_{split}.csv").open("w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows(lines if as_published else [HEADER, *lines])
    return folder


def make_tasks(data: Path, folder: Path) -> subprocess.CompletedProcess:
    script = str(ROOT / "recipes" / "mmlu" / "make_tasks.py")
    command = [sys.executable, script, "--data", str(data), "--output_dir", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="session")
def tasks_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("mmlu")
    done = make_tasks(write_mmlu(folder / "csv"), folder / "tasks")
    assert done.returncode == 0, done.stderr
    return str(folder / "tasks")


def answer_naively(model: torch.nn.Module, subject: str, num_fewshot: int) -> list[bool]:
    """Whether the likeliest letter is the answer, one prompt and one letter at a time."""
    tokenizer = make_tokenizer()
    index = list(SUBJECTS).index(subject)

    def ask(line: list[str]) -> str:
        choices = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, line[1:5], strict=True))
        return f"{line[0]}\n{choices}Answer:"

    examples = make_questions(NUM_EXAMPLES, seed=100 * index + NUM_EXAMPLES)[:num_fewshot]
    start = (
        f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        + "".join(f"{ask(line)} {LETTERS[int(line[5])]}\n\n" for line in examples)
    )
    right = []
    for line in make_questions(SUBJECTS[subject], seed=100 * index + SUBJECTS[subject]):
        prompt = tokenizer(start + ask(line)).input_ids
        scores = []
        for letter in LETTERS:
            ids = tokenizer(start + ask(line) + f" {letter}").input_ids
            with torch.no_grad():
                log_probs = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1)
            targets = range(len(prompt), len(ids))
            scores.append(sum(float(log_probs[position - 1, ids[position]]) for position in targets))
        right.append(scores.index(max(scores)) == int(line[5]))
    return right


def make_wide_model(seed: int = 0) -> Any:
    """A model with room for the examples, whose answers depend on the question."""
    model = make_model(seed=seed, num_layers=2)
    model.config.max_position_embeddings = 2048
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers" in name and parameter.dim() == 2:
                parameter *= 4
    return model.eval()


def make_adapted_model() -> Any:
    model = add_trained_adapter(make_wide_model()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter *= 10
    return model


# --- scores ---


@pytest.mark.parametrize("num_fewshot", [0, 2])
def test_scores_are_those_of_a_loop_over_questions(tasks_folder: str, num_fewshot: int) -> None:
    tasks = load_tasks(["mmlu"], tasks_folder, num_fewshot)
    base = make_wide_model()
    right = {subject: answer_naively(base, subject, num_fewshot) for subject in SUBJECTS}
    adapted = make_adapted_model()
    right_adapted = {subject: answer_naively(adapted, subject, num_fewshot) for subject in SUBJECTS}
    # Or neither question nor adapter would have been seen to count.
    assert all(0 < sum(answers["stone_walls"]) < 23 for answers in (right, right_adapted)) and right != right_adapted
    for model, expected in ((base, right), (adapted, right_adapted)):
        found = evaluate_tasks(model, make_tokenizer(), tasks, batch_size=4)["mmlu"]
        for subject, answers in expected.items():
            member = found["subtasks"][f"mmlu_{subject}"]
            assert member["metrics"] == {"acc": pytest.approx(sum(answers) / len(answers))}
            assert member["questions"] == len(answers)
        everything = [answer for answers in expected.values() for answer in answers]
        assert found["metrics"] == {"acc": pytest.approx(sum(everything) / len(everything))}  # by size
        assert (found["questions"], found["num_fewshot"], found["cut_prompts"]) == (len(everything), num_fewshot, 0)
        assert 0 < found["stderr"]["acc"] < 0.5


def test_a_limit_takes_the_first_questions_of_each_subject(tasks_folder: str) -> None:
    tasks = load_tasks(["mmlu", "mmlu_slow_rivers"], tasks_folder)
    model = make_wide_model()
    for limit, counts in ((5, {"stone_walls": 5, "slow_rivers": 5}), (0.5, {"stone_walls": 12, "slow_rivers": 7})):
        found = evaluate_tasks(model, make_tokenizer(), tasks, limit=limit)
        for subject, count in counts.items():
            answers = answer_naively(model, subject, 0)[:count]
            member = found["mmlu"]["subtasks"][f"mmlu_{subject}"]
            assert (member["questions"], member["metrics"]["acc"]) == (count, pytest.approx(sum(answers) / count))
        assert found["mmlu_slow_rivers"]["subtasks"] == {}
        assert found["mmlu_slow_rivers"]["metrics"] == found["mmlu"]["subtasks"]["mmlu_slow_rivers"]["metrics"]


def test_prompts_that_do_not_fit_are_counted_and_said_once(
    tasks_folder: str, capfd: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_wide_model()
    model.config.max_position_embeddings = 100
    found = evaluate_tasks(model, make_tokenizer(), load_tasks(["mmlu"], tasks_folder, num_fewshot=3), limit=4)
    assert found["mmlu"]["cut_prompts"] == 8
    assert [record.name for record in caplog.records if record.levelname == "WARNING"] == [
        "hf_in2core.evaluation.tasks"
    ]
    assert "8 prompts of mmlu are longer than the model's 100 tokens" in caplog.text
    shown = capfd.readouterr()
    assert "\r" not in shown.err and "it/s" not in shown.err  # no bar of a second in a log


@pytest.mark.slow
def test_two_processes_score_as_one(tasks_folder: str, tmp_path: Path) -> None:
    make_wide_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    recipe = str(ROOT / "recipes" / "evaluate.py")
    found = []
    for processes in (1, 2):
        output = tmp_path / f"evaluation-{processes}"
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        flags = ["--model_name_or_path", str(tmp_path / "model"), "--output_dir", str(output)]
        flags += ["--tasks", "mmlu", "--include_path", tasks_folder, "--num_fewshot", "1"]
        done = subprocess.run([*launch, recipe, *flags], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        text = (output / "evaluation.json").read_text(encoding="utf-8")
        found.append(json.loads(text, parse_float=lambda number: round(float(number), 9)))
        assert done.stdout.count("mmlu acc") == 1  # the main process alone
    assert found[0] == found[1]


# --- files of MMLU ---


def test_both_forms_of_the_csv_files_make_the_same_tasks(tasks_folder: str, tmp_path: Path) -> None:
    done = make_tasks(write_mmlu(tmp_path / "csv", as_published=True), tmp_path / "tasks")
    assert done.returncode == 0 and "2 subjects: slow_rivers, stone_walls" in done.stdout
    for path in sorted(Path(tasks_folder).glob("*.jsonl")):
        assert (tmp_path / "tasks" / path.name).read_text() == path.read_text()
    first = json.loads((tmp_path / "tasks" / "stone_walls_test.jsonl").read_text().splitlines()[0])
    line = make_questions(SUBJECTS["stone_walls"], seed=SUBJECTS["stone_walls"])[0]
    assert first == {"question": line[0], "choices": line[1:5], "answer": int(line[5])}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("test/slow_rivers_test.csv", "only,three,cells\n", "question 1: a line is a question, four choices"),
        ("test/slow_rivers_test.csv", "q,a,b,c,d,E\n", "the answer 'E'"),
        ("dev/slow_rivers_dev.csv", "", "holds no question"),
        ("dev/slow_rivers_dev.csv", None, "is missing: the examples of slow_rivers"),
    ],
)
def test_files_that_are_no_questions(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    data = write_mmlu(tmp_path / "csv")
    (data / name).unlink()
    if content is not None:
        (data / name).write_text(content)
    done = make_tasks(data, tmp_path / "tasks")
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"names": ["mmul"]}, r"There is no task mmul in include_path=.*; it has mmlu"),
        ({"names": ["mmlu"], "num_fewshot": 4}, r"num_fewshot=4, but the task mmlu_\w+ has 3 examples"),
        ({"names": ["mmlu"], "num_fewshot": -1}, "num_fewshot=-1 is negative"),
        ({"names": ["mmlu"], "include_path": "nowhere"}, "nowhere is no folder with task files"),
    ],
)
def test_what_cannot_be_evaluated_is_said_first(tasks_folder: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_tasks(**{"include_path": tasks_folder, **kwargs})


def test_without_lm_eval_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_in2core.evaluation.tasks.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'hf-in2core\[eval\]'"):
        check_task_settings(["mmlu"])


@pytest.mark.parametrize("limit", [0, -3, 1.5])
def test_limits_that_are_none(limit: float) -> None:
    with pytest.raises(ValueError, match=rf"limit={limit} is neither a number of questions"):
        check_task_settings(["mmlu"], limit=limit)


# --- recipes ---


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished run that may be written to."""
    shutil.copytree(finished / "run", tmp_path / "run")
    return tmp_path / "run"


def test_scores_of_a_run_reach_results_report_and_cards(
    copied: Path, finished: Path, tasks_folder: str, capsys: pytest.CaptureFixture
) -> None:
    flags = ["--run", str(copied), "--tasks", "mmlu", "--include_path", tasks_folder, "--limit", "6"]
    run_command("evaluate", *flags, "--arms", "coreset", "full")
    output = capsys.readouterr().out
    results = json.loads((copied / "results.json").read_text(encoding="utf-8"))
    evaluated = {(arm["arm"], arm["budget"]) for arm in results["arms"] if "tasks" in arm}
    assert evaluated == {(arm, budget) for arm in ("full", "coreset") for budget in ("steps", "epochs")}
    without = {"base": dict(results["base"]), "arms": [dict(arm) for arm in results["arms"]]}
    for entry in [without["base"], *without["arms"]]:
        entry.pop("tasks", None)
    before = read_results(finished)
    assert without["arms"] == before["arms"] and without["base"] == before["base"]  # nothing else was touched

    # The score of an arm is that of its own adapter on the run's target model.
    folder = next((copied / "arms").glob("coreset_25-steps-*"))
    flags_of_one = ["--model_name_or_path", str(finished / "model"), "--adapters", str(folder), *flags[2:]]
    run_command("evaluate", *flags_of_one, "--output_dir", str(copied / "alone"))
    alone = json.loads((copied / "alone" / "evaluation.json").read_text(encoding="utf-8"))
    arm = next(arm for arm in results["arms"] if (arm["arm"], arm["budget"]) == ("coreset", "steps"))
    assert alone[1]["tasks"] == arm["tasks"] and alone[0]["tasks"] == results["base"]["tasks"]

    score = f"{arm['tasks']['mmlu']['metrics']['acc']:.3f}"
    page = Page(copied / "report.html").words
    assert "Benchmarks" in page and f"coreset 0.25, equal steps {score}" in page
    assert "mmlu: 12 questions (a part: limit 6 per task), 0 examples before each" in page
    assert f"coreset 0.25, equal steps {score}" in " ".join(output.split())
    assert f"before training {results['base']['tasks']['mmlu']['metrics']['acc']:.3f}" in " ".join(output.split())
    card = ModelCard.load(folder / "README.md")
    *others, result = card.data.eval_results
    assert (result.dataset_name, result.metric_type) == ("mmlu", "acc")
    assert {other.metric_type: other.metric_value for other in others}["loss"] == arm["test_loss"]
    assert result.metric_value == arm["tasks"]["mmlu"]["metrics"]["acc"] and "## Benchmarks" in card.text


def test_what_is_evaluated_is_not_evaluated_again_and_stays(
    copied: Path, finished: Path, tasks_folder: str, capsys: pytest.CaptureFixture
) -> None:
    flags = ["--run", str(copied), "--tasks", "mmlu_slow_rivers", "--include_path", tasks_folder, "--limit", "3"]
    run_command("evaluate", *flags, "--arms", "coreset")
    files = {path: path.stat().st_mtime_ns for path in copied.glob("arms/*/tasks.json")}
    assert len(files) == 3  # the base and an arm at each budget
    capsys.readouterr()
    run_command("evaluate", *flags, "--arms", "coreset", "random")
    assert capsys.readouterr().out.count("(evaluated before)") == 3
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert len(list(copied.glob("arms/*/tasks.json"))) == 5
    run_command("evaluate", *flags[:-1], "4", "--arms", "coreset")  # another limit is another evaluation
    assert "(evaluated before)" not in capsys.readouterr().out

    # Another task comes beside it, and the pipeline, run again, trains nothing and keeps both.
    run_command("evaluate", *flags[:2], "--tasks", "mmlu_stone_walls", *flags[4:], "--arms", "coreset")
    arms = stamp(copied.parent)
    run_command("run", "--config", str(finished / "settings.yaml"), "--output_dir", str(copied))
    assert stamp(copied.parent) == arms
    results = json.loads((copied / "results.json").read_text(encoding="utf-8"))
    kept = {tuple(arm.get("tasks", {})) for arm in results["arms"]}
    assert kept == {("mmlu_slow_rivers", "mmlu_stone_walls"), ("mmlu_slow_rivers",), ()}
    assert list(results["base"]["tasks"]) == ["mmlu_slow_rivers", "mmlu_stone_walls"]


def test_a_target_is_judged_on_tasks_in_its_card(inputs: Inputs, tasks_folder: str, tmp_path: Path) -> None:
    _, config = inputs
    run_command(
        "sft_coreset", "--model_name_or_path", config["model_name_or_path"], "--dataset_name", config["pool"],
        "--output_dir", str(tmp_path / "target"), "--max_steps", "1", "--lora_target_modules", "all-linear",
        "--activation_checkpointing", "false", "--test", config["test"],
        "--tasks", "mmlu_slow_rivers", "--include_path", tasks_folder, "--num_fewshot", "1",
    )  # fmt: skip
    card = ModelCard.load(tmp_path / "target" / "README.md")
    kinds = [(result.dataset_name, result.metric_type) for result in card.data.eval_results]
    assert kinds[-1] == ("mmlu_slow_rivers", "acc") and ("a test set of its own", "loss") in kinds
    assert "| mmlu&#95;slow&#95;rivers | acc |" in card.text and "## Fine-tuned\n" in card.text
    # Judged again: in place of what was there.
    run_command(
        "evaluate", "--model_name_or_path", config["model_name_or_path"], "--adapters", str(tmp_path / "target"),
        "--tasks", "mmlu_slow_rivers", "--include_path", tasks_folder, "--limit", "2",
    )  # fmt: skip
    again = ModelCard.load(tmp_path / "target" / "README.md")
    assert [(r.dataset_name, r.metric_type) for r in again.data.eval_results] == kinds
    assert again.text.count("## Benchmarks") == 1 and "2 per task" in again.text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--run", "{run}", "--test", "t.jsonl", "--tasks", "mmlu"], "Leave out --test, or --run"),
        (["--run", "{run}"], "missing: --tasks"),
        (["--model_name_or_path", "m"], "missing: --test or --tasks"),
    ],
)
def test_flags_that_do_not_go_together(
    finished: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        run_command("evaluate", *(flag.format(run=finished / "run") for flag in flags))
    assert message in capsys.readouterr().err


def test_a_run_without_an_adapter_or_arm_is_refused(copied: Path, tasks_folder: str) -> None:
    flags = ["--run", str(copied), "--tasks", "mmlu", "--include_path", tasks_folder]
    with pytest.raises(ValueError, match="no result of the arms full with the seeds 7"):
        run_command("evaluate", *flags, "--arms", "full", "--seeds", "7")
    next((copied / "arms").glob("random_25-steps-*/adapter_config.json")).unlink()
    with pytest.raises(ValueError, match="holds no adapter_config.json, so this arm cannot be evaluated"):
        run_command("evaluate", *flags)
    with pytest.raises(ValueError, match="holds no results.json"):
        run_command("evaluate", *["--run", str(copied / "arms"), *flags[2:]])


def test_a_card_keeps_what_others_wrote(make_result: Callable[..., dict[str, Any]]) -> None:
    text = "---\nlicense: mit\n---\n# Mine\n\nWords.\n"
    first = add_task_results(text, {"mmlu": make_result(0.25)}, "name")
    second = add_task_results(first, {"ar|c": make_result(0.5)}, "other")
    third = add_task_results(second, {"mmlu": make_result(0.75)}, "other")
    card: Any = ModelCard(third)
    assert card.data.license == "mit" and card.data.model_name == "name" and "# Mine\n\nWords." in card.text
    assert {r.dataset_name: r.metric_value for r in card.data.eval_results} == {"mmlu": 0.75, "ar|c": 0.5}
    with pytest.raises(ValueError, match="`model-index` of the card is not in the Hub's form"):
        add_task_results("---\nmodel-index: [1]\n---\n", {"mmlu": make_result(0.25)}, "name")


@pytest.fixture
def make_result() -> Callable[..., dict[str, Any]]:
    def make_result(accuracy: float) -> dict[str, Any]:
        return {
            "metrics": {"acc": accuracy}, "stderr": {}, "questions": 10, "num_fewshot": 5, "limit": None,
            "version": None, "lm_eval": "0.4.13", "cut_prompts": 0, "subtasks": {},
        }  # fmt: skip

    return make_result
