"""When to read influence, and how: how well it finds the rows of the task along the training of the reference model.

    python benchmarks/checkpoints.py [--read_at 5 10 25 50 100] [flags of recipes/in2core.py]

At each step given, every row's gradient is kept in memory (small models and pools only), so that many estimators are
compared at once: AUC with which the rows whose `task_column` occurs in the validation set come first, and their share
among the first quarter. By default on the data that the quickstart generates; needs `--task_column`.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


sys.path.append(str(Path(__file__).resolve().parent.parent / "recipes"))

from arguments import In2CoreArguments  # noqa: E402
from datasets import Dataset, concatenate_datasets  # noqa: E402
from job import check  # noqa: E402
from recipe_parser import RecipeParser  # noqa: E402
from run_folder import join_processes, quiet_loading, run_setup_script  # noqa: E402
from scipy.stats import spearmanr  # noqa: E402
from stages import make_reference_trainer  # noqa: E402
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments  # noqa: E402

from hf_in2core import InfluenceConfig  # noqa: E402
from hf_in2core.blocks import find_blocks  # noqa: E402
from hf_in2core.coreset import take_round_robin  # noqa: E402
from hf_in2core.evaluation import compute_auc  # noqa: E402
from hf_in2core.fit import run_per_example_validation_pass  # noqa: E402
from hf_in2core.losses import compute_row_losses  # noqa: E402
from hf_in2core.passes import Passes  # noqa: E402
from hf_in2core.preparation import Preparation, prepare_rows  # noqa: E402


def compute_estimators(g: dict[str, np.ndarray], v: dict[str, np.ndarray], damping_scale: float) -> dict[str, Any]:
    """
    Columns from the gradients of the pool `[n, d]` and of the validation rows `[Q, d]`, per block; smallest first.

    DataInf is linear in the validation gradient: its mean over single rows is the influence on their mean.
    """
    num_rows, num_queries = len(next(iter(g.values()))), len(next(iter(v.values())))
    datainf, dots = np.zeros((num_rows, num_queries)), np.zeros((num_rows, num_queries))
    row_norms, query_norms, mean_norm = np.zeros(num_rows), np.zeros(num_queries), 0.0
    for name, rows in g.items():
        square_norms, products = (rows**2).sum(1), rows @ v[name].T
        damping = damping_scale * square_norms.mean() / rows.shape[1]
        u = (v[name] - (products / (damping + square_norms)[:, None]).T @ rows / num_rows) / damping
        datainf -= rows @ u.T
        dots -= products
        row_norms += square_norms
        query_norms += (v[name] ** 2).sum(1)
        mean_norm += float((v[name].mean(0) ** 2).sum())
    lengths = np.sqrt(row_norms)
    cosines = dots / lengths[:, None] / np.sqrt(query_norms)
    return {
        "DataInf": datainf.mean(1),
        "DataInf / norm of the row's gradient": datainf.mean(1) / lengths,
        "gradient dot": dots.mean(1),
        "gradient cosine": dots.mean(1) / lengths / np.sqrt(mean_norm),
        "DataInf, validation rows in turn": take_turns(datainf),
        "DataInf / norm, validation rows in turn": take_turns(datainf / lengths[:, None]),
        "gradient cosine, validation rows in turn": take_turns(cosines),
    }


def take_turns(scores: np.ndarray) -> np.ndarray:
    """Turn at which each row is taken, `[n]`, for `[n, Q]` scores."""
    turns = np.empty(len(scores))
    turns[take_round_robin(np.arange(len(scores)), len(scores), scores.T)] = np.arange(len(scores))
    return turns


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--read_at", type=int, nargs="+", default=[5, 10, 25, 50, 100], help="Steps of the reference.")
    args, rest = parser.parse_known_args()
    defaults = [] if "--config" in rest else ["--config", "recipes/quickstart/in2core.yaml"]
    defaults += [] if "--output_dir" in rest else ["--output_dir", "runs/benchmarks/checkpoints"]
    settings = RecipeParser(In2CoreArguments, reference=True).parse([*defaults, *rest])
    join_processes(settings)
    recipe: In2CoreArguments = settings.arguments
    if recipe.task_column is None:
        raise ValueError("--task_column is not set: it names the column that tells which rows are of the task.")
    if recipe.setup_script is not None:
        run_setup_script(recipe.setup_script)
    job = check(settings)
    sets = list(job.inputs.validation.values())
    validation = concatenate_datasets(sets)
    influence_args = settings.make(InfluenceConfig, reference=True, output_dir=str(job.folder / "checkpoints"))
    with quiet_loading():
        trainer = make_reference_trainer(
            job.reference_model, influence_args, job.inputs.pool, job.validation, job.reference_tokenizer
        )
        preparation = Preparation.from_args(influence_args, job.reference_tokenizer, job.inputs.pool)
        prepared = {
            name: prepare_rows(rows, preparation)
            for name, rows in (("pool", job.inputs.pool), ("validation", validation), ("test", job.inputs.test))
        }
    tasks = {str(task) for task in validation[recipe.task_column]}
    ours = np.array([str(task) in tasks for task in job.inputs.pool[recipe.task_column]])[prepared["pool"]["row"][:]]
    if ours.all() or not ours.any():
        raise ValueError(
            f"{ours.sum()} of {len(ours)} rows are of the tasks {sorted(tasks)}: there is nothing to find."
        )
    found: list[dict[str, Any]] = []

    def read(step: int) -> None:
        passes = Passes(trainer.model, find_blocks(trainer.model, "default"), "mean", 4096, show_progress=False)

        def keep(rows: Dataset) -> dict[str, np.ndarray]:
            gradients = run_per_example_validation_pass(passes, rows)
            return {name: value.flatten(1).double().numpy() for name, value in gradients.items()}

        test = compute_row_losses(trainer.model, prepared["test"])
        losses = compute_row_losses(trainer.model, prepared["pool"])
        columns = compute_estimators(
            keep(prepared["pool"]), keep(prepared["validation"]), influence_args.damping_scale
        )
        columns["highest loss"] = -losses.nll / losses.num_loss_tokens
        for name, column in columns.items():
            first = np.argsort(column, kind="stable")[: len(column) // 4]
            row = {
                "step": step,
                "test loss": float(test.nll.sum() / test.num_loss_tokens.sum()),
                "ranked by": name,
                "AUC": compute_auc(-column, ours),
                "of the first quarter": float(ours[first].mean()),
                "Spearman with length": float(spearmanr(column, losses.num_loss_tokens).statistic),
                "tokens per row of the first quarter": float(losses.num_loss_tokens[first].mean()),
            }
            found.append(row)
            print(
                f"| {' | '.join(f'{x:.3f}' if isinstance(x, float) else str(x) for x in row.values())} |", flush=True
            )
        (job.folder / "checkpoints.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")

    class Reader(TrainerCallback):
        def on_step_end(
            self, args_: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
        ) -> None:
            if state.global_step in args.read_at:
                training = trainer.model.training
                read(state.global_step)
                trainer.model.train(training)

    trainer.add_callback(Reader())
    trainer.train()
    if not found:
        raise ValueError(f"The reference took {trainer.state.global_step} steps and met none of {args.read_at}.")


if __name__ == "__main__":
    main()
