"""A run before any long work: loading, checking, and claiming its folder."""

import shutil
from dataclasses import dataclass, field
from datetime import datetime
from math import ceil
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState
from datasets import Dataset, Features, Value
from transformers import PreTrainedTokenizerBase
from transformers.training_args import OptimizerNames
from trl import ModelConfig, SFTConfig

from hf_in2core import InfluenceConfig
from hf_in2core.cards.publish import check_published_columns
from hf_in2core.evaluation.formats import read_object
from hf_in2core.evaluation.tournament import plan_tournament
from hf_in2core.hub.checks import PushCheck, check_can_push
from hf_in2core.influence.launcher import check_launcher
from hf_in2core.names import (
    AUTO,
    CLUSTERS,
    PER_CHECKPOINT,
    POOL,
    REPLAY,
    describe_set,
    list_method_columns,
    name_coreset,
)
from hf_in2core.rows.columns import read_template
from hf_in2core.rows.hashes import hash_tokenization, hash_value
from hf_in2core.rows.preparation import Preparation, tokenize_rows
from hf_in2core.rows.scored import describe_columns
from hf_in2core.rows.sources import find_sources, parse_named_sources
from hf_in2core.rows.template_date import read_clock

from .arguments import In2CoreArguments
from .comparison import plan_arms
from .inputs import Inputs, check_groups, check_pool_columns, check_tasks, check_trainable, hold_back, load_inputs
from .methods import check_methods, list_columns, needs_queries
from .models import check_adapter, check_model, hash_folder, load_tokenizer, pin_day
from .parser import Settings
from .run_folder import agree, lock_folder, quiet_loading, warn, write_json
from .training import count_loss_tokens


# Settings that change no result, so that a run may go on with others.
HARMLESS = {
    *(
        "output_dir",
        "hub_id",
        "hub_private_repo",
        "setup_script",
        "overwrite_output_dir",
        "dry_run",
        "task_column",
        "wrong_column",
        "bad_rows",
        "allow_overlap",
        "preset",
    ),
    # Results are kept by arm, so that arms can be added.
    *("fractions", "seeds", "arms", "budgets", "analyses", "auto_budget"),
    # Compared by content.
    *("pool", "validation", "test"),
    *("report_to", "run_name", "project", "disable_tqdm", "log_level", "log_level_replica", "log_on_each_node"),
    *("logging_steps", "logging_strategy", "logging_first_step", "logging_nan_inf_filter", "skip_memory_metrics"),
    *("save_strategy", "save_steps", "save_total_limit", "save_only_model", "tokens_per_batch", "chunk_size"),
    *("dataset_num_proc", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
    *("dataloader_prefetch_factor", "per_device_eval_batch_size", "ddp_timeout", "gradient_store_gb"),
    *("gradient_store_dir", "influence_activation_checkpointing"),
}


# When the run began, which templates that print the date go on printing.
DAY = "day"


@dataclass
class Job:
    """
    A checked run: its settings, models by name, data, and the identity of everything that results depend on.

    `halves` are the inputs of its tournament, where it holds one.
    """

    settings: Settings
    folder: Path
    inputs: Inputs
    reference_model: ModelConfig
    target_model: ModelConfig
    reference_tokenizer: PreTrainedTokenizerBase
    target_tokenizer: PreTrainedTokenizerBase
    prepared_test: Dataset
    identities: dict[str, str]
    target_parameters: int
    halves: Inputs | None = None
    tokens: dict[str, Dataset] = field(default_factory=dict, repr=False)

    @property
    def args(self) -> In2CoreArguments:
        """The command's own settings."""
        return self.settings.arguments

    def tokenize_pool(self, training_args: InfluenceConfig, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Tokens and labels of every row of the pool, made once for all models that prepare it alike."""
        preparation = Preparation.from_args(training_args, tokenizer, self.inputs.pool)
        key = hash_tokenization(preparation)
        if key not in self.tokens:
            self.tokens[key] = tokenize_rows(self.inputs.pool, preparation, training_args.dataset_num_proc)
        return self.tokens[key]

    def identify(self, reference: bool, config_type: type, *extra: Any, **instead: Any) -> str:
        """Hash of the settings (or of others `instead`) that shape a result, and of what else does."""
        shaping = self.settings.select(ModelConfig, reference) | self.settings.select(config_type, reference) | instead
        if shaping.get("query_memory_gb", 4.0) is None:
            shaping["query_memory_gb"] = 4.0  # the default of the runs whose hashes have it; it changes no result
        if shaping["use_peft"]:
            del shaping["use_peft"]  # which was no setting once
        return hash_value([{name: value for name, value in shaping.items() if name not in HARMLESS}, *extra])

    def identify_target(self, *extra: Any) -> str:
        """The same for a target: its batches are as large as there are processes, so arms of other runs do not fit."""
        inputs = [self.identities[name] for name in ("target model", POOL, "test")]
        return self.identify(False, SFTConfig, inputs, PartialState().num_processes, *extra)


def check(settings: Settings) -> Job:
    """
    Load the data and check everything that can be checked before long work.

    Raises:
        ValueError: with what was given, why it cannot work and what to do instead.
    """
    args: In2CoreArguments = settings.arguments
    check_launcher()
    folder = Path(args.output_dir or "")
    reference_args = settings.make(InfluenceConfig, reference=True)
    check_methods(args.methods, args.encoder, optim=OptimizerNames(reference_args.optim).value)
    target_args = settings.make(InfluenceConfig)
    reference_model = settings.make(ModelConfig, reference=True)
    if args.reference_checkpoints and not reference_model.use_peft:
        raise ValueError(
            f"`reference_checkpoints={args.reference_checkpoints}` keeps adapters, and with `use_peft=False` the "
            "reference has none. Leave out one of them."
        )
    target_name = args.target_model_name_or_path or args.model_name_or_path
    target_model = settings.make(ModelConfig, model_name_or_path=target_name)
    validation_sources = parse_named_sources(args.validation or [])
    found = check_hub(args, settings.values["hub_private_repo"]) if args.hub_id is not None else None

    reference_tokenizer = load_tokenizer(reference_model, reference_args)
    target_tokenizer = load_tokenizer(target_model, target_args)
    before = folder / "inputs.json"
    day = agree(lambda: read_object(before).get(DAY) or read_clock(reference_tokenizer).isoformat())
    reference_tokenizer, target_tokenizer = (
        pin_day(tokenizer, model_args, datetime.fromisoformat(day))
        for tokenizer, model_args in ((reference_tokenizer, reference_args), (target_tokenizer, target_args))
    )
    with quiet_loading():
        models = (reference_args, reference_tokenizer), (target_args, target_tokenizer)
        inputs = load_inputs(args, validation_sources, *models)
        halves = None
        if args.strategy == AUTO:
            templates = [read_template(tokenizer) for _, tokenizer in models]
            preparation = Preparation.from_args(reference_args, reference_tokenizer, inputs.pool)
            halves = hold_back(inputs, reference_args.seed, preparation, templates)
    if args.strategy == AUTO:
        check_tournament(args, target_args, len(inputs.pool))
    given = None if args.group_column in CLUSTERS else args.group_column
    needed = [args.task_column, args.wrong_column, given]
    also = list_method_columns(list_columns(args.methods)) + [PER_CHECKPOINT] * bool(args.reference_checkpoints)
    check_pool_columns(inputs.pool, inputs.validation, needed, needs_queries(args.methods), also)
    if args.task_column is not None:
        check_tasks(inputs.validation, args.task_column)
    if found is not None:
        check_published(args, found, dict(inputs.pool.features) | describe_columns(list(inputs.validation)))
    smallest = min(args.fractions)
    if round(smallest * len(inputs.pool)) == 0:
        raise ValueError(f"fraction {smallest} of a pool of {len(inputs.pool)} rows is no row. Give a larger one.")
    if args.group_column is not None:
        check_groups(inputs.pool, args.group_column, round(smallest * len(inputs.pool)))
    with quiet_loading():
        for name, rows in inputs.validation.items():
            what = describe_set(name)
            prepared = check_trainable(rows, f"{what} set", *models[0], inputs.pool)
            inputs.facts[what]["loss_tokens"] = count_loss_tokens(prepared)["loss_tokens"]
            for half in (halves.validation[name], halves.held_back[name]) if halves else ():
                check_trainable(half, f"half of the {what} set that --strategy auto draws", *models[0], inputs.pool)
        prepared_test = check_trainable(inputs.test, "test set", *models[1], inputs.pool)
        inputs.facts["test"]["loss_tokens"] = count_loss_tokens(prepared_test)["loss_tokens"]

    reference_parameters = check_model(reference_model, reference_args, for_influence=True)
    parameters = check_model(target_model, target_args, for_influence=False)
    if args.reference_adapter is not None:
        check_adapter(args.reference_adapter, reference_model, reference_args)
    sets = inputs.validation.values()
    queries = sum(map(len, sets)) if needs_queries(args.methods) else len(sets)
    # Of some layers alone it is less, and how much less is not known yet.
    directions = 0 if reference_args.influence_layers else queries * reference_parameters
    # Half of the queries are those of a tournament too.
    directions += directions // 2 * bool(halves)
    check_disk(folder, inputs.pool, parameters, len(plan_arms(args)), directions, num_scored=1 + bool(halves))
    identities = inputs.hashes | {
        "reference model": hash_folder(reference_model.model_name_or_path or ""),
        "target model": hash_folder(target_model.model_name_or_path or ""),
        "reference adapter": hash_folder(args.reference_adapter) if args.reference_adapter else "",
        DAY: day,
    }
    job = Job(
        settings,
        folder,
        inputs,
        reference_model,
        target_model,
        reference_tokenizer,
        target_tokenizer,
        prepared_test,
        identities,
        parameters,
        halves,
    )
    if not args.dry_run:
        claim_folder(job)
    return job


def check_tournament(args: In2CoreArguments, target_args: InfluenceConfig, num_rows: int) -> None:
    """
    Check that the budget of `--strategy auto` has runs for a candidate; with packing the steps are not known yet.

    Raises:
        ValueError: if it has not.
    """
    if target_args.packing and target_args.max_steps <= 0:
        return
    batch = target_args.per_device_train_batch_size * PartialState().num_processes
    largest = 1.0 if "full" in args.arms else max(args.fractions)
    batches = -(-round(largest * num_rows) // batch)
    per_epoch = -(-batches // target_args.gradient_accumulation_steps)
    steps = target_args.max_steps if target_args.max_steps > 0 else ceil(target_args.num_train_epochs * per_epoch)
    plan_tournament(args.candidates, int(args.auto_budget * steps), steps)


def check_hub(args: In2CoreArguments, private: bool | None) -> PushCheck | None:
    """Check on the main process that the publication at the end can succeed."""
    if not PartialState().is_main_process:
        return None
    assert args.hub_id is not None
    splits = ["train", *map(name_coreset, args.fractions)]
    found = check_can_push(args.hub_id, private=private, splits=splits, source_datasets=find_sources(args.pool))
    for warning in found.warnings:
        warn(warning)
    if found.overwrites:
        warn(f"{args.hub_id} holds {', '.join(found.overwrites)}, which the publication at the end replaces.")
    return found


def check_published(args: In2CoreArguments, found: PushCheck, features: dict[str, Any]) -> None:
    """
    Check that the columns of the run can stand beside what its repository holds; of `auto`, those of some winner.

    Raises:
        ValueError: if they cannot, whichever method wins.
    """
    refused = None
    for strategy in ("random", *args.candidates) if args.strategy == AUTO else (args.strategy,):
        columns = list_method_columns(list_columns(args.list_methods(strategy)))
        whole = {name for name in columns if name.endswith(("_rank", "_taker")) or name in CLUSTERS}
        added = {name: Value("int64" if name in whole else "float64") for name in columns}
        splits = ["train", *map(name_coreset, args.fractions)]
        try:
            return check_published_columns(found.head, Features(features | added), splits, "default")
        except ValueError as error:
            refused = refused or error
    assert refused is not None
    raise refused


def check_disk(
    folder: Path, pool: Dataset, adapter_parameters: int, num_arms: int, directions: int, num_scored: int = 1
) -> None:
    """
    Check that the adapters, the annotated pool and the scorer with so many numbers in its directions fit on the disk.

    Raises:
        ValueError: if they do not.
    """
    existing = next(parent for parent in [folder.absolute(), *folder.absolute().parents] if parent.exists())
    needed = estimate_disk(pool, adapter_parameters, num_arms, num_scored) + 4 * directions
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ValueError(
            f"{folder} needs about {needed / 1e9:.1f} GB ({num_arms} adapters, the annotated pool, and "
            f"{4 * directions / 1e9:.1f} GB of directions on which rows are scored), but the disk has "
            f"{free / 1e9:.1f} GB left. Give another --output_dir, or fewer --arms, --seeds or --fractions; with "
            "--strategy top all validation rows have one direction together."
        )


def estimate_disk(pool: Dataset, adapter_parameters: int, num_arms: int, num_scored: int = 1) -> int:
    """Bytes of the adapters and of so many annotated pools, of which one is written anew beside itself."""
    return (1 + num_scored) * pool.data.nbytes + 4 * adapter_parameters * (num_arms + 1)


def claim_folder(job: Job) -> None:
    """
    Write `config.yaml` into the run's folder, unless another configuration has been there.

    Raises:
        ValueError: naming the settings and inputs that differ.
    """
    lock_folder(job.folder)
    different = agree(lambda: find_differences(job))
    if different and not job.args.overwrite_output_dir:
        raise ValueError(
            f"{job.folder} is the run of another configuration: {'; '.join(different)}. Give another --output_dir, go "
            f"on with its settings by --config {job.folder / 'config.yaml'}, or with these by --overwrite_output_dir, "
            "which computes again what no longer fits."
        )
    if PartialState().is_main_process:
        job.folder.mkdir(parents=True, exist_ok=True)
        job.settings.save(job.folder / REPLAY)
        write_json(job.folder / "inputs.json", job.identities)
    PartialState().wait_for_everyone()


def find_differences(job: Job) -> list[str]:
    """What differs between this run and the one whose folder it is, in words."""
    path = job.folder / REPLAY
    if not path.is_file():
        return []
    before = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    now = job.settings.values
    # What was fitted on all rows is what a sample of them stands for.
    before |= {name: now.get(name) for name in before if name.endswith("fit_examples") and before[name] is None}
    before.setdefault("use_peft", True)  # which was no setting once
    harmless = HARMLESS | {"query_memory_gb"}
    if any(values.get(name + "gradient_store_dir") for values in (before, now) for name in ("", "reference_")):
        harmless -= {"gradient_store_gb"}  # gradients of an index that has less room are rounded
    different = [
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if name.removeprefix("reference_") not in harmless and before.get(name) != now.get(name)
    ]
    identities = read_object(job.folder / "inputs.json")
    return different + [
        f"the content of the {name} changed, or how this version reads it"
        for name in sorted((identities.keys() | job.identities.keys()) - {DAY})
        if identities.get(name) != job.identities.get(name)
    ]
