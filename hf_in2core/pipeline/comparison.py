"""The comparison of arms: which runs there are, what they found, and `results.json`."""

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hf_in2core.evaluation.judge import compute_auc, judge
from hf_in2core.evaluation.leakage import say_shared
from hf_in2core.evaluation.verdict import Verdict
from hf_in2core.influence.identity import read_versions
from hf_in2core.names import INFLUENCE, LOSS, METHODS, NUM_LOSS_TOKENS, RANK, RESULTS, name_coreset
from hf_in2core.report.page import write_report
from hf_in2core.report.plots import plot_arms, plot_influence, plot_length
from hf_in2core.report.run import RESULTS_VERSION
from hf_in2core.report.terminal import print_tables
from hf_in2core.rows.columns import apply_columns
from hf_in2core.rows.scored import read_scores
from hf_in2core.rows.text import render_row
from hf_in2core.selection.lengths import MIN_ROWS, compare_lengths
from hf_in2core.selection.record import Coreset, describe_choice, take_coresets
from hf_in2core.selection.turns import DecidingScore, find_ends, read_deciding_score

from .agreement import find_agreement
from .arguments import In2CoreArguments
from .run_folder import warn, write_json


NUM_EXAMPLES = 10
LONGEST_TEXT = 2000


@dataclass(frozen=True)
class Comparison:
    """What is compared: of the settings of `in2core run` those that [`plan_arms`] and [`choose_coresets`] read."""

    arms: list[str]
    fractions: list[float]
    seeds: list[int]
    budgets: list[str]
    groups: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Arm:
    """One training run of a comparison."""

    arm: str
    fraction: float
    seed: int
    budget: str

    @property
    def name(self) -> str:
        """Its rows, the budget that it has and its seed: `coreset_25-steps-seed0`."""
        return f"{name_coreset(self.fraction, self.arm)}-{self.budget}-seed{self.seed}"

    @property
    def rows(self) -> str:
        """What the rows that it trains on are called in the run's record."""
        return describe_choice(self.arm, self.fraction, self.seed)[0]

    @property
    def label(self) -> str:
        """In words, for a bar."""
        return f"{self.arm}, fraction {self.fraction:g}, seed {self.seed}, equal {self.budget}"

    def describe(self) -> dict[str, Any]:
        """What of it stands in its entry of `arms`, but for the budget."""
        return {"arm": self.arm, "fraction": self.fraction, "seed": self.seed}

    def find_folder(self, run: Path) -> Path:
        """Where its adapter is, or will be; version 0.1 called the folder otherwise."""
        before = run / "arms" / f"{self.budget}-{self.arm}-{self.fraction:g}-{self.seed}"
        return before if before.is_dir() else run / "arms" / self.name


def plan_arms(args: In2CoreArguments | Comparison) -> list[Arm]:
    """All runs of a comparison; those that answer the first question come first."""
    return [
        Arm(arm, 1.0 if arm == "full" else fraction, seed, budget)
        for budget in args.budgets
        for position, fraction in enumerate(args.fractions)
        for seed in args.seeds
        for arm in args.arms
        if arm != "full" or position == 0
    ]


def choose_coresets(
    args: In2CoreArguments | Comparison, run: Path, scored: Dataset, strategy: str
) -> dict[str, Coreset]:
    """
    The rows of every arm, and the coreset of every fraction: as they are recorded, or chosen now and recorded.

    `strategy` is that of the coreset: the run's own, or the one that won.
    """
    arms = [Arm("coreset", fraction, 0, "") for fraction in args.fractions] + plan_arms(args)
    wanted = dict(describe_choice(arm.arm, arm.fraction, arm.seed, strategy, args.groups) for arm in arms)
    # Every process chooses alike, so none waits for another.
    return take_coresets(run, scored, wanted, renew=True, write=PartialState().is_main_process)


def find_equal_run(arm: Arm, args: In2CoreArguments | Comparison, max_steps: int) -> Arm:
    """The run that is the same: the full arm takes its epochs under either budget, unless `max_steps` is set."""
    if arm.arm == "full" and "steps" in args.budgets and max_steps <= 0:
        return replace(arm, budget="steps")
    return arm


def judge_run(
    arms: list[dict[str, Any]], selection: dict[str, Any], base: dict[str, Any], fractions: list[float]
) -> Verdict:
    """The verdict on what `results.json` holds of a complete comparison."""
    return judge(arms, selection, fractions=fractions, base_loss=base.get("test_loss"))


def build_results(
    settings_values: dict[str, Any],
    arms: list[dict[str, Any]],
    num_planned: int,
    base: dict[str, Any],
    selection: dict[str, Any],
    findings: dict[str, Any],
    fractions: list[float],
    command: str,
) -> dict[str, Any]:
    """The content of `results.json`."""
    complete = len(arms) == num_planned
    verdict = {"text": f"The comparison is not finished: {len(arms)} of {num_planned} arms are trained."}
    if complete:
        verdict = asdict(judge_run(arms, selection, base, fractions))
    # Whoever quotes the verdict quotes it with what it is worth.
    verdict["text"] = f"{say_shared(findings.get('data'))} {verdict['text']}".lstrip()
    return {
        "format_version": RESULTS_VERSION,
        "arms": arms,
        "selection": selection,
        "verdict": verdict,
        "complete": complete,
        "base": base,
        **findings,
        "machine": describe_machine(),
        "command": command,
        "config": settings_values,
    }


def write_results(
    run: Path, results: dict[str, Any], scored: Dataset, deciding: DecidingScore, coreset: Coreset | None
) -> None:
    """Write `results.json`, and when the comparison is complete print its tables, draw it and write the page of it."""
    if not PartialState().is_main_process:
        return
    write_json(run / RESULTS, results)
    if not results["complete"]:
        return
    print_tables(results)
    if find_spec("matplotlib") is None:
        print("No pictures: matplotlib is not installed (`pip install hf-in2core[report]`).")
    else:
        draw_results(run, results, scored, deciding, coreset)
    print(f"Report: {write_report(run)}")


def draw_results(
    run: Path, results: dict[str, Any], scored: Dataset, deciding: DecidingScore, coreset: Coreset | None
) -> None:
    """
    Draw the arms of a complete comparison, and the score of the pool that chose, also against the length of its rows.

    `coreset` is that of the headline; `None` where all rows are kept.
    """
    plot_arms(results, run / "arms.png")
    kept = np.zeros(len(scored), dtype=bool)
    if coreset is not None:
        kept[coreset.positions] = True
    name, drawn = deciding.histogram
    plot_influence(drawn, run / "influence.png", kept=kept if kept.any() else None, name=name)
    carries_loss = np.isfinite(deciding.values)
    lengths = read_scores(scored, NUM_LOSS_TOKENS)
    values, lengths, kept = (found[carries_loss] for found in (deciding.values, lengths, kept))
    plot_length(values, lengths, kept, run / "influence_by_length.png", deciding.name)


def describe_machine() -> dict[str, Any]:
    """What the seconds were measured on."""
    return {
        "cpu": read_cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "processes": PartialState().num_processes,
        "python": platform.python_version(),
        **read_versions(),
    }


def read_cpu_name() -> str:
    """Name of the processor, as Linux tells it; else the architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def describe_selection(
    scored: Dataset,
    pool: Dataset,
    columns: list[str] | None,
    tokenizer: PreTrainedTokenizerBase,
    extra: list[str],
    fractions: Sequence[float],
    coresets: Mapping[str, Coreset],
    validation_sets: Mapping[str, int],
    selection: Mapping[str, Any],
) -> tuple[DecidingScore, Coreset | None, dict[str, Any]]:
    """
    What the selection shows before anything is trained on it; warns where it is unstable or lengths explain it.

    Args:
        scored, pool, columns, tokenizer, extra, validation_sets:
            As of [`find_examples`].
        fractions (`Sequence[float]`): Those of the run, the headline first.
        coresets (`Mapping[str, Coreset]`): Of the record.
        selection (`Mapping[str, Any]`): That of `results.json`.

    Returns:
        `tuple`: the score that chose, the coreset that the run is about (the first that leaves rows out; `None`
        without one), and `agreement`, `choice`, `examples` and `lengths` of `results.json`.
    """
    kept = [coresets[name_coreset(fraction)] for fraction in sorted(fractions) if fraction < 1]
    headline = next((coresets[name_coreset(fraction)] for fraction in fractions if fraction < 1), None)
    deciding = read_deciding_score(scored, **(headline.arguments if headline else {}))
    findings: dict[str, Any] = {
        "agreement": find_agreement(scored, selection, headline.arguments if headline else {}),
        "choice": {"how": deciding.how, "score": deciding.name, "meaning": deciding.meaning},
        "examples": find_examples(scored, pool, columns, tokenizer, extra, deciding, kept, validation_sets),
    }
    if (said := findings["agreement"]["warning"]) is not None:
        warn(said)
    if headline is not None and headline.rows_with_loss >= MIN_ROWS:  # fewer say nothing of lengths
        findings["lengths"] = asdict(compare_lengths(scored, scored.select(headline.positions)))
        if findings["lengths"]["warning"] is not None:
            warn(findings["lengths"]["warning"])
    return deciding, headline, findings


def find_examples(
    scored: Dataset,
    pool: Dataset,
    columns: list[str] | None,
    tokenizer: PreTrainedTokenizerBase,
    extra: list[str],
    deciding: DecidingScore,
    kept: list[Coreset],
    validation_sets: Mapping[str, int],
) -> dict[str, list[dict[str, Any]]]:
    """
    The first and last rows by the score that chose, with their text.

    Args:
        scored ([`~datasets.Dataset`]): The scored pool.
        pool ([`~datasets.Dataset`]): The pool as it was loaded, whose rows are the same.
        columns (`list[str]`, *optional*): Column mapping.
        tokenizer (`transformers.PreTrainedTokenizerBase`): For mapping and for rows that are tokens.
        extra (`list[str]`): Columns to show beside the text.
        deciding ([`~hf_in2core.selection.turns.DecidingScore`]): By what the coresets were chosen.
        kept (`list[Coreset]`): The coresets, the smallest first.
        validation_sets (`Mapping[str, int]`): Rows of each validation set, by its name.

    Returns:
        `dict`: `proponents` and `opponents`, as of [`~hf_in2core.selection.turns.find_ends`]; no coreset keeps an
        opponent. Each row tells where it stands (`standing`) and what chose it (`taken`, where something did).
    """
    influence = read_scores(scored, INFLUENCE)
    positions_kept = {row for coreset in kept for row in coreset.positions}
    taken = {row: words for coreset in kept[::-1] for row, words in coreset.describe_rows(validation_sets).items()}
    turns = {row: turn for coreset in kept[::-1] for row, turn in coreset.turn_of().items()}
    ends = find_ends(deciding, influence, positions_kept, NUM_EXAMPLES)
    found = dict(zip(("proponents", "opponents"), ends, strict=True))
    shown = [INFLUENCE, RANK, NUM_LOSS_TOKENS, *extra]
    examples: dict[str, list[dict[str, Any]]] = {}
    for name, positions in found.items():
        if len(positions) == 0:  # a dataset without rows has no columns left to map
            examples[name] = []
            continue
        rows = scored.select(positions)
        texts = apply_columns(pool.select(positions), columns, tokenizer)
        examples[name] = [
            {
                "row": int(position),
                **{key: row[key] for key in shown},
                "standing": deciding.describe(int(position), validation_sets, turns.get(int(position))),
                **({"taken": taken[int(position)]} if int(position) in taken else {}),
                "text": render_row(text, LONGEST_TEXT, tokenizer),
            }
            for position, row, text in zip(positions, rows, texts, strict=True)
        ]
    return examples


def compute_aucs(
    scored: Dataset,
    deciding: DecidingScore,
    row_losses: np.ndarray,
    validation: dict[str, Dataset],
    task_column: str | None,
    wrong_column: str | None,
) -> dict[str, Any]:
    """
    How the score that chose ranks the tasks of interest and the wrong answers, beside influence, loss and methods.

    Args:
        scored ([`~datasets.Dataset`]): The scored pool.
        deciding ([`~hf_in2core.selection.turns.DecidingScore`]): By what the coresets were chosen.
        row_losses (`np.ndarray` of shape `[rows]`):
            Mean loss of each pool row under the reference model; NaN where it carries none.
        validation (`dict[str, Dataset]`): Validation sets; the tasks in them are those of interest.
        task_column (`str`, *optional*): Column that names a row's task.
        wrong_column (`str`, *optional*): Column that is true for wrong answers.

    Returns:
        `dict`: `auc`, by kind of row and score (0.5 = chance; small scores are taken for a sign of tasks of
        interest, and large ones of wrong answers), and `auc_rows`, how many there are.
    """
    # A method's best rows are at its smallest values, as those of influence; the loss stands for itself.
    told = (INFLUENCE, LOSS, deciding.name)
    columns = {name: method.column for name, method in METHODS.items() if method.column not in told}
    by_name = {deciding.name: deciding.values, INFLUENCE: read_scores(scored, INFLUENCE), LOSS: row_losses}
    by_name |= {name: read_scores(scored, column) for name, column in columns.items() if column in scored.column_names}
    everything = np.ones(len(scored), dtype=bool)
    interest = everything
    if task_column is not None:
        tasks = {str(task) for rows in validation.values() for task in rows[task_column]}
        interest = np.array([str(task) in tasks for task in scored[task_column]])
    auc: dict[str, dict[str, float | None]] = {}
    counts: dict[str, int] = {}

    def add(kind: str, labels: np.ndarray, sign: int, among: np.ndarray) -> None:
        counts[kind] = int(labels[among].sum())
        auc[kind] = {name: compute_auc(sign * scores[among], labels[among]) for name, scores in by_name.items()}

    if task_column is not None:
        add("tasks of interest", interest, -1, everything)
    if wrong_column is not None:
        wrong = np.array([bool(value) for value in scored[wrong_column]])
        add("wrong answers", wrong, 1, everything)
        if task_column is not None:
            add("wrong answers in tasks of interest", wrong, 1, interest)
    return {"auc": auc, "auc_rows": counts}
