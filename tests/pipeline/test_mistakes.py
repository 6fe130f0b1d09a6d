"""What users mistype and what their files hold: one sentence that helps, no traceback, nothing trained."""

import gzip
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock
from helpers import ROOT, add_trained_adapter, make_model, make_tokenizer
from recipe_runs import load_command, make_inputs, write_rows

from hf_in2core import InfluenceConfig
from hf_in2core.hub.state import list_folder
from hf_in2core.pipeline.run_folder import LOCK_FILE


GUIDE = (ROOT / "docs" / "mistakes.md").read_text(encoding="utf-8")
# What is typed, and what is said, parted by what differs from machine to machine.
TABLE = re.findall(r"^\| `(--[^|]*)` \| (.*) \|$", GUIDE, re.MULTILINE)
GOOD = '{"prompt": "a :", "completion": " b c"}\n'
TURNS = [{"role": "user", "content": "cat"}, {"role": "assistant", "content": "mat"}]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: a model, rows, a configuration, and files that are not what they should be."""
    folder = tmp_path_factory.mktemp("project")
    config = make_inputs(folder)
    (folder / "models").mkdir()
    (folder / "model").rename(folder / "models" / "llama")
    add_trained_adapter(make_model(num_layers=2, hidden_size=64)).save_pretrained(
        folder / "adapters" / "of_another_model"
    )
    config |= {"model_name_or_path": "models/llama", "pool": "pool.jsonl", "test": "test.jsonl", "output_dir": "run"}
    config |= {"validation": ["validation.jsonl"], "task_column": None, "wrong_column": None}
    (folder / "my_run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    (folder / "broken.jsonl").write_text(GOOD * 2 + '{"prompt": "a", "compl\n' + GOOD, encoding="utf-8")
    (folder / "semicolons.csv").write_text("prompt;completion\na;b\n", encoding="utf-8")
    (folder / "plain.jsonl.gz").write_text(GOOD, encoding="utf-8")
    write_rows(folder / "chats.jsonl", [{"messages": TURNS}] * 9)
    return folder


def refuse(project: Path, command: str, *flags: str, capfd: pytest.CaptureFixture) -> str:
    """What a command says that ends with 2, on one line."""
    module = load_command(command)
    capfd.readouterr()
    with pytest.raises(SystemExit) as left:
        module.PARSER.run(module.main, flags)
    said = capfd.readouterr().err
    assert left.value.code == 2 and "Traceback" not in said
    assert not any((project / "run" / name).exists() for name in ("reference", "checkpoints", "scored"))
    return " ".join(said.partition(f"in2core {command}: error: ")[2].split())


@pytest.mark.parametrize(("typed", "expected"), TABLE, ids=[typed for typed, _ in TABLE])
def test_the_guide_says_what_is_said(
    project: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, typed: str, expected: str
) -> None:
    monkeypatch.chdir(project)
    (project / "at_work").mkdir(exist_ok=True)
    with FileLock(project / "at_work" / LOCK_FILE):
        said = refuse(project, "run", "--config", "my_run.yaml", *shlex.split(typed), capfd=capfd)
    parts = [part.strip() for part in expected.split("…")]
    assert re.match(".*".join(map(re.escape, parts)), said), said


def test_the_guide_has_ten() -> None:
    assert len(TABLE) == 10


FILES = {
    "latin.jsonl": ('{"prompt": "d\xe9j\xe0 :", "completion": "b"}\n'.encode("latin1"), "line 1: the byte 0xe9 is no"),
    "latin.csv": ("prompt,completion\na,b\nd\xe9,c\n".encode("latin1"), "`latin.csv`, line 3: the byte 0xe9"),
    "utf16.jsonl": (GOOD.encode("utf-16"), "`utf16.jsonl` is UTF-16 text"),
    "lists.jsonl": ((GOOD + '["a", "b"]\n').encode(), '`lists.jsonl`, line 2 is no JSON object: ["a", "b"]'),
    "list.json": (b'[{"prompt": "a", "completion": "b"},\n {"prompt": "a" "completion": "b"}]', "`list.json`, line 2"),
    "items.json": (b'[{"prompt": "a", "completion": "b"}, 3]', "`items.json`: item 1 of its list is no JSON object"),
    "cut.jsonl.gz": (gzip.compress((GOOD * 3000).encode())[:60], "`cut.jsonl.gz` ends in the middle of its packed"),
    "not.parquet": (GOOD.encode(), "`not.parquet` is no Parquet file"),
    "commas.tsv": (b"prompt,completion\na,b\n", "those of a .tsv file are to be by tabs"),
    "ragged.csv": (b"prompt,completion\na,b\nc,d,e,f\n", "`ragged.csv`, line 3 has 4 cells, and the header 2"),
    "rows.txt": (b"hello\n", "this one in `.txt`. Save it as one of these."),
    "empty.jsonl": (b"", "The pool `empty.jsonl` has no rows"),
    "blank.jsonl": (b"\n\n", "The pool `blank.jsonl` has no rows"),
    "columns.jsonl": (b'{"q": "a", "a": "b"}\n', "The pool `columns.jsonl` cannot be read: The dataset's columns (q,"),
    "picture.jsonl": (b'{"image": "a.png"}\n', "It has pictures, but only text can be trained on here."),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_not_what_they_say(
    project: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, name: str
) -> None:
    monkeypatch.chdir(project)
    content, expected = FILES[name]
    Path(name).write_bytes(content)
    assert expected in refuse(project, "run", "--config", "my_run.yaml", "--pool", name, capfd=capfd)


def test_the_part_of_a_folder_that_breaks_is_named(
    project: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(project)
    Path("parts").mkdir()
    Path("parts/part-0.jsonl").write_text(GOOD * 3, encoding="utf-8")
    Path("parts/part-1.jsonl").write_text(GOOD * 3 + "{", encoding="utf-8")
    Path("nothing").mkdir()
    flags = ("--config", "my_run.yaml", "--pool")
    assert "`parts/part-1.jsonl`, line 4 is no JSON" in refuse(project, "run", *flags, "parts", capfd=capfd)
    assert "The pool `nothing` cannot be loaded: the folder has no files" in refuse(
        project, "run", *flags, "nothing", capfd=capfd
    )


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("run --config my_run.yaml --target_model_name_or_path models", "the folder has no config.json (it"),
        ("run --config my_run.yaml --model_name_or_path pool.jsonl", "cannot be loaded: it is a file."),
        ("run --config my_run.yaml --model_name_or_path model/llama", "Did you mean `models/llama`?"),
        ("run --config my_run.yaml --reference_adapter models/llama", "the folder has no adapter_config.json"),
        ("run --config my_run.yaml --validation a=validation.jsonl b=valid.jsonl", "Did you mean `validation.jsonl`?"),
        ("run --config my_run.yaml --pool pool.jsonl:train", "it is a file, which has no splits. Leave out `:train`."),
        ("run --config my_run.yaml --pool models/llama", "config.json` is one JSON object. Make it a list of rows"),
        ("run --config my_run.yaml --columns alpacca", "Did you mean `alpaca`?"),
        ("run --config my_run.yaml --columns alpaca or sharegpt", "(prompt, completion, id, task, is_wrong) fit none"),
        ("run --config my_run.yaml --output_dir test.jsonl/run", "test.jsonl is a file. Give another one."),
        ("run --config my_run.yaml --lora_target_modules q_prj", "Its linear ones are down_proj,"),
        ("run --config my_run.yaml --per_device_train_batch_size 0", "`per_device_train_batch_size=0` leaves no row"),
        ("run --config my_run.yaml --report_to wandbb", "--report_to wandbb cannot work"),
        ("run --config my_run.yaml --chat_template_path chat.jinja", "`chat.jinja`: there is no such"),
        ("run --config my_rnu.yaml", "--config my_rnu.yaml cannot be read: there is no such file"),
        ("run --config tabs.yaml", "--config tabs.yaml, line 2 cannot be read: it has a tab"),
        ("score --scorer scorr --pool pool.jsonl --output_dir run", "The scorer `scorr` cannot be loaded"),
        ("select --scored scord --output chosen.jsonl", "The scored pool `scord` cannot be loaded"),
        ("evaluate --model_name_or_path models/llama --test test.jsonl --adapters x", "The adapter `x`"),
        ("evaluate --run rnu --tasks mmlu", "The run `rnu`: there is no such file or folder"),
        ("report rnu", "The run `rnu`: there is no such file or folder"),
        ("publish --run rnu --hub_id ada/rows", "The run `rnu`: there is no such file or folder"),
        ("sft --model_name_or_path models/llama --dataset_name pol.jsonl --output_dir run", "mean `pool.jsonl`?"),
    ],
)  # fmt: skip
def test_names_that_lead_nowhere(
    project: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, flags: str, expected: str
) -> None:
    monkeypatch.chdir(project)
    (project / "tabs.yaml").write_text("pool: x\n\tfractions: [0.5]\n", encoding="utf-8")
    assert expected in refuse(project, *shlex.split(flags), capfd=capfd)


def test_a_tokenizer_without_an_end(
    project: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(project)
    make_model(num_layers=2).save_pretrained("models/endless")
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained("models/endless")
    flags = ("--config", "my_run.yaml", "--model_name_or_path", "models/endless")
    assert "Name one of its tokens with --eos_token." in refuse(project, "run", *flags, capfd=capfd)


def test_a_mapping_as_one_string() -> None:
    given: Any = "prompt=question completion=answer"
    config = InfluenceConfig("out", columns=given, use_cpu=True, bf16=False)
    assert config.columns == ["prompt=question", "completion=answer"]


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that nobody raised for a reader: the commands must not hide where it comes from."""
    module = load_command("select")
    with pytest.raises(ValueError, match="invalid literal"):
        module.PARSER.run(lambda _: int("three"), ["--scored", "a", "--output", "b"])


@pytest.mark.slow
def test_several_processes_tell_once(project: Path) -> None:
    command = [sys.executable, "-c", "from hf_in2core.commands.main import main; main()", "run"]
    command += ["--config", "my_run.yaml", "--pool", "pol.jsonl", "--num_processes", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    said = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=200)
    assert said.returncode == 2 and "Traceback (most" not in said.stderr, said.stderr
    assert said.stderr.count("Did you mean `pool.jsonl`?") == 1


@pytest.mark.slow
def test_the_second_run_in_a_folder_is_told(project: Path) -> None:
    """By real processes: the second is refused while the first works, and not once it was killed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "hf_in2core.commands", "run", "--config", "my_run.yaml", "--output_dir", "both"]
    command += ["--max_steps", "20000", "--use_cpu"]
    with subprocess.Popen(
        command,
        cwd=project,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as first:
        try:
            deadline = time.monotonic() + 120
            while not (project / "both" / "inputs.json").exists():
                assert first.poll() is None and time.monotonic() < deadline
                time.sleep(0.2)
            os.killpg(first.pid, signal.SIGSTOP)  # it holds the folder, and takes no time from the second
            second = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=120)
        finally:
            os.killpg(first.pid, 9)
    assert second.returncode == 2 and "both is in use: another in2core command" in second.stderr
    assert "Traceback" not in second.stderr
    assert json.loads((project / "both" / "inputs.json").read_text(encoding="utf-8"))
    assert LOCK_FILE not in list_folder(project / "both")
    with FileLock(project / "both" / LOCK_FILE, timeout=20):
        pass
