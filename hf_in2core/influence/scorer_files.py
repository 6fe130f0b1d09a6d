"""A scorer's folder: found on the Hub, and its configuration and directions read with suspicion."""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.utils import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from hf_in2core import __version__
from hf_in2core.engine.blocks import Blocks
from hf_in2core.engine.fit_sums import FitResult
from hf_in2core.engine.state import hash_adapter, hash_base
from hf_in2core.files import write_whole
from hf_in2core.hub.checks import find_revision
from hf_in2core.hub.silence import limited_silence
from hf_in2core.names import LOSS_REDUCTIONS
from hf_in2core.rows.hashes import hash_template, hash_tokenizer
from hf_in2core.rows.places import describe_missing
from hf_in2core.rows.preparation import Preparation

from .config import AUTOCAST_DTYPES, ESTIMATORS, InfluenceConfig


FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
DIRECTIONS_FILE = "scorer.safetensors"
ADAPTER_FOLDER = "adapter"
TOKENIZER_FOLDER = "tokenizer"
# In place of an adapter, where the model's own weights were trained.
MODEL_FOLDER = "model"
# The only file of weights that an adapter is read from: PEFT would otherwise fall back to a pickle.
ADAPTER_FILE = f"{ADAPTER_FOLDER}/adapter_model.safetensors"
# All that is downloaded of a repository, whatever else it holds.
SCORER_PATTERNS = [CONFIG_FILE, DIRECTIONS_FILE, ADAPTER_FILE, f"{ADAPTER_FOLDER}/*.json", f"{TOKENIZER_FOLDER}/*"]
SCORER_PATTERNS += [f"{MODEL_FOLDER}/*.json", f"{MODEL_FOLDER}/*.safetensors"]
# What a fit was found to be worth; version 0.1 wrote none of it.
INDEXED = ("store_error", "store_agreement")
MEASURED = ("fit_agreement", "exact_agreement", "validation_agreement", *INDEXED)
_BASE_DTYPES = ("float32", "float64", "bfloat16", "float16")


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
        num_fit_examples (`int`), fit_agreement (`float`, *optional*):
            Training rows that the fit pass saw (0 for estimators without one); of a sample, how its halves agree.
        exact_agreement (`float`, *optional*), validation_agreement (`dict[str, float]`):
            Of [`FitResult`]: rank correlations with the exact inverse, and between halves of each validation set.
        store_error, store_agreement (`float`, *optional*):
            What rounding did to products of gradients of its index: relative error, and Spearman with exact ones.
        damping (`dict[str, float]`):
            Damping of each block.
        inner_damping_error (`float`):
            Bound on the relative error of `u` from the pilot's damping.
        preparation (`dict`):
            How raw rows become tokens, see [`preparation.Preparation`].
        autocast (`str`):
            `"no"`, `"bf16"` or `"fp16"`: mixed precision of the forward.
        tokens_per_batch (`int`, *optional*):
            Token budget of a batch; what suits the device by default.
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
    tokens_per_batch: int | None
    base_model: str
    base_model_revision: str | None
    base_model_dtype: str
    base_model_hash: str
    adapter_hash: str
    tokenizer_hash: str
    template_hash: str
    pool_hash: str
    libraries: dict[str, str] = field(default_factory=dict)
    fit_agreement: float | None = None
    exact_agreement: float | None = None
    validation_agreement: dict[str, float] = field(default_factory=dict)
    store_error: float | None = None
    store_agreement: float | None = None
    format_version: int = FORMAT_VERSION


def identify(config: ScorerConfig) -> dict[str, Any]:
    """What of a configuration makes a scorer another one."""
    left_out = {"tokens_per_batch", *MEASURED} - ({"fit_agreement"} if config.fit_agreement is not None else set())
    return {name: value for name, value in vars(config).items() if name not in left_out}


def write_scorer_config(path: Path, config: ScorerConfig) -> None:
    """Write `config.json` of a scorer's folder, whole or not at all."""
    # Where there was no index, an earlier version can read it.
    values = {name: value for name, value in vars(config).items() if not (name in INDEXED and value is None)}
    write_whole(path / CONFIG_FILE, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


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
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON ({error}). Download the scorer again.") from error
    version = values.get("format_version") if isinstance(values, dict) else None
    if not isinstance(version, int):
        raise ValueError(f"{file} is not a scorer's: it has no `format_version`. Give a folder of `save_pretrained`.")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{file} has format version {version}, but this hf_in2core reads up to {FORMAT_VERSION}. Upgrade: "
            "`pip install -U hf-in2core`."
        )
    known = {f.name for f in fields(ScorerConfig)}
    unknown, missing = sorted(set(values) - known), sorted(known - set(MEASURED) - set(values))
    if unknown or missing:
        raise ValueError(
            f"{file} has unknown keys {unknown} and lacks {missing}, so it is not a scorer of format version "
            f"{version}. Save it again with `save_pretrained`."
        )
    config = ScorerConfig(**values)
    wrong = [name for name, fits in _check_values(config).items() if not fits]
    if wrong:
        raise ValueError(
            f"{file} has values that no scorer has, in {', '.join(wrong)}. It is damaged or made up; download it "
            "again, or fit a scorer of your own."
        )
    return config


def _check_values(config: ScorerConfig) -> dict[str, bool]:
    """Whether each setting that loading or scoring uses is of the kind that `save_pretrained` writes."""
    sets, preparation = config.validation_sets, config.preparation
    prepared_by = {f.name for f in fields(Preparation)} - {"processing_class"}
    names = ("base_model", "base_model_hash", "adapter_hash", "tokenizer_hash", "template_hash", "pool_hash")
    return {
        "estimator": config.estimator in ESTIMATORS,
        "loss_reduction": isinstance(config.loss_reduction, str) and config.loss_reduction in LOSS_REDUCTIONS,
        "validation_sets": isinstance(sets, dict) and bool(sets) and all(map(_is_count, sets.values())),
        "per_example": isinstance(config.per_example, bool),
        "preparation": isinstance(preparation, dict) and set(preparation) == prepared_by,
        "autocast": isinstance(config.autocast, str) and config.autocast in AUTOCAST_DTYPES,
        "tokens_per_batch": config.tokens_per_batch is None or _is_count(config.tokens_per_batch),
        "base_model_dtype": config.base_model_dtype in _BASE_DTYPES,
        "base_model_revision": config.base_model_revision is None or isinstance(config.base_model_revision, str),
        "libraries": isinstance(config.libraries, dict),
        **{name: isinstance(getattr(config, name), float | None) for name in {*MEASURED} - {"validation_agreement"}},
        "validation_agreement": isinstance(config.validation_agreement, dict)
        and all(isinstance(value, float) for value in config.validation_agreement.values()),
        **{name: isinstance(getattr(config, name), str) for name in names},
    }


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def read_directions(path: Path, config: ScorerConfig) -> tuple[dict[str, Tensor], str]:
    """
    Read the directions of a scorer.

    Returns:
        `tuple[dict[str, torch.Tensor], str]`: the directions, `[Q, out, in]` per block, and the fingerprint of the
        scorer that they were written with.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no safetensors file or has no tensor, or if a tensor is not float32 or float64, not
            finite, or not for as many validation sets (or rows) as the configuration names.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, so this is no whole scorer. Download it again.")
    try:
        with safe_open(path, framework="pt") as file:
            fingerprint = (file.metadata() or {}).get("fingerprint", "")
            directions = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a safetensors file ({error}). Download the scorer again.") from error
    if not directions:
        raise ValueError(f"{path} holds no tensor, so it scores nothing. Download the scorer again.")
    sets = config.validation_sets
    num_queries = sum(sets.values()) if config.per_example else len(sets)
    for name, tensor in directions.items():
        if tensor.dtype not in (torch.float32, torch.float64) or not torch.isfinite(tensor).all():
            raise ValueError(
                f"{path}: `{name}` ({tensor.dtype}) is not a finite float32 or float64 tensor. The file is damaged or "
                "not a scorer's; download it again."
            )
        if tensor.dim() != 3 or tensor.shape[0] != num_queries:
            raise ValueError(
                f"{path}: `{name}` has shape {tuple(tensor.shape)}, but {num_queries} validation "
                f"{'rows' if config.per_example else 'sets'} need {num_queries} matrices. The file is damaged or "
                "another scorer's; download it again."
            )
    return directions, fingerprint


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


def check_identity(
    model: PreTrainedModel | PeftModel, preparation: Preparation, config: ScorerConfig, name: str
) -> None:
    """
    Check that what was loaded for a scorer is what it was fitted with.

    Raises:
        ValueError: naming what is not: base model, adapter, tokenizer or chat template.
    """
    found = {
        "base model": (hash_base(model), config.base_model_hash),
        "adapter": (hash_adapter(model), config.adapter_hash),
        "tokenizer": (hash_tokenizer(preparation.processing_class), config.tokenizer_hash),
        "chat template": (hash_template(preparation), config.template_hash),
    }
    different = [part for part, (actual, expected) in found.items() if actual != expected]
    if different:
        raise ValueError(
            f"The scorer in {name} was fitted with another {' and another '.join(different)} than the one "
            f"loaded (base model {config.base_model or 'in memory'}, revision {config.base_model_revision}): its "
            "scores would mean nothing. Load the same one, or fit a scorer for this one."
        )


def tidy_saved_files(path: Path, adapter_name: str) -> None:
    """Make what PEFT and Transformers have saved the same bytes in every process, and the same files for any name."""
    # PEFT saves an adapter that is not called `default` in a folder of its name.
    own_folder = path / ADAPTER_FOLDER / adapter_name
    if adapter_name and (own_folder / "adapter_config.json").is_file():
        for saved in own_folder.iterdir():
            saved.replace(path / ADAPTER_FOLDER / saved.name)
        own_folder.rmdir()
    # PEFT's own card says nothing of this scorer, and names local folders.
    (path / ADAPTER_FOLDER / "README.md").unlink(missing_ok=True)
    file = path / ADAPTER_FOLDER / "adapter_config.json"
    if file.is_file():
        config = json.loads(file.read_text(encoding="utf-8"))
        for name in ("target_modules", "target_parameters", "modules_to_save", "exclude_modules"):
            if isinstance(config.get(name), list):
                config[name] = sorted(config[name])  # PEFT keeps sets, whose order differs between processes
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    file = path / TOKENIZER_FOLDER / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    for name in ("is_local", "local_files_only"):
        config.pop(name, None)  # how the tokenizer was loaded, not what it is
    file.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def download_scorer(repo_id: str, revision: str | None, token: str | None, repo_type: str, subfolder: str) -> Path:
    """
    Download what a scorer consists of, and nothing else of its repository.

    Raises:
        FileNotFoundError: if there is no such repository.
    """
    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    patterns = [prefix + pattern for pattern in SCORER_PATTERNS]
    try:
        with limited_silence():
            return Path(
                snapshot_download(
                    repo_id, revision=revision, token=token, repo_type=repo_type, allow_patterns=patterns
                )
            )
    except (RepositoryNotFoundError, HFValidationError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(
            f"The scorer `{repo_id}` cannot be loaded: {describe_missing(repo_id)} It is no {repo_type} repository "
            "that can be seen with this token either. For the scorer beside a published pool pass "
            '`repo_type="dataset", subfolder="scorer"`.'
        ) from error


def describe_fit(
    model: PreTrainedModel | PeftModel,
    args: InfluenceConfig,
    preparation: Preparation,
    validation_sets: dict[str, int],
    result: FitResult,
    identity: dict[str, Any],
) -> ScorerConfig:
    """
    The configuration of a scorer that was just fitted.

    Args:
        model ([`~peft.PeftModel`]):
            The reference.
        args ([`InfluenceConfig`]):
            Settings of the fit.
        preparation ([`Preparation`]):
            How raw rows become tokens.
        validation_sets (`dict[str, int]`):
            Rows of each validation set, by name.
        result ([`FitResult`]):
            Outcome of the fit.
        identity (`dict[str, Any]`):
            Of [`identify_run`].
    """
    base = model.config
    asked = (args.model_init_kwargs or {}).get("revision")  # type: ignore[union-attr]
    shaping = ("estimator", "loss_reduction", "damping_scale", "per_example", "autocast")
    return ScorerConfig(
        **{name: identity[name] for name in shaping},
        **{item.name: getattr(result, item.name) for item in fields(ScorerConfig) if hasattr(result, item.name)},
        influence_layers=args.influence_layers,  # type: ignore[arg-type]
        validation_sets=validation_sets,
        num_fit_examples=result.num_examples,
        fit_agreement=result.agreement,
        preparation=preparation.to_dict(),
        tokens_per_batch=args.tokens_per_batch,
        base_model=base._name_or_path or "",
        base_model_revision=getattr(base, "_commit_hash", None) or find_revision(base._name_or_path, asked),
        base_model_dtype=str(model.dtype).removeprefix("torch."),
        base_model_hash=identity["base_model"],
        adapter_hash=identity["adapter"],
        tokenizer_hash=hash_tokenizer(preparation.processing_class),
        template_hash=hash_template(preparation),
        pool_hash=identity["data"]["pool"],
        libraries={"hf_in2core": __version__, **identity["libraries"]},
    )
