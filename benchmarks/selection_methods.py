"""The ways to select that the benchmarks of selection compare: what each ranks by, and its column."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets, load_from_disk  # noqa: E402

from hf_in2core import InfluenceConfig, InfluenceTrainer  # noqa: E402
from hf_in2core.evaluation.judge import compute_auc  # noqa: E402
from hf_in2core.names import INFLUENCE, NUM_LOSS_TOKENS, name_set_column  # noqa: E402
from hf_in2core.pipeline.comparison import Arm  # noqa: E402
from hf_in2core.pipeline.job import Job  # noqa: E402
from hf_in2core.pipeline.run_folder import quiet_loading, say, write_json, written_folder  # noqa: E402
from hf_in2core.pipeline.steps import read_result  # noqa: E402
from hf_in2core.pipeline.training import load_model  # noqa: E402
from hf_in2core.rows.hashes import hash_value  # noqa: E402
from hf_in2core.rows.preparation import Preparation  # noqa: E402
from hf_in2core.rows.scored import read_query_scores, read_scores  # noqa: E402
from hf_in2core.selection.baselines import add_bm25, add_ifd, add_loss, add_rds, select_length_matched  # noqa: E402
from hf_in2core.selection.coreset import select_positions  # noqa: E402
from hf_in2core.selection.turns import take_round_robin  # noqa: E402


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
    "sets": ("influence", "round_robin", "reference", "influence, validation sets in turn"),
    "turns": ("turns_rank", "top", "reference", "influence, validation rows in turn"),
    "turns_cosine": ("turns_cosine_rank", "top", "reference", "gradient cosine, validation rows in turn"),
    "rds": ("rds_rank", "top", "", "RDS+"),
    "bm25": ("bm25_rank", "top", "", "BM25"),
    "low_loss": ("loss", "top", "reference", "lowest loss"),
    "high_loss": ("loss", "bottom", "reference", "highest loss"),
    "low_ifd": ("ifd", "top", "reference", "lowest IFD"),
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


def add_estimator(job: Job, adapter: str, scored: Dataset, estimator: str, per_row: bool) -> Dataset:
    """Add a column of another estimator, or the turns in which the validation rows take rows by it."""
    influence_args = job.settings.make(InfluenceConfig, reference=True, estimator=estimator)
    with quiet_loading():
        trainer = InfluenceTrainer(
            model=load_model(job.reference_model, influence_args, adapter),
            args=influence_args,
            train_dataset=job.inputs.pool,
            eval_dataset=job.inputs.validation,
            processing_class=job.reference_tokenizer,
        )
    trainer.fit_influence(per_example=per_row)
    found = trainer.score_influence()
    if not per_row:
        return scored.add_column(f"influence_{ESTIMATORS[estimator]}", found["influence"][:])
    rows = np.flatnonzero(~np.isnan(read_scores(found, INFLUENCE)))
    turns = np.full(len(found), np.nan)
    turns[take_round_robin(rows, len(rows), read_query_scores(found))] = np.arange(len(rows))
    return scored.add_column("turns_rank" if estimator == "datainf" else f"turns_{ESTIMATORS[estimator]}_rank", turns)


def make_columns(job: Job, adapter: str, scored: Dataset, methods: list[str]) -> tuple[Dataset, dict[str, float]]:
    """Add the columns that the methods need; returns the dataset and the seconds that each column took."""
    reference_args = job.settings.make(InfluenceConfig, reference=True)
    preparation = Preparation.from_args(reference_args, job.reference_tokenizer, job.inputs.pool)
    sets = list(job.inputs.validation.values())
    validation = concatenate_datasets(sets) if len(sets) > 1 else sets[0]

    def add_reference_loss(rows: Dataset) -> Dataset:
        return add_loss(rows, load_model(job.reference_model, reference_args, adapter), preparation)

    def add_reference_ifd(rows: Dataset) -> Dataset:
        return add_ifd(rows, load_model(job.reference_model, reference_args, adapter), preparation)

    def add_base_rds(rows: Dataset) -> Dataset:
        return add_rds(rows, validation, load_model(job.reference_model, reference_args), preparation)

    makers: dict[str, Callable[[Dataset], Dataset]] = {
        "influence_dot": lambda rows: add_estimator(job, adapter, rows, "gradient_dot", False),
        "influence_cosine": lambda rows: add_estimator(job, adapter, rows, "gradient_cosine", False),
        "turns_rank": lambda rows: add_estimator(job, adapter, rows, "datainf", True),
        "turns_cosine_rank": lambda rows: add_estimator(job, adapter, rows, "gradient_cosine", True),
        "loss": add_reference_loss,
        "ifd": add_reference_ifd,
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


def find_tasks(job: Job) -> tuple[str, ...]:
    """The tasks that the validation rows are of, by `--task_column`; none without one."""
    column = job.args.task_column
    if column is None:
        return ()
    return tuple(sorted({str(task) for rows in job.inputs.validation.values() for task in rows[column]}))
