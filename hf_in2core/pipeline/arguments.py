"""Settings of each command of its own, as dataclasses. Imports nothing heavy, so that `--help` answers at once."""

import os
import re
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_in2core.names import ARMS, BUDGETS, STRATEGIES


ANALYSES = ("layers", "coverage")
BAD_ROWS = ("refuse", "drop")
COMPARED_STRATEGIES = tuple(strategy for strategy in STRATEGIES if strategy not in ("bottom", "random"))
# What the shell command leaves for the processes that it launches: the command as it was typed.
TYPED_VARIABLE = "IN2CORE_TYPED"

ROWS = "Hub id[:split], folder, .jsonl, .ndjson, .json, .csv, .tsv (also .gz) or .parquet"
NAMED_SETS = "one source, or several with names (`math=… code=…`)"
DRY_RUN = "Print what the influence passes will read, take and leave on disk, and stop; writes nothing."


def flag(group: str, text: str, default: Any = None, first: bool = True, choices: Any = None) -> Any:
    """
    A field of settings.

    Args:
        group (`str`):
            Heading of `--help` that it stands under: data, reference, influence, selection, targets or output.
        text (`str`):
            What it does.
        default (`Any`, *optional*):
            Its default.
        first (`bool`, *optional*, defaults to `True`):
            Whether `--help` shows it; `--help-all` always does.
        choices (`Iterable`, *optional*):
            The values it takes.
    """
    metadata = {"help": text, "group": group, "first": first} | ({"choices": list(choices)} if choices else {})
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class DataArguments:
    """What every command that reads raw rows has."""

    columns: list[str] | None = flag(
        "data",
        "How raw columns become TRL's: `alpaca`, `sharegpt`, `openai`, or pairs such as `prompt=instruction "
        "completion=output`. Not needed for `messages`, `prompt`/`completion` or `text`.",
    )
    bad_rows: str = flag(
        "data",
        "What to do with rows that cannot be trained on (null, not text, an empty conversation, refused by the chat "
        "template): `refuse` before any work, or `drop` and tell how many.",
        "refuse",
        first=False,
        choices=BAD_ROWS,
    )
    output_dir: str | None = flag("output", "Folder of the run; the same command resumes.")


@dataclass
class In2CoreArguments(DataArguments):
    """The whole pipeline. `model_name_or_path` is the reference model."""

    pool: str | None = flag("data", f"Rows to select from: {ROWS}.")
    validation: list[str] | None = flag("data", f"Rows that select: {NAMED_SETS}.")
    test: str | None = flag("data", "Rows that judge, none of them used to select.")
    drop_overlap: bool = flag(
        "data",
        "Drop pool rows that are in the validation or test set, and validation rows in the test set.",
        False,
        first=False,
    )
    allow_overlap: bool = flag(
        "data", "Go on with such rows where they are; results, page and cards tell how many.", False, first=False
    )
    task_column: str | None = flag(
        "data",
        "Column that names a row's task: how influence ranks the tasks of the validation set (AUC).",
        first=False,
    )
    wrong_column: str | None = flag(
        "data", "Column that is true for wrong answers: how influence ranks them (AUC).", first=False
    )
    setup_script: str | None = flag(
        "data", "Python script with its arguments, run first (the quickstart makes its data).", first=False
    )
    model_name_or_path: str | None = flag("reference", "Reference model: folder or Hub id.")
    reference_adapter: str | None = flag("reference", "Its adapter, if it is trained already: folder or Hub id.")
    reference_fraction: float = flag("reference", "Train it on a seeded part of the pool, in (0, 1].", 1.0)
    analyses: list[str] = flag(
        "influence",
        "What to add to the results and the report: `layers`, how few decoder layers would rank the pool alike (a "
        "pilot sample); `coverage`, how well the pool covers the test rows (each a query over the pool).",
        [],
        first=False,
        choices=ANALYSES,
    )
    dry_run: bool = flag("influence", DRY_RUN, False)
    fractions: list[float] = flag("selection", "Fractions of the pool to keep, in (0, 1]; the first leads.", [0.25])
    strategy: str = flag(
        "selection",
        "How the coreset is chosen: `top` by the influence on the mean validation loss, `round_robin` in turn by the "
        "named validation sets, `round_robin_rows` in turn by single validation rows, `greedy` likewise but given the "
        "rows chosen before (for pools that repeat themselves).",
        "top",
        choices=COMPARED_STRATEGIES,
    )
    target_model_name_or_path: str | None = flag(
        "targets", "Model to fine-tune on the coreset. The reference model by default."
    )
    arms: list[str] = flag("targets", "Arms to compare.", list(ARMS), choices=ARMS)
    seeds: list[int] = flag("targets", "Seeds of the targets (adapter, order, random rows).", [0, 1, 2])
    budgets: list[str] = flag(
        "targets",
        "`steps`: each arm takes as many steps as the largest one (or --max_steps). `epochs`: each takes "
        "--num_train_epochs over its own rows.",
        ["steps"],
        choices=BUDGETS,
    )
    hub_id: str | None = flag("output", "Dataset repository to publish to at the end (user/name).")
    overwrite_output_dir: bool = flag(
        "output",
        "Go on in a folder of another configuration; what no longer fits is computed again.",
        False,
        first=False,
    )

    def __post_init__(self) -> None:
        require(self, "model_name_or_path", "output_dir", "pool", "validation", "test")
        if self.drop_overlap and self.allow_overlap:
            raise ValueError(
                "--drop_overlap takes shared rows out, --allow_overlap leaves them where they are. Give one."
            )
        for fraction in [*self.fractions, self.reference_fraction]:
            check_fraction(fraction)
        if self.strategy == "round_robin" and len(self.validation or []) < 2:
            raise ValueError(
                "--strategy round_robin takes named validation sets in turn, but --validation has one. Name several "
                "(`--validation math=… code=…`), or take its rows in turn with --strategy round_robin_rows."
            )
        for name in ("fractions", "seeds", "arms", "budgets", "analyses"):
            values = getattr(self, name)
            if not values and name != "analyses":
                raise ValueError(f"--{name} is empty. Give at least one value.")
            if len(set(values)) != len(values):
                raise ValueError(f"--{name} has a value twice: {values}. Give each once.")


@dataclass
class TrainReferenceArguments(DataArguments):
    """Train the reference adapter. `model_name_or_path` is the reference model."""

    pool: str | None = flag("data", f"Training rows: {ROWS}.")
    model_name_or_path: str | None = flag("reference", "Reference model: folder or Hub id.")
    reference_fraction: float = flag("reference", "Train on a seeded part of the rows, in (0, 1].", 1.0)

    def __post_init__(self) -> None:
        require(self, "model_name_or_path", "output_dir", "pool")
        check_fraction(self.reference_fraction)


@dataclass
class ScoreInfluenceArguments(DataArguments):
    """Score a pool with a trained reference adapter, or with a scorer that was fitted before."""

    pool: str | None = flag("data", f"Rows to score: {ROWS}.")
    validation: list[str] | None = flag(
        "data",
        f"Rows that select: {NAMED_SETS}. With --scorer: those it was fitted with, to measure on a sample what "
        "fitting it on this pool would change.",
    )
    model_name_or_path: str | None = flag("reference", "Reference model: folder or Hub id.")
    reference_adapter: str | None = flag("reference", "Its trained adapter: folder or Hub id.")
    scorer: str | None = flag(
        "influence", "Fitted scorer (folder or Hub id), instead of an adapter and validation rows."
    )
    dry_run: bool = flag("influence", DRY_RUN, False)

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

    scored: str | None = flag("data", "Scored pool: folder, Hub id[:split] or file.")
    fraction: float | None = flag("selection", "Fraction of the rows that carry loss, in (0, 1].")
    size: int | None = flag("selection", "Number of rows, instead of a fraction.")
    strategy: str = flag("selection", "How rows are chosen.", "top", choices=STRATEGIES)
    proponents_only: bool = flag("selection", "Drop rows with influence >= 0 first.", False)
    group_column: str | None = flag("selection", "Select within each value of this column.")
    group_quota: str = flag("selection", "`proportional` or `equal`.", "proportional")
    seed: int = flag("selection", "Seed of `random`.", 0)
    order: str = flag("output", "Order of the rows: `influence` or `original`.", "influence")
    output: str | None = flag("output", "Where to write: a folder (of `save_to_disk`), or a .jsonl or .parquet file.")

    def __post_init__(self) -> None:
        require(self, "scored", "output")


@dataclass
class TaskArguments:
    """Tasks of lm-eval (`pip install 'hf-in2core[eval]'`)."""

    tasks: list[str] = flag("data", "Tasks of lm-eval, such as `mmlu`.", [])
    include_path: str | None = flag(
        "data",
        "Folder with task files of lm-eval, which are then the only ones (recipes/mmlu makes one, for machines "
        "without the Hub).",
        first=False,
    )
    num_fewshot: int | None = flag(
        "data", "Examples before each question. What the task says by default.", first=False
    )
    limit: float | None = flag(
        "data", "Questions of each task (10), or a share of them (0.1). All by default.", first=False
    )


@dataclass
class SftCoresetArguments(DataArguments, TaskArguments):
    """Fine-tune a target model. `model_name_or_path` is the target."""

    dataset_name: str | None = flag("data", "Rows to train on: Hub id[:split], folder (such as RUN/scored) or file.")
    split: str | None = flag("data", "Split of the dataset, such as `coreset_25`.")
    dataset_revision: str | None = flag(
        "data", "Branch, tag or commit of the dataset on the Hub. The newest by default.", first=False
    )
    test: str | None = flag("data", "Rows that judge the model at the end, for its card.")
    fraction: float | None = flag("selection", "Keep this fraction of a scored dataset, strongest proponents first.")
    model_name_or_path: str | None = flag("targets", "Model to fine-tune: folder or Hub id.")
    hub_id: str | None = flag("output", "Model repository to publish the adapter and its card to (user/name).")

    def __post_init__(self) -> None:
        require(self, "model_name_or_path", "output_dir", "dataset_name")
        if self.fraction is not None:
            check_fraction(self.fraction)


@dataclass
class EvaluateArguments(DataArguments, TaskArguments):
    """Loss, perplexity and accuracy per labelled token, and tasks of lm-eval."""

    test: str | None = flag("data", f"Rows that judge: {ROWS}.")
    model_name_or_path: str | None = flag("targets", "Model: folder or Hub id.")
    adapters: list[str] = flag("targets", "Adapters (folders or Hub ids); the base model is always evaluated.", [])
    run: str | None = flag(
        "targets",
        "Folder of `in2core run`: evaluate its target model and the adapter of every arm on --tasks, into its "
        "results.json and report.html.",
    )
    arms: list[str] = flag("targets", "With --run: only these arms.", list(ARMS), choices=ARMS)
    seeds: list[int] = flag("targets", "With --run: only these seeds. All by default.", [])

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


@dataclass
class PublishArguments:
    """Publish a run. `run` is its folder."""

    run: str | None = flag("data", "Folder of the run, as `in2core run` leaves it.")
    source_datasets: list[str] | None = flag(
        "data", "Hub ids of the pool's sources. By default the run's --pool, if it is one.", first=False
    )
    fractions: list[float] | None = flag(
        "selection", "Coresets to publish, in (0, 1]. By default those that the run compared."
    )
    random_controls: bool = flag("selection", "Publish as many random rows beside each coreset (`random_50`).", False)
    seed: int = flag("selection", "Seed of the random rows.", 0)
    hub_id: str | None = flag("output", "Dataset repository (user/name).")
    config_name: str = flag("output", "Configuration of the repository to publish as.", "default")
    private: bool = flag("output", "Make the repository private when it is created.", False)
    revision: str | None = flag("output", "Branch to publish to.")
    create_pr: bool = flag("output", "Open a pull request instead of committing.", False)

    def __post_init__(self) -> None:
        require(self, "run", "hub_id")


@dataclass
class GrowArguments:
    """Add rows to a published pool."""

    rows: list[str] | None = flag("data", "Rows to add: Hub ids[:split], folders or files, with the pool's columns.")
    combine: list[str] | None = flag("data", "Hub ids of other pools that the same scorer has scored.")
    validation: list[str] | None = flag(
        "data",
        f"The validation sets of the scorer ({NAMED_SETS}), to measure on a sample what a refit would change. By "
        "default those published beside the pool, if any.",
    )
    fractions: list[float] | None = flag(
        "selection", "Coresets to publish, in (0, 1]. By default those that are there."
    )
    hub_id: str | None = flag("output", "Published pool to add to (user/name).")
    bad_rows: str = flag(
        "data",
        "Rows to add that cannot be trained on: `refuse` them before any work, or `drop` them and tell how many.",
        "refuse",
        choices=BAD_ROWS,
    )
    config_name: str = flag("output", "Configuration of the repository.", "default")
    revision: str | None = flag("output", "Branch to load from and to publish to.")
    create_pr: bool = flag("output", "Open a pull request instead of committing.", False)

    def __post_init__(self) -> None:
        require(self, "hub_id")
        if not self.rows and not self.combine:
            raise ValueError("there is nothing to add: give --rows, --combine or both")
        for fraction in self.fractions or []:
            check_fraction(fraction)


@dataclass
class ReportArguments:
    """Write the page of a run."""

    run: str | None = flag("data", "Folder of `in2core run`, with results.json and scored/.")
    output: str | None = flag("output", "File to write. RUN/report.html by default.")

    def __post_init__(self) -> None:
        require(self, "run")


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
    typed = f"{launcher} recipes/{Path(sys.argv[0]).name} {shlex.join(sys.argv[1:])}"
    home = re.escape(str(Path.home()))
    return re.sub(rf"(?<![^ =]){home}(?=/)", "~", os.environ.get(TYPED_VARIABLE, typed))
