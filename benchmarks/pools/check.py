"""Has each pool the property that it is for: are its useful rows better to train on than as many random ones?

    python benchmarks/pools/check.py [--pools conventions unlike …] [--shared FOLDER] [--output FOLDER]

Pools that are not under runs/pools are made there. A target is trained on useful rows, on as many random ones, and on
harmful ones where there are any; where all rows are useful, on the longest and the shortest answers instead, which is
what a choice could still differ by. By the settings of the pool (a plain loop that equals TRL's trainer, see
retraining.py), one seed; no selector takes part. Writes `pools.json` (by default the record that README.md shows),
where what it says of other pools stays, and prints the table.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import report
from plain_training import Schedule, compute_test_loss, load_adapter, prepare_source, train_on

from benchmarks.pools.make import POOLS, find_pool
from benchmarks.pools.pool import HARMFUL, ROOT, USEFUL


# The recipes measure the demo and the mixture; in `multiple_choice` all rows are useful and nothing tells them apart.
CHECKED = [name for name in POOLS if name not in ("demo", "mixture", "mixture_two_sets", "multiple_choice")]
ARMS = ("before", "useful", "random", "harmful", "longest", "shortest")


def draw_arms(kinds: np.ndarray, lengths: np.ndarray, fraction: float) -> dict[str, np.ndarray]:
    """Rows of each arm: useful ones, as many of all, and at most as many harmful ones."""
    useful, harmful = np.flatnonzero(kinds == USEFUL), np.flatnonzero(kinds == HARMFUL)
    size = min(round(fraction * len(kinds)), len(useful))
    arms = {"useful": useful, "random": np.arange(len(kinds)), "harmful": harmful}
    generator = np.random.default_rng(0)
    drawn = {
        name: np.sort(generator.choice(rows, min(size, len(rows)), replace=False))
        for name, rows in arms.items()
        if len(rows)
    }
    if len(useful) == len(kinds):
        by_length = np.argsort(lengths, kind="stable")
        drawn |= {"longest": np.sort(by_length[-size:]), "shortest": np.sort(by_length[:size])}
    return drawn


def check_pool(name: str, folder: Path) -> dict[str, Any]:
    """Losses of the arms of a pool on its test set, or on that of what harms it where it has one."""
    settings = yaml.safe_load((folder / "in2core.yaml").read_text(encoding="utf-8"))
    kinds = np.array([json.loads(line)["kind"] for line in (folder / "pool.jsonl").read_text().splitlines()])
    model = settings["model_name_or_path"]
    schedule = Schedule(
        settings["max_steps"],
        settings["per_device_train_batch_size"],
        float(settings["learning_rate"]),
        settings["warmup_steps"],
        settings["lora_r"],
    )
    pool = prepare_source(settings["pool"], "pool", model)
    judge = next((path for path in folder.glob("test_*.jsonl")), folder / "test.jsonl")
    test = prepare_source(str(judge), judge.stem, model)
    lengths = np.array([sum(label != -100 for label in labels) for labels in pool["labels"]])
    arms = draw_arms(kinds, lengths, settings["fractions"][0])
    models = {arm: train_on(model, pool, rows, schedule, 0) for arm, rows in arms.items()}
    models["before"] = load_adapter(model, schedule.rank, 0)
    counts = {"rows": len(kinds), **{kind: int((kinds == kind).sum()) for kind in (USEFUL, HARMFUL)}}
    losses = {f"loss, {arm}": compute_test_loss(models[arm], test) if arm in models else "" for arm in ARMS}
    return {"pool": name, "judged on": judge.stem, **counts, "kept": len(arms["random"]), **losses}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--pools", nargs="+", choices=list(POOLS), default=CHECKED)
    parser.add_argument("--shared", type=Path, default=Path("../shared/data"), help="Data outside the project.")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/records")
    args = parser.parse_args()
    torch.set_num_threads(1)
    record = args.output / "pools.json"
    known = json.loads(record.read_text(encoding="utf-8"))["rows"] if record.is_file() else []
    found = {row["pool"]: row for row in known}
    for name in args.pools:
        found[name] = check_pool(name, find_pool(name, 0, args.shared))
        # After each pool, so that an interruption loses one.
        report("pools", [found[name] for name in POOLS if name in found], args.output)


if __name__ == "__main__":
    main()
