"""Settings of each recipe of its own, as dataclasses. Imports nothing heavy, so that `--help` answers at once."""

import os
import re
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


ARMS = ("full", "coreset", "random", "opponents")
BUDGETS = ("steps", "epochs")
ANALYSES = ("layers", "coverage")
COMPARED_STRATEGIES = ("top", "round_robin", "round_robin_rows", "greedy")
# These read the influence on every validation row.
STRATEGIES_BY_ROW = ("round_robin_rows", "greedy")


@dataclass
class DataArguments:
    """What every recipe that reads raw rows has."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Model: folder or Hub id."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder of the run; the same command resumes."})
    columns: list[str] | None = field(
        default=None,
        metadata={
            "help": "How raw columns become TRL's: `alpaca`, `sharegpt`, or pairs such as `prompt=instruction "
            "completion=output`. Not needed for `messages`, `prompt`/`completion` or `text`."
        },
    )


@dataclass
class In2CoreArguments(DataArguments):
    """The whole pipeline. `model_name_or_path` is the reference model."""

    target_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Model to fine-tune on the coreset. The reference model by default."}
    )
    pool: str | None = field(
        default=None,
        metadata={"help": "Rows to select from: Hub id[:split], folder, .jsonl, .json, .parquet or .csv."},
    )
    validation: list[str] | None = field(
        default=None, metadata={"help": "Rows that select: one such source, or several with names (`math=… code=…`)."}
    )
    test: str | None = field(default=None, metadata={"help": "Rows that judge, none of them used to select."})
    fractions: list[float] = field(
        default_factory=lambda: [0.25], metadata={"help": "Fractions of the pool to keep, in (0, 1]; the first leads."}
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of the targets (adapter, order, random rows)."}
    )
    arms: list[str] = field(
        default_factory=lambda: list(ARMS), metadata={"help": "Arms to compare.", "choices": list(ARMS)}
    )
    strategy: str = field(
        default="top",
        metadata={
            "help": "How the coreset is chosen: `top` by the influence on the mean validation loss, `round_robin` in "
            "turn by named validation sets, `round_robin_rows` in turn by single validation rows, `greedy` likewise "
            "but given the rows chosen before (for pools that repeat themselves).",
            "choices": list(COMPARED_STRATEGIES),
        },
    )
    budgets: list[str] = field(
        default_factory=lambda: ["steps"],
        metadata={
            "help": "`steps`: each arm takes as many steps as the largest one (or --max_steps). `epochs`: each takes "
            "--num_train_epochs over its own rows.",
            "choices": list(BUDGETS),
        },
    )
    hub_id: str | None = field(
        default=None, metadata={"help": "Dataset repository to publish to at the end (user/name)."}
    )
    reference_adapter: str | None = field(
        default=None, metadata={"help": "Adapter of the reference model that is trained already: folder or Hub id."}
    )
    reference_fraction: float = field(
        default=1.0, metadata={"help": "Train the reference on a seeded part of the pool, in (0, 1]."}
    )
    drop_overlap: bool = field(
        default=False,
        metadata={
            "help": "Drop pool rows that are in the validation or test set, and validation rows in the test set."
        },
    )
    task_column: str | None = field(
        default=None,
        metadata={
            "help": "Column that names a row's task: how influence ranks the tasks of the validation set (AUC)."
        },
    )
    wrong_column: str | None = field(
        default=None, metadata={"help": "Column that is true for wrong answers: how influence ranks them (AUC)."}
    )
    analyses: list[str] = field(
        default_factory=list,
        metadata={
            "help": "What to add to the results and the report: `layers`, how few decoder layers would rank the pool "
            "alike (a pilot sample); `coverage`, how well the pool covers the test rows (each a query over the pool). "
            "None by default.",
            "choices": list(ANALYSES),
        },
    )
    setup_script: str | None = field(
        default=None, metadata={"help": "Python script with its arguments, run first (the quickstart makes its data)."}
    )
    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Print what the influence passes will read, take and leave on disk, and stop; writes nothing."
        },
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Go on in a folder of another configuration; what no longer fits is computed again."},
    )

    def __post_init__(self) -> None:
        require(self, "model_name_or_path", "output_dir", "pool", "validation", "test")
        for fraction in [*self.fractions, self.reference_fraction]:
            check_fraction(fraction)
        if self.strategy == "round_robin" and len(self.validation or []) < 2:
            raise ValueError(
                "--strategy round_robin takes named validation sets in turn, but --validation has one. Name several "
                "(`--validation math=… code=…`), or take its rows in turn with --strategy round_robin_rows."
            )
        for name in ("fractions", "seeds", "arms", "budgets"):
            values = getattr(self, name)
            if not values:
                raise ValueError(f"--{name} is empty. Give at least one value.")
        for name in ("fractions", "seeds", "arms", "budgets", "analyses"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise ValueError(f"--{name} has a value twice: {values}. Give each once.")


@dataclass
class TrainReferenceArguments(DataArguments):
    """Train the reference adapter. `model_name_or_path` is the reference model."""

    pool: str | None = field(default=None, metadata={"help": "Training rows: Hub id[:split], folder or file."})
    reference_fraction: float = field(default=1.0, metadata={"help": "Train on a seeded part of them, in (0, 1]."})

    def __post_init__(self) -> None:
        require(self, "model_name_or_path", "output_dir", "pool")
        check_fraction(self.reference_fraction)


@dataclass
class ScoreInfluenceArguments(DataArguments):
    """Score a pool with a trained reference adapter, or with a scorer that was fitted before."""

    pool: str | None = field(default=None, metadata={"help": "Rows to score: Hub id[:split], folder or file."})
    reference_adapter: str | None = field(default=None, metadata={"help": "Trained adapter: folder or Hub id."})
    validation: list[str] | None = field(
        default=None,
        metadata={
            "help": "Rows that select: one source, or several with names (`math=… code=…`). With --scorer: those it "
            "was fitted with, to measure on a sample what fitting it on this pool would change."
        },
    )
    scorer: str | None = field(
        default=None, metadata={"help": "Fitted scorer (folder or Hub id), instead of an adapter and validation rows."}
    )
    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Print what the influence passes will read, take and leave on disk, and stop; writes nothing."
        },
    )

    def __post_init__(self) -> None:
        require(self, "output_dir", "pool")
        if self.scorer is None:
            require(self, "model_name_or_path", "reference_adapter", "validation")
        elif self.reference_adapter:
            raise ValueError("--scorer brings its adapter. Leave out --reference_adapter.")
        elif self.dry_run:
            raise ValueError(
                "--dry_run plans fitting and scoring, but --scorer is fitted already. Leave out one of them."
            )


@dataclass
class SelectCoresetArguments:
    """Keep the rows of a scored pool that are worth training on."""

    scored: str | None = field(default=None, metadata={"help": "Scored pool: folder, Hub id[:split] or file."})
    output: str | None = field(
        default=None, metadata={"help": "Where to write: a folder (of `save_to_disk`), or a .jsonl or .parquet file."}
    )
    fraction: float | None = field(default=None, metadata={"help": "Fraction of the rows that carry loss, in (0, 1]."})
    size: int | None = field(default=None, metadata={"help": "Number of rows, instead of a fraction."})
    strategy: str = field(
        default="top", metadata={"help": "`top`, `bottom`, `random`, `round_robin`, `round_robin_rows` or `greedy`."}
    )
    proponents_only: bool = field(default=False, metadata={"help": "Drop rows with influence >= 0 first."})
    group_column: str | None = field(default=None, metadata={"help": "Select within each value of this column."})
    group_quota: str = field(default="proportional", metadata={"help": "`proportional` or `equal`."})
    order: str = field(default="influence", metadata={"help": "Order of the rows: `influence` or `original`."})
    seed: int = field(default=0, metadata={"help": "Seed of `random`."})

    def __post_init__(self) -> None:
        require(self, "scored", "output")


@dataclass
class TaskArguments:
    """Tasks of lm-eval (`pip install 'hf-in2core[eval]'`)."""

    tasks: list[str] = field(default_factory=list, metadata={"help": "Tasks of lm-eval, such as `mmlu`."})
    include_path: str | None = field(
        default=None,
        metadata={
            "help": "Folder with task files of lm-eval, which are then the only ones (recipes/mmlu makes one, for "
            "machines without the Hub)."
        },
    )
    num_fewshot: int | None = field(
        default=None, metadata={"help": "Examples before each question. What the task says by default."}
    )
    limit: float | None = field(
        default=None,
        metadata={"help": "Questions of each task (10), or a share of them (0.1). All by default."},
    )


@dataclass
class SftCoresetArguments(DataArguments, TaskArguments):
    """Fine-tune a target model. `model_name_or_path` is the target."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Rows to train on: Hub id[:split], folder (such as RUN/scored) or file."}
    )
    split: str | None = field(default=None, metadata={"help": "Split of the dataset, such as `coreset_25`."})
    fraction: float | None = field(
        default=None, metadata={"help": "Keep this fraction of a scored dataset, strongest proponents first."}
    )
    dataset_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the dataset on the Hub. The newest by default."}
    )
    test: str | None = field(default=None, metadata={"help": "Rows that judge the model at the end, for its card."})
    hub_id: str | None = field(
        default=None, metadata={"help": "Model repository to publish the adapter and its card to (user/name)."}
    )

    def __post_init__(self) -> None:
        require(self, "model_name_or_path", "output_dir", "dataset_name")
        if self.fraction is not None:
            check_fraction(self.fraction)


@dataclass
class EvaluateArguments(DataArguments, TaskArguments):
    """Loss, perplexity and accuracy per labelled token, and tasks of lm-eval."""

    test: str | None = field(default=None, metadata={"help": "Rows that judge: Hub id[:split], folder or file."})
    adapters: list[str] = field(
        default_factory=list, metadata={"help": "Adapters (folders or Hub ids); the base model is always evaluated."}
    )
    run: str | None = field(
        default=None,
        metadata={
            "help": "Folder of in2core.py: evaluate its target model and the adapter of every arm on --tasks, into "
            "its results.json and report.html."
        },
    )
    arms: list[str] = field(
        default_factory=lambda: list(ARMS), metadata={"help": "With --run: only these arms.", "choices": list(ARMS)}
    )
    seeds: list[int] = field(default_factory=list, metadata={"help": "With --run: only these seeds. All by default."})

    def __post_init__(self) -> None:
        if self.run is not None:
            require(self, "tasks")
            if given := [name for name in ("model_name_or_path", "adapters", "test") if getattr(self, name)]:
                raise ValueError(
                    f"--run takes model and adapters from the run, whose arms are judged on its test set already. "
                    f"Leave out --{given[0]}, or --run."
                )
            return
        require(self, "model_name_or_path")
        if self.test is None and not self.tasks:
            raise ValueError("missing: --test or --tasks (or both): there is nothing to evaluate on")


def require(arguments: Any, *names: str) -> None:
    """Raise if a setting that has no default was not given."""
    missing = [name for name in names if not getattr(arguments, name)]
    if missing:
        raise ValueError(
            f"missing: {', '.join(f'--{name}' for name in missing)} (a flag, or a key of --config X.yaml)"
        )


def check_fraction(fraction: float) -> None:
    """Raise if a fraction is not one."""
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction {fraction} is outside (0, 1]: half of the rows is 0.5")


def describe_command() -> str:
    """The command of this process as it was typed, for what it makes to tell; no folder of the user's home in it."""
    launcher = "accelerate launch" if "ACCELERATE_DYNAMO_BACKEND" in os.environ else "python"
    home = re.escape(str(Path.home()))
    flags = re.sub(rf"(?<![^ =]){home}(?=/)", "~", shlex.join(sys.argv[1:]))
    return f"{launcher} recipes/{Path(sys.argv[0]).name} {flags}"
