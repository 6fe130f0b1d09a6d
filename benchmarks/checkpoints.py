"""When to read influence, and how: how well it finds the rows of the task along the training of the reference model.

    python benchmarks/checkpoints.py [--quick] [--read_at 10 50 100] [--validation_tasks A B] [flags of in2core.py]

At each step given, every row's gradient is kept in memory (small models and pools only), so that many estimators are
compared at once: AUC with which the rows whose `task_column` occurs in the validation set come first, and their share
among the first quarter. After the last step the readings are averaged, weighted by the mean learning rate since the
reading before (as LESS does), as they are and each divided by its standard deviation over the pool. Beside them stand
diagnostics that know no task, to see which of them tells a good reading from a bad one: losses, how concentrated the
squared gradient norms are, and how far halves of the validation set agree. One reference for each of `--seeds`. By
default on the data that the quickstart generates; needs `--task_column`. Writes `checkpoints.json` and
`checkpoints.png` into `output_dir` and prints the tables.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from common import drawing, group, make_parser, parse_run, print_table, show, write_results
from datasets import concatenate_datasets
from plain_training import compute_influence, keep_gradients
from references import REFERENCE_QUICK
from scipy.stats import spearmanr
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_in2core import InfluenceConfig, InfluenceTrainer
from hf_in2core.engine.losses import compute_row_losses
from hf_in2core.evaluation.judge import compute_auc
from hf_in2core.pipeline.arguments import In2CoreArguments
from hf_in2core.pipeline.job import Job, check
from hf_in2core.pipeline.parser import Settings
from hf_in2core.pipeline.run_folder import quiet_loading
from hf_in2core.pipeline.training import make_reference_trainer
from hf_in2core.rows.preparation import Preparation, prepare_rows
from hf_in2core.selection.turns import count_turns


Gradients = dict[str, np.ndarray]


def compute_diagnostics(
    g: Gradients, v: Gradients, datainf: np.ndarray, losses: dict[str, np.ndarray], seed: int
) -> dict[str, float]:
    """What can be measured about a reading without knowing any task."""
    norms = sum((rows**2).sum(1) for rows in g.values())
    mean_train, mean_validation = (np.concatenate([rows.mean(0) for rows in part.values()]) for part in (g, v))
    generator = np.random.default_rng(seed)
    agreements = []
    for _ in range(20):
        half, other = np.array_split(generator.permutation(datainf.shape[1]), 2)
        agreements.append(spearmanr(datainf[:, half].mean(1), datainf[:, other].mean(1)).statistic)
    largest = np.sort(norms)[::-1]
    return {
        "pool loss": float(losses["pool"].mean()),
        "validation loss": float(losses["validation"].mean()),
        "loss gap": float(losses["validation"].mean() - losses["pool"].mean()),
        "rows with loss < 0.1": float((losses["pool"] < 0.1).mean()),
        "gradient in the first tenth": float(largest[: max(len(norms) // 10, 1)].sum() / norms.sum()),
        "effective rows": float(norms.sum() ** 2 / (norms**2).sum() / len(norms)),
        "agreement of halves": float(np.mean(agreements)),
        "cancelling": float(1 - np.abs(datainf.sum(1)).sum() / np.abs(datainf).sum()),
        "train-validation cosine": float(
            mean_train @ mean_validation / np.linalg.norm(mean_train) / np.linalg.norm(mean_validation)
        ),
    }


def average(readings: list[np.ndarray], rates: list[float], scaled: bool) -> np.ndarray:
    """Mean of `[n, Q]` readings weighted by learning rate; `scaled` divides each by its deviation over the pool."""
    total = np.zeros_like(readings[0])
    for reading, rate in zip(readings, rates, strict=True):
        total += rate / sum(rates) * reading / (reading.mean(1).std() if scaled else 1.0)
    return total


class Readings:
    """Reads one reference along its training and keeps what averaging needs."""

    def __init__(self, job: Job, trainer: InfluenceTrainer, preparation: Preparation, seed: int) -> None:
        args: In2CoreArguments = job.args
        validation = concatenate_datasets(list(job.inputs.validation.values()))
        self.trainer, self.seed, self.args = trainer, seed, trainer.args
        self.prepared = {
            name: prepare_rows(rows, preparation)
            for name, rows in (("pool", job.inputs.pool), ("validation", validation), ("test", job.inputs.test))
        }
        tasks = {str(task) for task in validation[args.task_column]}
        every = np.array([str(task) in tasks for task in job.inputs.pool[args.task_column]])
        self.ours = every[self.prepared["pool"]["row"][:]]
        if self.ours.all() or not self.ours.any():
            raise ValueError(
                f"{self.ours.sum()} of {len(self.ours)} rows are of the tasks {sorted(tasks)}: nothing is to be found."
            )
        self.kept: dict[str, list[np.ndarray]] = {}
        self.weights: list[float] = []
        self.rates: list[float] = []
        self.rows: list[dict[str, Any]] = []
        self.diagnostics: list[dict[str, Any]] = []
        self.tokens = np.zeros(0)

    def read(self, step: int) -> None:
        found = {name: compute_row_losses(self.trainer.model, rows) for name, rows in self.prepared.items()}
        losses = {name: row.nll / row.num_loss_tokens for name, row in found.items()}
        self.tokens = found["pool"].num_loss_tokens
        g, v = (keep_gradients(self.trainer.model, self.prepared[name]) for name in ("pool", "validation"))
        estimators = compute_influence(g, v, self.args.damping_scale)
        test_loss = float(found["test"].nll.sum() / found["test"].num_loss_tokens.sum())
        for name, scores in estimators.items():
            self.kept.setdefault(name, []).append(scores)
            self.judge(step, test_loss, name, scores)
        self.add(step, test_loss, "highest loss", -losses["pool"])
        self.weights.append(float(np.mean(self.rates)) if self.rates else 0.0)
        self.rates = []
        diagnostics = compute_diagnostics(g, v, estimators["DataInf"], losses, self.seed)
        self.diagnostics.append({"seed": self.seed, "step": step, "test loss": test_loss} | diagnostics)
        print(f"seed {self.seed}, step {step}: {self.diagnostics[-1]}", file=sys.stderr, flush=True)

    def judge(self, step: int | str, test_loss: float, name: str, scores: np.ndarray) -> None:
        self.add(step, test_loss, name, scores.mean(1))
        self.add(step, test_loss, f"{name}, validation rows in turn", count_turns(scores.T))

    def add(self, step: int | str, test_loss: float, name: str, column: np.ndarray) -> None:
        first = np.argsort(column, kind="stable")[: len(column) // 4]
        self.rows.append(
            {
                "seed": self.seed,
                "step": step,
                "test loss": test_loss,
                "ranked by": name,
                "AUC": compute_auc(-column, self.ours),
                "quarter": float(self.ours[first].mean()),
                "Spearman with length": float(spearmanr(column, self.tokens).statistic),
                "tokens": float(self.tokens[first].mean()),
            }
        )

    def judge_averages(self) -> None:
        """Readings of all steps together; nothing where there is one alone."""
        if len(self.weights) < 2:
            return
        for name, readings in self.kept.items():
            for scaled in (False, True):
                label = "averaged, scaled" if scaled else "averaged"
                self.judge(label, float("nan"), name, average(readings, self.weights, scaled))


def read_reference(settings: Settings, read_at: list[int], validation_tasks: list[str], seed: int) -> Readings:
    """Train one reference and read it at the steps given."""
    recipe: In2CoreArguments = settings.arguments
    job = check(settings)
    if validation_tasks:
        job.inputs.validation.update(
            {
                name: rows.filter(lambda row: str(row[recipe.task_column]) in validation_tasks)
                for name, rows in job.inputs.validation.items()
            }
        )
    args = settings.make(InfluenceConfig, reference=True, output_dir=str(job.folder / "checkpoints"), seed=seed)
    with quiet_loading():
        trainer = make_reference_trainer(
            job.reference_model, args, job.inputs.pool, job.inputs.validation, job.reference_tokenizer
        )
        preparation = Preparation.from_args(args, job.reference_tokenizer, job.inputs.pool)
        readings = Readings(job, trainer, preparation, seed)

    class Reader(TrainerCallback):
        def on_step_end(
            self, args_: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
        ) -> None:
            readings.rates.append(kwargs["lr_scheduler"].get_last_lr()[0])
            if state.global_step in read_at:
                training = trainer.model.training
                readings.read(state.global_step)
                trainer.model.train(training)

    trainer.add_callback(Reader())
    trainer.train()
    if not readings.rows:
        raise ValueError(f"The reference took {trainer.state.global_step} steps and met none of {read_at}.")
    readings.judge_averages()
    return readings


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Mean and 95 % interval over seeds, by step and estimator."""
    table = []
    for (step, name), found in group(rows, "step", "ranked by").items():
        table.append(
            {
                "step": str(step),
                "test loss": ""
                if np.isnan(found[0]["test loss"])
                else f"{np.mean([r['test loss'] for r in found]):.2f}",
                "ranked by": name,
                "AUC": show(row["AUC"] for row in found),
                "quarter": show((100 * row["quarter"] for row in found), "{:.0f}") + " %",
                "Spearman with length": f"{np.mean([row['Spearman with length'] for row in found]):+.2f}",
                "tokens": f"{np.mean([row['tokens'] for row in found]):.1f}",
            }
        )
    return table


def tabulate_diagnostics(rows: list[dict[str, Any]], diagnostics: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Diagnostics by step, and last their Spearman with DataInf's AUC over all readings."""
    steps = sorted({row["step"] for row in diagnostics})
    names = [name for name in diagnostics[0] if name not in ("seed", "step")]
    aucs = {(row["seed"], row["step"], row["ranked by"]): row["AUC"] for row in rows}
    kinds = {"AUC": "DataInf", "AUC in turn": "DataInf, validation rows in turn"}
    table = []
    for step in steps:
        found = [row for row in diagnostics if row["step"] == step]
        line = {"step": str(step)}
        line |= {
            kind: f"{np.mean([aucs[row['seed'], step, name] for row in found]):.3f}" for kind, name in kinds.items()
        }
        table.append(line | {name: f"{np.mean([row[name] for row in found]):.2f}" for name in names})
    for kind, label in kinds.items():
        line = {"step": f"Spearman with {kind}", "AUC": "", "AUC in turn": ""}
        outcome = [aucs[row["seed"], row["step"], label] for row in diagnostics]
        for name in names:
            values = [row[name] for row in diagnostics]
            # Fewer readings than these, or a constant, correlate with anything or nothing.
            known = len(values) >= 5 and np.ptp(values) > 0 and np.ptp(outcome) > 0
            line[name] = f"{spearmanr(values, outcome).statistic:+.2f}" if known else ""
        table.append(line)
    return table


def plot(rows: list[dict[str, Any]], diagnostics: list[dict[str, Any]], path: Path) -> None:
    """AUC along the training, and the losses and the agreement of halves beside it; lines are means over seeds."""
    with drawing(path, 9, 3.8) as figure:
        left, right = figure.subplots(1, 2)
        colours = {"DataInf": "#0072B2", "gradient cosine": "#009E73", "highest loss": "#E69F00"}
        steps = sorted({row["step"] for row in diagnostics})
        for name, colour in colours.items():
            for suffix, style in (("", "-"), (", validation rows in turn", "--")):
                points = {
                    step: [row["AUC"] for row in rows if (row["step"], row["ranked by"]) == (step, name + suffix)]
                    for step in steps
                }
                if not points[steps[0]]:
                    continue
                left.plot(
                    steps,
                    [np.mean(points[step]) for step in steps],
                    style,
                    color=colour,
                    label=name + (" in turn" if suffix else ""),
                )
                for step in steps:
                    left.plot([step] * len(points[step]), points[step], "o", color=colour, alpha=0.4, markersize=3)
        left.axhline(0.5, color="0.7", linewidth=0.8)
        left.set_ylim(0.0, 1.05)  # room for the legend
        left.set_ylabel("AUC of the task's rows")
        for name, colour in (
            ("pool loss", "#000000"),
            ("validation loss", "#CC79A7"),
            ("agreement of halves", "#0072B2"),
            ("effective rows", "#009E73"),
        ):
            means = [np.mean([row[name] for row in diagnostics if row["step"] == step]) for step in steps]
            right.plot(steps, means, "o-", color=colour, markersize=3, label=name)
        for axes in (left, right):
            axes.set_xscale("log")
            axes.set_xticks(steps, [str(step) for step in steps])
            axes.minorticks_off()
            axes.set_xlabel("step of the reference")
            axes.legend(
                frameon=False, fontsize=8, ncols=2 if axes is left else 1, loc="lower left" if axes is left else "best"
            )


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--read_at", type=int, nargs="+", default=[10, 50, 100], help="Steps of the reference.")
    parser.add_argument("--validation_tasks", nargs="+", default=[], help="Keep the validation rows of these tasks.")
    args, settings = parse_run(parser, "checkpoints", REFERENCE_QUICK)
    if args.quick:
        args.read_at = [2, 5]
    recipe: In2CoreArguments = settings.arguments
    if recipe.task_column is None:
        raise ValueError("--task_column is not set: it names the column that tells which rows are of the task.")
    folder = Path(recipe.output_dir or "")
    rows: list[dict[str, Any]] = []
    diagnostics: list[dict[str, Any]] = []
    for seed in recipe.seeds:
        readings = read_reference(settings, args.read_at, args.validation_tasks, seed)
        rows += readings.rows
        diagnostics += readings.diagnostics
        write_results(folder / "checkpoints.json", rows=rows, diagnostics=diagnostics)
    print_table("Rows of the task along the training", summarise(rows))
    print_table("What a reading says of itself", tabulate_diagnostics(rows, diagnostics))
    plot(rows, diagnostics, folder / "checkpoints.png")


if __name__ == "__main__":
    main()
