"""From rows on the Hub to a coreset there and back, by the recipes as users start them.

Two launched processes publish to the Hub of `loopback_hub.py`; another machine has an empty HF_HOME and no token.
"""

import html
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import ROOT
from hub_client import QUIET, HubClient, check_that_tokens_stayed_secret, make_env
from loopback_hub import LoopbackHub, Repo
from recipe_runs import make_inputs


pytestmark = pytest.mark.slow

TOKEN = "hf_" + "T" * 34
CARD = b"---\nlicense: mit\nlanguage: en\n---\n# Rows\n"


def run(hub: LoopbackHub, home: Path, token: str | None, *command: str, refused: bool = False) -> str:
    """What the command prints, or why it refuses."""
    answer = subprocess.run(
        [sys.executable, *command],
        cwd=home,
        env=make_env(hub, home / "hf", token) | {"ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert answer.returncode == (2 if refused else 0), answer.stderr[-4000:]
    assert TOKEN not in answer.stdout + answer.stderr
    return answer.stderr if refused else answer.stdout


def launch(hub: LoopbackHub, home: Path, script: Path, *flags: str) -> str:
    """`accelerate launch` of two processes on the CPU."""
    several = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]
    settings = ["--mixed_precision", "no", "--dynamo_backend", "no"]
    return run(hub, home, TOKEN, "-m", "accelerate.commands.launch", *several, *settings, str(script), *flags)


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        hub.add_user(TOKEN, "ada")
        folder = tmp_path_factory.mktemp("inputs")
        make_inputs(folder)
        hub.add_repo("model", "ada/tiny", {path.name: path.read_bytes() for path in (folder / "model").iterdir()})
        for name in ("pool", "validation", "test"):
            rows = (folder / f"{name}.jsonl").read_bytes()
            hub.add_repo("dataset", f"ada/{name}", {"README.md": CARD, "train.jsonl": rows})
        yield hub
        check_that_tokens_stayed_secret(hub)


@pytest.fixture(scope="module")
def home(hub, tmp_path_factory) -> Path:
    """The machine that publishes; the folder of a run that two processes have finished and published."""
    home = tmp_path_factory.mktemp("home")
    flags = ["--model_name_or_path", "ada/tiny", "--pool", "ada/pool", "--validation", "ada/validation"]
    flags += ["--test", "ada/test", "--output_dir", "run", "--hub_id", "ada/out", "--fractions", "0.5", "0.25"]
    flags += [
        "--seeds",
        "0",
        "1",
        "--max_steps",
        "4",
        "--learning_rate",
        "3e-3",
        "--lora_target_modules",
        "all-linear",
    ]
    flags += ["--per_device_train_batch_size", "4", "--task_column", "task"]
    launch(hub, home, ROOT / "recipes" / "in2core.py", *flags, "--activation_checkpointing", "false")
    return home


@pytest.fixture(scope="module")
def repo(hub, home) -> Repo:
    return hub.repos[("dataset", "ada/out")]


@pytest.fixture(scope="module")
def elsewhere(hub, home, tmp_path_factory) -> Iterator[HubClient]:
    with HubClient(hub, tmp_path_factory.mktemp("elsewhere"), None, **QUIET) as client:
        yield client


def read_card(repo: Repo) -> tuple[dict[str, Any], str]:
    _, header, body = repo.files()["README.md"].decode().split("---\n", 2)
    return yaml.safe_load(header), body


def count_commits(hub: LoopbackHub, name: str) -> int:
    return len([request for request in hub.requests(kind="commit") if name in request.path])


def test_two_processes_make_one_commit(hub, home, repo) -> None:
    assert json.loads(repo.files()["results.json"])["machine"]["processes"] == 2
    assert [commit.title for commit in repo.history()] == ["Publish influence", "initial commit"]
    assert count_commits(hub, "ada/out") == 1
    # The recipe for a run that exists already, in two processes too.
    script = home / "publish_by_two.py"
    script.write_text(
        "import os, runpy, sys\n"
        "open('ranks.txt', 'a').write(f'{os.environ[\"RANK\"]}/{os.environ[\"WORLD_SIZE\"]} ')\n"
        f"sys.path.insert(0, {str(ROOT / 'recipes')!r})\n"
        f"runpy.run_path({str(ROOT / 'recipes' / 'publish.py')!r}, run_name='__main__')\n"
    )
    again = launch(hub, home, script, "--run", "run", "--hub_id", "ada/again")
    assert sorted((home / "ranks.txt").read_text().split()) == ["0/2", "1/2"]
    assert again.count("published: ") == 1
    assert count_commits(hub, "ada/again") == 1
    assert len(hub.repos[("dataset", "ada/again")].history()) == 2


def test_the_card_tells_all_of_it(hub, repo) -> None:
    metadata, body = read_card(repo)
    files = repo.files()
    assert metadata["license"] == "mit" and metadata["language"] == ["en"]
    assert metadata["source_datasets"] == ["ada/pool"] and metadata["base_model"] == ["ada/tiny"]
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", body)
    assert pictures == [f"plots/{name}.png" for name in ("arms", "influence", "influence_by_length")]
    assert all(files[path].startswith(b"\x89PNG") for path in pictures)
    # The base model by its commit: a scorer loads that one, whatever is pushed there later.
    revision = hub.repos[("model", "ada/tiny")].resolve("main").oid
    assert json.loads(files["scorer/config.json"])["base_model_revision"] == revision
    assert f"| Its revision | `{revision}` |" in body
    results = json.loads(files["results.json"])
    verdict = results["verdict"]
    difference = verdict["intervals"]["coreset_minus_random"]
    shown = re.findall(r"\| coreset − random \| [^|]+ \| (\S+) \| (\S+) to (\S+) \|", body)
    wanted = [difference[name] for name in ("mean", "low", "high")]
    assert [float(number) for number in shown[0]] == pytest.approx(wanted, abs=5e-4)
    assert "<code>select_coreset&#40;" not in body  # parentheses need no escape
    for name, fraction in (("coreset_50", 0.5), ("coreset_25", 0.25)):
        row = next(line for line in body.splitlines() if line.startswith(f"| `{name}` |"))
        assert "the smallest `cosine_rank` first" in row and f"fraction={fraction}" in row and "strategy=" in row, row
    assert "[report.html](report.html)" in body and files["report.html"].startswith(b"<!")
    made = r"Command that made `train`, `coreset_50`, `coreset_25`:\n\n```bash\n(.*?)\n```"
    (command,) = re.findall(made, body, flags=re.DOTALL)
    typed = command.replace(" \\\n   ", "")
    assert typed.startswith("accelerate launch recipes/in2core.py --model_name_or_path ada/tiny --pool ada/pool --val")
    assert typed.endswith("--task_column task --activation_checkpointing false")
    for told in ("### Limits", "Computing influence: ", "arXiv:2408.03560", "arXiv:2310.00902", "### Cost"):
        assert told in body


def test_the_published_configuration_runs_again_elsewhere(hub, home, repo, tmp_path) -> None:
    (tmp_path / "config.yaml").write_bytes(repo.files()["config.yaml"])
    _, body = read_card(repo)
    (flags,) = re.findall(r"`in2core run (--config config\.yaml)` runs it again", body)
    told = run(hub, tmp_path, None, str(ROOT / "recipes/in2core.py"), *flags.split(), "--dry_run")
    assert "Targets: 14 trainings" in told


def test_the_snippets_run_as_they_are_written(repo, elsewhere) -> None:
    snippets = re.findall(r"```python\n(.*?)```", read_card(repo)[1], flags=re.DOTALL)
    assert len(snippets) == 2
    rows, first, printed = elsewhere.run(
        """
        import contextlib, io
        out, scope = io.StringIO(), {}
        with contextlib.redirect_stdout(out):
            for snippet in snippets:
                exec(snippet, scope)
        result = [scope["coreset"].num_rows, scope["pool"]["influence"][0], float(out.getvalue())]
        """,
        snippets=snippets,
    )
    assert rows == 30
    assert printed == pytest.approx(first, rel=1e-3)


def test_a_stream_is_scored_to_the_same_numbers(elsewhere) -> None:
    published, streamed = elsewhere.run(
        """
        from datasets import load_dataset
        from hf_in2core import InfluenceScorer
        scorer = InfluenceScorer.from_pretrained("ada/out", repo_type="dataset", subfolder="scorer")
        raw = load_dataset("ada/pool", split="train", streaming=True)
        rows = list(raw.map(scorer, batched=True, batch_size=16))
        pool = load_dataset("ada/out", split="train")
        names = ("id", "influence")
        result = [[pool[name][:] for name in names], [[row[name] for row in rows] for name in names]]
        """
    )
    assert streamed[0] == published[0]
    assert streamed[1] == pytest.approx(published[1], rel=1e-3, abs=1e-5 * max(map(abs, published[1])))


def test_a_target_is_fine_tuned_on_the_coreset_from_the_hub(hub, repo, tmp_path) -> None:
    flags = ["--model_name_or_path", "ada/tiny", "--dataset_name", "ada/out", "--split", "coreset_50"]
    flags += ["--output_dir", "target", "--max_steps", "3", "--test", "ada/test", "--use_cpu", "true"]
    told = run(hub, tmp_path, None, str(ROOT / "recipes" / "sft_coreset.py"), *flags)
    assert "30 rows, 3 steps" in told
    assert (tmp_path / "target" / "adapter_model.safetensors").is_file()
    card = (tmp_path / "target" / "README.md").read_text()
    assert f'load_dataset("ada/out", split="coreset_50", revision="{repo.resolve("main").oid}")' in card
    assert "name: ada/test" in card and "base_model: ada/tiny" in card
    assert f"> {json.loads(repo.files()['results.json'])['verdict']['text']}" in html.unescape(card)


def test_ranks_that_new_rows_cannot_have_are_refused_before_scoring(hub, repo, tmp_path) -> None:
    head = repo.resolve("main").oid
    (tmp_path / "more.jsonl").write_text(
        json.dumps(
            {"prompt": "red mat :", "completion": " mat red", "id": "new", "task": "reverse", "is_wrong": False}
        )
    )
    command = ["-m", "hf_in2core.commands", "grow", "--hub_id", "ada/out", "--rows", "more.jsonl"]
    told = run(hub, tmp_path, TOKEN, *command, refused=True)
    assert "was chosen by cosine_rank" in told and "--strategy top" in told
    assert repo.resolve("main").oid == head
