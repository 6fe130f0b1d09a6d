"""Wrong answers in the pool: which column finds them, and does training without them help?

    python benchmarks/wrong_answers.py [--quick] [--wrong_fraction 0.2] [--methods coreset …] [--train random right …]
        [flags of recipes/in2core.py]

That share of the answers of each task is dealt to other rows of the task. On every shuffled pool (one for each of
`--seeds`) a reference is trained and scored; the AUC says how well a column puts wrong answers last, over the whole
pool and within each task (0.5 = chance). With `--train`, targets are trained on what the methods keep at each of
`--fractions`, `full`, `random` and `right` (only right answers, oracle) among them. By default on the quickstart's
data; `--config recipes/mixture/in2core.yaml` takes real rows. The same command resumes. Writes `wrong_answers.json`
and `wrong_answers.png` into the run's folder and prints the tables.
"""

from pathlib import Path
from typing import Any

import numpy as np
from common import draw_seeds, drawing, make_parser, parse_run, print_table, show, show_difference, write_results
from datasets import Dataset, load_from_disk
from selection import QUICK, mean_losses, pick, train_arms
from selection_methods import METHODS, compute_method_aucs, make_columns

from hf_in2core.pipeline.arguments import In2CoreArguments
from hf_in2core.pipeline.job import check
from hf_in2core.pipeline.parser import Settings
from hf_in2core.pipeline.run_folder import say
from hf_in2core.pipeline.steps import score_pool, train_reference
from hf_in2core.rows.sources import load_rows


FINDERS = ("coreset", "dot", "cosine", "low_loss", "low_ifd")


def shuffle_answers(pool: Dataset, fraction: float, task_column: str | None, seed: int) -> Dataset:
    """Give a seeded share of each task's rows the answers of each other; `is_wrong` marks those that changed."""
    if "completion" not in pool.column_names:
        raise ValueError(f"--wrong_fraction shuffles the column `completion`, which {pool.column_names} lacks.")
    generator = np.random.default_rng(seed)
    tasks = np.array(pool[task_column], dtype=str) if task_column else np.zeros(len(pool), dtype=str)
    answers = np.array(pool["completion"], dtype=object)
    shuffled = answers.copy()
    for task in np.unique(tasks):
        rows = np.flatnonzero(tasks == task)
        chosen = generator.choice(rows, round(fraction * len(rows)), replace=False)
        shuffled[chosen] = answers[np.roll(chosen, 1)]
    rest = pool.remove_columns([name for name in ("completion", "is_wrong") if name in pool.column_names])
    return rest.add_column("completion", shuffled.tolist()).add_column("is_wrong", (shuffled != answers).tolist())


def measure_seed(
    settings: Settings, clean: Dataset, seed: int, fraction: float, methods: list[str], trained: list[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """AUC of each method's column on one shuffled pool, and the arms trained on what it keeps."""
    args: In2CoreArguments = settings.arguments
    folder = Path(args.output_dir or "") / f"wrong-{fraction:g}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "pool.jsonl"
    if not path.is_file():
        shuffle_answers(clean, fraction, args.task_column, seed).to_json(str(path))
    overrides: dict[str, Any] = {"pool": str(path), "output_dir": str(folder), "wrong_column": "is_wrong"}
    arguments = type(args)(**vars(args) | overrides | {"seeds": [seed], "budgets": ["steps"]})
    job = check(Settings(arguments, settings.values | overrides | {"seed": seed}))
    adapter, reference = train_reference(job)
    score_pool(job, adapter, reference, job.args.methods, job.folder)
    names = list(dict.fromkeys([*methods, *trained]))
    scored, _ = make_columns(job, adapter, load_from_disk(str(job.folder / "scored")), names)
    wrong = np.array(scored["is_wrong"])
    among = {"all rows": np.ones(len(scored), dtype=bool)}
    if args.task_column is not None:
        tasks = np.array(scored[args.task_column], dtype=str)
        among |= {str(task): tasks == task for task in np.unique(tasks)}
    found = []
    for kind, rows in among.items():
        aucs = compute_method_aucs(scored.select(np.flatnonzero(rows)), wrong[rows], methods, sign=1)
        found += [{"among": kind, "method": method, "seed": seed, "auc": auc} for method, auc in aucs.items()]
    say(f"Wrong answers, seed {seed}: {found[: len(methods)]}")
    arms = train_arms(job, scored, trained, {"test": job.prepared_test})[0] if trained else []
    for arm in arms:
        kept = arm.pop("positions")
        arm["wrong"] = float(wrong[kept].mean())
    return found, arms


def summarise_finding(rows: list[dict[str, Any]], methods: list[str]) -> list[dict[str, Any]]:
    """One line per kind of row: AUC by method."""
    lines = []
    for among in dict.fromkeys(row["among"] for row in rows):
        line = {"among": among}
        for method in methods:
            aucs = [row["auc"] for row in rows if row["among"] == among and row["method"] == method]
            line[METHODS[method][3]] = "" if None in aucs or not aucs else show(aucs)
        lines.append(line)
    return lines


def summarise_training(arms: list[dict[str, Any]], fraction: float) -> list[dict[str, Any]]:
    """One line per method at a fraction: test loss, difference from random rows, and share of wrong answers kept."""
    found = pick(arms, "steps", fraction)
    losses = {method: mean_losses(runs) for method, runs in found.items()}
    lines = []
    for method in sorted(losses, key=lambda name: np.mean(list(losses[name].values()))):
        line = {"kept by": METHODS[method][3], "test loss": show(losses[method].values())}
        for other in ("random", "full"):
            line[f"minus {METHODS[other][3]}"] = show_difference(losses[method], losses.get(other))
        line["wrong answers"] = f"{np.mean([run['wrong'] for run in found[method]]):.0%}"
        lines.append(line)
    return lines


def plot(rows: list[dict[str, Any]], methods: list[str], path: Path) -> None:
    """AUC by method and kind of row; points are seeds, the bar their 95 % interval."""
    kinds = list(dict.fromkeys(row["among"] for row in rows))
    with drawing(path, 7.5, 1.2 + 0.2 * len(kinds) * len(methods)) as figure:
        axes = figure.subplots()
        colours = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#000000")
        for method, colour in zip(methods, colours, strict=False):
            for height, among in enumerate(reversed(kinds)):
                aucs = [row["auc"] for row in rows if row["among"] == among and row["method"] == method]
                if None in aucs or not aucs:
                    continue
                place = height + 0.35 - 0.7 * methods.index(method) / max(len(methods) - 1, 1)
                draw_seeds(axes, aucs, place, colour, interval=True)
            axes.plot([], [], "o", color=colour, markersize=4, label=METHODS[method][3])
        axes.axvline(0.5, color="#999999", linewidth=0.8, linestyle="--")
        axes.set_yticks(range(len(kinds)), kinds[::-1])
        axes.set_xlabel("AUC with which wrong answers come last (0.5 = chance); bars: 95 % interval over seeds")
        figure.legend(fontsize=8, frameon=False, loc="outside upper center", ncols=3)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--wrong_fraction", type=float, default=0.2, help="Share of the answers to shuffle.")
    finders = [name for name, (_, strategy, _, _) in METHODS.items() if strategy == "top" and name != "full"]
    parser.add_argument("--methods", nargs="+", choices=finders, default=list(FINDERS), help="Columns to find with.")
    parser.add_argument("--train", nargs="+", choices=list(METHODS), default=[], help="Methods to train targets by.")
    args, settings = parse_run(parser, "wrong_answers", QUICK)
    if not 0 < args.wrong_fraction < 1:
        raise ValueError(f"--wrong_fraction {args.wrong_fraction} is no share of the answers: give one in (0, 1).")
    recipe: In2CoreArguments = settings.arguments
    clean = load_rows(recipe.pool or "", "pool")
    rows: list[dict[str, Any]] = []
    arms: list[dict[str, Any]] = []
    folder = Path(recipe.output_dir or "")
    for seed in recipe.seeds:
        found, trained = measure_seed(settings, clean, seed, args.wrong_fraction, args.methods, args.train)
        rows, arms = rows + found, arms + trained
        write_results(folder / "wrong_answers.json", rows=rows, arms=arms)
    title = f"AUC of finding shuffled answers ({args.wrong_fraction:.0%} of the pool)"
    print_table(title, summarise_finding(rows, args.methods))
    for fraction in recipe.fractions if arms else []:
        print_table(f"Trained on {fraction:.0%} of the shuffled pool", summarise_training(arms, fraction))
    plot(rows, args.methods, folder / "wrong_answers.png")


if __name__ == "__main__":
    main()
