"""Which rows to train on: influence against loss, RDS+, BM25, length and random rows, at equal steps or epochs.

    python benchmarks/selection.py [--quick] [--methods rds …] [--more_tests FILE …] [flags of recipes/in2core.py]

By default on the data that the quickstart generates. `--config recipes/mixture/in2core.yaml` takes real rows; with the
folder of a finished run as `--output_dir` the recipe's reference and arms are found again, and this adds to them. The
same command resumes. Writes `selection_results.json` and `selection.png` into the run's folder and prints the tables:
loss, share of tokens and share of whole answers (every token of it, so that greedy decoding gives exactly this answer)
predicted right on the test set, and on those of `--more_tests`.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from common import draw_seeds, drawing, make_parser, parse_run, print_table, show, show_difference, write_results
from datasets import Dataset, load_from_disk
from selection_methods import METHODS, MethodArm, compute_method_aucs, find_tasks, make_columns

from hf_in2core import InfluenceConfig
from hf_in2core.engine.losses import compute_row_losses
from hf_in2core.evaluation.intervals import compute_confidence_interval
from hf_in2core.pipeline.arguments import In2CoreArguments
from hf_in2core.pipeline.comparison import find_equal_run, plan_arms
from hf_in2core.pipeline.inputs import check_trainable
from hf_in2core.pipeline.job import Job, check
from hf_in2core.pipeline.parser import Settings
from hf_in2core.pipeline.run_folder import quiet_loading, say, write_json
from hf_in2core.pipeline.steps import evaluate_base, read_result, score_pool, train_arm, train_reference
from hf_in2core.pipeline.training import load_model
from hf_in2core.rows.columns import apply_columns
from hf_in2core.rows.hashes import hash_rows, hash_value
from hf_in2core.rows.sources import load_rows
from hf_in2core.selection.coreset import select_positions


# What `--quick` takes of a target.
QUICK = ("--max_steps", "5", "--warmup_steps", "1")


def load_tests(job: Job, more: list[str]) -> dict[str, Dataset]:
    """Prepared rows of every test set, by name."""
    args = job.settings.make(InfluenceConfig)
    tests = {"test": job.prepared_test}
    for source in more:
        if Path(source).stem in tests:
            raise ValueError(
                f"--more_tests {source}: there is a test set {Path(source).stem} already. Rename the file."
            )
        rows = apply_columns(load_rows(source, "test set"), job.args.columns, job.target_tokenizer)
        tests[Path(source).stem] = check_trainable(rows, f"test set {source}", args, job.target_tokenizer)
    return tests


def evaluate_on_tests(job: Job, adapter: Path | None, tests: dict[str, Dataset]) -> dict[str, dict[str, float]]:
    """
    Loss per token, share of tokens and of whole answers predicted right on every test set.

    Kept beside the adapter; of the base model without one.
    """
    folder = adapter or job.folder / "arms" / "base"
    trained = json.loads((folder / "result.json").read_text(encoding="utf-8"))["identity"]
    found: dict[str, dict[str, float]] = {}
    missing: dict[str, tuple[Path, str]] = {}
    for name, prepared in tests.items():
        path = folder / f"test_{name}.json"
        identity = hash_value([trained, hash_rows(prepared)])
        known = read_result(path, identity)
        if known is None:
            missing[name] = (path, identity)
        else:
            found[name] = {key: value for key, value in known.items() if key != "identity"}
    if missing:
        args = job.settings.make(InfluenceConfig)
        with quiet_loading(repeated=True):
            model = load_model(job.target_model, args, None if adapter is None else str(adapter))
        for name, (path, identity) in missing.items():
            losses = compute_row_losses(model, tests[name], args.tokens_per_batch)
            tokens = losses.num_loss_tokens
            found[name] = {
                "loss": float(losses.nll.sum() / tokens.sum()),
                "tokens_right": float(losses.num_correct.sum() / tokens.sum()),
                "answers_right": float((losses.num_correct == tokens).mean()),
            }
            write_json(path, found[name] | {"identity": identity})
    return {name: found[name] for name in tests}


def train_arms(
    job: Job, scored: Dataset, methods: list[str], tests: dict[str, Dataset]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Train and judge the arms of the methods; returns them, with the `positions` of their rows, and the base."""
    args, tasks, sets = job.args, find_tasks(job), tuple(job.inputs.validation)
    largest = max(arm.fraction for arm in plan_arms(args))
    base = evaluate_base(job, select_positions(scored, fraction=largest, order="original").tolist())
    base["tests"] = evaluate_on_tests(job, None, tests)
    plan = [
        MethodArm(method, 1.0 if method == "full" else fraction, seed, budget, args.task_column, tasks, sets)
        for budget in args.budgets
        for fraction in args.fractions
        for seed in args.seeds
        for method in methods
        if (method != "full" or fraction == args.fractions[0]) and (method != "oracle" or tasks)
    ]
    arms: list[dict[str, Any]] = []
    for number, arm in enumerate(plan, 1):
        positions = arm.select(scored)
        result = train_arm(job, arm, positions, base["steps"])
        folder = find_equal_run(arm, args, job.settings.values["max_steps"]).find_folder(job.folder)
        result["tests"] = evaluate_on_tests(job, folder, tests)
        arms.append(result | {"positions": positions})
        say(f"[{number}/{len(plan)}] {arm.name}: {result['rows']} rows, test loss {result['test_loss']:.3f}")
    return arms, base


def run_arms(settings: Settings, methods: list[str], more_tests: list[str]) -> dict[str, Any]:
    """Train and judge every arm; returns what `selection_results.json` holds."""
    args: In2CoreArguments = settings.arguments
    job = check(settings)
    if "sets" in methods and len(job.inputs.validation) < 2:
        raise ValueError("The method `sets` lets validation sets take rows in turn: give several as --validation.")
    tests = load_tests(job, more_tests)
    adapter, reference = train_reference(job)
    selection = score_pool(job, adapter, reference, job.args.methods, job.folder)
    scored, seconds = make_columns(job, adapter, load_from_disk(str(job.folder / "scored")), methods)
    seconds["influence"] = selection["seconds"]
    tasks = find_tasks(job)
    aucs: dict[str, Any] = {}
    if tasks:
        ours = np.isin(np.array(scored[args.task_column], dtype=str), tasks)
        aucs = compute_method_aucs(scored, ours, methods, sign=-1)
    arms, base = train_arms(job, scored, methods, tests)
    for arm in arms:
        positions = arm.pop("positions")
        if tasks:
            arm["rows_of_the_task"] = int(ours[positions].sum())
    costs = {
        method: (seconds.get(METHODS[method][0], 0.0) if METHODS[method][1] != "random" else 0.0)
        + (reference["seconds"] if METHODS[method][2] == "reference" else 0.0)
        for method in methods
        if method not in ("full", "oracle")
    }
    return {"arms": arms, "base": base, "auc": aucs, "costs": costs}


def pick(arms: list[dict[str, Any]], budget: str, fraction: float) -> dict[str, list[dict[str, Any]]]:
    """The runs of every method at a budget and a fraction; all rows belong to every fraction."""
    found: dict[str, list[dict[str, Any]]] = {}
    for arm in arms:
        if arm["budget"] == budget and (arm["arm"] == "full" or arm["fraction"] == fraction):
            found.setdefault(arm["arm"], []).append(arm)
    return found


def summarise(results: dict[str, Any], budget: str, fraction: float) -> list[dict[str, Any]]:
    """One row per method: losses with their intervals, difference from random, accuracy, and what it cost."""
    found = pick(results["arms"], budget, fraction)
    losses = {method: mean_losses(arms) for method, arms in found.items()}
    several = len(results["base"]["tests"]) > 1
    rows = []
    for method in sorted(losses, key=lambda name: np.mean(list(losses[name].values()))):
        arms = found[method]
        row = {"kept by": METHODS[method][3], "test loss": show(losses[method].values())}
        row["minus random"] = show_difference(losses[method], losses.get("random"))
        for test in results["base"]["tests"]:
            of = f", {test}" if several else ""
            if several:
                row[f"loss{of}"] = show(arm["tests"][test]["loss"] for arm in arms)
            for name, label in (("tokens_right", "tokens right"), ("answers_right", "answers right")):
                row[f"{label}{of}"] = show((arm["tests"][test][name] for arm in arms), "{:.1%}")
        if results["auc"]:
            shares = [arm.get("rows_of_the_task", np.nan) / arm["rows"] for arm in arms]
            row["rows of the task"] = f"{np.mean(shares):.0%}"
            auc = results["auc"].get(method)
            row["AUC of the task"] = "" if auc is None else f"{auc:.3f}"
        row["selecting, s"] = f"{results['costs'][method]:.0f}" if method in results["costs"] else ""
        rows.append(row)
    return rows


def mean_losses(arms: list[dict[str, Any]]) -> dict[int, float]:
    """Loss by seed, the mean over test sets."""
    return {arm["seed"]: float(np.mean([test["loss"] for test in arm["tests"].values()])) for arm in arms}


COLOURS = {"random": "#E69F00", "length": "#E69F00", "full": "#000000", "opponents": "#CC79A7"}


def plot(results: dict[str, Any], budget: str, fractions: list[float], path: Path) -> None:
    """Test loss of every method: points are seeds, the bar their 95 % interval."""
    with drawing(path, 7.5, 1 + 4.2 * len(fractions)) as figure:
        for axes, fraction in zip(np.atleast_1d(figure.subplots(len(fractions), 1)), fractions, strict=True):
            found = pick(results["arms"], budget, fraction)
            groups = {name: list(mean_losses(arms).values()) for name, arms in found.items()}
            order = sorted(groups, key=lambda name: -float(np.mean(groups[name])))
            for height, name in enumerate(order):
                colour = "#0072B2" if METHODS[name][0].startswith(("influence", "turns")) else "#009E73"
                colour = COLOURS.get(name, colour)
                draw_seeds(axes, groups[name], height, colour, interval=True)
            if "random" in groups:
                axes.axvline(np.mean(groups["random"]), color="#E69F00", linewidth=0.8, linestyle="--")
            axes.set_yticks(range(len(order)), [METHODS[name][3] for name in order])
            axes.set_xlabel("Test loss, nats per token (left is better)")
            axes.set_title(f"{fraction:.0%} of the pool, equal {budget}; bars: 95 % interval over seeds", fontsize=10)


def plot_fractions(results: dict[str, Any], budget: str, fractions: list[float], path: Path) -> None:
    """Test loss against the share of the pool that is kept, a line for each method."""
    lines: dict[str, dict[float, list[float]]] = {}
    for fraction in sorted(fractions):
        for name, arms in pick(results["arms"], budget, fraction).items():
            lines.setdefault(name, {})[fraction] = list(mean_losses(arms).values())
    with drawing(path, 7.5, 4.5) as figure:
        axes = figure.subplots()
        styles = iter(
            (colour, mark) for mark in "os^" for colour in ("#0072B2", "#D55E00", "#009E73", "#56B4E9", "#999999")
        )
        for name, values in lines.items():
            if name == "full":
                axes.axhline(
                    float(np.mean(next(iter(values.values())))), color="#000000", linewidth=0.8, label=METHODS[name][3]
                )
                continue
            colour, mark = (COLOURS[name], "s") if name in COLOURS else next(styles)
            means = [float(np.mean(found)) for found in values.values()]
            halves = [compute_confidence_interval(found).half_width or 0.0 for found in values.values()]
            places = np.array(list(values)) * (1 + 0.006 * (len(axes.containers) - len(lines) / 2))
            axes.errorbar(
                places,
                means,
                yerr=halves,
                fmt=f"{mark}-",
                color=colour,
                markersize=4,
                linewidth=1,
                capsize=2,
                label=METHODS[name][3],
            )
        axes.set_xscale("log")
        axes.set_xticks(sorted(fractions), [f"{fraction:.0%}" for fraction in sorted(fractions)])
        axes.minorticks_off()
        axes.set_xlabel("Share of the pool that is kept")
        axes.set_ylabel("Test loss, nats per token")
        axes.set_title(f"Equal {budget}; bars: 95 % interval over seeds", fontsize=10)
        axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS))
    parser.add_argument("--more_tests", nargs="+", default=[], help="Further files of test rows.")
    args, settings = parse_run(parser, "selection", QUICK)
    recipe: In2CoreArguments = settings.arguments
    methods = args.methods or [name for name in METHODS if name != "sets" or len(recipe.validation or []) > 1]
    results = run_arms(settings, methods, args.more_tests)
    folder = Path(recipe.output_dir or "")
    write_results(folder / "selection_results.json", **results)
    for budget in recipe.budgets:
        for fraction in recipe.fractions:
            print_table(f"{fraction:.0%} of the pool, equal {budget}", summarise(results, budget, fraction))
    print(f"\nTarget before training: {json.dumps(results['base']['tests'])}")
    plot(results, recipe.budgets[0], recipe.fractions, folder / "selection.png")
    for budget in recipe.budgets:
        if len(recipe.fractions) > 1:
            plot_fractions(results, budget, recipe.fractions, folder / f"selection_{budget}.png")


if __name__ == "__main__":
    main()
