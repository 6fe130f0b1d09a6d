"""The steps of `in2core run`: each returns at once what an earlier run of the same settings has finished."""

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from datasets import Dataset
from trl import ModelConfig, SFTConfig

from hf_in2core import InfluenceConfig, push_influence_dataset
from hf_in2core.engine.sharding import save_adapter
from hf_in2core.evaluation.formats import read_object
from hf_in2core.names import POOL, describe_set, has_named_sets, name_coreset
from hf_in2core.rows.hashes import hash_value
from hf_in2core.rows.preparation import Preparation, prepare_rows
from hf_in2core.rows.sources import find_sources
from hf_in2core.selection.answers import compare_answers
from hf_in2core.selection.record import Coreset

from .arguments import describe_command
from .comparison import Arm, find_equal_run
from .inputs import take_fraction
from .job import Job
from .methods import needs_queries
from .models import load_tokenizer
from .run_folder import (
    agree,
    find_command,
    quiet_loading,
    read_tasks,
    save_rows,
    say,
    warn,
    write_json,
    written_folder,
)
from .training import (
    compute_influence,
    compute_losses,
    count_steps,
    evaluate_model,
    list_checkpoints,
    load_model,
    make_reference_trainer,
    make_saving,
    make_trainer,
    move_checkpoints,
    release,
    train,
)


def train_reference(job: Job) -> tuple[str, dict[str, Any]]:
    """
    Train the reference adapter, or take the given one.

    Returns:
        `tuple`: where the adapter is, and `{rows, loss_tokens, steps, seconds, identity}` of its training.
    """
    args = job.args
    if args.reference_adapter is not None:
        say(f"Reference: the adapter {args.reference_adapter}.")
        identity = hash_value([job.identities["reference adapter"], job.identities["reference model"]])
        return args.reference_adapter, {"rows": 0, "loss_tokens": 0, "steps": 0, "seconds": 0.0, "identity": identity}
    folder = job.folder / "reference"
    hashes = [job.identities[name] for name in ("reference model", POOL)]
    saving = make_saving(args.reference_checkpoints)
    identity = job.identify(True, SFTConfig, hashes, args.reference_fraction, *saving.values())
    result = agree(lambda: read_result(folder / "training.json", identity))
    if result is None:
        checkpoints = job.folder / "checkpoints" / "reference"
        influence_args = job.settings.make(InfluenceConfig, reference=True, output_dir=str(checkpoints), **saving)
        rows = take_fraction(job.inputs.pool, args.reference_fraction, influence_args.seed)
        with quiet_loading():
            inputs = (rows, job.inputs.validation, job.reference_tokenizer)
            trainer = make_reference_trainer(job.reference_model, influence_args, *inputs)
        with written_folder(folder) as temporary:
            result = train(trainer, "Reference", job.reference_model) | {"identity": identity}
            save_adapter(trainer.model, temporary)
            if PartialState().is_main_process:
                load_tokenizer(job.reference_model, influence_args).save_pretrained(temporary)
                write_json(temporary / "training.json", result)
                if saving:
                    move_checkpoints(checkpoints, temporary)
        release(trainer)
        remove_checkpoints(checkpoints)
    say(f"Reference: {result['rows']:,} rows, {result['steps']:,} steps, {result['seconds']:.0f} s.")
    return str(folder), result


def score_pool(
    job: Job, adapter: str, reference: dict[str, Any], methods: Iterable[str], folder: Path
) -> dict[str, Any]:
    """
    Score the pool and keep `scored/` and `scorer/` in a folder, for methods that choose rows by it.

    Returns:
        `dict`: the `selection` of `results.json`.
    """
    validation = job.inputs.validation
    # Scores in run folders are marked so: a set without a name is "" in their hash.
    sets = {name if has_named_sets(validation) else "": job.identities[describe_set(name)] for name in validation}
    per_example = needs_queries(methods)
    shaping = (reference["identity"], sets, job.identities[POOL], *(["per example"] * per_example))
    influence_args = job.settings.make(InfluenceConfig, reference=True)
    if influence_args.gradient_store_dir is not None:
        # Gradients of an index that has less room are rounded.
        shaping = (*shaping, f"index of {influence_args.gradient_store_gb} GB")
    path = folder / "selection.json"
    result, identity = find_influence(job, path, *shaping)
    if result is None:
        scorer, scored, seconds, resumed = compute_influence(
            job.reference_model,
            influence_args,
            adapter,
            job.inputs.pool,
            job.inputs.validation,
            job.reference_tokenizer,
            per_example,
            list_checkpoints(job.folder),
        )
        with written_folder(folder / "scored") as temporary:
            if PartialState().is_main_process:
                save_rows(scored, temporary)
        with written_folder(folder / "scorer") as temporary:
            if PartialState().is_main_process:
                scorer.save_pretrained(temporary)
        result = {
            "seconds": seconds,
            "reference_seconds": reference["seconds"],
            "rows": len(scored),
            "validation_rows": {name: len(rows) for name, rows in job.inputs.validation.items()},
            "reference_rows": reference["rows"],
            "reference_steps": reference["steps"],
            "estimator": influence_args.estimator,
            "exact_agreement": scorer.config.exact_agreement,
            "validation_agreement": scorer.config.validation_agreement,
            "resumed": resumed,
            "identity": identity,
        }
        if PartialState().is_main_process:
            write_json(path, result)
        PartialState().wait_for_everyone()
    say(
        f"Influence: {result['rows']:,} rows on {sum(result['validation_rows'].values()):,} validation rows, "
        f"{result['seconds']:.0f} s."
    )
    return result


def find_influence(job: Job, path: Path, *shaping: Any) -> tuple[dict[str, Any] | None, str]:
    """What an earlier run of the same settings has found by influence, and the identity of this one's result."""
    identity = job.identify(True, InfluenceConfig, *shaping)
    # What was fitted on all rows is what a sample of them stands for.
    exact = job.identify(True, InfluenceConfig, *shaping, fit_examples=None)
    return agree(lambda: read_result(path, identity) or read_result(path, exact)), identity


def find_answers(job: Job, coreset: Coreset) -> dict[str, Any]:
    """How mixed the answers of a coreset are, by the tokens that carry loss."""
    training_args = job.settings.make(InfluenceConfig, reference=True)
    with quiet_loading(repeated=True):
        tokens = job.tokenize_pool(training_args, job.reference_tokenizer)
    answers = [
        str(job.reference_tokenizer.decode([token for token in labels if token != -100], skip_special_tokens=True))
        for labels in tokens["labels"]
    ]
    return asdict(compare_answers(answers, coreset.positions))


def compute_reference_losses(job: Job, adapter: str) -> np.ndarray:
    """Mean loss of each pool row under the reference model, float64 `[rows]`; NaN where a row carries none."""
    training_args = job.settings.make(InfluenceConfig, reference=True)
    preparation = Preparation.from_args(training_args, job.reference_tokenizer, job.inputs.pool)
    with quiet_loading():
        whole = job.tokenize_pool(training_args, job.reference_tokenizer)
        prepared = prepare_rows(whole, replace(preparation, columns=None))
        model = load_model(job.reference_model, training_args, adapter)
    nll, tokens, _ = compute_losses(model, prepared, training_args, "Loss of the pool")
    losses = np.full(len(job.inputs.pool), np.nan)
    losses[prepared.with_format("numpy")["row"][:]] = nll / tokens
    return losses


def make_target_trainer(job: Job, positions: list[int], name: str, **changes: Any) -> Any:
    """The trainer of a target on rows of the pool, by the settings of the run but for some `changes`."""
    checkpoints = job.folder / "checkpoints" / name
    training_args = job.settings.make(InfluenceConfig, output_dir=str(checkpoints), **changes)
    tokens = job.tokenize_pool(training_args, job.target_tokenizer).select(positions)
    return make_trainer(job.target_model, training_args, tokens, job.target_tokenizer)


def evaluate_base(job: Job, positions: list[int], folder: Path | None = None) -> dict[str, Any]:
    """
    Evaluate the target model before any training, and count the steps of the largest arm.

    Args:
        job ([`Job`]): The run.
        positions (`list[int]`): Rows of the pool that the largest arm trains on.
        folder (`Path`, *optional*): Where the result is kept, if not among the arms.

    Returns:
        `dict`: `steps`, and the loss, perplexity and accuracy on the test set.
    """
    folder, make = folder or job.folder / "arms" / "base", partial(make_target_trainer, job, positions, "base")
    found = take_or_judge(folder, job.identify_target(positions), make, job.prepared_test)
    return found | tasks_of(folder)


def train_arm(job: Job, arm: Arm, positions: list[int], steps: int) -> dict[str, Any]:
    """
    Train a target on an arm's rows and evaluate it on the test set; keep the adapter and the result.

    Args:
        job ([`Job`]): The run.
        arm ([`Arm`]): Which seed and budget.
        positions (`list[int]`): Its rows of the pool.
        steps (`int`): Optimiser steps under the budget `steps`.

    Returns:
        `dict`: an entry of `arms` in `results.json`.
    """
    max_steps = job.settings.values["max_steps"]
    run = find_equal_run(arm, job.args, max_steps)
    folder = run.find_folder(job.folder)
    budget: dict[str, Any] = {"max_steps": steps if run.budget == "steps" else -1}
    identity = job.identify_target(positions, run.seed, budget)
    make = partial(make_target_trainer, job, positions, run.name, seed=run.seed, **budget)

    def save(trainer: Any, temporary: Path) -> None:
        save_adapter(trainer.model, temporary)
        if PartialState().is_main_process:
            # That of the run may be pinned to its day; whoever takes the model away wants today's date.
            load_tokenizer(job.target_model, trainer.args).save_pretrained(temporary)

    result = take_or_train(folder, identity, run.label, make, job.prepared_test, job.target_model, save)
    return run.describe() | result | {"budget": arm.budget} | tasks_of(folder)


def take_or_train(
    folder: Path,
    identity: str,
    label: str,
    make: Callable[[], Any],
    judges: Dataset,
    model_args: ModelConfig,
    save: Callable[[Any, Path], None] | None = None,
) -> dict[str, Any]:
    """
    Train a model and judge it, or take what was kept of the same training.

    Args:
        folder (`Path`): Where the result is, or will be.
        identity (`str`): Hash of everything that it depends on.
        label (`str`): Of the bar.
        make (`Callable`): Makes the trainer.
        judges ([`~datasets.Dataset`]): Prepared rows.
        model_args ([`~trl.ModelConfig`]): As of [`~.training.train`].
        save (`Callable`, *optional*): Writes of the trained model, given its trainer and a folder, what is kept.

    Returns:
        `dict`: what [`~.training.train`] and [`~.training.evaluate_model`] return.
    """

    def compute(trainer: Any, temporary: Path) -> dict[str, Any]:
        result = train(trainer, label, model_args) | evaluate_model(trainer.model, judges, trainer.args)
        if save is not None:
            save(trainer, temporary)
        return result

    return _take_or_compute(folder, identity, make, compute)


def take_or_judge(folder: Path, identity: str, make: Callable[[], Any], judges: Dataset) -> dict[str, Any]:
    """
    Judge a model before it is trained and count the steps of its training, or take what was kept of it.

    Returns:
        `dict`: `steps`, and what [`~.training.evaluate_model`] returns.
    """

    def compute(trainer: Any, _: Path) -> dict[str, Any]:
        args = trainer.args
        steps = args.max_steps if args.max_steps > 0 else count_steps(trainer)
        # A fresh LoRA adapter changes nothing: this is the base model.
        return {"steps": steps, **evaluate_model(trainer.model, judges, args)}

    result = _take_or_compute(folder, identity, make, compute)
    say(f"Target before training: test loss {show(result['test_loss'])}.")
    return result


def _take_or_compute(
    folder: Path, identity: str, make: Callable[[], Any], compute: Callable[[Any, Path], dict[str, Any]]
) -> dict[str, Any]:
    """What was kept under this identity, or what is computed with a trainer and the folder that is being written."""
    result = agree(lambda: read_result(folder / "result.json", identity))
    if result is None:
        with quiet_loading(repeated=True):
            trainer = make()
        with written_folder(folder) as temporary:
            result = compute(trainer, temporary) | {"identity": identity}
            if PartialState().is_main_process:
                write_json(temporary / "result.json", result)
        release(trainer)
        remove_checkpoints(Path(trainer.args.output_dir))
    return {name: value for name, value in result.items() if name != "identity"}


def train_arms(
    plan: Sequence[Arm], train_one: Callable[[Arm], dict[str, Any]], write: Callable[[list[dict[str, Any]]], Any]
) -> Any:
    """Train and judge one arm after the other, and write down each when it is there; returns what was written last."""
    arms: list[dict[str, Any]] = []
    written = None
    for arm in plan:
        result = train_one(arm)
        arms.append(result)
        say(
            f"[{len(arms)}/{len(plan)}] {arm.label}: {result['rows']:,} rows, {result['steps']:,} steps, "
            f"{result['seconds']:.0f} s, test loss {show(result['test_loss'])}"
        )
        written = write(arms)
    return written


def tasks_of(folder: Path) -> dict[str, Any]:
    """`{"tasks": …}` where `in2core evaluate` has evaluated the model of an arm, which goes with the arm."""
    tasks = agree(lambda: read_tasks(folder))
    return {"tasks": tasks} if tasks else {}


def publish(job: Job, scored: Dataset, coresets: dict[str, Coreset]) -> None:
    """Push the annotated pool, the coresets, the scorer and the results in one commit, from the main process."""
    args = job.args
    assert args.hub_id is not None and args.pool is not None
    if PartialState().is_main_process:
        say(f"Publishing to {args.hub_id}.")
        try:
            push_influence_dataset(
                args.hub_id,
                scored,
                coresets={name: coresets[name] for name in map(name_coreset, args.fractions)},
                scorer=job.folder / "scorer",
                report=job.folder,
                source_datasets=find_sources(args.pool),
                private=job.settings.values["hub_private_repo"],
                command=describe_command(),
            )
        except Exception:
            warn(
                f"The run is complete in {job.folder}, but it is not published. What arrived is not sent again: "
                f"{find_command()} publish --run {job.folder} --hub_id {args.hub_id}"
            )
            raise
    PartialState().wait_for_everyone()


def read_result(path: Path, identity: str) -> dict[str, Any] | None:
    """What an earlier run of the same settings on the same data has finished."""
    result = read_object(path)
    return result if result.get("identity") == identity else None


def remove_checkpoints(folder: Path) -> None:
    """Remove the checkpoints of a training that is finished."""
    if PartialState().is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        if folder.parent.is_dir() and not any(folder.parent.iterdir()):
            folder.parent.rmdir()
    PartialState().wait_for_everyone()


def show(loss: float | None) -> str:
    """A loss in words."""
    return "not finite (the training diverged)" if loss is None else f"{loss:.3f}"
