"""The console command: what it answers, how it starts through accelerate, and the whole story from a wheel."""

import json
import os
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from helpers import ROOT

from hf_in2core.commands.launch import SETTINGS, complete, resolve_config, split_flags
from hf_in2core.commands.main import COMMANDS, WITHOUT_LAUNCH, main
from hf_in2core.pipeline.parser import make_run_parser


def run(*flags: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from hf_in2core.commands.main import main; main()", *flags]
    kept = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    environment = kept | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | variables
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=500)


def test_the_commands_are_listed(capsys: pytest.CaptureFixture) -> None:
    main([])
    told = capsys.readouterr().out
    assert all(f"  {name} " in told for name in COMMANDS)


@pytest.mark.parametrize(
    "argv, told",
    [
        (["scor"], "there is no command `scor`. Did you mean `score`?"),
        (["select", "--scord", "x"], "in2core select: error: unknown flag `--scord`. Did you mean `--scored`?"),
        (
            ["publish", "--run", "missing", "--hub_id", "a/b"],
            "in2core publish: error: The run `missing`: there is no such file",
        ),
        (["publish"], "in2core publish: error: missing: --run, --hub_id"),
    ],
)
def test_what_cannot_be_is_told_by_the_command(argv: list[str], told: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as left:
        main(argv)
    assert left.value.code == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_grouped_and_imports_no_library(name: str, tmp_path: Path) -> None:
    started = time.monotonic()
    code = f"import sys; from hf_in2core.commands.main import main\ntry: main([{name!r}, '--help'])\n"
    code += "finally: print(sorted({n.split('.')[0] for n in sys.modules} & set(sys.argv[1:])), file=sys.stderr)"
    libraries = ["torch", "transformers", "datasets", "accelerate", "trl", "numpy", "pyarrow"]
    answer = subprocess.run(
        [sys.executable, "-c", code, *libraries],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=60,
    )
    assert answer.returncode == 0 and answer.stderr.strip() == "[]", answer.stderr
    assert f"usage: in2core {name}" in answer.stdout and "--help-all" in answer.stdout
    assert "\ndata:\n" in answer.stdout and "\noutput:\n" in answer.stdout
    assert time.monotonic() - started < 10


def test_flags_of_accelerate_are_told_from_settings() -> None:
    argv = ["--num_processes", "2", "--learning_rate", "1e-3", "--cpu", "--pool", "p.jsonl", "--mixed_precision=no"]
    argv += ["--gradient_accumulation_steps", "4", "--fractions", "0.25", "0.5", "--num-machines", "1"]
    flags, settings = split_flags(argv, launch_command_parser())
    assert flags == ["--num_processes", "2", "--cpu", "--mixed_precision=no", "--num-machines", "1"]
    assert settings == [
        *("--learning_rate", "1e-3", "--pool", "p.jsonl", "--gradient_accumulation_steps", "4"),
        *("--fractions", "0.25", "0.5"),
    ]


def test_no_setting_is_taken_for_a_flag_of_accelerate() -> None:
    ours = {f"--{action.dest}" for action in make_run_parser()._make_parser()._actions}
    theirs = set(launch_command_parser()._option_string_actions)
    assert ours & theirs - set(SETTINGS) == {"--debug"}


def test_a_configuration_of_ours_is_found_by_its_name(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    flag, path, *rest = resolve_config(["--accelerate_config", "multi_gpu", "--pool", "p"])
    assert flag == "--config_file" and Path(path).name == "multi_gpu.yaml" and rest == ["--pool", "p"]
    own = tmp_path / "own.yaml"
    own.write_text("num_processes: 1\n")
    assert resolve_config([f"--accelerate_config={own}"]) == ["--config_file", str(own)]
    with pytest.raises(SystemExit):
        resolve_config(["--accelerate_config", "multi_gpus"])
    assert "multi_gpus is neither a file nor one of cpu" in capsys.readouterr().err


def test_what_is_shipped_is_found_through_a_link_to_the_package(tmp_path: Path) -> None:
    (tmp_path / "hf_in2core").symlink_to(ROOT / "hf_in2core")
    code = "from hf_in2core.shipped import find_shipped as f; print(f('dataset_cards/scorer.md').read_text()[:1])"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert answer.returncode == 0, answer.stderr


def test_several_processes_on_a_cpu_join(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.delenv("IN2CORE_PROCESSES", raising=False)
    given = launch_command_parser().parse_args(["--cpu", "--num_processes", "2", "script.py"])
    complete(given)
    assert given.multi_gpu and not given.cpu and given.num_machines == 1
    assert os.environ["ACCELERATE_USE_CPU"] == "true" and os.environ["IN2CORE_PROCESSES"] == "2"


@pytest.mark.slow
def test_a_launch_that_would_run_one_process_is_refused(tmp_path: Path) -> None:
    flags = ["--model_name_or_path", "m", "--pool", "p.jsonl", "--output_dir", "out"]
    launching = ["--accelerate_config", "cpu", "--num_processes", "2"]
    answer = run("train-reference", *flags, *launching, folder=tmp_path)
    assert answer.returncode != 0
    assert "2 processes were launched, but they do not find each other (1 in this group)" in answer.stderr


def test_commands_that_launch_nothing_are_known() -> None:
    assert set(WITHOUT_LAUNCH) < set(COMMANDS)


@pytest.mark.slow
def test_the_demo_runs_from_a_wheel_in_an_empty_folder(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    target, folder = tmp_path / "installed", tmp_path / "empty"
    venv.create(target)
    python = str(target / "bin" / "python")
    libraries = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True
    )
    # The libraries that are installed here, without what their own .pth files add: this repository.
    (Path(libraries.stdout.strip()) / "libraries.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    wheel = next(tmp_path.glob("*.whl"))
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([*install, "--ignore-installed"], check=True, capture_output=True, timeout=300)
    folder.mkdir()
    environment = {
        "HF_HUB_OFFLINE": "1",
        "HOME": str(tmp_path),
        "HF_HOME": str(tmp_path / "hf"),
        "PATH": os.environ["PATH"],
    }
    where = "import hf_in2core; from importlib.util import find_spec as f; print(hf_in2core.__file__, f('recipes'))"
    found = subprocess.run(
        [python, "-c", where], capture_output=True, text=True, cwd=folder, env=environment, check=True
    )
    source, repository = found.stdout.split()
    assert Path(source).is_relative_to(target) and repository == "None"
    smaller = "--pool_rows 200 --uniform_rows 20 --validation_rows 16 --test_rows 20 --pretrain_steps 20"
    script = f"recipes/quickstart/generate.py --output_dir runs/quickstart/inputs {smaller}"
    flags = ["--setup_script", script, "--seeds", "0", "--max_steps", "3", "--reference_max_steps", "3"]
    answer = subprocess.run(
        [str(target / "bin" / "in2core"), "demo", *flags],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        timeout=500,
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    results = json.loads((folder / "runs/quickstart/in2core/results.json").read_text(encoding="utf-8"))
    assert results["complete"] and {arm["arm"] for arm in results["arms"]} == {
        "full",
        "coreset",
        "random",
        "opponents",
    }
    assert results["command"].startswith("in2core demo --setup_script")
    assert (folder / "runs/quickstart/in2core/report.html").is_file()
    assert str(target) not in (folder / "runs/quickstart/in2core/config.yaml").read_text(encoding="utf-8")
