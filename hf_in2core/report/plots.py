"""Pictures of a run: arms, influence, also against length and by group, layers, coverage; matplotlib figures.

Sign: negative influence = proponent (training on the row lowers the validation loss), positive = opponent.
"""

import textwrap
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_in2core.evaluation.arms import ArmSummary, count_seeds, require_arms, split_by_budget
from hf_in2core.evaluation.intervals import LEVEL, compute_confidence_interval
from hf_in2core.names import INFLUENCE


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe-Ito colours, told apart under every common colour blindness; the shapes do it in black and white.
COLOURS = {"full": "#000000", "coreset": "#0072B2", "random": "#E69F00", "opponents": "#CC79A7"}
MARKERS = {"full": "s", "coreset": "o", "random": "^", "opponents": "D"}
OTHER_COLOUR, OTHER_MARKER = "#009E73", "v"
REST_COLOUR = "#999999"
INFLUENCE_LABEL = (
    "influence\n\N{LEFTWARDS ARROW} negative = proponent (lowers the validation loss)\n"
    "positive = opponent \N{RIGHTWARDS ARROW}"
)
MAX_POINTS = 1500
# Inches; what a page shows has to be read on a telephone too.
PAGE_WIDTH = 6.0
LONGEST_NAME = 24


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
    draw_arms(results, results.get("verdict", {}).get("headline") or "Test loss of the arms").savefig(path, dpi=150)


def draw_arms(results: Mapping[str, Any], title: str = "", width: float = 7.0) -> "Figure":
    """The figure of [`plot_arms`] under a title, or without one, at least so many inches wide."""
    arms = require_arms(results)
    budgets = split_by_budget(arms)
    groups = dict.fromkeys(arm.share for arm in arms)
    figure = _make_figure(width=min(14.0, max(width, len(budgets) * (1.0 + 1.1 * len(groups)))), height=4.8)
    panels = figure.subplots(1, len(budgets), sharey=True, squeeze=False)[0]
    for panel, (budget, members) in zip(panels, budgets.items(), strict=True):
        _draw_panel(panel, members)
        panel.set_title(budget, fontsize=10)
        panel.set_xlabel("fraction of the pool's rows kept")
    panels[0].set_ylabel("test loss\n(nats per labelled token, lower is better)")

    handles: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    note = f"bars: {LEVEL * 100:g} % Student-t interval over {count_seeds(arms)}; small points: single seeds"
    figure.legend(
        handles.values(),
        handles,
        title=note,
        title_fontsize=8,
        loc="outside lower center",
        ncols=len(handles),
        frameon=False,
    )
    if title:
        figure.suptitle("\n".join(textwrap.wrap(title, int(figure.get_figwidth() * 11))), fontsize=11)
    return figure


def plot_influence(
    influence: Sequence[float | None] | np.ndarray,
    path: str | PathLike[str],
    *,
    kept: np.ndarray | None = None,
    name: str = INFLUENCE,
) -> None:
    r"""
    Draw the distribution of influence (negative = proponent) over a pool, and which rows the coreset keeps.

    Args:
        influence (`Sequence[float | None]` or `np.ndarray` of shape `[n]`):
            Influence of every row; null and NaN (no loss) are left out and counted in the title.
        path (`str` or `PathLike`):
            File to write; its ending chooses the format (`.png`, `.svg`, `.pdf`).
        kept (`np.ndarray` of shape `[n]`, bool, *optional*):
            Whether the coreset has the row. Where it ends at a cut, that is drawn too.
        name (`str`, *optional*, defaults to `"influence"`):
            Name of the score, if it is another.

    Raises:
        `ImportError`: matplotlib is not installed.
        `ValueError`: no row carries loss.
    """
    figure, note = draw_influence(influence, kept, name=name)
    title = note if name == INFLUENCE else f"{name.capitalize()}; {note}"
    figure.suptitle("\n".join(textwrap.wrap(title, 76)), fontsize=11)
    figure.savefig(path, dpi=150)


def find_cut(values: np.ndarray, kept: np.ndarray | None) -> float | None:
    """The largest value that is kept, where no smaller one is left out."""
    if kept is None or not kept.any() or kept.all():
        return None
    cut = float(values[kept].max())
    return None if (values[~kept] < cut).any() else cut


def draw_influence(
    influence: Sequence[float | None] | np.ndarray,
    kept: np.ndarray | None = None,
    width: float = 7.0,
    name: str = INFLUENCE,
) -> tuple["Figure", str]:
    """The figure of [`plot_influence`] without a title, so many inches wide, and what to say of it."""
    values = np.asarray(influence, dtype=np.float64)
    carries_loss = np.isfinite(values)
    num_rows, values = len(values), values[carries_loss]
    kept = None if kept is None else kept[carries_loss]
    if len(values) == 0:
        raise ValueError(f"None of the {num_rows} rows carries loss (influence is null or NaN): nothing can be drawn.")
    cut = find_cut(values, kept)
    low, high = np.quantile(values, [0.005, 0.995])
    # A few extreme rows would squeeze all the others into one bar; 0 and the cut are what the picture is about.
    marks = [0.0] if cut is None else [0.0, cut]
    low, high = min(low, *marks), max(high, *marks)
    outside = int(((values < low) | (values > high)).sum())

    figure = _make_figure(width=width, height=4.2)
    panel = figure.subplots()
    edges = np.histogram_bin_edges(values, bins=60, range=(low, high)).tolist()
    if kept is None:
        panel.hist(values, bins=edges, color=REST_COLOUR)
    else:
        # Stacked, so that a bar that is kept in part shows both.
        parts = [values[kept], values[~kept]]
        labels = [f"coreset ({len(parts[0]):,} rows)", f"not kept ({len(parts[1]):,} rows)"]
        panel.hist(parts, bins=edges, stacked=True, color=[COLOURS["coreset"], REST_COLOUR], label=labels)
        if cut is not None:
            panel.axvline(cut, color="#000000", linewidth=1.2, label=f"cut at {cut:.3g}")
        panel.legend(frameon=False)
    panel.axvline(0, color="#444444", linewidth=1, linestyle=":")
    panel.set_xlabel(_label(name))
    panel.set_ylabel("rows")
    notes = [f"{int((values < 0).sum()):,} of {len(values):,} rows are proponents"] if name == INFLUENCE else []
    notes += [f"the {'cut' if cut is not None else 'coreset'} keeps {int(kept.sum()):,}"] if kept is not None else []
    notes += [f"{num_rows - len(values):,} rows carry no loss"] if num_rows > len(values) else []
    notes += [f"{outside:,} rows lie beyond the axis"] if outside else []
    return figure, "; ".join(notes)


def _label(name: str) -> str:
    """The label of an axis from left to right."""
    if name.partition(",")[0] == INFLUENCE:  # of what did not choose it says so, after a comma
        return INFLUENCE_LABEL.replace(INFLUENCE, name, 1)
    return f"{name}\n\N{LEFTWARDS ARROW} first in line"


def plot_length(
    influence: np.ndarray,
    num_loss_tokens: np.ndarray,
    in_coreset: np.ndarray,
    path: str | PathLike[str],
    name: str = INFLUENCE,
) -> None:
    """Write the picture of [`draw_length`]; the file's ending chooses the format."""
    figure = draw_length(influence, num_loss_tokens, in_coreset, name)
    figure.suptitle(f"{name.capitalize()} against the length of the row", fontsize=11)
    figure.savefig(path, dpi=150)


def draw_length(
    influence: np.ndarray, num_loss_tokens: np.ndarray, in_coreset: np.ndarray, name: str = INFLUENCE
) -> "Figure":
    """
    Draw influence against the number of loss tokens: a sample of the rows, and the median of all by tenth of length.

    Args:
        influence (`np.ndarray` of shape `[n]`): Finite influence (negative = proponent), or the score of that `name`.
        num_loss_tokens (`np.ndarray` of shape `[n]`): Tokens that carry loss, at least 1.
        in_coreset (`np.ndarray` of shape `[n]`, bool): Whether the coreset has the row.
        name (`str`): Name of the score.
    """
    figure = _make_figure(width=PAGE_WIDTH, height=4.0)
    from matplotlib.ticker import LogLocator

    panel = figure.subplots()
    shown = np.sort(np.random.default_rng(0).permutation(len(influence))[:MAX_POINTS])
    parts = ((False, "not kept", REST_COLOUR, "x"), (True, "coreset", COLOURS["coreset"], "o"))
    for kept, label, colour, marker in parts:
        part = shown[in_coreset[shown] == kept]
        if len(part):
            panel.plot(
                num_loss_tokens[part], influence[part], marker, color=colour, markersize=3.5, alpha=0.6, label=label
            )
    middles, medians = _compute_medians(num_loss_tokens, influence)
    panel.plot(middles, medians, color=COLOURS["full"], marker="s", markersize=4, label="median by tenth of length")
    panel.axhline(0, color="#444444", linewidth=1, linestyle=":")
    if num_loss_tokens.max() > 20 * num_loss_tokens.min():
        panel.set_xscale("log", subs=[])
        panel.xaxis.set_major_locator(LogLocator(subs=[1, 2, 5]))
        panel.xaxis.set_major_formatter("{x:,.0f}")
    # A few extreme rows would squeeze all the others into one line.
    low, high = np.quantile(influence, [0.005, 0.995])
    margin = 0.08 * max(high - min(low, 0.0), 1e-300)
    panel.set_ylim(min(low, 0.0) - margin, max(high, 0.0) + margin)
    panel.set_xlabel("loss tokens of the row")
    panel.set_ylabel(f"{name}\n({'negative = proponent' if name == INFLUENCE else 'smallest = first in line'})")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    panel.spines[["top", "right"]].set_visible(False)
    return figure


def _compute_medians(lengths: np.ndarray, influence: np.ndarray) -> tuple[list[float], list[float]]:
    """Medians of length and influence by tenth of length; fewer where many rows have the same length."""
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, 11)))
    tenths = np.clip(np.searchsorted(edges, lengths, side="right") - 1, 0, max(len(edges) - 2, 0))
    found = [tenths == tenth for tenth in np.unique(tenths)]
    return [float(np.median(lengths[f])) for f in found], [float(np.median(influence[f])) for f in found]


def draw_groups(groups: Sequence[Mapping[str, Any]], name: str = INFLUENCE) -> "Figure":
    """
    Draw the spread of influence, or of the score of that `name`, in groups: 5 to 95 %, 25 to 75 % and the median.

    Args:
        groups (`Sequence[Mapping[str, Any]]`):
            From top to bottom: `name` (`str`), `rows` (`int`) and `quantiles` (5, 25, 50, 75 and 95 %).
    """
    figure = _make_figure(width=PAGE_WIDTH, height=1.5 + 0.34 * len(groups))
    panel = figure.subplots()
    for y, group in enumerate(groups):
        low, lower, median, upper, high = group["quantiles"]
        panel.plot([low, high], [y, y], color=REST_COLOUR, linewidth=1.5)
        panel.plot([lower, upper], [y, y], color=COLOURS["coreset"], linewidth=7, solid_capstyle="butt")
        panel.plot([median], [y], "o", color="#ffffff", markeredgecolor=COLOURS["full"], markersize=6)
    panel.set_yticks(
        range(len(groups)),
        [_shorten(group["name"]) for group in groups],
        parse_math=False,  # a dollar sign in a name is a dollar sign
    )
    panel.set_ylim(len(groups) - 0.5, -0.5)
    panel.axvline(0, color="#444444", linewidth=1, linestyle=":")
    panel.set_xlabel(_label(name))
    panel.spines[["top", "right"]].set_visible(False)
    return figure


def draw_layers(candidates: Sequence[Mapping[str, Any]], chosen: Sequence[int]) -> "Figure":
    """
    Draw how well sets of layers rank the rows: Spearman with all layers against their share of gradient memory.

    Args:
        candidates (`Sequence[Mapping[str, Any]]`):
            Sets of layers: `layers`, `name` (its first word is how they were picked), `memory` in (0, 1] and
            `spearman`.
        chosen (`Sequence[int]`):
            The layers to mark.

    Returns:
        `matplotlib.figure.Figure`
    """
    figure = _make_figure(width=PAGE_WIDTH, height=4.0)
    panel = figure.subplots()
    kinds = {
        "first": ("<", REST_COLOUR),
        "last": (">", COLOURS["random"]),
        "middle": ("D", COLOURS["opponents"]),
        "spread": ("s", OTHER_COLOUR),
        "greedy": ("o", COLOURS["coreset"]),
        "all": ("*", COLOURS["full"]),
    }
    for kind, (marker, colour) in kinds.items():
        members = [entry for entry in candidates if entry["name"].partition(" ")[0] == kind]
        if members:
            memory, spearman = [entry["memory"] for entry in members], [entry["spearman"] for entry in members]
            panel.plot(memory, spearman, marker, color=colour, markersize=6, label=kind)
    for entry in candidates:
        if list(entry["layers"]) == list(chosen):
            panel.plot(
                [entry["memory"]],
                [entry["spearman"]],
                "o",
                markersize=13,
                markerfacecolor="none",
                markeredgecolor=COLOURS["full"],
                label="chosen",
            )
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    panel.set_xlim(0, 1.04)
    panel.set_xlabel("share of the gradient memory of all layers\n(left = less memory)")
    panel.set_ylabel("Spearman with all layers\n(1 = the same order of the rows)")
    _rule(panel)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return figure


def draw_coverage(coverage: Sequence[float], loss: Sequence[float], top_k: int) -> "Figure":
    """
    Draw the loss of test rows against how well the pool covers them.

    Args:
        coverage (`Sequence[float]` of length `Q`):
            Mean of `-influence` over the `top_k` strongest proponents of each test row; larger = better covered.
        loss (`Sequence[float]` of length `Q`):
            Nats per labelled token.
        top_k (`int`):
            For the label.

    Returns:
        `matplotlib.figure.Figure`
    """
    figure = _make_figure(width=PAGE_WIDTH, height=4.0)
    panel = figure.subplots()
    panel.plot(coverage, loss, "o", color=COLOURS["coreset"], markersize=4, alpha=0.7)
    if min(coverage) > 0 and max(coverage) > 20 * min(coverage):
        panel.set_xscale("log")
    else:
        panel.axvline(0, color="#444444", linewidth=1, linestyle=":")
    panel.set_xlabel(
        f"coverage: mean of \N{MINUS SIGN}influence of the {top_k} strongest proponents\n"
        "(no unit; negative influence = proponent)   better covered \N{RIGHTWARDS ARROW}"
    )
    panel.set_ylabel("loss of the test row\n(nats per labelled token, lower is better)")
    _rule(panel)
    return figure


def _shorten(name: str) -> str:
    """A name from the data as a label: no character that a picture cannot hold, and not too long."""
    name = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _make_figure(width: float, height: float) -> "Figure":
    try:
        # Figure, not pyplot: no global state, and no window system is looked for.
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Plots need matplotlib, which is not installed. Install it with `pip install hf-in2core[report]`."
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def _rule(panel: "Axes") -> None:
    """No frame but the axes, and lines to read heights by."""
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", color="#dddddd", linewidth=0.6)
    panel.set_axisbelow(True)


def _draw_panel(panel: "Axes", arms: list[ArmSummary]) -> None:
    groups = list(dict.fromkeys(arm.share for arm in arms))
    for position, group in enumerate(groups):
        members = [arm for arm in arms if arm.share == group]
        for index, arm in enumerate(members):
            x = position + (index - (len(members) - 1) / 2) * 0.25
            colour = COLOURS.get(arm.arm, OTHER_COLOUR)
            losses = arm.values["test_loss"]
            if None in losses or not losses:
                panel.annotate(
                    "not finite", (x, 0.98), xycoords=("data", "axes fraction"), rotation=90, va="top", ha="center",
                    fontsize=8, color=colour,
                )  # fmt: skip
                continue
            interval = compute_confidence_interval(losses, LEVEL)
            assert interval.mean is not None
            panel.errorbar(
                x,
                interval.mean,
                yerr=interval.half_width,
                fmt=MARKERS.get(arm.arm, OTHER_MARKER),
                color=colour,
                markersize=8,
                capsize=4,
                linewidth=1.5,
                label=arm.arm,
            )
            panel.plot([x + 0.08] * len(losses), losses, ".", color=colour, markersize=4, alpha=0.8)
            if arm.arm == "full":
                panel.axhline(interval.mean, color=colour, linewidth=0.8, linestyle=":", zorder=0)
    panel.set_xticks(range(len(groups)), groups)
    panel.set_xlim(-0.6, len(groups) - 0.4)
    _rule(panel)
