"""Transfer: does the influence of another, smaller or barely trained reference choose rows for the target?

    python benchmarks/transfer.py [--quick] [--target DIR --references NAME=DIR … --pool F --validation F --test F]

By default models that the quickstart's generator pretrains: the target, the same size from another seed, a smaller and
a larger one. Each reference is trained on the pool (or on a share of it, `target 10%`), the pool is scored, and the
target is trained on the quarter that it chooses, for the same steps (a plain loop that equals TRL's trainer, see
retraining.py). The upper bound is the target as its own reference; `target, other seed` is how far two such references
agree. ± is the 95 % interval over seeds; rank correlations are with the target's own influence, same seed of the rows.
"""

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import Found, draw_seeds, drawing, make_parser, print_table, set_up, show, show_difference
from fidelity import compare_scores
from plain_training import (
    Schedule,
    add_selection_flags,
    compute_query_influence,
    compute_test_loss,
    find_sources,
    load_adapter,
    make_sized_model,
    prepare_every_row,
    prepare_source,
    select_rows,
    train_on,
)
from scipy.stats import spearmanr

from hf_in2core.rows.sources import load_rows
from hf_in2core.selection.similarities import compute_rds_similarities


STRATEGIES = {"top": "mean", "round_robin_rows": "in turn"}


def run_seed(args: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    parts = {name: prepare_source(getattr(args, name), name, args.target) for name in ("validation", "test")}
    raw = load_rows(args.pool, "pool").select(range(args.rows))
    pool = prepare_every_row(raw, "pool", args.target)
    n = len(pool)
    everything = np.arange(n)

    def score(model: Path, share: float, training_seed: int) -> np.ndarray:
        rows, queries = (
            (pool, parts["validation"])
            if model == args.target
            else (prepare_every_row(raw, "pool", model), prepare_source(args.validation, "validation", model))
        )
        kept = np.random.default_rng(training_seed).choice(everything, round(share * n), replace=False)
        # As many epochs as the whole pool gets.
        steps = max(round(share * args.reference_steps), 1)
        schedule = Schedule(steps, 16, warmup_steps=min(10, steps // 2))
        return compute_query_influence(train_on(model, rows, np.sort(kept), schedule, training_seed), rows, queries)

    start = time.process_time()
    own = score(args.target, 1.0, seed)
    references = {"target itself": own, "target, other seed": score(args.target, 1.0, seed + 100)}
    references |= {f"target, on {share:.0%} of the pool": score(args.target, share, seed) for share in args.shares}
    references |= {name: score(folder, 1.0, seed) for name, folder in args.references.items()}
    untrained = load_adapter(args.target, 8, 0)
    references["RDS+ of the target"] = -compute_rds_similarities(pool, parts["validation"], untrained).T
    found = []

    def train_target(name: str, strategy: str, kept: np.ndarray) -> dict[str, Any]:
        target = train_on(args.target, pool, kept, Schedule(args.steps, args.batch_size), seed)
        return {
            "reference": name,
            "strategy": strategy,
            "seed": seed,
            "test_loss": compute_test_loss(target, parts["test"]),
        }

    for name, influence in references.items():
        for strategy, label in STRATEGIES.items():
            row = train_target(name, label, select_rows(influence, strategy, fraction=args.fraction))
            if name != "target itself" and strategy == "top":
                agreement = compare_scores(influence.mean(1), own.mean(1), args.fraction)
                row |= {"spearman": agreement.spearman, "overlap": agreement.overlap}
                by_row = [spearmanr(influence[:, q], own[:, q]).statistic for q in range(own.shape[1])]
                row["spearman by row"] = float(np.mean(by_row))
            found.append(row)
    random = np.random.default_rng(seed).choice(everything, round(args.fraction * n), replace=False)
    found += [train_target("random rows", label, np.sort(random)) for label in list(STRATEGIES.values())[:1]]
    print(f"seed {seed}: {time.process_time() - start:.0f} CPU s", flush=True)
    return found


def summarise(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line per reference, in the order in which they ran."""
    lines = []
    random = {row["seed"]: row["test_loss"] for row in found if row["reference"] == "random rows"}
    for name in dict.fromkeys(row["reference"] for row in found):
        line: dict[str, Any] = {"reference": name}
        ours = [row for row in found if row["reference"] == name]
        for column in ("spearman", "spearman by row", "overlap"):
            values = [row[column] for row in ours if column in row and row["strategy"] == "mean"]
            line[column] = show(values) if values else ""
        for label in STRATEGIES.values():
            losses = {row["seed"]: row["test_loss"] for row in ours if row["strategy"] == label}
            line[f"loss, {label}"] = show(losses.values()) if losses else ""
            line[f"minus random, {label}"] = show_difference(losses, None if name == "random rows" else random)
        lines.append(line)
    return lines


def plot(found: list[dict[str, Any]], path: Path) -> None:
    """Test loss of the target by reference; points are seeds."""
    names = list(dict.fromkeys(row["reference"] for row in found))[::-1]
    with drawing(path, 7.5, 0.8 + 0.36 * len(names)) as figure:
        axes = figure.subplots()
        for label, colour, shift in (("mean", "#0072B2", 0.12), ("in turn", "#D55E00", -0.12)):
            for height, name in enumerate(names):
                values = [row["test_loss"] for row in found if row["reference"] == name and row["strategy"] == label]
                if values:
                    draw_seeds(axes, values, height + shift, "#E69F00" if name == "random rows" else colour)
            axes.plot([], [], "o", color=colour, label=f"kept by the {label}" if label == "mean" else f"kept {label}")
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set_xlabel("Test loss of the target, nats per token (left is better)")
        axes.legend(frameon=False, fontsize=8)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--target", type=Path)
    parser.add_argument("--references", nargs="+", default=[], help="Others, as name=folder.")
    parser.add_argument("--rows", type=int, default=800, help="First rows of the pool to use.")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.05, 0.25], help="Of the pool, for a reference.")
    add_selection_flags(parser, fraction=0.25, steps=60, reference_steps=50)
    args = set_up(parser, "--output", "benchmarks/results/transfer")
    if args.quick:
        args.rows, args.steps, args.reference_steps, args.seeds, args.shares = 48, 3, 4, [0], [0.25]
    args.references = {name: Path(folder) for name, _, folder in (item.partition("=") for item in args.references)}
    inputs = find_sources(args, "target", ("pool", "validation", "test"))
    if inputs is not None and not args.quick:
        args.references = {
            "same size, pretrained from another seed": make_sized_model(inputs, 48, 2, seed=1),
            "smaller (hidden 24, 1 layer)": make_sized_model(inputs, 24, 1),
            "larger (hidden 96, 4 layers)": inputs / "model",
        }
    available = len(load_rows(args.pool, "pool"))
    if args.rows > available:
        raise ValueError(f"--rows {args.rows} is more than the {available} rows of {args.pool}.")
    found = Found(args.output / "transfer.json", args, ("output", "seeds", "quick"))
    rows = [row for seed in args.seeds for row in found.take(partial(run_seed, args, seed), seed=seed)]
    print_table(f"{args.fraction:.0%} of the pool kept", summarise(rows))
    plot(rows, args.output / "transfer.png")


if __name__ == "__main__":
    main()
