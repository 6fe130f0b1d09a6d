"""Against the exact answer: how DataInf's ranking departs from the exact damped inverse's.

    python benchmarks/exact.py [--quick] [--model FOLDER --pool FILE --validation FILE]

By default the quickstart's rows and a small sibling of its model. Adapters of several LoRA ranks are trained a little;
the influence of n rows on the mean validation loss is then taken by DataInf, by the exact damped inverse of each
block (dense algebra in float64, hf_in2core/curvature.py) and by the plain dot product, for several n and dampings.
Spearman correlations with the exact answer; ± is the 95 % interval over seeds (adapter, order and rows).
The agreement on 64 rows is what the library measures after a fit and warns of below 0.7.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import drawing, group, make_parser, print_table, set_up, show, write_results
from plain_training import Schedule, find_sources, keep_gradients, prepare_source, train_on
from scipy.stats import spearmanr

from hf_in2core.engine.curvature import score_fitted_rows
from hf_in2core.engine.datainf import compute_damping


PILOT = 64


def compare(grams: list[tuple[torch.Tensor, torch.Tensor, int]], n: int, damping_scale: float) -> dict[str, float]:
    """Agreement on the first n rows, from each block's products of gradients, and its number of elements."""
    datainf, exact, dot, weighted = (torch.zeros(n, dtype=torch.float64) for _ in range(4))
    directions = 0.0
    for gram, dots, elements in grams:
        gram, dots = gram[:n, :n], dots[:n]
        damping = compute_damping(float(gram.diagonal().mean()), elements, damping_scale)
        if damping == 0:
            continue
        by_datainf, by_exact = score_fitted_rows(gram, dots, damping)
        datainf, exact, dot, weighted = datainf + by_datainf, exact + by_exact, dot - dots, weighted - dots / damping
        eigenvalues = torch.linalg.eigvalsh(gram).clamp(min=0)
        directions += float((eigenvalues / (eigenvalues + n * damping)).sum()) / len(grams)
    return {
        "DataInf": float(spearmanr(datainf, exact).statistic),
        "gradient dot": float(spearmanr(dot, exact).statistic),
        "DataInf with weighted dot": float(spearmanr(datainf, weighted).statistic),
        "effective directions": directions,
    }


def summarise(groups: dict[tuple[Any, ...], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One line per setting."""
    smallest = min(n for _, n, _ in groups)
    lines = []
    for (rank, n, scale), rows in groups.items():
        line: dict[str, Any] = {"rank": rank, "rows": n, "damping_scale": f"{scale:g}"}
        line |= {name: show([row[name] for row in rows]) for name in ("DataInf", "gradient dot")}
        pilot = groups[rank, smallest, scale]
        line[f"DataInf on {smallest} rows"] = f"{np.mean([row['DataInf'] for row in pilot]):.2f}"
        for name, pattern in (("DataInf with weighted dot", "{:.3f}"), ("effective directions", "{:.0f}")):
            line[name] = pattern.format(np.mean([row[name] for row in rows]))
        lines.append(line)
    return lines


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--pool")
    parser.add_argument("--validation")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rows", type=int, nargs="+", default=[PILOT, 128, 384])
    parser.add_argument("--damping_scales", type=float, nargs="+", default=[0.01, 0.1, 1.0, 10.0, 100.0])
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = set_up(parser, "--output", "benchmarks/results/exact")
    if args.quick:
        args.ranks, args.rows, args.damping_scales, args.steps, args.seeds = [1, 2], [16, 32], [0.1, 10.0], 4, [0]
    if min(args.rows) < 10:
        raise ValueError(f"--rows {args.rows}: fewer than 10 rows say nothing about a rank correlation.")
    find_sources(args, "model", ("pool", "validation"))
    everything = prepare_source(args.pool, "pool", args.model)
    validation = prepare_source(args.validation, "validation", args.model)
    if max(args.rows) > len(everything):
        raise ValueError(f"--rows {max(args.rows)} is more than the {len(everything)} rows of {args.pool}.")
    found: list[dict[str, Any]] = []
    for seed in args.seeds:
        drawn = np.random.default_rng(seed).choice(len(everything), max(args.rows), replace=False)
        pool = everything.select(drawn)
        for rank in args.ranks:
            schedule = Schedule(args.steps, 16, warmup_steps=max(args.steps // 10, 1), rank=rank)
            model = train_on(args.model, pool, np.arange(len(pool)), schedule, seed)
            g, v = keep_gradients(model, pool), keep_gradients(model, validation)
            grams = []
            for name, value in g.items():
                rows = torch.from_numpy(value)
                grams.append((rows @ rows.T, rows @ torch.from_numpy(v[name].mean(0)), rows.shape[1]))
            for n in args.rows:
                for scale in args.damping_scales:
                    row = {"rank": rank, "rows": n, "damping_scale": scale, "seed": seed}
                    found.append(row | compare(grams, n, scale))
        print(f"seed {seed} done", flush=True)
        write_results(args.output / "exact.json", rows=found)
    groups = group(found, "rank", "rows", "damping_scale")
    print_table("Spearman with the exact damped inverse", summarise(groups))
    plot(groups, args.output / "exact.png")


def plot(groups: dict[tuple[Any, ...], list[dict[str, Any]]], path: Path) -> None:
    """Agreement with the exact answer against damping, a panel for each rank, a line for each n."""
    ranks, sizes, scales = (sorted({key[i] for key in groups}) for i in range(3))
    with drawing(path, 3 * len(ranks), 3) as figure:
        for axes, rank in zip(np.atleast_1d(figure.subplots(1, len(ranks), sharey=True)), ranks, strict=True):
            for n, colour in zip(sizes, ("#56B4E9", "#0072B2", "#000000", "#009E73", "#CC79A7"), strict=False):
                values = [np.mean([row["DataInf"] for row in groups[rank, n, scale]]) for scale in scales]
                axes.plot(scales, values, "o-", color=colour, markersize=3, label=f"DataInf, {n} rows")
            dots = [np.mean([row["gradient dot"] for row in groups[rank, sizes[-1], scale]]) for scale in scales]
            axes.plot(scales, dots, "--", color="#E69F00", label=f"gradient dot, {sizes[-1]} rows")
            axes.axvline(0.1, color="#999999", linewidth=0.8)
            axes.set_xscale("log")
            axes.set_xlabel("damping_scale (grey: default)")
            axes.set_title(f"LoRA rank {rank}", fontsize=10)
        first = figure.axes[0]
        first.set_ylabel("Spearman with the exact inverse")
        first.legend(fontsize=7, frameon=False)


if __name__ == "__main__":
    main()
