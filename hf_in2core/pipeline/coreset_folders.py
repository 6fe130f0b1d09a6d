"""The coresets of a run as datasets of their own, `coresets/coreset_25/`, made of what its record says."""

from collections.abc import Mapping
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset, load_from_disk

from hf_in2core.rows.hashes import hash_rows
from hf_in2core.selection.record import Coreset

from .run_folder import agree, save_rows, written_folder


FOLDER = "coresets"


def write_coresets(run: Path, scored: Dataset, coresets: Mapping[str, Coreset]) -> dict[str, Path]:
    """
    Write the rows of coresets with all their columns, in the pool's order, as the arms train on them.

    Args:
        run (`Path`):
            Folder of the run.
        scored ([`~datasets.Dataset`]):
            The scored pool.
        coresets (`Mapping[str, Coreset]`):
            Those to write, by their names in the record. What lies there and is what the record says stays.

    Returns:
        `dict[str, Path]`: where each lies, for `load_from_disk` and `in2core sft --dataset_name`.
    """
    folders = {name: run / FOLDER / name for name in coresets}
    for name, folder in folders.items():
        keep_rows(folder, scored.select(coresets[name].positions))
    return folders


def keep_rows(folder: Path, rows: Dataset) -> None:
    """Save rows into a folder, unless it holds just these."""
    if agree(lambda: holds(folder, rows)):
        return
    with written_folder(folder) as temporary:
        if PartialState().is_main_process:
            # Saving copies the rows alone, so nothing points to the pool's files.
            save_rows(rows, temporary)


def holds(folder: Path, rows: Dataset) -> bool:
    """Whether a folder is a saved dataset of just these rows."""
    try:
        saved = load_from_disk(str(folder))
    except Exception:  # datasets and arrow raise many types for what is missing or damaged
        return False
    same = isinstance(saved, Dataset) and saved.features == rows.features and len(saved) == len(rows)
    return same and hash_rows(saved) == hash_rows(rows)
