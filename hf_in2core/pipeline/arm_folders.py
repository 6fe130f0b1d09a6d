"""Cards of the adapters of a finished run, so that each can be taken away alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState
from trl import ModelConfig

from hf_in2core.cards.composer import CARD
from hf_in2core.cards.model import REFERENCE, add_task_results, render_target_model_card
from hf_in2core.cards.own_folders import hide_own_folders, list_own_folders
from hf_in2core.names import name_coreset
from hf_in2core.rows.sources import find_hub_id

from .arm_tasks import find_arm
from .job import Job


def write_cards(job: Job, results: Mapping[str, Any], reference: Mapping[str, Any]) -> None:
    """
    Write a card into the folder of each arm and of the reference; the main process does so.

    Args:
        job ([`Job`]): The run.
        results (`Mapping[str, Any]`): `results.json` of the complete comparison.
        reference (`Mapping[str, Any]`): Of [`~.steps.train_reference`].
    """
    if not PartialState().is_main_process:
        return
    for entry in results["arms"]:
        arm = find_arm(entry, job.args, job.settings.values["max_steps"])
        if arm.budget == entry["budget"]:  # the full arm is the same model at every budget
            _write_card_of_run(job, arm.find_folder(job.folder), job.target_model, entry, results)
    if job.args.reference_adapter is None:
        share = job.args.reference_fraction
        entry = {"arm": REFERENCE, "fraction": None if share == 1 else share, **reference}
        _write_card_of_run(job, job.folder / REFERENCE, job.reference_model, entry, results)


def _write_card_of_run(
    job: Job, folder: Path, model_args: ModelConfig, entry: Mapping[str, Any], results: Mapping[str, Any]
) -> None:
    args = job.args
    dataset, split = args.pool or "", None
    if args.hub_id is not None and entry["arm"] in ("coreset", "full"):
        split = "train" if entry["arm"] == "full" else name_coreset(entry["fraction"])
        dataset = args.hub_id
    command = str(results.get("command") or "")
    write_card(
        folder,
        entry,
        results,
        base_model=model_args.model_name_or_path or "",
        dataset_id=dataset,
        split=split,
        test_name=find_hub_id(args.test or "") or "the test set of its run",
        lora=bool(job.settings.values["use_peft"]),
        command=hide_own_folders(command, list_own_folders(job.settings.values, command)),
    )


def write_card(folder: Path, entry: Mapping[str, Any], results: Mapping[str, Any], **facts: Any) -> None:
    """
    Write the card of one adapter, in place of PEFT's own, which says nothing; of one that is there text stays.

    Args:
        folder (`Path`): Of the adapter.
        entry (`Mapping[str, Any]`), results (`Mapping[str, Any]`):
            Its entry of `arms`, and `results.json`.
        **facts (`Any`):
            Further arguments of [`~hf_in2core.cards.model.render_target_model_card`].
    """
    path = folder / CARD
    existing = path.read_text(encoding="utf-8") if path.is_file() else ""
    existing_card = existing if "in2core:begin model" in existing else None
    card = render_target_model_card(folder.name, existing_card, run=entry, results=results, **facts)
    tasks = entry.get("tasks")
    card = add_task_results(card, tasks, folder.name) if tasks else card
    if card != existing:
        path.write_text(card, encoding="utf-8")
