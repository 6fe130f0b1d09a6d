"""What results.json says of a comparison, for the terminal, the pictures, the page and cards alike.

The file may be anybody's: what in it has another form than a run writes is left out or shown as a dash. Every text is
as it stands there; whoever shows it escapes it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_in2core.names import ALL_ARMS, BUDGETS, METHODS

from .formats import (
    DASH,
    format_difference,
    format_interval,
    format_mean,
    format_number,
    format_seconds,
    get_object,
    get_value,
    is_number,
    list_objects,
)
from .intervals import LEVEL
from .leakage import describe_shared


FIGURES = ("rows", "loss tokens", "steps", "seconds", "test loss", "perplexity")
ARM_WORDS = {"random": "random rows", "full": "the whole pool"}
OUTCOMES = {"better": "lower loss", "worse": "higher loss", "no worse": "no worse", "inconclusive": "inconclusive"}


@dataclass(frozen=True)
class ArmSummary:
    """
    An arm at one fraction and budget, over its seeds.

    Attributes:
        arm (`str`): Its name.
        fraction (`float`, *optional*): Share of the pool's rows that it keeps.
        budget (`str`): `"steps"`, `"epochs"` or what else the file says.
        seeds (`int`): How many there are.
        values (`dict[str, list]`): Per seed `rows`, `loss_tokens`, `steps`, `seconds`, `test_loss`, `test_perplexity`,
            each a finite number or `None` (it diverged), and `tasks`; an empty list for what was not recorded.
    """

    arm: str
    fraction: float | None
    budget: str
    seeds: int
    values: dict[str, list[Any]]

    @property
    def name(self) -> str:
        """The arm and its fraction."""
        return name_arm(self.arm, self.fraction)

    @property
    def budget_name(self) -> str:
        """What is equal between the arms."""
        return BUDGETS.get(self.budget, self.budget) or DASH

    @property
    def share(self) -> str:
        """What its rows are a share of, as the plot's axis says it."""
        return "full pool" if self.arm == "full" else format_number(self.fraction, "g")

    @property
    def figures(self) -> list[str]:
        """The cells of a table with the columns `FIGURES`: means over the seeds, ± half of the 95 % interval."""
        counts = [format_mean(self.values[name], ",.0f") for name in ("rows", "loss_tokens", "steps")]
        seconds = format_mean(self.values["seconds"], ",.1f")
        loss, perplexity = self.values["test_loss"], self.values["test_perplexity"]
        return [*counts, seconds, format_interval(loss, 3), format_interval(perplexity, 2)]


@dataclass(frozen=True)
class Difference:
    """How much lower the test loss of one arm is than that of another, as the cells of a table."""

    name: str
    where: str
    mean: str
    interval: str
    seeds: str
    outcome: str


@dataclass(frozen=True)
class Table:
    """Cells as text, the first of each line its name, and sentences to stand below."""

    columns: list[str]
    lines: list[list[str]]
    notes: Sequence[str] = ()


def name_arm(arm: str, fraction: float | None) -> str:
    """An arm and its fraction."""
    return arm if arm == "full" or fraction is None else f"{arm} {fraction:g}"


def summarize_arms(entries: Any) -> list[ArmSummary]:
    """
    Sum up the runs of each arm, fraction and budget, in a fixed order.

    Args:
        entries (`list[dict]`):
            The `arms` of `results.json`; an entry that is no object is left out.

    Returns:
        `list[ArmSummary]`: empty where there are none.
    """
    groups: dict[tuple[str, float | None, str], list[Mapping[str, Any]]] = {}
    for entry in list_objects(entries):
        fraction = float(entry["fraction"]) if is_number(entry.get("fraction")) else None
        key = str(entry.get("arm")), fraction, str(entry.get("budget", ""))
        groups.setdefault(key, []).append(entry)
    fractions = list(dict.fromkeys(fraction for arm, fraction, _ in groups if arm != "full"))

    def sort_key(key: tuple[str, float | None, str]) -> tuple[int, ...]:
        arm, fraction, budget = key
        return (
            list(BUDGETS).index(budget) if budget in BUDGETS else len(BUDGETS),
            -1 if arm == "full" else fractions.index(fraction),
            ALL_ARMS.index(arm) if arm in ALL_ARMS else len(ALL_ARMS),
        )

    columns = ("rows", "loss_tokens", "steps", "seconds", "test_loss", "test_perplexity")
    summaries = []
    for key in sorted(groups, key=sort_key):
        runs = groups[key]
        values: dict[str, list[Any]] = {
            name: [run[name] if is_number(run[name]) else None for run in runs if name in run] for name in columns
        }
        summaries.append(ArmSummary(*key, len(runs), values | {"tasks": [run.get("tasks") for run in runs]}))
    return summaries


def require_arms(results: Mapping[str, Any]) -> list[ArmSummary]:
    """
    [`summarize_arms`] of `results.json`, for what can show nothing without them.

    Raises:
        ValueError: the results hold no arms.
    """
    if not (summaries := summarize_arms(results.get("arms"))):
        raise ValueError(
            f"The results hold no arms (their keys: {sorted(results)}), so there is nothing to show. Is this the "
            "results.json of a finished `in2core run`?"
        )
    return summaries


def split_by_budget(summaries: Iterable[ArmSummary]) -> dict[str, list[ArmSummary]]:
    """The arms of each budget, by what is equal between them."""
    budgets: dict[str, list[ArmSummary]] = {}
    for summary in summaries:
        budgets.setdefault(summary.budget_name, []).append(summary)
    return budgets


def count_seeds(summaries: Iterable[ArmSummary]) -> str:
    """How many seeds the arms have, in words."""
    counts = [summary.seeds for summary in summaries]
    low, high = min(counts, default=0), max(counts, default=0)
    if low == high:
        return "1 seed (none can be given)" if low == 1 else f"{low} seeds"
    return f"{low} to {high} seeds"


def explain_means(summaries: Iterable[ArmSummary]) -> str:
    """What the figures of arms are, for below their table."""
    return f"Means; ± is half the {LEVEL * 100:g} % Student-t interval over {count_seeds(summaries)}."


def list_differences(entries: Any) -> list[Difference]:
    """
    The differences between arms with their intervals.

    Args:
        entries (`list[dict]`):
            `by_fraction` of a verdict, or the verdict itself in a list for those of the headline alone; what in it
            has no `intervals` with a `mean` is left out.
    """
    found = []
    for entry in list_objects(entries):
        for name, interval in get_object(entry, "intervals").items():
            if not is_number(get_value(interval, "mean")):
                continue
            budget = str(entry.get("budget") or DASH)
            found.append(
                Difference(
                    str(name).replace("_", " ").replace(" minus ", " \N{MINUS SIGN} "),
                    f"{format_number(entry.get('fraction'), 'g')}, {BUDGETS.get(budget, budget)}",
                    *format_difference(interval["mean"], interval.get("low"), interval.get("high")),
                    format_number(interval.get("n"), ".0f"),
                    OUTCOMES.get(str(interval.get("outcome")), "no interval"),
                )
            )
    return found


def list_costs(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a run cost, in words: from `selection`, `arms` and the verdict's `cost` of `results.json`."""
    selection, cost = get_object(results, "selection"), get_object(results, "verdict", "cost")
    # The full arm may stand there under both budgets, but ran once.
    runs = {
        (str(arm.get("arm")), str(arm.get("fraction")), str(arm.get("seed")), arm["seconds"])
        for arm in list_objects(results.get("arms"))
        if is_number(arm.get("seconds"))
    }
    resumed = " (of the last part alone: the run was resumed)" if selection.get("resumed") is True else ""
    took = " on the full pool, ".join(format_seconds(cost.get(f"{arm}_seconds")) for arm in ("full", "coreset"))
    known = {
        "Training the reference": (selection.get("reference_seconds"), ""),
        "Holding the tournament": (selection.get("tournament_seconds"), ""),
        "Computing influence": (selection.get("seconds"), resumed),
        "Training and testing the arms": (sum(run[-1] for run in runs) or None, f" for {len(runs)} runs"),
        "Saved by each target run at equal epochs": (cost.get("saving_per_run"), f" ({took} on the coreset)"),
    }
    known |= {f"Ranking by {column}": (value, "") for column, value in get_object(selection, "columns").items()}
    lines = [(label, format_seconds(value) + note) for label, (value, note) in known.items() if is_number(value)]
    pays_after = cost.get("break_even_runs")
    if is_number(pays_after) or isinstance(pays_after, str):
        said = f"{pays_after:,}" if is_number(pays_after) else str(pays_after)
        lines.append(("Target runs until selecting has paid", said))
    return lines


def describe_data(data: Any) -> list[tuple[str, str]]:
    """Each set in words, from `data` of `results.json`: rows, loss tokens, what was dropped, what it shares."""
    lines = []
    for name, facts in data.items() if isinstance(data, Mapping) else ():
        parts = [f"{format_number(get_value(facts, 'rows'), ',.0f')} rows"]
        if is_number(tokens := get_value(facts, "loss_tokens")):
            parts.append(f"{tokens:,.0f} loss tokens")
        if is_number(held_back := get_value(facts, "held_back")):
            parts.append(f"{held_back:,.0f} more held back to judge the methods")
        if is_number(judging := get_value(facts, "judging")):
            parts.append(f"{judging:,.0f} of the rows judged the methods, which chose by the others")
        if is_number(missing := get_value(facts, "without_label")):
            parts.append(f"{missing:,.0f} without a label")
        if is_number(dropped := get_value(facts, "dropped")):
            first = get_value(facts, "first_dropped")
            parts.append(f"{dropped:,.0f} malformed ones dropped{f', the first {first}' if first else ''}")
        lines.append((str(name), ", ".join(parts + describe_shared(facts))))
    return lines


def tabulate_auc(results: Mapping[str, Any]) -> Table:
    """How well scores find the rows that are looked for, a line for each kind of row."""
    by_kind = {str(kind): get_object(scores) for kind, scores in get_object(results, "auc").items()}
    names = list(dict.fromkeys(name for scores in by_kind.values() for name in scores))
    lines = [
        [
            kind,
            format_number(get_value(results, "auc_rows", kind), ",.0f"),
            *(format_number(scores.get(name), ".3f") for name in names),
        ]
        for kind, scores in by_kind.items()
    ]
    return Table(["AUC (0.5 = chance)", "rows", *names], lines)


def tabulate_tournament(results: Mapping[str, Any]) -> Table | None:
    """How the methods did in the tournament, the lowest loss first; `None` where there was none."""
    found = get_object(results, "tournament")
    by_name = {str(name): get_object(losses) for name, losses in get_object(found, "losses").items()}
    known = {name: [loss for loss in losses.values() if is_number(loss)] for name, losses in by_name.items()}
    if not known:
        return None
    order = sorted(known, key=lambda name: sum(known[name]) / len(known[name]) if known[name] else float("inf"))
    words = ARM_WORDS | {name: method.words for name, method in METHODS.items()}
    lines = [
        [name, format_number(len(known[name]), ".0f"), format_interval(known[name], 3), words.get(name, DASH)]
        for name in order
    ]
    return Table(["method", "seeds", "held-back loss", "which is"], lines, [str(found.get("text", ""))])


def tabulate_tasks(results: Mapping[str, Any]) -> Table | None:
    """
    How the arms do on tasks of lm-eval; `None` where no task was evaluated.

    Args:
        results (`Mapping[str, Any]`):
            `results.json`; `base` and the entries of `arms` may have `tasks`, as
            [`~hf_in2core.evaluation.tasks.evaluate_tasks`] returns them.

    Returns:
        [`Table`]: a line for the model before training and for each arm, and a sentence for each task. Scores are
        means over the seeds that were evaluated, ± half of their 95 % interval.
    """
    summaries = summarize_arms(results.get("arms"))
    models: list[tuple[str, Sequence[Any]]] = [("before training", [get_value(results, "base", "tasks")])]
    several = len(split_by_budget(summaries)) > 1
    models += [(f"{arm.name}, {arm.budget_name}" if several else arm.name, arm.values["tasks"]) for arm in summaries]
    # A result of each task and metric, which describes it.
    first: dict[tuple[str, str], Mapping[str, Any]] = {}
    for tasks in (tasks for _, evaluated in models for tasks in evaluated):
        for task, found in get_object(tasks).items():
            for metric in get_object(found, "metrics"):
                first.setdefault((task, metric), found)
    if not first:
        return None
    lines = []
    for model, evaluated in models:
        scores = [[get_value(tasks, task, "metrics", name) for tasks in evaluated] for task, name in first]
        known = [[value for value in values if is_number(value)] for values in scores]
        if any(known):
            lines.append([model, *(format_interval(values, 3) for values in known)])
    by_task = {task: found for (task, _), found in reversed(first.items())}
    notes = [_describe_task(task, found) for task, found in reversed(by_task.items())]
    return Table(["model", *(f"{task} {metric}" for task, metric in first)], lines, notes)


def _describe_task(task: str, found: Mapping[str, Any]) -> str:
    questions, limit, examples, cut = (
        found[name] if is_number(found.get(name)) else None
        for name in ("questions", "limit", "num_fewshot", "cut_prompts")
    )
    parts = []
    if questions is not None:
        parts.append(f"{questions:,.0f} questions{'' if limit is None else f' (a part: limit {limit:g} per task)'}")
    if examples is not None:
        parts.append(f"{examples:g} example{'' if examples == 1 else 's'} before each")
    if errors := [value for value in get_object(found, "stderr").values() if is_number(value)]:
        parts.append(f"standard error of one model over questions {errors[0]:.3f}")
    if cut:
        parts.append(f"{cut:,.0f} prompt{'' if cut == 1 else 's'} cut to the model's context")
    return f"{task}: {', '.join(parts)}." if parts else f"{task}."
