"""Settings of the commands of single stages, as dataclasses; those of `in2core run` are in [`arguments`]."""

from dataclasses import dataclass

from hf_in2core.names import ALL_ARMS, ARMS, CLUSTERS, GROUP_QUOTAS, METHODS, STRATEGIES

from .arguments import BAD_ROWS, DRY_RUN, ENCODER, NAMED_SETS, ROWS, WAYS, DataArguments, check_fraction, flag, require


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
    methods: list[str] = flag(
        "influence",
        f"What else to rank the rows by, each a column: {WAYS}. `turns` makes each validation row a query, for "
        "`in2core select --strategy round_robin_rows`. `answer_cluster` and `row_cluster` are columns for "
        "`in2core select --group_column`.",
        [],
        choices=(*METHODS, *CLUSTERS),
    )
    encoder: str | None = flag("influence", ENCODER, first=False)
    checkpoints: list[str] = flag(
        "influence",
        "Checkpoint folders of the reference's training: influence is averaged over them, weighted by the learning "
        "rate, in place of read at the adapter. The method `less` reads Adam's moments there.",
        [],
        first=False,
    )
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
        elif self.methods or self.checkpoints:
            name, values = ("methods", self.methods) if self.methods else ("checkpoints", self.checkpoints)
            raise ValueError(
                f"--{name} {' '.join(values)} ranks by the reference model and the validation rows, but "
                "--scorer brings neither. Give --reference_adapter and --validation in its place."
            )


@dataclass
class SelectCoresetArguments:
    """Keep the rows of a scored pool that are worth training on."""

    scored: str | None = flag("data", "Scored pool: folder (such as RUN/scored), Hub id[:split] or file.")
    fraction: float | None = flag("selection", "Fraction of the rows that carry loss, in (0, 1].")
    size: int | None = flag("selection", "Number of rows, instead of a fraction.")
    strategy: str | None = flag(
        "selection",
        "How rows are chosen, or a method whose column the pool has. By default as the run chose whose pool it is, "
        "else `top`.",
        choices=(*STRATEGIES, *METHODS),
    )
    column: str | None = flag(
        "selection",
        "Column to choose by, the smallest values first (the largest with `bottom`), such as `rds_rank` or `loss` "
        "(default: influence).",
    )
    proponents_only: bool = flag("selection", "Drop rows with influence >= 0 first.", False)
    group_column: str | None = flag("selection", "Select within each value of this column.")
    group_quota: str | None = flag(
        "selection", "Rows that each group gets (default: proportional).", choices=GROUP_QUOTAS
    )
    seed: int | None = flag("selection", "Seed of `random` (default: 0).")
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
        "Folder with task files of lm-eval, which are then the only ones (recipes/mmlu of a clone makes one, for "
        "machines without the Hub).",
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
    fraction: float | None = flag(
        "selection",
        "Keep this fraction of a scored dataset: of RUN/scored as the run chose, else the strongest proponents.",
    )
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
    arms: list[str] = flag("targets", "With --run: only these arms.", list(ARMS), choices=ALL_ARMS)
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
