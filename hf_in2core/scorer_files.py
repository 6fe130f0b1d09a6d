"""A scorer's folder: its configuration and directions, read with suspicion."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from .blocks import Blocks


FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
DIRECTIONS_FILE = "scorer.safetensors"
ADAPTER_FOLDER = "adapter"
TOKENIZER_FOLDER = "tokenizer"


@dataclass
class ScorerConfig:
    """
    Everything but tensors that a scorer consists of; `config.json` in its folder.

    Attributes:
        estimator, loss_reduction, damping_scale, influence_layers:
            As in [`InfluenceConfig`].
        validation_sets (`dict[str, int]`):
            Rows of each validation set, by name (`"validation"` for a single one), in the order of `u`'s first axis.
        per_example (`bool`):
            Whether that axis has an entry for every validation row instead of every set.
        num_fit_examples (`int`):
            Training rows that the fit pass saw; 0 for estimators without one.
        damping (`dict[str, float]`):
            Damping of each block.
        inner_damping_error (`float`):
            Bound on the relative error of `u` from the pilot's damping.
        preparation (`dict`):
            How raw rows become tokens, see [`preparation.Preparation`].
        autocast (`str`):
            `"no"`, `"bf16"` or `"fp16"`: mixed precision of the forward.
        tokens_per_batch (`int`):
            Token budget of a batch.
        base_model, base_model_revision, base_model_dtype (`str`):
            Identity of the base model; an empty id if it was built in memory.
        base_model_hash, adapter_hash, tokenizer_hash, template_hash (`str`):
            What loading verifies.
        pool_hash (`str`):
            Hash of the pool that `u` was fitted on.
        libraries (`dict[str, str]`):
            Versions it was made with.
        format_version (`int`):
            Version of this file's layout.
    """

    estimator: str
    loss_reduction: str
    damping_scale: float
    influence_layers: str | list[int] | None
    validation_sets: dict[str, int]
    per_example: bool
    num_fit_examples: int
    damping: dict[str, float]
    inner_damping_error: float
    preparation: dict[str, Any]
    autocast: str
    tokens_per_batch: int
    base_model: str
    base_model_revision: str | None
    base_model_dtype: str
    base_model_hash: str
    adapter_hash: str
    tokenizer_hash: str
    template_hash: str
    pool_hash: str
    libraries: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION


def read_scorer_config(path: Path) -> ScorerConfig:
    """
    Read and check `config.json` of a scorer's folder.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is not a scorer's, has unknown or missing keys, or is of a newer version.
    """
    file = path / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"{path} holds no scorer: {CONFIG_FILE} is missing. Give a folder of `save_pretrained`."
        )
    values = json.loads(file.read_text(encoding="utf-8"))
    version = values.get("format_version") if isinstance(values, dict) else None
    if not isinstance(version, int):
        raise ValueError(f"{file} is not a scorer's: it has no `format_version`. Give a folder of `save_pretrained`.")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{file} has format version {version}, but this hf_in2core reads up to {FORMAT_VERSION}. Upgrade: "
            "`pip install -U hf-in2core`."
        )
    fields = ScorerConfig.__dataclass_fields__
    unknown, missing = sorted(set(values) - set(fields)), sorted(set(fields) - set(values))
    if unknown or missing:
        raise ValueError(
            f"{file} has unknown keys {unknown} and lacks {missing}, so it is not a scorer of format version "
            f"{version}. Save it again with `save_pretrained`."
        )
    return ScorerConfig(**values)


def read_directions(path: Path) -> dict[str, Tensor]:
    """
    Read the directions of a scorer.

    Raises:
        ValueError: if a tensor is not float32 or float64, or not finite.
    """
    directions = load_file(path)
    for name, tensor in directions.items():
        if tensor.dtype not in (torch.float32, torch.float64) or not torch.isfinite(tensor).all():
            raise ValueError(
                f"{path}: `{name}` ({tensor.dtype}) is not a finite float32 or float64 tensor. The file is damaged or "
                "not a scorer's; download it again."
            )
    return directions


def check_directions(directions: dict[str, Tensor], blocks: Blocks) -> None:
    """
    Check that every direction has a block of its shape.

    Raises:
        ValueError: if a block is missing or a shape differs, naming both.
    """
    for name, tensor in directions.items():
        if name not in blocks:
            raise ValueError(
                f"The scorer has a direction for `{name}`, which the model does not have. Load its own model."
            )
        block = blocks[name].tensor
        shape = tuple(block.shape) if block.dim() == 2 else (block.numel(), 1)
        if tuple(tensor.shape[1:]) != shape:
            raise ValueError(
                f"The scorer's direction for `{name}` has shape {tuple(tensor.shape[1:])}, the model's tensor "
                f"{shape}. Load the adapter the scorer was fitted with."
            )
