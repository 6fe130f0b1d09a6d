"""Values of a JSON that may be anybody's, and numbers as text, alike on the terminal, on the page and on cards."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .intervals import LEVEL, Interval, compute_confidence_interval


DASH = "\N{EN DASH}"


def read_object(source: Path | bytes | None) -> dict[str, Any]:
    """What JSON that may be anybody's holds, or a file of it; empty where it is not whole, or no object."""
    try:
        value = json.loads(source.read_bytes() if isinstance(source, Path) else source or b"{}")
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def get_value(value: Any, *names: str) -> Any:
    """A value in nested objects by its path; `None` where there is none."""
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def get_object(value: Any, *names: str) -> Mapping[str, Any]:
    """An object in nested objects by its path; an empty one where there is none."""
    found = get_value(value, *names)
    return found if isinstance(found, Mapping) else {}


def list_objects(value: Any) -> list[Mapping[str, Any]]:
    """The objects of a list; none where it is no list."""
    return [entry for entry in value if isinstance(entry, Mapping)] if isinstance(value, list) else []


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a finite number."""
    # Compared, not converted: JSON has integers that no float holds.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def format_number(value: Any, form: str) -> str:
    """A number by a format; a dash for what is none."""
    return format(value, form) if is_number(value) else DASH


def format_seconds(value: Any) -> str:
    """Seconds in three digits, or whole ones; a dash for what is no number."""
    return f"{format_number(value, ',.0f' if is_number(value) and value >= 100 else '.3g')} s"


def format_mean(values: Sequence[Any], form: str) -> str:
    """The mean of the values that are numbers; a dash where there is none."""
    known = [value for value in values if is_number(value)]
    return format(sum(known) / len(known), form) if known else DASH


def format_interval(values: Sequence[Any], decimals: int) -> str:
    """The mean over seeds, ± half of its 95 % interval where it has one; a dash where there are no values."""
    known = [float(value) for value in values if is_number(value)]
    if len(known) < len(values):
        return f"not finite in {len(values) - len(known)} of {len(values)}"
    if not known:
        return DASH
    interval = compute_confidence_interval(known, LEVEL)
    half = "" if interval.half_width is None else f" ± {interval.half_width:.{decimals}f}"
    return f"{interval.mean:.{decimals}f}{half}"


def say_difference(interval: Interval) -> str:
    """A difference of losses with its interval, where it has one."""
    mean, ends = format_difference(interval.mean, interval.low, interval.high)
    return mean if interval.low is None else f"{mean}, {interval.level * 100:g} % interval {ends}"


def format_difference(mean: Any, low: Any, high: Any) -> tuple[str, str]:
    """
    A difference of losses and the ends of its interval, as of one of `intervals` of a verdict; dashes for no numbers.

    Digits are two of the half-width, three decimals at least, so that an end close to 0 does not read as 0.
    """
    if not (is_number(low) and is_number(high)):
        return format_number(mean, "+.3f"), DASH
    half_width = abs(high - low) / 2
    decimals = 3 if half_width < 1e-6 else max(3, 1 - math.floor(math.log10(half_width)))
    return format_number(mean, f"+.{decimals}f"), f"{low:+.{decimals}f} to {high:+.{decimals}f}"


def describe_calibration(calibration: Any) -> str:
    """How influence stands to the change of the validation loss by one more step; empty where that is not known."""
    names = ("nats_per_influence", "error", "spearman", "rows")
    scale, error, spearman, rows = (get_value(calibration, name) for name in names)
    if isinstance(refused := get_value(calibration, "refused"), str):
        return f"not taken: {refused}"
    if not all(map(is_number, (scale, error, spearman, rows))):
        return ""
    seen = f"(Spearman {spearman:.2f} on {rows:,} rows)"
    if get_value(calibration, "agrees") is not True:
        return f"what it changes the validation loss by does not follow influence {seen}, so nothing is told in nats"
    return f"{scale:.2g} nats of the validation loss for an influence of 1, within {error:.1g} on average {seen}"


def show_step(calibration: Any, influence: Any) -> str:
    """The change of the validation loss by one more step on a row of this influence; empty where that is not told."""
    step = _find_step(calibration, influence)
    if step is None:
        return ""
    unsure = ", so its sign is not known" if is_step_unsure(calibration, influence) else ""
    return f"{step[0]:+.1g} nats by one more step on it, within {step[1]:.1g}{unsure}"


def is_step_unsure(calibration: Any, influence: Any) -> bool:
    """Whether a step that is told lies within its error, so that nothing says whether the row raises or lowers."""
    step = _find_step(calibration, influence)
    return step is not None and abs(step[0]) <= step[1]


def _find_step(calibration: Any, influence: Any) -> tuple[float, float] | None:
    """The step on a row and its error, in nats."""
    scale, error = get_value(calibration, "nats_per_influence"), get_value(calibration, "error")
    if get_value(calibration, "agrees") is not True or not all(map(is_number, (scale, error, influence))):
        return None
    return scale * influence, error
