"""What identifies a run: everything that shapes its directions and scores. Its hash is the run's fingerprint."""

import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from hf_in2core import __version__
from hf_in2core.engine import batches, blocks, datainf, fit, forwards, gradients, losses, passes, scoring, store
from hf_in2core.engine.blocks import Blocks, read_adapter_settings
from hf_in2core.engine.state import hash_adapter, hash_base

from .config import InfluenceConfig


# A change in any of these may change a score, so their source is part of a run's fingerprint.
ENGINE = (batches, blocks, datainf, fit, forwards, gradients, losses, passes, scoring, store)
LIBRARIES = ["torch", "transformers", "trl", "peft", "datasets", "accelerate"]


def identify_run(
    model: PeftModel,
    blocks: Blocks,
    args: InfluenceConfig,
    data: dict[str, Any],
    *,
    autocast: str,
    per_example: bool,
    store_dtype: torch.dtype | None,
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
        autocast (`str`):
            Mixed precision of the forward: `"no"`, `"bf16"` or `"fp16"`.
        per_example (`bool`):
            Whether every validation row is a query of its own.
        store_dtype (`torch.dtype`, *optional*):
            Precision of the gradient store, `None` without one.

    Returns:
        `dict[str, Any]`, ready for JSON. Where base weights are sharded, all processes have to call together.
    """
    source = b"".join(Path(str(module.__file__)).read_bytes() for module in ENGINE)
    return {
        "version": __version__,
        "source": hashlib.sha256(source).hexdigest(),
        "libraries": {library: version(library) for library in LIBRARIES},
        "data": data,
        "adapter": hash_adapter(model),
        "adapter_settings": read_adapter_settings(model),
        "base_model": hash_base(model),
        "blocks": list(blocks),
        "autocast": autocast,
        "estimator": args.estimator,
        "loss_reduction": args.loss_reduction,
        "damping_scale": args.damping_scale,
        "fit_examples": args.fit_examples,
        "seed": args.seed,
        "per_example": per_example,
        # In float32 a store changes nothing but rounding.
        "gradient_store": "bfloat16" if store_dtype is torch.bfloat16 else None,
    }
