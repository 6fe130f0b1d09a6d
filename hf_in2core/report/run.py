"""A run's folder read with suspicion: the page is made of what is there, and says what is not."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, load_from_disk

from hf_in2core.evaluation.formats import get_value, is_number, read_object
from hf_in2core.names import INFLUENCE, RESULTS
from hf_in2core.rows.places import describe_missing


# Version of the layout of results.json.
RESULTS_VERSION = 1
NEEDED: dict[str, Any] = {"arm": str, "fraction": (int, float, type(None)), "budget": str, "seed": int}
NUMBERS = ("rows", "loss_tokens", "steps", "seconds", "test_loss", "test_perplexity")


class ReportError(ValueError):
    """A run's folder that no page can be made of."""


@dataclass
class Run:
    """
    What a run's folder holds.

    Attributes:
        name (`str`): Name of the folder.
        results (`dict`): `results.json`; its `arms` are checked.
        scored (`datasets.Dataset`, *optional*): The scored pool, as arrow.
        scorer (`dict`): `scorer/config.json`.
        folder (`Path`): Where it is.
        notes (`list[str]`): What could not be read, for the reader of the page.
    """

    name: str
    results: dict[str, Any]
    scored: Dataset | None
    scorer: dict[str, Any]
    folder: Path
    notes: list[str] = field(default_factory=list)

    def get(self, *names: str) -> Any:
        """A value of `results.json` by its path; `None` where there is none."""
        return get_value(self.results, *names)


def read_run(folder: str | Path) -> Run:
    """
    Read the folder of a run.

    Args:
        folder (`str` or `Path`):
            Folder of `in2core run`, with `results.json`, and `scored/` and `scorer/` where they exist.

    Returns:
        [`Run`]

    Raises:
        ReportError: there is no such folder, or its `results.json` is missing, damaged, from a newer version or
            without arms.
    """
    path = Path(folder)
    results = read_results(path)
    notes: list[str] = []
    scored = read_scored(path, notes)
    expected = get_value(results, "selection", "rows")
    if scored is not None and isinstance(expected, int) and expected != len(scored):
        notes.append(
            f"scored/ has {len(scored):,} rows, but results.json was written for {expected:,}: they are of different "
            "runs, or one of them is half-written. Start `in2core run` again into this folder."
        )
    return Run(path.resolve().name, results, scored, read_object(path / "scorer" / "config.json"), path, notes)


def read_results(folder: Path) -> dict[str, Any]:
    """
    Read and check `results.json`.

    Raises:
        ReportError: see [`read_run`].
    """
    path = folder / RESULTS
    if not folder.exists():
        raise ReportError(f"The run `{folder}`: {describe_missing(str(folder))} Give the --output_dir of a run.")
    if not folder.is_dir():
        raise ReportError(f"The run `{folder}` is a file. Give the --output_dir of a run.")
    if not path.is_file():
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise ReportError(
            f"`{folder}` holds no results.json, so no run has finished there (it holds {found}). Start it, or "
            "start it again to go on: `in2core run --config …`; or give another folder."
        )
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ReportError(
            f"{path} cannot be read ({type(error).__name__}: {error}): it is half-written or damaged. Start "
            "`in2core run` again into this folder; what is finished is not computed again."
        ) from error
    if not isinstance(results, dict):
        raise ReportError(f"{path} is no results.json of a run: it holds a {type(results).__name__}, not an object.")
    version = results.get("format_version", RESULTS_VERSION)
    if not isinstance(version, int) or version > RESULTS_VERSION:
        raise ReportError(
            f"{path} has format version {version!r}, but this hf_in2core reads up to {RESULTS_VERSION}. Upgrade: "
            "`pip install -U hf-in2core`."
        )
    check_arms(path, results.get("arms"))
    return results


def check_arms(path: Path, arms: Any) -> None:
    """
    Check that the arms have what the page shows of them.

    Raises:
        ReportError: naming the first that has not.
    """
    if not isinstance(arms, list) or not arms:
        raise ReportError(
            f"{path} holds no arms, so nothing can be shown. Start `in2core run` again into this folder."
        )
    for number, arm in enumerate(arms):
        if not isinstance(arm, dict):
            raise ReportError(f"{path}: arms[{number}] is a {type(arm).__name__}, not an object. The file is damaged.")
        for name, kind in NEEDED.items():
            if name not in arm or not isinstance(arm[name], kind) or isinstance(arm[name], bool):
                raise ReportError(f"{path}: arms[{number}] has no usable `{name}`. The file is damaged.")
        if (arm["fraction"] is None and arm["arm"] != "full") or not is_number(arm["fraction"] or 0):
            raise ReportError(f"{path}: arms[{number}] has no usable `fraction`. The file is damaged.")
        for name in NUMBERS:
            value = arm.get(name)
            if value is not None and not is_number(value) and not isinstance(value, float):  # NaN: it diverged
                raise ReportError(f"{path}: arms[{number}] has {value!r} as `{name}`, which is no number.")


def read_scored(folder: Path, notes: list[str]) -> Dataset | None:
    """The scored pool as arrow; `None`, and a note, where it cannot be shown."""
    again = "Start `in2core run` again into this folder to have the table of examples."
    if not (folder / "scored").is_dir():
        notes.append(f"The run has no scored/, so no example can be shown. {again}")
        return None
    try:
        scored = load_from_disk(str(folder / "scored"))
    except Exception as error:  # datasets and arrow raise many types for a damaged folder
        notes.append(f"scored/ cannot be read ({type(error).__name__}): it is half-written or damaged. {again}")
        return None
    if not isinstance(scored, Dataset) or INFLUENCE not in scored.column_names or len(scored) == 0:
        notes.append(f"scored/ is not a scored pool: it has no column `influence`, or no rows. {again}")
        return None
    return scored.with_format("arrow")
