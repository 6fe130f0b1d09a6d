"""Against retraining: does influence predict what training without a row, or on half of the rows, does to the loss?

    python benchmarks/retraining.py [--quick] [--model FOLDER --pool FILE --validation FILE]

By default a small sibling of the quickstart's model (made on the spot) and pools of 64 of its rows. For each pool: the
model is trained without each row (leave-one-out) and on random halves of the pool (linear datamodeling score), with
several seeds of adapter and order; a left-out row is missing from its batch, and all others keep their places. Scores
are read from references trained on the whole pool with the same seeds. Rank correlations with the loss averaged over
seeds, per validation row (then averaged) and for the mean validation loss; ± is the 95 % interval over pools.
"""

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Found, draw_seeds, drawing, group, make_parser, print_table, set_up, show
from datasets import Dataset
from fidelity import compare_leave_one_out, compute_lds
from plain_training import (
    Schedule,
    check_against_trl,
    compute_influence,
    find_sources,
    keep_gradients,
    load_adapter,
    make_batches,
    plan_steps,
    prepare_source,
    train_adapter,
)

from hf_in2core.engine.batches import read_token_rows
from hf_in2core.engine.curvature import compute_exact_ihvp
from hf_in2core.engine.datainf import compute_damping
from hf_in2core.engine.losses import compute_row_losses
from hf_in2core.selection.similarities import compute_rds_similarities


def compute_exact_influence(g: dict[str, np.ndarray], v: dict[str, np.ndarray], damping_scale: float) -> np.ndarray:
    """Influence `[n, Q]` by the exact damped inverse of each block, of gradients as of [`compute_influence`]."""
    influence = np.zeros((len(next(iter(g.values()))), len(next(iter(v.values())))))
    for name in g:
        rows, queries = torch.from_numpy(g[name]), torch.from_numpy(v[name])
        damping = compute_damping(float(rows.square().sum(1).mean()), rows.shape[1], damping_scale)
        if damping > 0:
            influence -= (rows @ compute_exact_ihvp(rows, queries, damping).T).numpy()
    return influence


class Retraining:
    """One pool: its steps by seed, and trainings with rows left out."""

    def __init__(self, model: Path, pool: Dataset, validation: Dataset, schedule: Schedule, seeds: list[int]) -> None:
        self.pool, self.validation, self.schedule = pool, validation, schedule
        self.model = load_adapter(model, schedule.rank, 0)
        self.steps, self.start = {}, {}
        for seed in seeds:
            self.steps[seed] = plan_steps(len(pool), schedule, seed)
            fresh = load_adapter(model, schedule.rank, seed)
            self.start[seed] = {name: p.detach().clone() for name, p in fresh.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def reset(self, seed: int) -> None:
        for name, parameter in self.model.named_parameters():
            if name in self.start[seed]:
                parameter.copy_(self.start[seed][name])

    def train(self, kept: np.ndarray, seed: int) -> np.ndarray:
        """Mean token loss of every validation row after training on the rows that are kept (bool `[n]`)."""
        self.reset(seed)
        batches = make_batches(self.pool, [rows[kept[rows]] for rows in self.steps[seed]])
        train_adapter(self.model, batches, self.schedule)
        losses = compute_row_losses(self.model, self.validation)
        return losses.nll / losses.num_loss_tokens

    def score(self, seeds: list[int], damping_scale: float) -> dict[str, np.ndarray]:
        """Scores `[n, Q]`, small first; those of references are means over the seeds."""
        n, num_queries = len(self.pool), len(self.validation)
        self.reset(seeds[0])
        scores = {"RDS+": -compute_rds_similarities(self.pool, self.validation, self.model).T}
        by_seed: list[dict[str, np.ndarray]] = []
        for seed in seeds:
            self.train(np.ones(n, dtype=bool), seed)
            g, v = (keep_gradients(self.model, part) for part in (self.pool, self.validation))
            found = compute_influence(g, v, damping_scale)
            del found["DataInf / norm"]
            found["exact damped inverse"] = compute_exact_influence(g, v, damping_scale)
            losses = compute_row_losses(self.model, self.pool)
            found["highest loss"] = np.tile(-(losses.nll / losses.num_loss_tokens)[:, None], num_queries)
            by_seed.append(found)
        scores |= {name: np.mean([found[name] for found in by_seed], axis=0) for name in by_seed[0]}
        scores["DataInf, one reference"] = by_seed[0]["DataInf"]
        lengths = read_token_rows(self.pool).num_loss_tokens.astype(np.float64)
        scores["longest answer"] = np.tile(-lengths[:, None], num_queries)
        # The same for all validation rows, as loss and length are.
        scores["random"] = np.tile(np.random.default_rng(seeds[0] + n).random(n)[:, None], num_queries)
        return scores


def measure_pool(job: Retraining, args: argparse.Namespace, pool_seed: int) -> list[dict[str, Any]]:
    """Agreement of every score with retraining on one pool."""
    n = len(job.pool)
    start = time.process_time()
    scores = job.score(args.seeds, args.damping_scale)
    generator = np.random.default_rng(pool_seed)
    members = np.zeros((args.subsets, n), dtype=bool)
    for row in members:
        row[generator.choice(n, n // 2, replace=False)] = True
    halves = np.array([[job.train(row, seed) for seed in args.subset_seeds] for row in members])
    left_out = np.array([[job.train(np.arange(n) != i, seed) for seed in args.seeds] for i in range(n)])
    print(f"pool {pool_seed}: {time.process_time() - start:.0f} CPU s", flush=True)
    found = []
    for name, score in scores.items():
        row: dict[str, Any] = {"pool": pool_seed, "score": name}
        for column, measured, compare in (
            ("LDS", halves, lambda s, x: compute_lds(s, members, x)),
            ("leave-one-out", left_out, compare_leave_one_out),
        ):
            for kind, s, x in (
                ("per validation row", score, measured),
                ("mean loss", score.mean(1), measured.mean(2)),
            ):
                result = compare(s, x)
                row[f"{column}, {kind}"] = result.spearman
                row[f"{column}, {kind}: seed agreement"] = result.seed_agreement
                row[f"{column}, {kind}: ceiling"] = result.ceiling
        found.append(row)
    return found


COLUMNS = (
    "LDS, per validation row",
    "LDS, mean loss",
    "leave-one-out, per validation row",
    "leave-one-out, mean loss",
)


def summarise(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line per score, best LDS first, after the lines of the noise."""
    by_score = {score: rows for (score,), rows in group(found, "score").items()}
    anything = next(iter(by_score.values()))
    lines = []
    for label, suffix in (
        ("*ceiling: a perfect score*", ": ceiling"),
        ("*two seeds of retraining*", ": seed agreement"),
    ):
        line: dict[str, Any] = {"score": label}
        for column in COLUMNS:
            values = [row[column + suffix] for row in anything]
            known = [value for value in values if value is not None]
            line[column] = show(known) if len(known) == len(values) else "none: seeds do not agree"
        lines.append(line)
    for name in sorted(by_score, key=lambda name: -float(np.mean([row[COLUMNS[0]] for row in by_score[name]]))):
        lines.append({"score": name} | {c: show([row[c] for row in by_score[name]], "{:+.3f}") for c in COLUMNS})
    return lines


def plot(found: list[dict[str, Any]], path: Path) -> None:
    """Agreement of every score, with the ceiling as a line; points are pools."""
    with drawing(path, 9, 4) as figure:
        axes_list = figure.subplots(1, 2, sharey=True)
        lines = [line["score"] for line in summarise(found)[2:]][::-1]
        for axes, column in zip(axes_list, (COLUMNS[0], COLUMNS[2]), strict=True):
            for height, name in enumerate(lines):
                values = [row[column] for row in found if row["score"] == name]
                colour = "#0072B2" if name.startswith("DataInf") else "#000000"
                draw_seeds(axes, values, height, colour)
            ceilings = [row[f"{column}: ceiling"] for row in found if row[f"{column}: ceiling"] is not None]
            if ceilings:
                axes.axvline(np.mean(ceilings), color="#E69F00", linestyle="--", linewidth=1)
            axes.axvline(0, color="#999999", linewidth=0.8)
            axes.set_yticks(range(len(lines)), lines)
            axes.set_xlabel("Spearman with retraining (right is better)")
            axes.set_title(f"{column}; dashed: ceiling", fontsize=10)


def main() -> None:
    parser = make_parser(__doc__, "One pool of 16 rows, few trainings: shows that it runs.")
    parser.add_argument("--model", type=Path, help="Folder of a causal language model.")
    parser.add_argument("--pool", help="Rows with prompt and completion: a .jsonl, a folder or a Hub id.")
    parser.add_argument("--validation", help="Likewise.")
    parser.add_argument("--pool_seeds", type=int, nargs="+", default=[0, 1, 2], help="One pool is drawn by each.")
    parser.add_argument("--rows", type=int, default=64, help="Rows of a pool.")
    parser.add_argument("--subsets", type=int, default=40, help="Random halves of each pool.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3], help="Of references and leave-one-out.")
    parser.add_argument("--subset_seeds", type=int, nargs="+", default=[0, 1, 2], help="Of the halves.")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--damping_scale", type=float, default=0.1)
    args = set_up(parser, "--output", "benchmarks/results/retraining")
    if args.quick:
        args.pool_seeds, args.rows, args.subsets = [0], 16, 10
        args.seeds, args.subset_seeds, args.epochs = [0, 1], [0, 1], 1
    find_sources(args, "model", ("pool", "validation"))
    everything = prepare_source(args.pool, "pool", args.model)
    validation = prepare_source(args.validation, "validation", args.model)
    if args.rows > len(everything):
        raise ValueError(f"--rows {args.rows} is more than the {len(everything)} rows of {args.pool}.")
    steps = args.epochs * -(-args.rows // args.batch_size)
    schedule = Schedule(steps, args.batch_size, args.learning_rate, warmup_steps=max(steps // 10, 1))
    found = Found(args.output / "retraining.json", args, ("output", "pool_seeds", "quick"))
    difference = check_against_trl(args.model, everything.select(range(args.rows)), schedule)
    print(f"This loop and TRL's trainer end at adapters that differ by {difference:.0e} of the largest weight.")

    def measure(pool_seed: int) -> list[dict[str, Any]]:
        drawn = np.sort(np.random.default_rng(pool_seed).choice(len(everything), args.rows, replace=False))
        job = Retraining(args.model, everything.select(drawn), validation, schedule, args.seeds)
        return measure_pool(job, args, pool_seed)

    rows = [row for seed in args.pool_seeds for row in found.take(partial(measure, seed), pool=seed)]
    print_table(f"{len(args.pool_seeds)} pools of {args.rows} rows, {steps} steps", summarise(rows))
    plot(rows, args.output / "retraining.png")


if __name__ == "__main__":
    main()
