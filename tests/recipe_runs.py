"""Runs of the recipes on tiny models and data made on the spot, shared by their tests."""

import importlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from helpers import ROOT, WORDS, make_model, make_tokenizer
from transformers import AutoTokenizer


Inputs = tuple[Path, dict[str, Any]]

NUM_POOL, NUM_VALIDATION, NUM_TEST = 60, 8, 11


# Script under recipes/ → command; the others have the same name in both.
COMMANDS = {"in2core": "run", "score_influence": "score", "select_coreset": "select", "sft_coreset": "sft"}


def load_command(name: str) -> ModuleType:
    return importlib.import_module(f"hf_in2core.commands.{COMMANDS.get(name, name)}")


def run_command(name: str, *flags: str, pictures: bool = False) -> None:
    """A command in this process; as where matplotlib is missing, since pictures take a third of a short run."""
    module = load_command(name)
    with nullcontext() if pictures else no_pictures():
        module.main(module.PARSER.parse(flags))


@contextmanager
def no_pictures() -> Iterator[None]:
    """As where matplotlib is missing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        yield


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
        # The fewest passes, and what most tests look at: the influence on the mean.
        "strategy": "top",
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


def launch(
    *arguments: str, processes: int = 1, use_cpu: bool = True, config: str | None = None, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """`accelerate launch` as users type it, on the CPU; `config` is one of `recipes/accelerate_configs`."""
    kind = ["--cpu"] if processes == 1 else ["--multi_gpu", "--main_process_port", "0"]
    if config is not None:
        kind = ["--config_file", f"recipes/accelerate_configs/{config}", "--main_process_port", "0"]
    command = [
        sys.executable, "-m", "accelerate.commands.launch", *kind, "--num_processes", str(processes),
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", *arguments,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": str(use_cpu).lower()}
    answer = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert answer.returncode == 0 or not (use_cpu and check), answer.stderr[-3000:]
    return answer
