"""The columns by which the methods of a run rank its pool, kept in the run's `scored/` as soon as each is there."""

from collections.abc import Iterable
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset, load_from_disk

from hf_in2core import InfluenceConfig
from hf_in2core.evaluation.formats import read_object
from hf_in2core.names import ENCODER_RANK, list_method_columns

from .job import Job
from .methods import Reference, add_columns, list_columns
from .run_folder import agree, save_rows, say, write_json, written_folder
from .training import list_checkpoints


# In a run's `columns.json`, beside the seconds of each column; a flag is no column's name.
ENCODER_USED = "--encoder"


def add_method_columns(
    job: Job, adapter: str, methods: Iterable[str], folder: Path
) -> tuple[Dataset, dict[str, float]]:
    """
    Add what methods rank by to the `scored/` of a folder, each column kept as soon as it is there.

    Returns:
        `tuple`: the scored pool, and the seconds that each column took, of earlier runs too.
    """
    args = job.args
    inputs = (job.inputs.pool, job.inputs.validation, job.reference_tokenizer, args.encoder)
    reference_args, checkpoints = job.settings.make(InfluenceConfig, reference=True), list_checkpoints(job.folder)
    reference = Reference(job.reference_model, reference_args, adapter, *inputs, checkpoints)
    folder, path = folder / "scored", folder / "columns.json"
    scored = load_from_disk(str(folder))
    before = agree(lambda: read_object(path))
    if ENCODER_RANK in scored.column_names and before.get(ENCODER_USED) != args.encoder:
        made = list_method_columns([ENCODER_RANK])
        scored = scored.remove_columns([name for name in made if name in scored.column_names])
    for column in list_columns(methods):
        scored, seconds = add_columns(scored, [column], reference)
        if seconds:
            say(f"Column {column}: {seconds[column]:.0f} s.")
            with written_folder(folder) as temporary:
                if PartialState().is_main_process:
                    save_rows(scored, temporary)
                    write_json(path, read_object(path) | seconds | {ENCODER_USED: args.encoder})
            scored = load_from_disk(str(folder))
    known = agree(lambda: read_object(path))
    return scored, {column: known[column] for column in known if column in scored.column_names}
