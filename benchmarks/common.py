"""What the benchmarks share beside their measurements: flags, the machine, results that resume, tables, pictures."""

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import disable_progress_bars

from hf_in2core.evaluation.intervals import Interval, compare_losses, compute_confidence_interval
from hf_in2core.pipeline import comparison
from hf_in2core.pipeline.parser import Settings, make_run_parser
from hf_in2core.pipeline.run_folder import join_processes, run_setup_script


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def make_parser(
    doc: str | None, quick: str = "One seed, few rows and steps: shows that it runs."
) -> argparse.ArgumentParser:
    """A parser with `--quick`, described by the first sentence of a module's docstring."""
    # Flags of `in2core run` may pass through: `--test` is none of a benchmark's own, however that may begin.
    parser = argparse.ArgumentParser(description=(doc or "").split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help=quick)
    return parser


def parse_run(parser: argparse.ArgumentParser, name: str, quick: Iterable[str]) -> tuple[argparse.Namespace, Settings]:
    """
    A benchmark's own flags, and the settings of `in2core run` from all others.

    By default the run is of the quickstart's data, made on the spot, under `runs/benchmarks`; `quick` are flags that
    `--quick` stands for.
    """
    args, rest = parser.parse_known_args()
    defaults = [] if "--config" in rest else ["--config", "recipes/quickstart/in2core.yaml"]
    if "--output_dir" not in rest:
        defaults += ["--output_dir", f"runs/benchmarks/{name}{'_quick' if args.quick else ''}"]
    if args.quick:
        defaults += ["--seeds", "0", *quick]
    settings = make_run_parser().parse([*defaults, *rest])
    join_processes(settings)
    if settings.arguments.setup_script is not None:
        run_setup_script(settings.arguments.setup_script)
    return args, settings


def describe_machine() -> dict[str, Any]:
    """What the numbers were measured on, and when."""
    return {**comparison.describe_machine(), "date": time.strftime("%Y-%m-%d")}


def set_up(
    parser: argparse.ArgumentParser, flag: str = "--output_dir", default: str = "benchmarks/results"
) -> argparse.Namespace:
    """The flags, that of where to write among them; from here on one thread and no bars of datasets."""
    parser.add_argument(flag, type=Path, default=Path(default))
    torch.set_num_threads(1)
    disable_progress_bars()
    return parser.parse_args()


def group(rows: Iterable[dict[str, Any]], *names: str) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """The rows of every combination of the values of some columns, in the order in which these are met."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


class Found:
    """Rows of results in a JSON file, kept after every unit of work: the same command goes on where it stopped."""

    def __init__(self, path: Path, args: argparse.Namespace, harmless: tuple[str, ...]) -> None:
        self.path = path
        self.settings = {name: str(value) for name, value in vars(args).items() if name not in harmless}
        stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        self.rows: list[dict[str, Any]] = stored["rows"] if stored.get("settings") == self.settings else []

    def take(self, work: Callable[[], list[dict[str, Any]]], **unit: Any) -> list[dict[str, Any]]:
        """The rows of a unit of work, which is done where it has none yet."""
        if not any(unit.items() <= row.items() for row in self.rows):
            self.rows += work()
            write_results(self.path, settings=self.settings, rows=self.rows)
        return [row for row in self.rows if unit.items() <= row.items()]


def write_results(path: Path, **results: Any) -> None:
    """Write results with the machine, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**results, "machine": describe_machine()}, indent=2)
    path.write_text(text + "\n", encoding="utf-8")


def report(name: str, rows: list[dict[str, Any]], folder: Path) -> None:
    """Print a table and write it with the machine."""
    print_table(name, rows)
    write_results(folder / f"{name}.json", rows=rows)


def print_table(title: str, rows: list[dict[str, Any]]) -> None:
    """A Markdown table; what a row lacks is empty, and a number has three digits."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    print(f"\n### {title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        values = [row.get(column, "") for column in columns]
        cells = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in values]
        print(f"| {' | '.join(cells)} |", flush=True)


def show(values: Iterable[float], pattern: str = "{:.3f}") -> str:
    """The mean over seeds, ± half of its 95 % interval."""
    return show_interval(compute_confidence_interval(list(values)), pattern)


def show_difference(ours: Mapping[int, float], others: Mapping[int, float] | None) -> str:
    """How much higher a mean over seeds is than another, ± half of its 95 % interval; empty beside none or itself."""
    if not ours or not others or ours is others:
        return ""
    return show_interval(compare_losses(ours, others), "{:+.3f}")


def show_interval(interval: Interval, pattern: str) -> str:
    """The mean ± half of an interval; the mean alone where one seed has none."""
    mean, half = pattern.format(interval.mean), interval.half_width
    return mean if half is None else f"{mean.rstrip('%')} ± {pattern.replace('+', '').format(half)}"


@contextmanager
def drawing(path: Path, width: float, height: float) -> Iterator["Figure"]:
    """A picture of a size in inches, written without the frame's upper and right line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    yield figure
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def draw_seeds(axes: "Axes", values: list[float], height: float, colour: str, interval: bool = False) -> None:
    """One line of a picture: a point for each seed, and their mean, with its 95 % interval where that is wanted."""
    axes.plot(values, [height] * len(values), "o", color=colour, alpha=0.4, markersize=4)
    found = compute_confidence_interval(values)
    half_width = found.half_width if interval else None
    axes.errorbar(found.mean, height, xerr=half_width, fmt="|", color=colour, capsize=3, markersize=12)  # type: ignore
