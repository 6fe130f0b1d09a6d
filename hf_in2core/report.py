"""What a run found, for the terminal (`print_results`) and as pictures (`plot_arms`, `plot_influence`).

All take `results.json` as a dict. Sign: negative influence = proponent (training on the row lowers the validation
loss), positive = opponent.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .intervals import compute_confidence_interval


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ARMS = ("full", "coreset", "random", "opponents")
BUDGETS = {"steps": "equal steps", "epochs": "equal epochs"}
LEVEL = 0.95
# Okabe-Ito colours, told apart under every common colour blindness; the shapes do it in black and white.
COLOURS = {"full": "#000000", "coreset": "#0072B2", "random": "#E69F00", "opponents": "#CC79A7"}
MARKERS = {"full": "s", "coreset": "o", "random": "^", "opponents": "D"}
OTHER_COLOUR, OTHER_MARKER = "#009E73", "v"
REST_COLOUR = "#999999"
MAX_TEXT_CHARACTERS = 240


def print_results(results: Mapping[str, Any]) -> None:
    r"""
    Print a run's results to the terminal: arms, verdict, AUCs and examples.

    Wrapped to the width of the terminal; plain text without colours when piped. Text from the data is shown as it is
    (never read as markup), in one line, without control characters, cut to 240 characters.

    Args:
        results (`Mapping[str, Any]`):
            `results.json`: `arms` (see [`~hf_in2core.evaluation.judge`]) and, where present:

            - `verdict` (`dict`): with `text`.
            - `auc` (`dict[str, dict[str, float | None]]`): for each kind of row looked for, the AUC by score, such as
              `{"tasks of interest": {"influence": 0.97, "loss": 0.61}}`.
            - `examples` (`dict[str, list[dict]]`): `proponents` and `opponents`, strongest first, each row with
              `influence`, `text` and optionally `influence_rank`.

    Raises:
        `ValueError`: `results` has no arms.
    """
    rows = _summarize(results)
    console = Console()
    for budget in dict.fromkeys(row["budget"] for row in rows):
        _write(console, f"Arms at {BUDGETS.get(budget, budget)}", style="bold")
        _print_table(console, ARM_COLUMNS, [_format_arm(row) for row in rows if row["budget"] == budget])
    _write(
        console,
        f"Means over {_count_seeds(rows)}, ± half of the {LEVEL * 100:g} % Student-t interval. Test loss in nats per "
        "labelled token, lower is better.\n",
    )
    if text := results.get("verdict", {}).get("text"):
        _write(console, f"Verdict: {text}\n", style="bold red" if "WARNING" in text else "bold")

    if auc := results.get("auc"):
        scores = list(dict.fromkeys(score for by_score in auc.values() for score in by_score))
        _write(console, "AUC of finding rows by a score (0.5 = chance)", style="bold")
        lines = [
            [kind, *(_format_mean([by_score.get(score)], "{:.3f}") for score in scores)]
            for kind, by_score in auc.items()
        ]
        _print_table(console, ["rows", *scores], lines)

    examples = results.get("examples", {})
    for kind, sign in (("proponents", "negative influence: lowers"), ("opponents", "positive influence: raises")):
        if examples.get(kind):
            _write(console, f"Strongest {kind} ({sign} the validation loss)", style="bold")
            _print_examples(console, examples[kind])


def plot_arms(results: Mapping[str, Any], path: str | PathLike[str]) -> None:
    r"""
    Draw the test loss of every arm, one panel per budget: the mean with its 95 % interval, and each seed as a point.

    Args:
        results (`Mapping[str, Any]`):
            `results.json`: `arms`, and `verdict` for the title.
        path (`str` or `PathLike`):
            File to write; its ending chooses the format (`.png`, `.svg`, `.pdf`).

    Raises:
        `ImportError`: matplotlib is not installed.
        `ValueError`: `results` has no arms.
    """
    rows = _summarize(results)
    budgets = list(dict.fromkeys(row["budget"] for row in rows))
    groups = list(dict.fromkeys(_group(row) for row in rows))
    figure = _make_figure(width=min(14.0, max(7.0, len(budgets) * (1.0 + 1.1 * len(groups)))), height=4.8)
    panels = figure.subplots(1, len(budgets), sharey=True, squeeze=False)[0]
    for panel, budget in zip(panels, budgets, strict=True):
        _draw_panel(panel, [row for row in rows if row["budget"] == budget])
        panel.set_title(BUDGETS.get(budget, str(budget)), fontsize=10)
        panel.set_xlabel("fraction of the pool's rows kept")
    panels[0].set_ylabel("test loss\n(nats per labelled token, lower is better)")

    handles: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    note = f"bars: {LEVEL * 100:g} % Student-t interval over {_count_seeds(rows)}; small points: single seeds"
    figure.legend(
        handles.values(),
        handles,
        title=note,
        title_fontsize=8,
        loc="outside lower center",
        ncols=len(handles),
        frameon=False,
    )
    title = results.get("verdict", {}).get("headline") or "Test loss of the arms"
    figure.suptitle("\n".join(textwrap.wrap(title, int(figure.get_figwidth() * 11))), fontsize=11)
    figure.savefig(path, dpi=150)


def plot_influence(
    influence: Sequence[float | None] | np.ndarray, path: str | PathLike[str], *, cut: float | None = None
) -> None:
    r"""
    Draw the distribution of influence over a pool, with the cut of the coreset.

    Negative = proponent (training on the row lowers the validation loss), positive = opponent.

    Args:
        influence (`Sequence[float | None]` or `np.ndarray` of shape `[n]`):
            Influence of every row; null and NaN (no loss) are left out and counted in the title.
        path (`str` or `PathLike`):
            File to write; its ending chooses the format (`.png`, `.svg`, `.pdf`).
        cut (`float`, *optional*):
            Largest influence that the coreset keeps; rows up to it are drawn as coreset.

    Raises:
        `ImportError`: matplotlib is not installed.
        `ValueError`: no row carries loss.
    """
    values = np.asarray(influence, dtype=np.float64)
    num_rows, values = len(values), values[np.isfinite(values)]
    if len(values) == 0:
        raise ValueError(f"None of the {num_rows} rows carries loss (influence is null or NaN): nothing can be drawn.")
    low, high = np.quantile(values, [0.005, 0.995])
    # A few extreme rows would squeeze all the others into one bar; 0 and the cut are what the picture is about.
    low, high = min(low, 0.0, *_maybe(cut)), max(high, 0.0, *_maybe(cut))
    outside = int(((values < low) | (values > high)).sum())
    num_proponents, num_kept = int((values < 0).sum()), None if cut is None else int((values <= cut).sum())

    figure = _make_figure(width=7.0, height=4.2)
    panel = figure.subplots()
    edges = np.histogram_bin_edges(values, bins=60, range=(low, high)).tolist()
    if cut is None:
        panel.hist(values, bins=edges, color=REST_COLOUR)
    else:
        # Stacked, so that the bar through which the cut goes shows both parts.
        parts = [values[values <= cut], values[values > cut]]
        panel.hist(
            parts,
            bins=edges,
            stacked=True,
            color=[COLOURS["coreset"], REST_COLOUR],
            label=[f"coreset ({num_kept:,} rows)", f"not kept ({len(values) - len(parts[0]):,} rows)"],
        )
        panel.axvline(cut, color="#000000", linewidth=1.2, label=f"cut at {cut:.3g}")
        panel.legend(frameon=False)
    panel.axvline(0, color="#444444", linewidth=1, linestyle=":")
    panel.set_xlabel(
        "influence\n\N{LEFTWARDS ARROW} negative = proponent (lowers the validation loss)        "
        "positive = opponent \N{RIGHTWARDS ARROW}"
    )
    panel.set_ylabel("rows")
    notes = [f"{num_proponents:,} of {len(values):,} rows are proponents"]
    notes += [f"the cut keeps {num_kept:,}"] if cut is not None else []
    notes += [f"{num_rows - len(values):,} rows carry no loss"] if num_rows > len(values) else []
    notes += [f"{outside:,} rows lie beyond the axis"] if outside else []
    figure.suptitle("\n".join(textwrap.wrap("; ".join(notes), 76)), fontsize=11)
    figure.savefig(path, dpi=150)


# --- the terminal ---


def _write(console: Console, text: object, style: str = "", indent: int = 0) -> None:
    """Print text as it is, never as markup."""
    shown = Text(_fit(text, console.encoding), style=style)
    console.print(Padding(shown, (0, 0, 0, indent)) if indent else shown)


def _print_table(console: Console, names: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Print a table, or a list where the terminal is too narrow for one: a folded number is hard to read."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for i, name in enumerate(names):
        table.add_column(Text(_fit(name, console.encoding)), justify="right" if i else "left", no_wrap=True)
    for line in lines:
        table.add_row(*[Text(_fit(cell, console.encoding)) for cell in line])
    if Measurement.get(console, console.options.update(max_width=10_000), table).maximum <= console.width:
        console.print(table)
    else:
        for line in lines:
            cells = [f"{name} {cell}" for name, cell in zip(names[1:], line[1:], strict=True)]
            _write(console, f"{line[0]}: {', '.join(cells)}")
    console.print()


def _print_examples(console: Console, examples: Sequence[Mapping[str, Any]]) -> None:
    for number, example in enumerate(examples, 1):
        rank = "" if example.get("influence_rank") is None else f"rank {example['influence_rank']:,}, "
        _write(console, f"{number:>2}. {rank}influence {example['influence']:+.3g}", style="cyan")
        _write(console, _cut(str(example.get("text", ""))), indent=4)
    console.print()


# --- the arms as rows of a table ---

ARM_COLUMNS = ("arm", "rows", "loss tokens", "steps", "seconds", "test loss", "perplexity")


def _summarize(results: Mapping[str, Any]) -> list[dict[str, Any]]:
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


def _format_arm(row: dict[str, Any]) -> list[str]:
    name = row["arm"] if row["arm"] == "full" or row["fraction"] is None else f"{row['arm']} {row['fraction']:g}"
    counts = [_format_mean(row[column], "{:,.0f}") for column in ("rows", "loss_tokens", "steps")]
    seconds = _format_mean(row["seconds"], "{:,.1f}")
    return [name, *counts, seconds, _format_interval(row["test_loss"], 3), _format_interval(row["test_perplexity"], 2)]


def _format_mean(values: list[float | None], pattern: str) -> str:
    known = _finite(values)
    return pattern.format(sum(known) / len(known)) if known else "-"


def _format_interval(values: list[float | None], decimals: int) -> str:
    known = _finite(values)
    if len(known) < len(values):
        return f"not finite in {len(values) - len(known)} of {len(values)}"
    interval = compute_confidence_interval(known, LEVEL)
    if interval["half_width"] is None:
        return f"{interval['mean']:.{decimals}f}"
    return f"{interval['mean']:.{decimals}f} ± {interval['half_width']:.{decimals}f}"


def _finite(values: Sequence[float | None]) -> list[float]:
    return [float(value) for value in values if value is not None and math.isfinite(value)]


def _count_seeds(rows: list[dict[str, Any]]) -> str:
    counts = sorted({len(row["test_loss"]) for row in rows})
    if counts == [1]:
        return "1 seed (none can be given)"
    return f"{' to '.join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))} seeds"


def _cut(text: str) -> str:
    """Text from the data in one line, without characters that would steer the terminal."""
    # Cut before and after: cleaning a text of megabytes is wasted, and cleaning changes the length.
    printable = "".join(c if c.isprintable() else " " for c in text[: 4 * MAX_TEXT_CHARACTERS])
    line = " ".join(printable.split())
    if len(line) > MAX_TEXT_CHARACTERS or len(text) > 4 * MAX_TEXT_CHARACTERS:
        return line[:MAX_TEXT_CHARACTERS] + "..."
    return line


def _fit(text: object, encoding: str) -> str:
    """What the terminal's encoding can show; ± as +/-, the rest as question marks."""
    try:
        str(text).encode(encoding)
    except UnicodeEncodeError:
        return str(text).replace("±", "+/-").encode(encoding, "replace").decode(encoding)
    return str(text)


# --- pictures ---


def _make_figure(width: float, height: float) -> "Figure":
    try:
        # Figure, not pyplot: no global state, and no window system is looked for.
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Plots need matplotlib, which is not installed. Install it with `pip install hf-in2core[report]`."
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def _group(row: dict[str, Any]) -> str:
    return "full pool" if row["arm"] == "full" else f"{row['fraction']:g}"


def _draw_panel(panel: "Axes", rows: list[dict[str, Any]]) -> None:
    groups = list(dict.fromkeys(_group(row) for row in rows))
    for position, group in enumerate(groups):
        members = [row for row in rows if _group(row) == group]
        for index, row in enumerate(members):
            x = position + (index - (len(members) - 1) / 2) * 0.25
            colour = COLOURS.get(row["arm"], OTHER_COLOUR)
            losses = _finite(row["test_loss"])
            if len(losses) < len(row["test_loss"]):
                panel.annotate(
                    "not finite", (x, 0.98), xycoords=("data", "axes fraction"), rotation=90, va="top", ha="center",
                    fontsize=8, color=colour,
                )  # fmt: skip
                continue
            interval = compute_confidence_interval(losses, LEVEL)
            panel.errorbar(
                x,
                interval["mean"],
                yerr=interval["half_width"],
                fmt=MARKERS.get(row["arm"], OTHER_MARKER),
                color=colour,
                markersize=8,
                capsize=4,
                linewidth=1.5,
                label=row["arm"],
            )
            panel.plot([x + 0.08] * len(losses), losses, ".", color=colour, markersize=4, alpha=0.8)
            if row["arm"] == "full":
                panel.axhline(interval["mean"], color=colour, linewidth=0.8, linestyle=":", zorder=0)
    panel.set_xticks(range(len(groups)), groups)
    panel.set_xlim(-0.6, len(groups) - 0.4)
    panel.grid(axis="y", color="#dddddd", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def _maybe(value: float | None) -> list[float]:
    return [] if value is None else [value]
