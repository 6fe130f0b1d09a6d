"""The ways to select that the benchmarks of selection compare: what each ranks by, and its column."""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, load_from_disk
from references import make_trainer

from hf_in2core import InfluenceConfig
from hf_in2core.evaluation.judge import compute_auc
from hf_in2core.names import BM25_RANK, IFD, INFLUENCE, LOSS, NUM_LOSS_TOKENS, RDS_RANK, name_set_column
from hf_in2core.pipeline.comparison import Arm
from hf_in2core.pipeline.job import Job
from hf_in2core.pipeline.methods import MAKERS, Reference, add_columns
from hf_in2core.pipeline.run_folder import say, write_json, written_folder
from hf_in2core.pipeline.steps import read_result
from hf_in2core.rows.hashes import hash_value
from hf_in2core.rows.scored import read_query_scores, read_scores
from hf_in2core.selection.baselines import select_length_matched
from hf_in2core.selection.coreset import select_positions
from hf_in2core.selection.turns import count_turns


# Columns of other estimators: which, and whether validation rows take the rows in turn by it.
ESTIMATED = {
    "influence_dot": ("gradient_dot", False),
    "influence_cosine": ("gradient_cosine", False),
    "turns_rank": ("datainf", True),
    "turns_cosine_rank": ("gradient_cosine", True),
}
# Arm: (column, strategy, what it costs beside the column itself, name in the tables). The recipe's own arms keep their
# names, so that their runs are found.
METHODS: dict[str, tuple[str, str, str, str]] = {
    "full": ("influence", "top", "", "all rows"),
    "random": ("influence", "random", "", "random"),
    "coreset": ("influence", "top", "reference", "influence (DataInf)"),
    "opponents": ("influence", "bottom", "reference", "opponents (DataInf)"),
    "dot": ("influence_dot", "top", "reference", "gradient dot"),
    "cosine": ("influence_cosine", "top", "reference", "gradient cosine"),
    "sets": ("influence", "round_robin", "reference", "influence, validation sets in turn"),
    "turns": ("turns_rank", "top", "reference", "influence, validation rows in turn"),
    "turns_cosine": ("turns_cosine_rank", "top", "reference", "gradient cosine, validation rows in turn"),
    "rds": (RDS_RANK, "top", "", "RDS+"),
    "bm25": (BM25_RANK, "top", "", "BM25"),
    "low_loss": (LOSS, "top", "reference", "lowest loss"),
    "high_loss": (LOSS, "bottom", "reference", "highest loss"),
    "low_ifd": (IFD, "top", "reference", "lowest IFD"),
    "length": ("influence", "length", "reference", "random, as long as influence's"),
    "right": ("is_wrong", "right", "", "only right answers (oracle)"),
    "oracle": ("", "oracle", "", "only rows of the task (oracle)"),
}


@dataclass(frozen=True)
class MethodArm(Arm):
    """An arm of the recipe whose rows a column of `METHODS` chooses."""

    task_column: str | None = None
    tasks: tuple[str, ...] = ()
    sets: tuple[str, ...] = ()

    def select(self, scored: Dataset) -> list[int]:
        """Positions of its rows in the pool, ascending."""
        column, strategy, _, _ = METHODS[self.arm]
        if strategy in ("oracle", "right"):
            if strategy == "right":
                ours = np.flatnonzero(~np.array(scored[column]))
            else:
                ours = np.flatnonzero(np.isin(np.array(scored[self.task_column], dtype=str), self.tasks))
            count = min(round(self.fraction * len(scored)), len(ours))
            return sorted(np.random.default_rng(self.seed).choice(ours, count, replace=False).tolist())
        if strategy == "length":
            numbered = scored.select_columns([column, NUM_LOSS_TOKENS]).add_column("row", np.arange(len(scored)))
            return select_length_matched(numbered, fraction=self.fraction, seed=self.seed)["row"][:]
        if strategy == "round_robin":
            # Of the columns that are called like those of a validation set, some hold other estimators.
            scored = scored.select_columns([column, *map(name_set_column, self.sets)])
        options: dict[str, Any] = {"column": column, "strategy": strategy, "order": "original", "seed": self.seed}
        return select_positions(scored, fraction=self.fraction, **options).tolist()


def add_estimated(job: Job, adapter: str, scored: Dataset, column: str) -> Dataset:
    """Add a column of `ESTIMATED`."""
    estimator, in_turn = ESTIMATED[column]
    trainer = make_trainer(job, adapter, estimator=estimator)
    trainer.fit_influence(per_example=in_turn)
    found = trainer.score_influence()
    influence = read_scores(found, INFLUENCE)
    if in_turn:
        influence = count_turns(read_query_scores(found), np.flatnonzero(~np.isnan(influence)))
    return scored.add_column(column, influence)


def make_columns(job: Job, adapter: str, scored: Dataset, methods: list[str]) -> tuple[Dataset, dict[str, float]]:
    """Add the columns that the methods need; returns the dataset and the seconds that each column took."""
    inputs = job.inputs
    influence_args = job.settings.make(InfluenceConfig, reference=True)
    rows = (inputs.pool, inputs.validation, job.reference_tokenizer)
    reference = Reference(job.reference_model, influence_args, adapter, *rows)
    folder = job.folder / "columns"
    seconds: dict[str, float] = {}
    for column in dict.fromkeys(METHODS[method][0] for method in methods):
        if column not in ESTIMATED and column not in MAKERS:
            continue
        identity = hash_value([adapter, job.identities, column])
        result = read_result(folder / f"{column}.json", identity)
        if result is None:
            start = time.perf_counter()
            if column in ESTIMATED:
                added = add_estimated(job, adapter, scored, column)
            else:
                added, _ = add_columns(scored, [column], reference)
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


def find_tasks(job: Job) -> tuple[str, ...]:
    """The tasks that the validation rows are of, by `--task_column`; none without one."""
    column = job.args.task_column
    if column is None:
        return ()
    return tuple(sorted({str(task) for rows in job.inputs.validation.values() for task in rows[column]}))
