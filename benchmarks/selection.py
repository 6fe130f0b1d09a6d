"""Which rows to train on: influence against loss, RDS+, BM25, length and random rows, at equal steps.

    python benchmarks/selection.py [--quick] [--methods rds …] [--wrong_fraction 0.2] [flags of recipes/in2core.py]

By default on the data that the quickstart generates. `--config recipes/mixture/in2core.yaml` takes real rows; with the
folder of a finished run as `--output_dir` the recipe's reference and arms are found again, and this adds to them. The
same command resumes. Writes `selection.json` and `selection.png` into the run's folder and prints the tables.

`--wrong_fraction` shuffles that share of the answers within each task of the pool first and, without any target, asks
which column finds them.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


sys.path.append(str(Path(__file__).resolve().parent.parent / "recipes"))

from arguments import In2CoreArguments  # noqa: E402
from comparison import Arm, describe_machine, read_influence  # noqa: E402
from datasets import Dataset, concatenate_datasets, load_from_disk  # noqa: E402
from job import Job, check  # noqa: E402
from pipeline import evaluate_base, read_result, score_pool, train_arm, train_reference  # noqa: E402
from recipe_parser import RecipeParser, Settings  # noqa: E402
from run_folder import join_processes, quiet_loading, run_setup_script, say, write_json, written_folder  # noqa: E402
from stages import load_model  # noqa: E402

from hf_in2core import InfluenceConfig, InfluenceTrainer, select_coreset  # noqa: E402
from hf_in2core.baselines import add_bm25, add_loss, add_rds, select_length_matched  # noqa: E402
from hf_in2core.coreset import take_round_robin  # noqa: E402
from hf_in2core.data import hash_value, load_rows  # noqa: E402
from hf_in2core.evaluation import compare_arms, compute_auc, compute_confidence_interval  # noqa: E402
from hf_in2core.preparation import Preparation  # noqa: E402


ESTIMATORS = {"gradient_dot": "dot", "gradient_cosine": "cosine"}
# Arm: (column, strategy, what it costs beside the column itself, name in the tables). The recipe's own arms keep their
# names, so that their runs are found.
METHODS: dict[str, tuple[str, str, str, str]] = {
    "full": ("influence", "top", "", "all rows"),
    "random": ("influence", "random", "", "random"),
    "coreset": ("influence", "top", "reference", "influence (DataInf)"),
    "opponents": ("influence", "bottom", "reference", "opponents (DataInf)"),
    "dot": ("influence_dot", "top", "reference", "gradient dot"),
    "cosine": ("influence_cosine", "top", "reference", "gradient cosine"),
    "turns": ("turns_rank", "top", "reference", "influence, validation rows in turn"),
    "turns_cosine": ("turns_cosine_rank", "top", "reference", "gradient cosine, validation rows in turn"),
    "rds": ("rds_rank", "top", "", "RDS+"),
    "bm25": ("bm25_rank", "top", "", "BM25"),
    "low_loss": ("loss", "top", "reference", "lowest loss"),
    "high_loss": ("loss", "bottom", "reference", "highest loss"),
    "length": ("influence", "length", "reference", "random, as long as influence's"),
    "oracle": ("", "oracle", "", "only rows of the task (oracle)"),
}


@dataclass(frozen=True)
class MethodArm(Arm):
    """An arm of the recipe whose rows a column of `METHODS` chooses."""

    task_column: str | None = None
    tasks: tuple[str, ...] = ()

    def select(self, scored: Dataset, strategy: str = "top") -> list[int]:
        column, strategy, _, _ = METHODS[self.arm]  # in place of the run's own
        if strategy == "oracle":
            ours = np.flatnonzero(np.isin(np.array(scored[self.task_column], dtype=str), self.tasks))
            count = min(round(self.fraction * len(scored)), len(ours))
            return sorted(np.random.default_rng(self.seed).choice(ours, count, replace=False).tolist())
        names = list(dict.fromkeys([column, "num_loss_tokens"]))
        numbered = scored.select_columns(names).add_column("row", np.arange(len(scored)))
        if strategy == "length":
            chosen = select_length_matched(numbered, fraction=self.fraction, seed=self.seed)
        else:
            options: dict[str, Any] = {"column": column, "strategy": strategy, "order": "original", "seed": self.seed}
            chosen = select_coreset(numbered, fraction=self.fraction, **options)
        return chosen.with_format(None)["row"][:]


def add_estimator(job: Job, adapter: str, scored: Dataset, estimator: str, per_row: bool) -> Dataset:
    """Add a column of another estimator, or the turns in which the validation rows take rows by it."""
    influence_args = job.settings.make(InfluenceConfig, reference=True, estimator=estimator)
    with quiet_loading():
        trainer = InfluenceTrainer(
            model=load_model(job.reference_model, influence_args, adapter),
            args=influence_args,
            train_dataset=job.inputs.pool,
            eval_dataset=job.validation,
            processing_class=job.reference_tokenizer,
        )
    trainer.fit_influence(per_example=per_row)
    found = trainer.score_influence()
    if not per_row:
        return scored.add_column(f"influence_{ESTIMATORS[estimator]}", found["influence"][:])
    per_query = found.with_format("numpy")["influence_per_query"][:]
    rows = np.flatnonzero(~np.isnan(read_influence(found)))
    turns = np.full(len(found), np.nan)
    scores = np.stack([np.asarray(per_query[row], dtype=np.float64) for row in range(len(found))]).T
    turns[take_round_robin(rows, len(rows), scores)] = np.arange(len(rows))
    return scored.add_column("turns_rank" if estimator == "datainf" else f"turns_{ESTIMATORS[estimator]}_rank", turns)


def make_columns(job: Job, adapter: str, scored: Dataset, methods: list[str]) -> tuple[Dataset, dict[str, float]]:
    """Add the columns that the methods need; returns the dataset and the seconds that each column took."""
    reference_args = job.settings.make(InfluenceConfig, reference=True)
    preparation = Preparation.from_args(reference_args, job.reference_tokenizer, job.inputs.pool)
    sets = list(job.inputs.validation.values())
    validation = concatenate_datasets(sets) if len(sets) > 1 else sets[0]

    def add_reference_loss(rows: Dataset) -> Dataset:
        return add_loss(rows, load_model(job.reference_model, reference_args, adapter), preparation)

    def add_base_rds(rows: Dataset) -> Dataset:
        return add_rds(rows, validation, load_model(job.reference_model, reference_args), preparation)

    makers: dict[str, Callable[[Dataset], Dataset]] = {
        "influence_dot": lambda rows: add_estimator(job, adapter, rows, "gradient_dot", False),
        "influence_cosine": lambda rows: add_estimator(job, adapter, rows, "gradient_cosine", False),
        "turns_rank": lambda rows: add_estimator(job, adapter, rows, "datainf", True),
        "turns_cosine_rank": lambda rows: add_estimator(job, adapter, rows, "gradient_cosine", True),
        "loss": add_reference_loss,
        "rds_rank": add_base_rds,
        "bm25_rank": lambda rows: add_bm25(rows, validation, preparation),
    }
    folder = job.folder / "columns"
    seconds: dict[str, float] = {}
    for column in dict.fromkeys(METHODS[method][0] for method in methods):
        if column not in makers:
            continue
        identity = hash_value([adapter, job.identities, column])
        result = read_result(folder / f"{column}.json", identity)
        if result is None:
            start = time.perf_counter()
            with quiet_loading():
                added = makers[column](scored)
            result = {"seconds": time.perf_counter() - start, "identity": identity}
            names = [name for name in added.column_names if name not in scored.column_names]
            with written_folder(folder / column) as temporary:
                added.select_columns(names).save_to_disk(str(temporary))
            write_json(folder / f"{column}.json", result)
            say(f"Column {column}: {result['seconds']:.0f} s.")
        stored = load_from_disk(str(folder / column))
        for name in stored.column_names:
            scored = scored.add_column(name, stored[name][:])
        seconds[column] = result["seconds"]
    return scored, seconds


def compute_method_aucs(scored: Dataset, labels: np.ndarray, methods: list[str], sign: int) -> dict[str, float | None]:
    """AUC with which a method puts the labelled rows first (`sign` -1) or last (+1); 0.5 is chance."""
    aucs = {}
    for method in methods:
        column, strategy, _, _ = METHODS[method]
        if strategy in ("top", "bottom") and method not in ("full", "opponents"):
            values = [np.nan if value is None else value for value in scored[column]]
            aucs[method] = compute_auc(sign * (1 if strategy == "top" else -1) * np.array(values), labels)
    return aucs


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


def find_wrong_answers(settings: Settings, fraction: float, methods: list[str]) -> list[dict[str, Any]]:
    """AUC of each method's column for finding shuffled answers, and influence's by task, for each seed."""
    args: In2CoreArguments = settings.arguments
    run = Path(args.output_dir or "")
    clean = load_rows(args.pool or "", "pool")
    rows = []
    for seed in args.seeds:
        folder = run / f"wrong-{fraction:g}-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "pool.jsonl"
        if not path.is_file():
            shuffle_answers(clean, fraction, args.task_column, seed).to_json(str(path))
        values = {"pool": str(path), "output_dir": str(folder), "wrong_column": "is_wrong", "seed": seed}
        overrides = {name: value for name, value in values.items() if name != "seed"}
        changed = Settings(type(args)(**vars(args) | overrides), settings.values | values)
        job = check(changed)
        adapter, reference = train_reference(job)
        score_pool(job, adapter, reference)
        scored, _ = make_columns(job, adapter, load_from_disk(str(job.folder / "scored")), methods)
        wrong = np.array(scored["is_wrong"])
        found = {"all rows": compute_method_aucs(scored, wrong, methods, sign=1)}
        if args.task_column is not None:
            tasks = {str(task) for part in job.inputs.validation.values() for task in part[args.task_column]}
            ours = np.flatnonzero([str(task) in tasks for task in scored[args.task_column]])
            found["rows of the task"] = compute_method_aucs(scored.select(ours), wrong[ours], methods, sign=1)
        rows += [
            {"among": among, "method": method, "seed": seed, "auc": auc}
            for among, aucs in found.items()
            for method, auc in aucs.items()
        ]
        say(f"Wrong answers, seed {seed}: {found}")
    return rows


def run_arms(settings: Settings, methods: list[str]) -> dict[str, Any]:
    """Train and judge every arm; returns what `selection.json` holds."""
    args: In2CoreArguments = settings.arguments
    job = check(settings)
    adapter, reference = train_reference(job)
    selection = score_pool(job, adapter, reference)
    scored, seconds = make_columns(job, adapter, load_from_disk(str(job.folder / "scored")), methods)
    seconds["influence"] = selection["seconds"]
    tasks: tuple[str, ...] = ()
    aucs: dict[str, Any] = {}
    if args.task_column is not None:
        every = {str(task) for part in job.inputs.validation.values() for task in part[args.task_column]}
        tasks = tuple(sorted(every))
        ours = np.isin(np.array(scored[args.task_column], dtype=str), tasks)
        aucs = compute_method_aucs(scored, ours, methods, sign=-1)
    base = evaluate_base(job, scored)
    arms: list[dict[str, Any]] = []
    plan = [
        MethodArm(method, 1.0 if method == "full" else fraction, seed, "steps", args.task_column, tasks)
        for fraction in args.fractions
        for seed in args.seeds
        for method in methods
        if (method != "full" or fraction == args.fractions[0]) and (method != "oracle" or tasks)
    ]
    for number, arm in enumerate(plan, 1):
        result = train_arm(job, arm, scored, base["steps"])
        if tasks:
            positions = arm.select(scored)
            result["rows_of_the_task"] = int(ours[positions].sum())
        arms.append(result)
        say(f"[{number}/{len(plan)}] {arm.name}: {result['rows']} rows, test loss {result['test_loss']:.3f}")
        write_json(job.folder / "selection_arms.json", arms)
    costs = {
        method: (seconds.get(METHODS[method][0], 0.0) if METHODS[method][1] != "random" else 0.0)
        + (reference["seconds"] if METHODS[method][2] == "reference" else 0.0)
        for method in methods
        if method not in ("full", "oracle")
    }
    return {"arms": arms, "base": base, "auc": aucs, "costs": costs, "machine": describe_machine()}


def summarise(results: dict[str, Any], methods: list[str], fraction: float) -> list[dict[str, Any]]:
    """One row per method at a fraction: loss with its interval, difference from random, and what it cost."""
    losses: dict[str, dict[int, float]] = {}
    shares: dict[str, list[float]] = {}
    for arm in results["arms"]:
        if arm["arm"] == "full" or arm["fraction"] == fraction:
            losses.setdefault(arm["arm"], {})[arm["seed"]] = arm["test_loss"]
            shares.setdefault(arm["arm"], []).append(arm.get("rows_of_the_task", np.nan) / arm["rows"])
    rows = []
    for method in sorted(losses, key=lambda name: np.mean(list(losses[name].values()))):
        interval = compute_confidence_interval(list(losses[method].values()))
        difference = compare_arms(losses[method], losses["random"]) if "random" in losses else None
        rows.append(
            {
                "kept by": METHODS[method][3],
                "test loss": show(interval, "{:.3f}"),
                "minus random": show(difference, "{:+.3f}") if difference and method != "random" else "",
                "rows of the task": f"{np.mean(shares[method]):.0%}" if results["auc"] else "",
                "AUC of the task": f"{results['auc'][method]:.3f}" if results["auc"].get(method) is not None else "",
                "selecting, s": f"{results['costs'][method]:.0f}" if method in results["costs"] else "",
            }
        )
    return rows


def show(interval: dict[str, Any], pattern: str) -> str:
    """Mean ± half-width of the 95 % interval."""
    mean = pattern.format(interval["mean"])
    return mean if interval["half_width"] is None else f"{mean} ± {interval['half_width']:.3f}"


def print_table(title: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n### {title}\n\n| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
    for row in rows:
        print(f"| {' | '.join(str(value) for value in row.values())} |")


def plot(results: dict[str, Any], fractions: list[float], path: Path) -> None:
    """Test loss of every method: points are seeds, the bar their 95 % interval."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 1 + 4.2 * len(fractions)), layout="constrained")
    for axes, fraction in zip(np.atleast_1d(figure.subplots(len(fractions), 1)), fractions, strict=True):
        groups: dict[str, list[float]] = {}
        for arm in results["arms"]:
            if arm["arm"] == "full" or arm["fraction"] == fraction:
                groups.setdefault(arm["arm"], []).append(arm["test_loss"])
        order = sorted(groups, key=lambda name: -float(np.mean(groups[name])))
        for height, name in enumerate(order):
            interval = compute_confidence_interval(groups[name])
            colour = "#0072B2" if METHODS[name][0].startswith(("influence", "turns")) else "#000000"
            colour = {"random": "#E69F00", "full": "#000000", "opponents": "#CC79A7", "length": "#E69F00"}.get(
                name, colour
            )
            axes.plot(groups[name], [height] * len(groups[name]), "o", color=colour, alpha=0.35, markersize=4)
            axes.errorbar(interval["mean"], height, xerr=interval["half_width"], fmt="|", color=colour, capsize=3)
        if "random" in groups:
            axes.axvline(np.mean(groups["random"]), color="#E69F00", linewidth=0.8, linestyle="--")
        axes.set_yticks(range(len(order)), [METHODS[name][3] for name in order])
        axes.set_xlabel("Test loss, nats per token (left is better)")
        axes.set_title(f"{fraction:.0%} of the pool, equal steps; bars: 95 % interval over seeds", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="One seed and 5 steps: shows that it runs.")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--wrong_fraction", type=float, help="Shuffle this share of the answers and find them.")
    args, rest = parser.parse_known_args()
    defaults: list[str] = []
    if "--config" not in rest:
        defaults += ["--config", "recipes/quickstart/in2core.yaml"]
    if "--output_dir" not in rest:
        defaults += ["--output_dir", f"runs/benchmarks/selection{'_quick' if args.quick else ''}"]
    if args.quick:
        defaults += ["--seeds", "0", "--max_steps", "5", "--warmup_steps", "1"]
    settings = RecipeParser(In2CoreArguments, reference=True).parse([*defaults, *rest])
    join_processes(settings)
    recipe: In2CoreArguments = settings.arguments
    if recipe.setup_script is not None:
        run_setup_script(recipe.setup_script)
    folder = Path(recipe.output_dir or "")
    if args.wrong_fraction is not None:
        measured = [method for method in args.methods if METHODS[method][1] in ("top", "bottom")]
        found = find_wrong_answers(settings, args.wrong_fraction, measured)
        write_json(folder / "wrong_answers.json", {"rows": found, "machine": describe_machine()})
        table: dict[tuple[str, str], list[float]] = {}
        for row in found:
            table.setdefault((row["among"], row["method"]), []).append(row["auc"])
        rows = [
            {
                "among": among,
                "ranked last by": METHODS[method][3],
                "AUC": show(compute_confidence_interval(v), "{:.3f}"),
            }
            for (among, method), v in table.items()
        ]
        print_table(f"Finding shuffled answers ({args.wrong_fraction:.0%} of the pool)", rows)
        return
    results = run_arms(settings, args.methods)
    write_json(folder / "selection_results.json", results)
    for fraction in recipe.fractions:
        print_table(f"{fraction:.0%} of the pool", summarise(results, args.methods, fraction))
    print(f"\nTarget before training: {results['base']['test_loss']:.3f}")
    plot(results, recipe.fractions, folder / "selection.png")
    print(json.dumps(results["machine"]))


if __name__ == "__main__":
    main()
