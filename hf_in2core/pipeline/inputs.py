"""What a command is given: rows, tokenizers, models, adapters; and everything that can be checked before long work."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash
from accelerate import PartialState
from datasets import Dataset
from peft import PeftConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from trl import ModelConfig, SFTConfig, get_peft_config

from hf_in2core.engine.blocks import find_blocks
from hf_in2core.names import POOL, describe_set, list_added_columns
from hf_in2core.rows.columns import apply_columns, get_column_names
from hf_in2core.rows.preparation import Preparation, prepare_rows
from hf_in2core.rows.sources import find_shared_rows, hash_rows, hash_value, load_rows

from .run_folder import warn


def load_tokenizer(model_args: ModelConfig, training_args: SFTConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer with the end-of-sequence token and the chat template that SFT will use."""
    tokenizer = AutoTokenizer.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        trust_remote_code=training_args.trust_remote_code,
    )
    if training_args.eos_token is not None:
        tokenizer.eos_token = training_args.eos_token
    template = training_args.chat_template_path
    if template is not None and template.endswith((".jinja", ".j2")):
        tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
    elif template is not None:
        source = AutoTokenizer.from_pretrained(template)
        added = [token.content for token in source.added_tokens_decoder.values()]
        missing = [token for token in added if token not in tokenizer.get_vocab()]
        if missing:
            raise ValueError(
                f"`chat_template_path={template}` would add the tokens {missing} to the model, and their embeddings "
                "have no per-example gradient here. Give a .jinja file that uses tokens which the model has."
            )
        tokenizer.chat_template, tokenizer.eos_token = source.chat_template, source.eos_token
    return tokenizer


@dataclass
class Inputs:
    """Pool, validation sets by name and test set; raw rows and the hash of each set, as [`load_inputs`] calls them."""

    pool: Dataset
    validation: dict[str, Dataset]
    test: Dataset
    hashes: dict[str, str]


def load_inputs(
    pool_source: str,
    validation_sources: dict[str, str],
    test_source: str,
    columns: list[str] | None,
    tokenizer: PreTrainedTokenizerBase,
    drop_overlap: bool,
) -> Inputs:
    """
    Load all sets and look for rows that occur in several of them.

    Rows of the pool that are in the validation or test set, and validation rows that are in the test set, are counted
    in a warning, and dropped with `drop_overlap`.

    Raises:
        ValueError: if a set is empty, or nothing is left of it.
    """
    with PartialState().main_process_first():
        raw = {POOL: load_rows(pool_source, POOL), "test": load_rows(test_source, "test set")}
        validation = load_validation(validation_sources)
        raw |= {describe_set(name): rows for name, rows in validation.items()}
        hashes = {name: hash_rows(apply_columns(dataset, columns, tokenizer)) for name, dataset in raw.items()}
    for name in [*map(describe_set, validation), POOL]:
        judges = ["test"] if name != POOL else [other for other in raw if other != POOL]
        for other in judges:
            shared = find_shared_rows(hashes[name], hashes[other])
            if not shared.any():
                continue
            found = f"{shared.sum()} of {len(shared)} rows of the {name} set are in the {other} set too"
            if not drop_overlap:
                warn(f"{found}: what it measures is too good. Drop them with --drop_overlap.")
                continue
            if shared.all():
                raise ValueError(f"{found}: nothing is left when they are dropped. Give another set.")
            warn(f"{found}; they are dropped from the {name} set.")
            keep = np.flatnonzero(~shared)
            raw[name] = raw[name].select(keep)
            hashes[name] = [hashes[name][row] for row in keep]
    return Inputs(
        pool=raw[POOL],
        validation={name: raw[describe_set(name)] for name in validation},
        test=raw["test"],
        hashes={name: hash_value(hash_rows(dataset)) for name, dataset in raw.items()},
    )


def load_validation(sources: dict[str, str]) -> dict[str, Dataset]:
    """Load the validation sets of [`~hf_in2core.rows.sources.parse_named_sources`] by their names."""
    return {name: load_rows(source, f"{describe_set(name)} set") for name, source in sources.items()}


def check_pool_columns(
    pool: Dataset, validation_sets: Iterable[str], needed: Sequence[str | None] = (), per_query: bool = False
) -> None:
    """
    Check the pool's column names.

    Raises:
        ValueError: if the pool already has a column that scoring adds, or lacks one that a flag names.
    """
    names = get_column_names(pool)
    clashes = [name for name in list_added_columns(validation_sets, per_query) if name in names]
    if clashes:
        raise ValueError(
            f"The pool already has the column(s) {', '.join(clashes)}. Remove or rename them before scoring."
        )
    missing = [name for name in needed if name is not None and name not in names]
    if missing:
        raise ValueError(f"The pool has no column {', '.join(missing)}; it has: {', '.join(names)}.")


def check_trainable(rows: Dataset, what: str, training_args: SFTConfig, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """
    Prepare rows as SFT will, and check that some carry loss.

    Raises:
        ValueError: if the columns, masks or template do not fit, or no row carries a loss token.
    """
    prepared = prepare_rows(rows, Preparation.from_args(training_args, tokenizer, rows))
    if len(prepared) == 0:
        raise ValueError(
            f"No row of the {what} ({len(rows)} rows) carries loss at `max_length={training_args.max_length}`: "
            "prompts may fill it, or masks hide every token. Raise `max_length` or check the completions."
        )
    return prepared


def take_fraction(rows: Dataset, fraction: float, seed: int) -> Dataset:
    """A seeded part of some rows, in their order."""
    if fraction == 1.0:
        return rows
    size = max(round(fraction * len(rows)), 1)
    return rows.select(np.sort(np.random.default_rng(seed).permutation(len(rows))[:size]))


def check_model(model_args: ModelConfig, training_args: SFTConfig, for_influence: bool) -> int:
    """
    Build the model without weights and put the adapter on, so that settings that cannot work fail at once.

    Args:
        model_args ([`~trl.ModelConfig`]): Model and LoRA settings.
        training_args ([`~trl.SFTConfig`]): For `trust_remote_code`.
        for_influence (`bool`): Whether every trainable tensor must have per-example gradients.

    Returns:
        `int`: trainable parameters.
    """
    trust = training_args.trust_remote_code
    name = model_args.model_name_or_path or ""
    peft_config = get_peft_config(model_args)
    assert peft_config is not None
    config = AutoConfig.from_pretrained(name, revision=model_args.model_revision, trust_remote_code=trust)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
        peft_model = get_peft_model(model, peft_config)
    if for_influence:
        find_blocks(peft_model, peft_model.active_adapter)
    return sum(tensor.numel() for tensor in peft_model.parameters() if tensor.requires_grad)


def check_whole_model() -> None:
    """Raise where the launcher shards the model: the influence and evaluation passes need it whole."""
    for variable, name in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if os.environ.get(variable, "false").lower() == "true":
            raise ValueError(
                f"The launcher shards the model ({name}), but each process needs the whole one here. Launch with "
                "--accelerate_config multi_gpu, or train with `in2core train-reference` and score without it."
            )


def check_adapter(adapter: str, model_name: str) -> None:
    """
    Check that an adapter can be found, and warn if it was trained on another model.

    Raises:
        ValueError: if it cannot be found.
    """
    try:
        base = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    except ValueError as error:
        raise ValueError(f"`{adapter}` is no adapter that PEFT can load: {error}") from error
    if base and base != model_name:
        warn(f"the adapter {adapter} says that it belongs to {base}, but it is put on {model_name}.")


def hash_folder(name_or_path: str, suffixes: tuple[str, ...] = (".json", ".safetensors")) -> str:
    """Identity of a model or adapter: the content of a local folder, the id of a Hub repository."""
    folder = Path(name_or_path).expanduser()
    if not folder.is_dir():
        return name_or_path
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix in suffixes)
    digest = xxhash.xxh3_128()
    for path in files:
        digest.update(str(path.relative_to(folder)).encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()
