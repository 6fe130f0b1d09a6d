"""The arms of a run as rows of a table, for the terminal, the pictures and the page."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hf_in2core.names import ARMS, BUDGETS

from .intervals import compute_confidence_interval


LEVEL = 0.95
ARM_COLUMNS = ("arm", "rows", "loss tokens", "steps", "seconds", "test loss", "perplexity")


def summarize_arms(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per arm, fraction and budget, in a fixed order, with the values of the seeds as lists."""
    entries = results.get("arms")
    if not entries:
        raise ValueError(
            f"The results hold no arms (their keys: {sorted(results)}), so there is nothing to show. Is this the "
            "results.json of a finished `in2core run`?"
        )
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for entry in entries:
        groups.setdefault((entry["arm"], entry["fraction"], entry["budget"]), []).append(entry)
    fractions = list(dict.fromkeys(fraction for arm, fraction, _ in groups if arm != "full"))

    def sort_key(key: tuple[Any, ...]) -> tuple[int, ...]:
        arm, fraction, budget = key
        return (
            list(BUDGETS).index(budget) if budget in BUDGETS else len(BUDGETS),
            -1 if arm == "full" else fractions.index(fraction),
            ARMS.index(arm) if arm in ARMS else len(ARMS),
        )

    columns = ("rows", "loss_tokens", "steps", "seconds", "test_loss", "test_perplexity", "tasks")
    return [
        dict(zip(("arm", "fraction", "budget"), key, strict=True))
        | {column: [entry.get(column) for entry in groups[key]] for column in columns}
        for key in sorted(groups, key=sort_key)
    ]


def format_arm(row: dict[str, Any]) -> list[str]:
    """A row as the cells of a table with the columns `ARM_COLUMNS`."""
    counts = [format_mean(row[column], "{:,.0f}") for column in ("rows", "loss_tokens", "steps")]
    seconds = format_mean(row["seconds"], "{:,.1f}")
    return [
        name_arm(row),
        *counts,
        seconds,
        format_interval(row["test_loss"], 3),
        format_interval(row["test_perplexity"], 2),
    ]


def name_arm(row: dict[str, Any]) -> str:
    """An arm and its fraction."""
    return row["arm"] if row["arm"] == "full" or row["fraction"] is None else f"{row['arm']} {row['fraction']:g}"


def summarize_tasks(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """
    How the arms do on tasks of lm-eval, as a table; `None` where no task was evaluated.

    Args:
        results (`Mapping[str, Any]`):
            `results.json`; `base` and the entries of `arms` may have `tasks`, as
            [`~hf_in2core.evaluation.tasks.evaluate_tasks`] returns them.

    Returns:
        `dict`: `columns` and `lines` of text, a line for the model before training and for each arm, and `notes`, a
        sentence for each task. Scores are means over the seeds that were evaluated, ± half of their interval.
    """
    rows = summarize_arms(results)
    base = results.get("base")
    base_tasks = base.get("tasks") if isinstance(base, Mapping) else None
    models = [("before training", [base_tasks])] if isinstance(base_tasks, Mapping) else []
    several = len({row["budget"] for row in rows}) > 1
    for row in rows:
        budget = f", {BUDGETS.get(row['budget'], row['budget'])}" if several else ""
        models.append((f"{name_arm(row)}{budget}", row["tasks"]))
    first: dict[tuple[str, str], Mapping[str, Any]] = {}  # a result of each task and metric, which describes it
    for _, evaluated in models:
        for tasks in evaluated:
            for task, found in (tasks if isinstance(tasks, Mapping) else {}).items():
                for metric in found["metrics"] if _is_task_result(found) else ():
                    first.setdefault((str(task), str(metric)), found)
    if not first:
        return None
    lines = []
    for name, evaluated in models:
        scores = [[_read_score(tasks, *key) for tasks in evaluated] for key in first]
        known = [[value for value in values if value is not None] for values in scores]
        if any(known):
            lines.append([name, *(format_interval(values, 3) if values else "-" for values in known)])
    by_task = {task: found for (task, _), found in reversed(first.items())}
    return {
        "columns": ["model", *(f"{task} {metric}" for task, metric in first)],
        "lines": lines,
        "notes": [_describe_task(task, found) for task, found in reversed(by_task.items())],
    }


def _is_task_result(found: Any) -> bool:
    return isinstance(found, Mapping) and isinstance(found.get("metrics"), Mapping)


def _read_score(tasks: Any, task: str, metric: str) -> float | None:
    found = tasks.get(task) if isinstance(tasks, Mapping) else None
    value = found["metrics"].get(metric) if _is_task_result(found) else None  # type: ignore[index]
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
    return float(value) if is_number else None  # type: ignore[arg-type]


def _describe_task(task: str, found: Mapping[str, Any]) -> str:
    def read_number(name: str) -> int | float | None:
        value = found.get(name)
        return value if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9 else None

    parts = []
    if (questions := read_number("questions")) is not None:
        limit = read_number("limit")
        parts.append(f"{questions:,.0f} questions" + ("" if limit is None else f" (a part: limit {limit:g} per task)"))
    if (examples := read_number("num_fewshot")) is not None:
        parts.append(f"{examples:g} example{'' if examples == 1 else 's'} before each")
    stderr = found.get("stderr")
    errors = find_finite(
        [value if isinstance(value, float) else None for value in stderr.values()]
        if isinstance(stderr, Mapping)
        else []
    )
    if errors:
        parts.append(f"standard error of one model over questions {errors[0]:.3f}")
    if cut := read_number("cut_prompts"):
        parts.append(f"{cut:,.0f} prompt{'' if cut == 1 else 's'} cut to the model's context")
    return f"{task}: {', '.join(parts)}." if parts else f"{task}."


def format_mean(values: list[float | None], pattern: str) -> str:
    """The mean of the values that are finite; a dash where there is none."""
    known = find_finite(values)
    return pattern.format(sum(known) / len(known)) if known else "-"


def format_interval(values: Sequence[float | None], decimals: int) -> str:
    """The mean over seeds, ± half of its interval where it has one."""
    known = find_finite(values)
    if len(known) < len(values):
        return f"not finite in {len(values) - len(known)} of {len(values)}"
    interval = compute_confidence_interval(known, LEVEL)
    if interval["half_width"] is None:
        return f"{interval['mean']:.{decimals}f}"
    return f"{interval['mean']:.{decimals}f} ± {interval['half_width']:.{decimals}f}"


def find_finite(values: Sequence[float | None]) -> list[float]:
    """The values that are finite numbers."""
    return [float(value) for value in values if value is not None and math.isfinite(value)]


def count_seeds(rows: list[dict[str, Any]]) -> str:
    """How many seeds the arms have, in words."""
    counts = sorted({len(row["test_loss"]) for row in rows})
    if counts == [1]:
        return "1 seed (none can be given)"
    return f"{' to '.join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))} seeds"


def name_group(row: dict[str, Any]) -> str:
    """What an arm's rows are a share of, as the plot's axis says it."""
    return "full pool" if row["arm"] == "full" else f"{row['fraction']:g}"
