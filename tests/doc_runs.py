"""What the documents are run in: a folder that looks like the repository, a Hub, and a SLURM, all of them small.

The names of the documents hold: `Qwen/Qwen3-0.6B` is a model on the Hub (of loopback), `tatsu-lab/alpaca` rows there,
`../shared/data/…` lies beside the folder. A command runs as it is written, followed by flags that make it short.
"""

import io
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from helpers import CHAT_TEMPLATE, ROOT, make_model, make_tokenizer
from hub_client import QUIET, make_env
from loopback_hub import LoopbackHub
from recipe_runs import make_rows, write_rows


TOKEN = "hf_" + "d" * 34
DOCUMENTS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "recipes").glob("*/README.md")),
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# A file that a document tells the reader to write: its name is its first line.
NAMED_FILE = re.compile(r"# ([\w./]+\.yaml)\n")

GENERATED = "--pool_rows 50 --uniform_rows 9 --validation_rows 7 --test_rows 12 --pretrain_steps 20"
TRAINED = "--max_steps 2 --per_device_train_batch_size 4"
COMPARED = f"--seeds 0 --arms coreset random --budgets steps {TRAINED} --reference_max_steps 2"
MADE = f"--setup_script 'recipes/quickstart/generate.py --output_dir runs/quickstart/inputs {GENERATED}'"
# Flags after a command's own, by what it starts: two steps of one seed, and the generator's data in small.
SHORT = {
    "in2core run": COMPARED,
    "in2core demo": f"{COMPARED} {MADE}",
    "recipes/in2core.py": COMPARED,
    "recipes/slurm/": COMPARED,
    "in2core train-reference": TRAINED,
    "in2core sft": TRAINED,
    "recipes/quickstart/generate.py": GENERATED,
}
BY_CONFIG = {
    "recipes/quickstart/in2core.yaml": MADE,
    "recipes/qwen3_alpaca/in2core.yaml": "--bf16 false --dtype float32",  # which is what a CPU can do
}
# What cannot be run here, and where it is checked instead.
NOT_RUN = {
    "pip install hf-in2core": "needs PyPI; test_command.py runs the demo from a wheel",
    "pip install deepspeed": "needs PyPI",
    "pip install -r recipes/space/requirements.txt gradio==6.31.0": "needs PyPI; test_space.py compares the versions",
    "python recipes/space/app.py": "serves until it is stopped; test_space.py starts it",
}
# SLURM in small: the job starts at once, on this machine, as one node with two processes.
SBATCH = """#!/bin/bash
set -e
export SLURM_JOB_ID=$$ SLURM_NNODES=1 SLURM_NODEID=0 SLURM_GPUS_PER_NODE=cpu:2 SLURM_JOB_NODELIST=localhost
exec bash "$@"
"""
SRUN = '#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n'
SCONTROL = '#!/bin/bash\n[[ "$1 $2" == "show hostnames" ]] && echo 127.0.0.1\n'


class Block(NamedTuple):
    """A fenced block of a document: its language, its text and the line that it begins in."""

    language: str
    text: str
    line: int


def read_blocks(document: Path) -> list[Block]:
    text = document.read_text(encoding="utf-8")
    return [
        Block(match[1], match[2], text[: match.start()].count("\n") + 2)  # the line after the fence
        for match in FENCE.finditer(text)
    ]


def read_commands(block: Block) -> list[str]:
    """The commands of a bash block, each on one line and without its comment."""
    lines = block.text.replace("\\\n", " ").splitlines()
    stripped = [re.sub(r"(^|\s+)#(\s.*)?$", "", line).strip() for line in lines]
    return [line for line in stripped if line]


def shorten(command: str) -> str:
    """The command as it is, and then what makes it short."""
    tables = SHORT | BY_CONFIG
    if "zero3" in command and find_spec("deepspeed") is None:
        return "true"  # test_zero.py runs it where it is installed
    # accelerate itself shards on GPUs only
    launch, script = "accelerate launch --config_file recipes/accelerate_configs", ROOT / "tests" / "sharded_on_cpu.py"
    command = re.sub(
        r"in2core run --accelerate_config (fsdp|zero3) (--num_processes 2)",
        rf"{launch}/\1.yaml \2 {script} recipes/in2core.py",
        command,
    )
    return " ".join([command, *(tables[name] for name in tables if name in command)])


def shorten_python(code: str) -> str:
    """The snippet as it is, with what it lacks on a machine without a GPU: there TRL's default, bf16, is an error."""
    return code.replace("InfluenceConfig(output_dir", "InfluenceConfig(bf16=False, output_dir")


class Place:
    """The folder, the Hub and the environment in which documents are run."""

    def __init__(self, root: Path, hub: LoopbackHub) -> None:
        self.project, self.hub = root / "project", hub
        self.project.mkdir(parents=True)
        for name in ("recipes", "hf_in2core", "Makefile", "pyproject.toml", "constraints.txt"):
            (self.project / name).symlink_to(ROOT / name)
        # An installation that is up to date, for make.
        (self.project / ".venv").mkdir()
        (self.project / ".venv" / "bin").symlink_to(Path(sys.executable).parent)
        (self.project / ".venv" / ".installed").touch()
        programs = root / "programs"
        programs.mkdir()
        for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", SCONTROL)):
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        path = os.pathsep.join([str(Path(sys.executable).parent), str(programs), os.environ["PATH"]])
        # Passive: threads that wait for each other by spinning take minutes where cores are shared.
        own = {"PATH": path, "ACCELERATE_USE_CPU": "true", "OMP_WAIT_POLICY": "passive"}
        self.env = make_env(hub, root / "home", TOKEN, **own, **QUIET)
        self.done: set[str] = set()
        self._fill(root)

    def _fill(self, root: Path) -> None:
        """Models and rows under the names that the documents give them."""
        model = root / "model"
        make_model(num_layers=2).save_pretrained(model)
        tokenizer = make_tokenizer()
        tokenizer.chat_template = CHAT_TEMPLATE
        tokenizer.save_pretrained(model)
        files = {path.name: path.read_bytes() for path in model.iterdir()}
        self.hub.add_user(TOKEN, "user")
        for name in ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-4B"):
            self.hub.add_repo("model", name, files)
        shared = root / "shared" / "data"
        for folder in (
            self.project / "REF",
            self.project / "TGT",
            shared / "stories260K",
            shared / "stories260K_instr",
            shared / "llama1M",
        ):
            shutil.copytree(model, folder)

        pool = make_rows("reverse", 24, seed=0) + make_rows("copy", 24, seed=1)
        self._add_rows("user/pool", train=pool)
        scored = [row | {"influence": number / 7 - 3, "num_loss_tokens": 5} for number, row in enumerate(pool)]
        self._add_rows("user/alpaca-in2core", train=scored, coreset_25=scored[:12])
        self._add_rows("tatsu-lab/alpaca", train=[to_alpaca(row) for row in pool])
        # Slices of it are asked for, up to row 700.
        self._add_rows("sahil2801/CodeAlpaca-20k", train=[to_alpaca(row) for row in make_rows("copy", 700, seed=5)])
        (shared / "mixture").mkdir()
        for path, task, num_rows, seed in (
            (self.project / "my_validation.jsonl", "reverse", 6, 2),
            (self.project / "my_code.jsonl", "copy", 6, 3),
            (self.project / "my_test.jsonl", "reverse", 9, 4),
            (self.project / "more.jsonl", "copy", 7, 6),
            (shared / "mixture" / "pool.jsonl", "copy", 40, 7),
            (shared / "mixture" / "validation_gsm8k.jsonl", "reverse", 6, 8),
            (shared / "mixture" / "test_gsm8k.jsonl", "reverse", 9, 9),
        ):
            write_rows(path, [row | {"source": task} for row in make_rows(task, num_rows, seed)])

    def _add_rows(self, repo_id: str, **splits: list[dict[str, Any]]) -> None:
        files = {}
        for split, rows in splits.items():
            buffer = io.BytesIO()
            Dataset.from_list(rows).to_parquet(buffer)
            files[f"data/{split}-00000-of-00001.parquet"] = buffer.getvalue()
        self.hub.add_repo("dataset", repo_id, files)

    def write_files(self, block: Block) -> None:
        """The file that a YAML block is, where its first line names it."""
        if match := NAMED_FILE.match(block.text):
            (self.project / match[1]).write_text(block.text, encoding="utf-8")

    def run_once(self, command: str) -> None:
        """Run a command, unless it was run as it stands."""
        if command not in self.done and command not in NOT_RUN:
            self.run_bash(command)
            self.done.add(command)

    def run_bash(self, command: str) -> str:
        """Run a command as a reader's shell would, and return all that it printed."""
        done = subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", command],
            cwd=self.project,
            env=self.env,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=900,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}"
        return done.stdout


def to_alpaca(row: dict[str, Any]) -> dict[str, Any]:
    return {"instruction": row["prompt"], "input": "", "output": row["completion"].strip()}
