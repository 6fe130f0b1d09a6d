"""What identifies a run, and the gradients of a pool: all that shapes them. Its hash is their fingerprint."""

import hashlib
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from hf_in2core import __version__
from hf_in2core.engine import (
    batches,
    blocks,
    datainf,
    encoding,
    experts,
    fit,
    fit_sums,
    forwards,
    gradients,
    index,
    losses,
    passes,
    recorded,
    reductions,
    sample,
    scoring,
    store,
    validation,
    vocabulary,
)
from hf_in2core.engine.blocks import Blocks, read_adapter_settings
from hf_in2core.engine.encoding import choose_store_dtype, count_bytes
from hf_in2core.engine.gradients import accumulation_dtype
from hf_in2core.engine.sample import is_sampled
from hf_in2core.engine.state import describe_base, hash_adapter, hash_base
from hf_in2core.names import LIBRARIES

from .config import InfluenceConfig


# A change in any of these may change a gradient or its bytes, so their source is part of an index's fingerprint ...
RECORDING = (batches, blocks, encoding, experts, forwards, gradients, index, losses, recorded, store, vocabulary)
# ... and in any of these a score, and so of a run's.
ENGINE = (*RECORDING, datainf, fit, fit_sums, passes, reductions, sample, scoring, validation)


def hash_source(modules: tuple[ModuleType, ...]) -> str:
    """Hash of the source of modules."""
    return hashlib.sha256(b"".join(Path(str(module.__file__)).read_bytes() for module in modules)).hexdigest()


@cache
def read_versions() -> dict[str, str]:
    """Versions of the libraries that a figure may hang on; read once, since runs note them after every arm."""
    return {library: version(library) for library in LIBRARIES}


def find_store_dtype(args: InfluenceConfig, num_rows: int, blocks: Blocks) -> torch.dtype | None:
    """
    Precision of the gradient store of a pool, `None` without one.

    Raises:
        ValueError: if an index was asked for that does not fit into its budget even in 8 bits.
    """
    kept = args.gradient_store_dir is not None
    sampled = isinstance(args.fit_examples, int) and args.fit_examples < num_rows
    if args.gradient_store_gb == 0 or (sampled and not kept):
        return None
    full = accumulation_dtype(next(iter(blocks.values())).tensor)
    elements = {name: block.tensor.numel() for name, block in blocks.items()}
    precisions = [full, torch.bfloat16, *[torch.int8] * kept]
    found = choose_store_dtype(args.gradient_store_gb, num_rows, elements, precisions)
    if found is None and kept:
        needed = num_rows * sum(count_bytes(count, torch.int8) for count in elements.values()) / 1e9
        raise ValueError(
            f"`gradient_store_gb={args.gradient_store_gb}` is too little for an index in `gradient_store_dir`: the "
            f"gradients of {num_rows:,} rows take {needed:.3g} GB in 8 bits. Give as much, count fewer layers "
            "(`influence_layers`), or leave out the folder: the model then runs in every pass."
        )
    return found


def find_fit_examples(args: InfluenceConfig, num_rows: int, store_dtype: torch.dtype | None) -> int | str | None:
    """`fit_examples`, or `None` where it comes to all rows of a pool."""
    if args.fit_examples == "auto":
        return "auto" if is_sampled(num_rows, store_dtype is not None) else None
    return args.fit_examples if isinstance(args.fit_examples, int) and args.fit_examples < num_rows else None


def identify_model(model: PreTrainedModel | PeftModel, blocks: Blocks, autocast: str) -> dict[str, Any]:
    """What of a model shapes its gradients. Where base weights are sharded, all processes have to call together."""
    return {
        "adapter": hash_adapter(model),
        "adapter_settings": read_adapter_settings(model),
        "base_model": hash_base(model),
        **describe_base(model),
        "blocks": list(blocks),
        "autocast": autocast,
    }


def identify_run(
    model: PreTrainedModel | PeftModel,
    blocks: Blocks,
    args: InfluenceConfig,
    data: dict[str, Any],
    *,
    num_rows: int,
    autocast: str,
    per_example: bool,
) -> dict[str, Any]:
    """
    Everything that shapes u and the scores.

    Args:
        model ([`~peft.PeftModel`]):
            The reference.
        blocks (`dict[str, Block]`):
            Blocks that count.
        args ([`InfluenceConfig`]):
            Settings; those that change nothing but time and memory are left out.
        data (`dict[str, Any]`):
            Hashes of the prepared rows: of the `pool`, and of each set of `validation` by name.
        num_rows (`int`):
            Prepared rows of the pool.
        autocast (`str`):
            Mixed precision of the forward: `"no"`, `"bf16"` or `"fp16"`.
        per_example (`bool`):
            Whether every validation row is a query of its own.

    Returns:
        `dict[str, Any]`, ready for JSON. Where base weights are sharded, all processes have to call together.
    """
    store_dtype = find_store_dtype(args, num_rows, blocks)
    rounded = store_dtype in (torch.bfloat16, torch.int8)
    kept = "index " * (args.gradient_store_dir is not None)  # which rounds before the fit, and not after it
    return {
        "version": __version__,
        "source": hash_source(ENGINE),
        "libraries": read_versions(),
        "data": data,
        **identify_model(model, blocks, autocast),
        "estimator": args.estimator,
        "loss_reduction": args.loss_reduction,
        "damping_scale": args.damping_scale,
        "fit_examples": find_fit_examples(args, num_rows, store_dtype),
        "seed": args.seed,
        "per_example": per_example,
        # In float32 a store changes nothing but rounding.
        "gradient_store": kept + str(store_dtype).removeprefix("torch.") if rounded else None,
    }
