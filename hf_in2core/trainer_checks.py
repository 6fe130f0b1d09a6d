"""What an [`InfluenceTrainer`] refuses, before a model is loaded."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import AutoProcessor, PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import get_config_model_id

from .config import InfluenceConfig


def check_settings(args: InfluenceConfig, kwargs: dict[str, Any]) -> None:
    """Refuse, by name, what would make influence another thing than that of the SFT loss."""
    if not isinstance(args, InfluenceConfig):
        raise TypeError(f"`args` is a {type(args).__name__}. Pass an `InfluenceConfig`, which extends `SFTConfig`.")
    refused = {
        "loss_type": args.loss_type != "nll" and f"`loss_type={args.loss_type!r}`: only the negative log-likelihood",
        "label_smoothing_factor": args.label_smoothing_factor > 0 and "`label_smoothing_factor`",
        "compute_loss_func": kwargs.get("compute_loss_func") is not None and "`compute_loss_func`",
        "data_collator": kwargs.get("data_collator") is not None and "`data_collator`",
        "formatting_func": kwargs.get("formatting_func") is not None
        and "`formatting_func` (apply it with `Dataset.map` first)",
        "skip_prepare_dataset": bool(_as_dict(args.dataset_kwargs).get("skip_prepare_dataset"))
        and "`skip_prepare_dataset`",
        "deepspeed": args.deepspeed and "DeepSpeed (train with it if you like, then score the adapter without it)",
        "fsdp": args.fsdp and "FSDP (train with it if you like, then score the adapter without it)",
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
    validation = dict(eval_dataset) if isinstance(eval_dataset, dict) else {"validation": eval_dataset}
    if not validation:
        raise ValueError("`eval_dataset` is an empty dict. Pass at least one validation set.")
    for name, dataset in {"pool": train_dataset, **validation}.items():
        if not isinstance(dataset, Dataset):
            raise ValueError(f"The validation set `{name}` is a {type(dataset).__name__}; pass a `datasets.Dataset`.")
        if len(dataset) == 0:
            raise ValueError(f"`{name}` is empty: it has no rows. Check its source or the split's name.")
        if {"image", "images"} & set(dataset.column_names):
            raise ValueError(f"`{name}` has images: vision models are not supported. Pass text rows.")
    reserved = {"rank", "per_query", ""} & set(validation)
    if reserved:
        raise ValueError(f"A validation set is named {sorted(reserved)}, which is reserved. Give it another name.")
    return validation


def load_tokenizer(model: str | PreTrainedModel | PeftModel, args: InfluenceConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that TRL would load."""
    model_id = model if isinstance(model, str) else get_config_model_id(model.config)
    revision = _as_dict(args.model_init_kwargs).get("revision") if isinstance(model, str) else None
    return AutoProcessor.from_pretrained(model_id, revision=revision, trust_remote_code=args.trust_remote_code)


@contextmanager
def stand_in_template(processing_class: PreTrainedTokenizerBase, path: str | None) -> Iterator[None]:
    """A stand-in chat template while formats are checked, before TRL has set the one of `chat_template_path`."""
    original = processing_class.chat_template
    if path is not None:
        processing_class.chat_template = original or "set by chat_template_path"
    try:
        yield
    finally:
        processing_class.chat_template = original
