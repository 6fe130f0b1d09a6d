"""Length bias: does influence favour long or short rows, under which reduction of a row's loss, and what does it cost?

    python benchmarks/lengths.py [--quick] [--model DIR --pool FILE --validation FILE --test FILE --task_column NAME]

By default the quickstart's rows and a small sibling of its model. For every seed rows are drawn and a reference is
trained on them (mean loss over tokens, as SFT does); DataInf is read with each `loss_reduction`, and the gradient
cosine, which gives every row's gradient the same norm. The first quarter of each ranking, by the influence on the mean
validation loss (`top`) and with validation rows in turn (`round_robin_rows`), is compared with the pool by length,
and targets are trained on it for the same steps (a plain loop that equals TRL's trainer, see retraining.py), beside
random rows and random rows as long as the quarter's. Spearman below 0: long rows first. ± is the 95 % interval over
seeds; differences are paired by seed.
"""

import argparse
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
    prepare_every_row,
    train_on,
)

from hf_in2core import select_coreset
from hf_in2core.engine.batches import read_token_rows
from hf_in2core.names import LOSS_REDUCTIONS
from hf_in2core.rows.sources import load_rows
from hf_in2core.selection.baselines import select_length_matched
from hf_in2core.selection.lengths import MIN_ROWS, compare_lengths
from hf_in2core.selection.turns import count_turns


COSINE = "cosine (unit norm)"
RANKINGS = [*LOSS_REDUCTIONS, COSINE]
TOP, IN_TURN, MATCHED = "top", "in turn", "as long as top"


def prepare(source: str, name: str, model: Path, task_column: str) -> tuple[Dataset, np.ndarray]:
    """Tokens of the rows, all of which must carry loss, and the task of each."""
    rows = load_rows(source, name)
    if task_column not in rows.column_names:
        raise ValueError(f"The {name} has no column {task_column!r}, only {rows.column_names}: see --task_column.")
    return prepare_every_row(rows, name, model), np.array([str(task) for task in rows[task_column]])


def draw(num_rows: int, rows: int, seed: int) -> np.ndarray:
    """Positions of the pool's rows that a seed uses."""
    return np.sort(np.random.default_rng(seed).choice(num_rows, rows, replace=False))


def check_pool(tokens: np.ndarray, args: argparse.Namespace) -> None:
    """Refuse rows that can say nothing about length, before anything is trained."""
    if args.rows > len(tokens):
        raise ValueError(f"--rows {args.rows} is more than the {len(tokens)} rows of {args.pool}.")
    if round(args.fraction * args.rows) < MIN_ROWS:
        raise ValueError(
            f"--rows {args.rows} keeps {round(args.fraction * args.rows)} rows at --fraction {args.fraction:g}, too "
            f"few to compare their lengths. Keep at least {MIN_ROWS}."
        )
    for seed in args.seeds:
        drawn = tokens[draw(len(tokens), args.rows, seed)]
        if np.ptp(drawn) == 0:
            raise ValueError(
                f"Every row that seed {seed} draws from {args.pool} has {drawn[0]} loss tokens: no ranking can go "
                "with length. Give rows of different lengths."
            )


def rank(influence: np.ndarray) -> dict[str, np.ndarray]:
    """What each strategy takes the smallest values of, from `[n, Q + 1]` of which the last is of the mean."""
    return {TOP: influence[:, -1], IN_TURN: count_turns(influence[:, :-1].T)}


def run_seed(args: argparse.Namespace, seed: int, data: dict[str, Any]) -> list[dict[str, Any]]:
    start = time.process_time()
    drawn = draw(len(data["tokens"]), args.rows, seed)
    pool, tokens, ours = data["pool"].select(drawn), data["tokens"][drawn], data["ours"][drawn]
    reference = train_on(args.model, pool, np.arange(args.rows), Schedule(args.reference_steps, 16), seed)
    columns = {"num_loss_tokens": tokens, "row": np.arange(args.rows)}
    found: list[dict[str, Any]] = []

    def add(name: str, strategy: str, kept: np.ndarray, **values: Any) -> None:
        target = train_on(args.model, pool, np.sort(kept), Schedule(args.steps, args.batch_size), seed)
        values |= {"loss_tokens": float(tokens[kept].mean()), "pool_tokens": float(tokens.mean())}
        values |= {"task": float(ours[kept].mean()), "test_loss": compute_test_loss(target, data["test"])}
        found.append({"seed": seed, "ranked by": name, "strategy": strategy, **values})

    first: dict[str, np.ndarray] = {}
    for name in RANKINGS:
        estimator, loss_reduction = ("gradient_cosine", "mean") if name == COSINE else ("datainf", name)
        influence = compute_query_influence(
            reference, pool, data["validation"], estimator, loss_reduction=loss_reduction, with_mean=True
        )
        for strategy, scores in rank(influence).items():
            scored = Dataset.from_dict({"influence": scores, **columns})
            coreset = select_coreset(scored, fraction=args.fraction, order="original")
            kept = np.array(coreset["row"])
            lengths = compare_lengths(scored, coreset)
            first.setdefault(strategy, kept)  # "mean" comes first
            add(
                name,
                strategy,
                kept,
                spearman=lengths.spearman,
                gap=lengths.gap,
                is_warned=lengths.warning is not None,
                overlap=len(np.intersect1d(kept, first[strategy])) / len(kept),
            )
            if strategy == TOP:
                matched = select_length_matched(scored, fraction=args.fraction, seed=seed)
                add(name, MATCHED, np.array(matched["row"]))
    size = round(args.fraction * args.rows)
    add("random rows", TOP, np.random.default_rng(seed).choice(args.rows, size, replace=False))
    print(f"seed {seed}: {time.process_time() - start:.0f} CPU s", flush=True)
    return found


def pick(found: list[dict[str, Any]], name: str, strategy: str, value: str) -> dict[int, Any]:
    """A value by seed."""
    return {row["seed"]: row[value] for row in found if (row["ranked by"], row["strategy"]) == (name, strategy)}


def summarise_lengths(found: list[dict[str, Any]], strategy: str, tasks: int) -> list[dict[str, Any]]:
    """One line per ranking: how it goes with length and what it keeps."""
    pool = np.mean(list(pick(found, "random rows", TOP, "pool_tokens").values()))
    lines = []
    for name in RANKINGS:
        line: dict[str, Any] = {"ranked by": name}
        line["Spearman with length"] = show(pick(found, name, strategy, "spearman").values(), "{:+.2f}")
        line[f"tokens (pool {pool:.1f})"] = show(pick(found, name, strategy, "loss_tokens").values(), "{:.1f}")
        line["gap"] = show(pick(found, name, strategy, "gap").values(), "{:.2f}")
        warned = pick(found, name, strategy, "is_warned").values()
        line["warned of"] = f"{sum(warned)} of {len(warned)}"
        if tasks > 1:
            shares = [100 * share for share in pick(found, name, strategy, "task").values()]
            line["of the task"] = f"{show(shares, '{:.0f}')} %"
        line["overlap with mean"] = show(pick(found, name, strategy, "overlap").values(), "{:.2f}")
        lines.append(line)
    return lines


def summarise_losses(found: list[dict[str, Any]], strategy: str) -> list[dict[str, Any]]:
    """One line per ranking: test loss of the targets, and for `top` what is left of it beside rows as long."""
    random = pick(found, "random rows", TOP, "test_loss")
    lines = [{"ranked by": "random rows", "test loss": show(random.values())}]
    for name in RANKINGS:
        losses = pick(found, name, strategy, "test_loss")
        line = {
            "ranked by": name,
            "test loss": show(losses.values()),
            "minus random": show_difference(losses, random),
        }
        mean = pick(found, "mean", strategy, "test_loss")
        line["minus mean's"] = show_difference(losses, None if name == "mean" else mean)
        if strategy == TOP:
            matched = pick(found, name, MATCHED, "test_loss")
            line["rows as long"] = show(matched.values())
            line["rows as long, minus random"] = show_difference(matched, random)
            line["minus rows as long"] = show_difference(losses, matched)
        lines.append(line)
    return [dict.fromkeys(lines[-1], "") | line for line in lines]


def plot(found: list[dict[str, Any]], path: Path) -> None:
    """Length correlation and test loss by reduction; points are seeds, ticks their means."""
    with drawing(path, 8.5, 3.5) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        names = RANKINGS[::-1]
        for strategy, colour, shift in ((TOP, "#0072B2", 0.2), (IN_TURN, "#D55E00", 0.0), (MATCHED, "#009E73", -0.2)):
            for axes, value in ((left, "spearman"), (right, "test_loss")):
                if value == "spearman" and strategy == MATCHED:
                    continue
                for height, name in enumerate(names):
                    values = list(pick(found, name, strategy, value).values())
                    draw_seeds(axes, values, height + shift, colour)
            label = "random rows as long as top's" if strategy == MATCHED else strategy
            right.plot([], [], "o", color=colour, label=label)
        left.axvline(0, color="#999999", linewidth=0.8)
        left.set_yticks(range(len(names)), names, fontsize=8)
        left.set_xlabel("Spearman with loss tokens (left: long rows first)")
        random = list(pick(found, "random rows", TOP, "test_loss").values())
        right.axvline(float(np.mean(random)), color="#E69F00", linewidth=1.2, label="random rows")
        right.set_xlabel("Test loss, nats per token (left is better)")
        figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--task_column", default="task", help="Column that tells the task of a row.")
    parser.add_argument("--rows", type=int, default=800, help="Rows of the pool, drawn anew for every seed.")
    add_selection_flags(parser, fraction=0.25, steps=60, reference_steps=50)
    args = set_up(parser, "--output", "benchmarks/results/lengths")
    if args.quick:
        args.rows, args.steps, args.reference_steps, args.seeds = 48, 3, 4, [0]
    find_sources(args, "model", ("pool", "validation", "test"))
    parts = {
        name: prepare(getattr(args, name), name, args.model, args.task_column)
        for name in ("pool", "validation", "test")
    }
    pool, tasks = parts["pool"]
    tokens = read_token_rows(pool).num_loss_tokens
    check_pool(tokens, args)
    data: dict[str, Any] = {"pool": pool, "tokens": tokens, "ours": np.isin(tasks, parts["validation"][1])}
    data |= {name: parts[name][0] for name in ("validation", "test")}
    found = Found(args.output / "lengths.json", args, ("output", "seeds", "quick"))
    rows = [row for seed in args.seeds for row in found.take(partial(run_seed, args, seed, data), seed=seed)]
    num_tasks = len(set(tasks))
    for strategy in (TOP, IN_TURN):
        title = f"Lengths: {args.fraction:.0%} of {args.rows} rows kept, {strategy}"
        print_table(title, summarise_lengths(rows, strategy, num_tasks))
    if num_tasks == 1:
        print(f"\nAll rows are of one task ({tasks[0]}), so nothing is concluded about which tasks a ranking keeps.")
    for strategy in (TOP, IN_TURN):
        print_table(f"Test loss of the targets, {strategy}", summarise_losses(rows, strategy))
    plot(rows, args.output / "lengths.png")


if __name__ == "__main__":
    main()
