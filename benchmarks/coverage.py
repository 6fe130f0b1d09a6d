"""Does coverage say how well a test row goes? Rank correlation with its loss, by influence and by similarity.

    python benchmarks/coverage.py [--quick] [--more_tests FILE …] [--test_rows 150] [--encoder FOLDER] [flags]

Flags are those of recipes/in2core.py. By default on the data that the quickstart generates; `--config
recipes/mixture/in2core.yaml` takes real rows. One reference for each of `--seeds`, trained under `output_dir` or found
there. Coverage of the rows of `--test` and `--more_tests` by the pool (influence: DataInf and gradient cosine;
similarity: RDS+, BM25 and, with `--encoder`, sentence embeddings) is correlated with the row's loss under the
reference and with how much training has lowered it. With a `--task_column` also within tasks: ranks are taken in each
task, so that tasks of different difficulty do not make the correlation. Writes `coverage.json` and `coverage.png` into
`output_dir` and prints the tables.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from common import drawing, group, make_parser, parse_run, print_table, write_results
from datasets import Dataset
from references import REFERENCE_QUICK, make_trainer, train_references
from scipy.stats import rankdata

from hf_in2core import InfluenceTrainer
from hf_in2core.analysis.coverage import compute_coverage, compute_similarity_coverage
from hf_in2core.engine.losses import compute_row_losses
from hf_in2core.evaluation.intervals import compute_confidence_interval, compute_rank_correlation
from hf_in2core.rows.sources import load_rows


INFLUENCE = {"datainf": "influence (DataInf)", "gradient_cosine": "gradient cosine"}
SIMILARITY = {"rds": "RDS+", "bm25": "BM25", "embedding": "sentence embeddings"}
AGGREGATIONS = {
    "coverage_sum": "sum of proponents",
    "coverage_top_k": "mean of the 10 strongest",
    "coverage_mean": "mean",
    "coverage_share": "share of proponents",
    "num_loss_tokens": "",
}
OUTCOMES = {"loss": "loss", "gain": "loss before training minus after"}


def take_tests(job_test: Dataset, more: list[str], rows: int) -> dict[str, Dataset]:
    """The first rows of every test set, by name."""
    tests = {"test": job_test} | {Path(source).stem: load_rows(source, "test set") for source in more}
    return {name: test.select(range(min(rows, len(test)))) for name, test in tests.items()}


def measure_gain(trainer: InfluenceTrainer, tests: list[str]) -> np.ndarray:
    """Loss of the test rows before training the adapter, nats per token."""
    with trainer.model.disable_adapter():
        losses = [compute_row_losses(trainer.model, trainer.prepared_validation[name]) for name in tests]
    return np.concatenate([found.nll / found.num_loss_tokens for found in losses])


def rank_within(values: np.ndarray, tasks: np.ndarray) -> np.ndarray:
    """Ranks in (0, 1) within each task."""
    ranks = np.zeros(len(values))
    for task in np.unique(tasks):
        ours = tasks == task
        ranks[ours] = (rankdata(values[ours]) - 0.5) / ours.sum()
    return ranks


def correlate(coverage: Dataset, method: str, outcomes: dict[str, np.ndarray], tasks: np.ndarray) -> list[dict]:
    """Correlations of every aggregation with every outcome, over all rows and within tasks."""
    rows = []
    for column in AGGREGATIONS:
        if column not in coverage.column_names or (column == "num_loss_tokens") != (method == "number of loss tokens"):
            continue
        values = np.array(coverage[column], dtype=np.float64)
        for name, outcome in outcomes.items():
            for among in ("all rows", "within tasks"):
                first, second = values, outcome
                if among == "within tasks":
                    first, second = rank_within(values, tasks), rank_within(outcome, tasks)
                found = compute_rank_correlation(first, second)
                rows.append({"method": method, "coverage": column, "outcome": name, "among": among} | vars(found))
    return rows


def measure_reference(
    job: Any, adapter: str, args: argparse.Namespace, similarities: dict[str, Dataset]
) -> list[dict[str, Any]]:
    """Correlations for one reference; `similarities` know of none, so that they are computed once."""
    tests = take_tests(job.inputs.test, args.more_tests, args.test_rows)
    task_column = job.args.task_column
    rows: list[dict[str, Any]] = []
    for estimator, method in INFLUENCE.items():
        store = {"gradient_store_gb": 2} if estimator == "datainf" else {}  # one pass over the pool instead of two
        trainer = make_trainer(job, adapter, validation=tests, estimator=estimator, **store)
        coverage = compute_coverage(trainer)
        if not rows:
            loss = np.array(coverage["loss"])
            outcomes = {"loss": loss, "gain": measure_gain(trainer, list(tests)) - loss}
            where = zip(coverage["test_set"], coverage["test_row"], strict=True)
            tasks = np.array([str(tests[name][task_column][row]) if task_column else name for name, row in where])
            for by, label in SIMILARITY.items():
                if by == "embedding" and not args.encoder:
                    continue
                if by not in similarities:
                    similarities[by] = compute_similarity_coverage(trainer, by, encoder=args.encoder)
                rows += correlate(similarities[by], label, outcomes, tasks)
            rows += correlate(coverage, "number of loss tokens", outcomes, tasks)
        rows += correlate(coverage, method, outcomes, tasks)
    return rows


def summarise(found: list[dict[str, Any]]) -> list[dict[str, str]]:
    """One row per method and aggregation: mean over seeds, mean interval over test rows, spread over seeds."""
    table = []
    for (method, column), rows in group(found, "method", "coverage").items():
        line = {"coverage by": method, "aggregation": AGGREGATIONS[column]}
        for outcome in OUTCOMES:
            for among in ("all rows", "within tasks"):
                ours = [row for row in rows if row["outcome"] == outcome and row["among"] == among]
                line[f"{outcome}, {among}"] = show(ours)
        table.append(line)
    return table


def show(rows: list[dict[str, Any]]) -> str:
    if any(row["estimate"] is None for row in rows):
        return "constant"
    mean, low, high = (float(np.mean([row[key] for row in rows])) for key in ("estimate", "low", "high"))
    half_width = compute_confidence_interval([row["estimate"] for row in rows]).half_width
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]" + ("" if half_width is None else f" ± {half_width:.2f}")


def plot(found: list[dict[str, Any]], path: Path) -> None:
    """Correlation of every coverage with loss and gain within tasks; bars are 95 % intervals over test rows."""
    with drawing(path, 9, 4.6) as figure:
        keys = list(dict.fromkeys((row["method"], row["coverage"]) for row in found))[::-1]
        for axes, outcome in zip(figure.subplots(1, 2, sharey=True), OUTCOMES, strict=True):
            for height, (method, column) in enumerate(keys):
                rows = [
                    row
                    for row in found
                    if (row["method"], row["coverage"]) == (method, column)
                    and (row["outcome"], row["among"]) == (outcome, "within tasks")
                    and row["estimate"] is not None
                ]
                colour = (
                    "#0072B2" if method in INFLUENCE.values() else "#E69F00" if column != "num_loss_tokens" else "0.4"
                )
                if not rows:
                    continue
                mean, low, high = (float(np.mean([row[key] for row in rows])) for key in ("estimate", "low", "high"))
                axes.plot([row["estimate"] for row in rows], [height] * len(rows), "o", color=colour, alpha=0.4, ms=4)
                axes.errorbar(mean, height, xerr=[[mean - low], [high - mean]], fmt="|", color=colour, capsize=3)
            axes.axvline(0, color="0.5", linewidth=0.8)
            labels = [f"{method}{', ' * bool(AGGREGATIONS[column])}{AGGREGATIONS[column]}" for method, column in keys]
            axes.set_yticks(range(len(keys)), labels, fontsize=8)
            axes.set_xlabel(f"Spearman with {OUTCOMES[outcome]}", fontsize=9)
        figure.suptitle("within tasks; dots: seeds, bars: 95 % interval over test rows", fontsize=10)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--more_tests", nargs="+", default=[], help="Further files of test rows.")
    parser.add_argument("--test_rows", type=int, default=150, help="Rows of each test set.")
    parser.add_argument("--encoder", help="Folder or name of a sentence-transformers model.")
    args, settings = parse_run(parser, "references", REFERENCE_QUICK)
    if args.quick:
        args.test_rows = min(args.test_rows, 30)
    found: list[dict[str, Any]] = []
    similarities: dict[str, Dataset] = {}
    folder = Path(settings.arguments.output_dir or "")
    for seed, job, adapter in train_references(settings):
        found += [{"seed": seed} | row for row in measure_reference(job, adapter, args, similarities)]
        write_results(folder / "coverage.json", rows=found)
        print(f"Seed {seed} measured.", flush=True)
    print_table("Spearman of coverage with the loss of test rows", summarise(found))
    plot(found, folder / "coverage.png")


if __name__ == "__main__":
    main()
