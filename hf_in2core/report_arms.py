"""The arms of a run as rows of a table, for the terminal, the pictures and the page."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .intervals import compute_confidence_interval


ARMS = ("full", "coreset", "random", "opponents")
BUDGETS = {"steps": "equal steps", "epochs": "equal epochs"}
LEVEL = 0.95
ARM_COLUMNS = ("arm", "rows", "loss tokens", "steps", "seconds", "test loss", "perplexity")


def summarize_arms(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per arm, fraction and budget, in a fixed order, with the values of the seeds as lists."""
    entries = results.get("arms")
    if not entries:
        raise ValueError(
            f"The results hold no arms (their keys: {sorted(results)}), so there is nothing to show. Is this the "
            "results.json of a finished run of recipes/in2core.py?"
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

    columns = ("rows", "loss_tokens", "steps", "seconds", "test_loss", "test_perplexity")
    return [
        dict(zip(("arm", "fraction", "budget"), key, strict=True))
        | {column: [entry.get(column) for entry in groups[key]] for column in columns}
        for key in sorted(groups, key=sort_key)
    ]


def format_arm(row: dict[str, Any]) -> list[str]:
    """A row as the cells of a table with the columns `ARM_COLUMNS`."""
    name = row["arm"] if row["arm"] == "full" or row["fraction"] is None else f"{row['arm']} {row['fraction']:g}"
    counts = [format_mean(row[column], "{:,.0f}") for column in ("rows", "loss_tokens", "steps")]
    seconds = format_mean(row["seconds"], "{:,.1f}")
    return [name, *counts, seconds, format_interval(row["test_loss"], 3), format_interval(row["test_perplexity"], 2)]


def format_mean(values: list[float | None], pattern: str) -> str:
    """The mean of the values that are finite; a dash where there is none."""
    known = find_finite(values)
    return pattern.format(sum(known) / len(known)) if known else "-"


def format_interval(values: list[float | None], decimals: int) -> str:
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
