"""What a run found, for the terminal.

Results are those of `results.json`, as a dict. Sign: negative influence = proponent (training on the row lowers the
validation loss), positive = opponent.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from hf_in2core.evaluation.arms import (
    FIGURES,
    explain_means,
    require_arms,
    split_by_budget,
    tabulate_auc,
    tabulate_tasks,
    tabulate_tournament,
)
from hf_in2core.evaluation.formats import DASH, get_value, is_step_unsure, show_step
from hf_in2core.names import INFLUENCE, RANK
from hf_in2core.rows.text import CUT, render_line


MAX_TEXT_CHARACTERS = 240


def print_verdict(results: Mapping[str, Any]) -> None:
    """Print the verdict of a run, where it has one, after all else: there a reader stops."""
    if text := results.get("verdict", {}).get("text"):
        _write(Console(), f"Verdict: {text}", style="bold red" if "WARNING" in text else "bold")


def print_tables(results: Mapping[str, Any]) -> None:
    r"""
    Print a run's results to the terminal, without the verdict: arms, AUCs and examples.

    Wrapped to the width of the terminal; plain text without colours when piped. Text from the data is shown as it is
    (never read as markup), in one line, without control characters, cut to 240 characters.

    Args:
        results (`Mapping[str, Any]`):
            `results.json`: `arms` (see [`~hf_in2core.evaluation.judge.judge`]) and, where present:

            - `auc` (`dict[str, dict[str, float | None]]`): for each kind of row looked for, the AUC by score, such as
              `{"tasks of interest": {"influence": 0.97, "loss": 0.61}}`.
            - `choice` (`dict`): what chose the coreset: `how`, `score` and its `meaning`.
            - `calibration` (`dict`): of [`~hf_in2core.analysis.calibration.Calibration`]; influence is told in nats.
            - `examples` (`dict[str, list[dict]]`): `proponents` and `opponents`, strongest first, each row with
              `influence`, `text` and optionally `influence_rank`; or `standing` and `taken`, which say it in words.

    Raises:
        `ValueError`: `results` has no arms.
    """
    arms = require_arms(results)
    console = Console()
    for budget, members in split_by_budget(arms).items():
        _write(console, f"Arms at {budget}", style="bold")
        print_table(("arm", *FIGURES), [[arm.name, *arm.figures] for arm in members], console)
    note = "Test loss in nats per labelled token, lower is better."
    _write(console, f"{explain_means(arms)} {note}\n")
    if (tournament := tabulate_tournament(results)) is not None:
        _write(console, "Tournament of the methods", style="bold")
        print_table(tournament.columns, tournament.lines, console)
        _write(console, f"{tournament.notes[0]}\n")
    print_tasks(results, console)
    if (auc := tabulate_auc(results)).lines:
        _write(console, "Finding rows by a score", style="bold")
        print_table(auc.columns, auc.lines, console)

    examples, choice = results.get("examples", {}), results.get("choice", {"score": INFLUENCE})
    by_influence, calibration = choice["score"] == INFLUENCE, results.get("calibration")
    if not by_influence:
        told = get_value(results, "agreement", "in_turn")
        said = [f"The coreset was chosen {choice['how']}.", choice["meaning"], *([told] if told else [])]
        _write(console, f"{' '.join(said)}\n")
    for kind in ("proponents", "opponents"):
        if shown := examples.get(kind):
            by = "" if by_influence else f" by {choice['score']}"
            # Of a step within its error nobody knows whether it raises or lowers the loss.
            unsure = any(is_step_unsure(calibration, example["influence"]) for example in shown)
            _write(console, f"Strongest {kind}{by} ({_say_sign(kind, by_influence, unsure)})", style="bold")
            _print_examples(console, shown, by_influence, calibration)


def print_tasks(results: Mapping[str, Any], console: Console | None = None) -> None:
    """Print how the arms of a run do on tasks of lm-eval, as [`print_tables`] does; nothing where none was run."""
    console = console or Console()
    tasks = tabulate_tasks(results)
    if tasks is None:
        return
    _write(console, "Benchmarks", style="bold")
    print_table(tasks.columns, tasks.lines, console)
    for note in [*tasks.notes, "The verdict is of the test loss alone."]:
        _write(console, note)
    console.print()


# --- the terminal ---


def _write(console: Console, text: object, style: str = "", indent: int = 0) -> None:
    """Print text as it is, never as markup."""
    shown = Text(_fit(text, console.encoding), style=style)
    console.print(Padding(shown, (0, 0, 0, indent)) if indent else shown)


def print_table(names: Sequence[str], lines: Sequence[Sequence[str]], console: Console | None = None) -> None:
    """
    Print a table whose first column names the rows, plain when piped.

    A list where the terminal is too narrow for one: a folded number is hard to read.
    """
    console = console or Console()
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


def _say_sign(kind: str, by_influence: bool, unsure: bool) -> str:
    """The sign of influence that the rows of a list have, and what training on them does."""
    if kind == "proponents":
        return "negative influence" + (": lowers the validation loss" if by_influence and not unsure else "")
    mean = "" if by_influence else "mean "
    return f"positive {mean}influence{'' if unsure else ': raises the validation loss'}; no coreset keeps them"


def _print_examples(
    console: Console, examples: Sequence[Mapping[str, Any]], by_influence: bool, calibration: Any
) -> None:
    for number, example in enumerate(examples, 1):
        rank = "" if example.get(RANK) is None else f"rank {example[RANK]:,}, "
        standing = example.get("standing", f"{rank}influence {example['influence']:+.3g}")
        said = [standing, *([example["taken"]] if "taken" in example else [])]
        said += [] if by_influence else [f"mean influence {example['influence']:+.3g}"]
        said += [step] if (step := show_step(calibration, example["influence"])) else []
        _write(console, f"{number:>2}. {'; '.join(said)}", style="cyan")
        _write(console, render_line(str(example.get("text", "")), MAX_TEXT_CHARACTERS), indent=4)
    console.print()


def _fit(text: object, encoding: str) -> str:
    """What the terminal's encoding can show; our own signs in ASCII, the rest as question marks."""
    shown = str(text)
    try:
        shown.encode(encoding)
    except UnicodeEncodeError:
        shown = shown.replace("±", "+/-").replace(DASH, "-").replace(CUT, "...")
    return shown.encode(encoding, "replace").decode(encoding)
