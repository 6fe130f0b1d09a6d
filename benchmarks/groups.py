"""Groups: selection that accounts for what is chosen already, on pools that repeat themselves.

    python benchmarks/groups.py [--quick] [--model FOLDER --pool FILE --validation FILE --test FILE --task_column NAME]

A redundant pool holds every row four times: as copies, or reworded (the quickstart's rows in its own phrasings, others
behind different first words). A reference is trained on it, 10 % are kept in several ways, and targets are
trained on them for the same steps (a plain loop that equals TRL's trainer, see retraining.py). By default the
quickstart's data and a small sibling of its model; the last pool is taken as it is, to show what caution costs where
nothing repeats itself.
± is the 95 % interval over seeds, each with its own pool, reference and target.
"""

import argparse
import random
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import Found, draw_seeds, drawing, make_parser, print_table, set_up, show, show_difference
from datasets import Dataset
from plain_training import (
    Schedule,
    add_selection_flags,
    compute_query_influence,
    compute_test_loss,
    find_sources,
    load_adapter,
    prepare_every_row,
    prepare_source,
    select_rows,
    train_on,
)

from hf_in2core.rows.sources import load_rows
from hf_in2core.selection.similarities import compute_rds_similarities
from hf_in2core.selection.turns import take_round_robin


COPIES = 4
OPENINGS = ("", "Please: ", "Now this one. ", "Question: ")


def reword(row: dict[str, Any], number: int) -> str:
    """The prompt of a row in other words: the quickstart's own phrasings, else another beginning."""
    sys.path.append(str(Path(__file__).resolve().parent.parent / "recipes/quickstart"))
    from generate import TASKS

    text = row["prompt"].removeprefix("Instruction: ").removesuffix("\nResponse:")
    for template in TASKS[row["task"]][1] if row.get("task") in TASKS else ():
        before, after = template.split("{}")
        if text.startswith(before) and text.endswith(after):
            content = text[len(before) : len(text) - len(after)]
            phrasings = [*TASKS[row["task"]][1], f"Please: {TASKS[row['task']][1][0]}"]
            return f"Instruction: {phrasings[number].format(content)}\nResponse:"
    return OPENINGS[number] + row["prompt"]


def make_pool(rows: list[dict[str, Any]], kind: str, size: int, seed: int) -> list[dict[str, Any]]:
    """`size` rows, four of each distinct one but for `as it is`; `origin` tells which belong together."""
    rng = random.Random(seed)
    if kind == "as it is":
        pool = [row | {"origin": index} for index, row in enumerate(rng.sample(rows, size))]
    else:
        pool = [
            row | {"origin": index, "prompt": reword(row, number) if kind == "reworded" else row["prompt"]}
            for index, row in enumerate(rng.sample(rows, size // COPIES))
            for number in range(COPIES)
        ]
    rng.shuffle(pool)
    return pool


def choose(scores: dict[str, np.ndarray], origin: np.ndarray, fraction: float, seed: int) -> dict[str, np.ndarray]:
    """Positions kept by each method."""
    n = len(origin)
    size = round(fraction * n)

    def select(influence: np.ndarray, strategy: str) -> np.ndarray:
        return select_rows(influence, strategy, size=size, seed=seed)

    datainf, cosine = scores["DataInf"], scores["gradient cosine"]
    scaled = datainf / np.sqrt((datainf**2).mean(0))
    order = np.argsort(datainf.mean(1), kind="stable")
    first = np.sort(np.unique(origin[order], return_index=True)[1])
    return {
        "random": select(datainf, "random"),
        "influence, top": select(datainf, "top"),
        "influence, top, one of each origin (oracle)": order[first][:size],
        "influence, each validation row scaled, top": select(scaled, "top"),
        "influence, largest over validation rows": np.argsort(scaled.min(1), kind="stable")[:size],
        "influence, in turn": select(datainf, "round_robin_rows"),
        "influence, greedy": select(datainf, "greedy"),
        "cosine, in turn": select(cosine, "round_robin_rows"),
        "cosine, greedy": select(cosine, "greedy"),
        "RDS+": take_round_robin(np.arange(n), size, scores["RDS+"].T),
    }


def run_seed(args: argparse.Namespace, kind: str, seed: int, data: dict[str, Any]) -> list[dict[str, Any]]:
    rows = make_pool(data["pool"], kind, args.rows, seed)
    pool = prepare_every_row(Dataset.from_list(rows), "pool", args.model)
    origin, task = np.array([row["origin"] for row in rows]), np.array([str(row[args.task_column]) for row in rows])
    ours = np.isin(task, data["tasks"])
    start = time.process_time()
    reference = train_on(args.model, pool, np.arange(len(pool)), Schedule(args.reference_steps, 16), seed)
    scores = {
        "DataInf": compute_query_influence(reference, pool, data["validation"]),
        "gradient cosine": compute_query_influence(reference, pool, data["validation"], "gradient_cosine"),
        "RDS+": -compute_rds_similarities(pool, data["validation"], load_adapter(args.model, 8, 0)).T,
    }
    found = []
    for method, chosen in choose(scores, origin, args.fraction, seed).items():
        if args.methods and method not in args.methods:
            continue
        target = train_on(args.model, pool, np.sort(chosen), Schedule(args.steps, args.batch_size), seed)
        row = {"pool": kind, "seed": seed, "kept by": method, "test_loss": compute_test_loss(target, data["test"])}
        row |= {"distinct": len(set(origin[chosen])), "task": len(set(origin[chosen][ours[chosen]]))}
        found.append(row | {"rows": len(chosen), "of the task": float(ours[chosen].mean())})
    print(f"{kind}, seed {seed}: {time.process_time() - start:.0f} CPU s", flush=True)
    return found


def summarise(found: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """One line per method, lowest loss first."""
    losses: dict[str, dict[int, float]] = {}
    for row in found:
        if row["pool"] == kind:
            losses.setdefault(row["kept by"], {})[row["seed"]] = row["test_loss"]
    lines = []
    for method in sorted(losses, key=lambda name: float(np.mean(list(losses[name].values())))):
        rows = [row for row in found if row["pool"] == kind and row["kept by"] == method]
        line: dict[str, Any] = {"kept by": method, "test loss": show(losses[method].values())}
        for other in ("influence, top", "random"):
            line[f"minus {other.split(', ')[-1]}"] = show_difference(losses[method], losses[other])
        line["distinct rows"] = f"{np.mean([row['distinct'] for row in rows]):.0f} of {rows[0]['rows']}"
        line["distinct of the task"] = f"{np.mean([row['task'] for row in rows]):.0f}"
        lines.append(line | {"of the task": f"{np.mean([row['of the task'] for row in rows]):.0%}"})
    return lines


def plot(found: list[dict[str, Any]], path: Path) -> None:
    """Test loss by method, one panel for each pool; points are seeds."""
    kinds = list(dict.fromkeys(row["pool"] for row in found))
    with drawing(path, 7.5, 0.6 + 2.6 * len(kinds)) as figure:
        for axes, kind in zip(np.atleast_1d(figure.subplots(len(kinds), 1)), kinds, strict=True):
            order = [line["kept by"] for line in summarise(found, kind)][::-1]
            for height, method in enumerate(order):
                values = [row["test_loss"] for row in found if row["pool"] == kind and row["kept by"] == method]
                colour = "#D55E00" if "greedy" in method else "#E69F00" if method == "random" else "#0072B2"
                draw_seeds(axes, values, height, colour)
            axes.set_yticks(range(len(order)), order, fontsize=8)
            axes.set_title(f"Pool: {kind}", fontsize=10)
        axes.set_xlabel("Test loss, nats per token (left is better)")


def main() -> None:
    parser = make_parser(__doc__, "One small pool, few steps: shows that it runs.")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--task_column", default="task", help="Column that tells the task of a row.")
    parser.add_argument("--kinds", nargs="+", default=["copies", "reworded", "as it is"])
    parser.add_argument("--methods", nargs="+", help="Some of the methods of the table; all by default.")
    parser.add_argument("--rows", type=int, default=1600, help="Rows of a pool, copies included.")
    add_selection_flags(parser, fraction=0.1, steps=100, reference_steps=100)
    args = set_up(parser, "--output", "benchmarks/results/groups")
    if args.quick:
        args.kinds, args.rows, args.steps, args.reference_steps, args.seeds = ["reworded"], 80, 4, 4, [0]
    find_sources(args, "model", ("pool", "validation", "test"))
    parts = {name: load_rows(getattr(args, name), name).to_list() for name in ("pool", "validation", "test")}
    for name, rows in parts.items():
        if args.task_column not in rows[0]:
            raise ValueError(
                f"The {name} has no column {args.task_column!r}, only {list(rows[0])}: see --task_column."
            )
    data = {"pool": parts["pool"], "tasks": sorted({str(row[args.task_column]) for row in parts["validation"]})}
    data |= {name: prepare_source(getattr(args, name), name, args.model) for name in ("validation", "test")}
    found = Found(args.output / "groups.json", args, ("output", "kinds", "seeds", "quick"))
    rows: list[dict[str, Any]] = []
    for kind in args.kinds:
        for seed in args.seeds:
            rows += found.take(partial(run_seed, args, kind, seed, data), pool=kind, seed=seed)
        print_table(f"Pool: {kind}, {args.fraction:.0%} kept", summarise(rows, kind))
    plot(rows, args.output / "groups.png")


if __name__ == "__main__":
    main()
