"""What an [`InfluenceTrainer`] refuses: settings and data before a model is loaded, the rest before long passes."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import DistributedType, PartialState
from datasets import Dataset
from peft import PeftModel
from transformers import AutoProcessor, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import get_config_model_id

from hf_in2core.engine.blocks import (
    VOCABULARY_KINDS,
    Blocks,
    check_not_offloaded,
    count_elements,
    find_blocks,
    select_blocks,
)
from hf_in2core.engine.budget import read_free_memory
from hf_in2core.engine.curvature import CURVATURE_ADAPTERS
from hf_in2core.engine.fit_sums import FIT_BYTES, MEAN_BYTES, SAMPLED_FIT_BYTES
from hf_in2core.engine.forwards import find_checkpointable_layers
from hf_in2core.engine.sample import is_sampled
from hf_in2core.engine.sharding import is_sharded, is_sharding_launch
from hf_in2core.names import POOL, RESERVED_SET_NAMES, VALIDATION, describe_set
from hf_in2core.rows.checks import CheckedRows, check_rows, refuse_bad_rows
from hf_in2core.rows.doubts import say_doubts
from hf_in2core.rows.masks import compare_masks
from hf_in2core.rows.overlap import find_overlap
from hf_in2core.rows.preparation import Preparation, map_trainable
from hf_in2core.rows.scored import find_mean_columns, read_record

from .config import InfluenceConfig
from .launcher import check_launcher, check_layer_classes


logger = logging.getLogger(__name__)


def check_settings(args: InfluenceConfig, kwargs: dict[str, Any], model: str | PreTrainedModel | PeftModel) -> None:
    """Refuse, by name, what makes influence another thing than that of the SFT loss, and offloaded weights."""
    if not isinstance(args, InfluenceConfig):
        raise TypeError(f"`args` is a {type(args).__name__}. Pass an `InfluenceConfig`, which extends `SFTConfig`.")
    check_launcher()
    check_layer_classes(model, args)
    if args.torch_compile and is_sharding_launch():
        raise ValueError(
            "`torch_compile` cannot work where the launcher shards the model (FSDP): compiled layers would be traced "
            "anew for every pass, and the compiled model is no `PeftModel` any more. Leave it out."
        )
    if not isinstance(model, str):
        check_not_offloaded(model)
    refused = {
        # In TRL 1.14 `chunked_nll` is the default, and in each TRL the same loss, computed in less memory.
        "loss_type": args.loss_type not in ("nll", "chunked_nll")
        and f"`loss_type={args.loss_type!r}`: only the negative log-likelihood",
        "label_smoothing_factor": args.label_smoothing_factor > 0 and "`label_smoothing_factor`",
        "compute_loss_func": kwargs.get("compute_loss_func") is not None and "`compute_loss_func`",
        "data_collator": kwargs.get("data_collator") is not None and "`data_collator`",
        "formatting_func": kwargs.get("formatting_func") is not None
        and "`formatting_func` (apply it with `Dataset.map` first)",
        "skip_prepare_dataset": bool(_as_dict(args.dataset_kwargs).get("skip_prepare_dataset"))
        and "`skip_prepare_dataset`",
        "deepspeed": args.deepspeed
        and "DeepSpeed by `deepspeed` (`in2core --accelerate_config zero3` trains with it, and passes on to FSDP2)",
        "fsdp": args.fsdp
        and "FSDP by `fsdp` (let the launcher shard: `in2core --accelerate_config fsdp`, or `accelerate launch` "
        "with an FSDP2 configuration)",
        "use_liger_kernel": args.use_liger_kernel and "`use_liger_kernel`",
    }
    for reason in refused.values():
        if reason:
            raise ValueError(
                f"Influence cannot be computed with {reason}: the per-example gradients would not be those of the "
                "loss that SFT minimises. Leave it out of the `InfluenceTrainer`."
            )


def _as_dict(value: dict[str, Any] | str | None) -> dict[str, Any]:
    """TRL has parsed command-line strings into dicts when it built the configuration."""
    return value if isinstance(value, dict) else {}


def check_tokenizer(processing_class: Any) -> PreTrainedTokenizerBase:
    """Refuse what is no tokenizer; returns what is."""
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        raise ValueError(
            f"`processing_class` is a {type(processing_class).__name__}: vision-language models are not supported. "
            "Pass a text model with its tokenizer."
        )
    return processing_class


def check_datasets(
    train_dataset: Dataset | None, eval_dataset: Dataset | dict[str, Dataset] | None
) -> dict[str, Dataset]:
    """Check pool and validation sets; returns the validation sets by name."""
    if not isinstance(train_dataset, Dataset):
        raise ValueError(
            f"`train_dataset` is a {type(train_dataset).__name__}: the pool must be a `datasets.Dataset` that can be "
            "read twice. Fit on a `Dataset` sample, then score the stream with `stream.map(scorer, batched=True)`."
        )
    if eval_dataset is None:
        raise ValueError(
            "`eval_dataset` is missing: influence is taken on a validation set. Pass rows like those the model should "
            "become good at, and keep them out of the pool."
        )
    validation = dict(eval_dataset) if isinstance(eval_dataset, dict) else {VALIDATION: eval_dataset}
    if not validation:
        raise ValueError("`eval_dataset` is an empty dict. Pass at least one validation set.")
    sets = [(f"The {describe_set(name)} set", dataset) for name, dataset in validation.items()]
    for name, dataset in [("The pool", train_dataset), *sets]:
        if not isinstance(dataset, Dataset):
            raise ValueError(f"{name} is a {type(dataset).__name__}; pass a `datasets.Dataset`.")
        if len(dataset) == 0:
            raise ValueError(f"{name} is empty: it has no rows. Check its source or the split's name.")
    reserved = set(RESERVED_SET_NAMES) & set(validation)
    if reserved:
        raise ValueError(f"A validation set is named {sorted(reserved)}, which is reserved. Give it another name.")
    return validation


def map_sets(
    pool: Dataset, validation: dict[str, Dataset], preparation: Preparation, args: InfluenceConfig
) -> tuple[Dataset, dict[str, Dataset]]:
    """
    Look at every row of the pool and the validation sets, tell what the user should know, and map them for SFT.

    Returns:
        `tuple`: the pool and the validation sets as of [`map_trainable`].

    Raises:
        ValueError: naming malformed rows, sets that cannot be masked alike, or one in which no row can be trained on.
    """
    sets = {POOL: pool} | {f"{describe_set(name)} set": rows for name, rows in validation.items()}
    checked = [check_rows(rows, preparation, what) for what, rows in sets.items()]
    refuse_bad_rows(checked)
    warn = logger.warning if PartialState().is_main_process else logger.debug
    said = compare_masks(checked[0], checked[1:], args.completion_only_loss is not None)
    for message in sum(map(say_doubts, checked), said):
        warn(message)
    warn_of_overlap(checked[0], checked[1:])
    mapped, *rest = (
        map_trainable(rows, preparation, found) for rows, found in zip(sets.values(), checked, strict=True)
    )
    return mapped, dict(zip(validation, rest, strict=True))


def warn_of_overlap(pool: CheckedRows, validation: Iterable[CheckedRows]) -> None:
    """Tell on the main process how many rows of the pool are in a validation set."""
    warn = logger.warning if PartialState().is_main_process else logger.debug
    for overlap in (find_overlap(pool, found) for found in validation):
        if overlap is not None:
            warn(
                "%s: influence on itself makes a row look better than it is. Take such rows out of the pool.", overlap
            )


def check_model(
    model: PreTrainedModel | PeftModel, args: InfluenceConfig, aux_loss_enabled: bool, num_rows: int, num_sets: int
) -> None:
    """Refuse a model that settings, accelerator or memory do not fit, or whose tensors cannot be accounted for."""
    kind = PartialState().distributed_type
    sharded = kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
    if sharded and not is_sharding_launch():
        raise ValueError(
            f"The accelerator shards the model ({kind.value}) and the launcher does not say so, so that influence "
            "cannot be taken. Launch with --accelerate_config fsdp."
        )
    if isinstance(model, PeftModel) and len(model.active_adapters) > 1:
        raise ValueError(
            f"The adapters {', '.join(model.active_adapters)} are active together, but influence is taken through "
            "one. Choose it with `model.set_adapter(name)`, or merge them into one with `model.add_weighted_adapter`."
        )
    blocks = find_blocks(model)
    _check_special_blocks(blocks, model, args)
    num_layers = model.config.get_text_config().num_hidden_layers
    _check_memory(select_blocks(blocks, args.influence_layers, num_layers), args, num_rows, num_sets)  # type: ignore[arg-type]
    check_not_offloaded(model)
    if aux_loss_enabled:
        raise ValueError(
            "The model adds a load-balancing loss to the SFT loss, which influence leaves out. Set "
            "`router_aux_loss_coef=0.0`."
        )
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if args.influence_activation_checkpointing and not find_checkpointable_layers(model):
        raise ValueError(
            f"`influence_activation_checkpointing=True`, but {type(base).__name__} has no layer "
            "that Transformers can checkpoint. Leave it out, and lower `tokens_per_batch` instead."
        )


def _check_special_blocks(blocks: Blocks, model: PreTrainedModel | PeftModel, args: InfluenceConfig) -> None:
    """Refuse sharded weights and a gradient store for the blocks that do not go with them."""
    unshardable = next((name for name, block in blocks.items() if block.kind != "linear"), None)
    if unshardable is not None and (is_sharding_launch() or is_sharded(model)):
        raise ValueError(
            f"`{unshardable}` is trained and the model is sharded (FSDP): the gradients of a head, an embedding, "
            "norms, experts or DoRA's magnitudes need weights that are whole. Launch with --accelerate_config "
            "multi_gpu, or train linear layers alone by LoRA, without `use_dora` and `target_parameters`."
        )
    name = next((name for name, block in blocks.items() if block.kind in VOCABULARY_KINDS), None)
    if name is not None and args.gradient_store_gb > 0 and args.influence_layers is None:
        raise ValueError(
            f"`gradient_store_gb={args.gradient_store_gb}` would keep a copy of `{name}` "
            f"({blocks[name].tensor.numel():,} elements) for every row. Set `gradient_store_gb=0`, or leave it "
            "frozen."
        )


def _check_memory(blocks: Blocks, args: InfluenceConfig, num_rows: int, num_sets: int) -> None:
    """Refuse to fit more trained elements than the device has memory for."""
    elements, device = count_elements(blocks), next(iter(blocks.values())).tensor.device
    bytes_each = MEAN_BYTES
    if args.estimator == "datainf":
        sampled = args.fit_examples == "auto" and is_sampled(num_rows, args.gradient_store_gb > 0)
        bytes_each += SAMPLED_FIT_BYTES if sampled else FIT_BYTES
    needed, free = elements * (num_sets * bytes_each + CURVATURE_ADAPTERS * 4), read_free_memory(device)
    if needed > free:
        raise ValueError(
            f"{elements:,} trained elements need {needed / 1e9:.1f} GB for the sums of a fit ({num_sets} validation "
            f"set(s)), and {device} has {free / 1e9:.1f} GB free. Train LoRA (`peft_config=LoraConfig()`), count "
            'fewer layers (`influence_layers="last:2"`), or give fewer validation sets.'
        )


def load_tokenizer(model: str | PreTrainedModel | PeftModel, args: InfluenceConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that TRL would load."""
    model_id = model if isinstance(model, str) else get_config_model_id(model.config)
    revision = _as_dict(args.model_init_kwargs).get("revision") if isinstance(model, str) else None
    return AutoProcessor.from_pretrained(model_id, revision=revision, trust_remote_code=args.trust_remote_code)


@contextmanager
def stand_in_template(processing_class: PreTrainedTokenizerBase, path: str | None) -> Iterator[None]:
    """The chat template of `chat_template_path` while rows are checked, before TRL has set it."""
    original = processing_class.chat_template
    if path is not None and path.endswith((".jinja", ".j2")):
        processing_class.chat_template = Path(path).read_text(encoding="utf-8")
    elif path is not None:
        processing_class.chat_template = AutoTokenizer.from_pretrained(path).chat_template
    try:
        yield
    finally:
        processing_class.chat_template = original


def check_top_k(top_k: int | None, per_example: bool, at_checkpoints: bool) -> None:
    """Refuse `top_k` where there are no single validation rows, or no one set of strongest rows."""
    if top_k is not None and not per_example:
        raise ValueError(
            f"`top_k={top_k}` asks for the strongest rows of every validation row, but the scorer knows only their "
            "mean. Call `fit_influence(per_example=True)` first."
        )
    if top_k is not None and at_checkpoints:
        raise ValueError(
            f"`top_k={top_k}` keeps other rows at every checkpoint, so that they have no average. Leave out one of "
            "the two."
        )


def check_added_columns(pool: Dataset, names: list[str], overwrite: bool) -> list[str]:
    """
    Refuse a pool that has columns which scoring adds, or an earlier scoring added, unless they are to be replaced.

    Returns:
        `list[str]`: the columns to be removed.
    """
    earlier = read_record(pool.features) or find_mean_columns(pool)
    clashes = [name for name in pool.column_names if name in names or name in earlier]
    if clashes and not overwrite:
        raise ValueError(
            f"The pool already has the column(s) {', '.join(clashes)}. Pass `overwrite=True` to replace them, or "
            "rename them."
        )
    return clashes


def check_zero_blocks(damping: dict[str, float], blocks: Blocks, warn: bool) -> None:
    """
    Look for blocks that had no gradient in any fitted row; `warn` says whether this process reports some of them.

    Raises:
        ValueError: if all of them had none.
    """
    zero = [name for name, value in damping.items() if value == 0.0]
    if zero and len(zero) == len(blocks):
        raise ValueError(
            "Every per-example gradient is zero, so no row has any influence. Check that the adapter is active and "
            "that the rows carry loss."
        )
    if zero and warn:
        untrained = all(not bool(block.tensor.any()) for name, block in blocks.items() if "lora_B" in name)
        logger.warning(
            "%d of %d blocks have zero gradients and count for nothing, first `%s`. %s",
            len(zero),
            len(blocks),
            zero[0],
            "The adapter is untrained (every lora_B is zero, so influence through lora_A is zero): call `.train()` "
            "first, or load a trained adapter."
            if untrained
            else "Their inputs or outputs are always zero.",
        )
