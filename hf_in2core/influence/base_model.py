"""The model that a saved scorer was fitted with: a base model that it names and its adapter, or one of its own."""

from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_in2core.engine.blocks import check_not_offloaded

from .scorer_files import ADAPTER_FILE, ADAPTER_FOLDER, MODEL_FOLDER, ScorerConfig


def load_reference(
    path: Path, config: ScorerConfig, name: str, model: PreTrainedModel | PeftModel | None
) -> PreTrainedModel | PeftModel:
    """
    Load the model of a scorer's folder; into `model`, where one is given for an adapter, or that one in its place.

    Raises:
        FileNotFoundError: if the folder holds neither an adapter nor a model as safetensors.
        ValueError: if the adapter does not fit, or weights of `model` are offloaded.
    """
    if isinstance(model, PeftModel):
        raise ValueError(
            "`model` already carries an adapter; the scorer brings its own. Pass the base model without one "
            "(`peft_model.unload()`)."
        )
    is_whole = (path / MODEL_FOLDER).is_dir()
    if not is_whole and not (path / ADAPTER_FILE).is_file():
        raise FileNotFoundError(
            f"{path / ADAPTER_FILE} is missing; an adapter in any other form than safetensors is not read. "
            "Download the scorer again, or save it with `save_pretrained`."
        )
    if model is not None:
        base = model
    elif is_whole:
        base = _load(str(path / MODEL_FOLDER), config, name, use_safetensors=True)
    else:
        base = _load_base_model(config, name)
    check_not_offloaded(base)
    if is_whole:
        return base
    try:
        return PeftModel.from_pretrained(base, str(path / ADAPTER_FOLDER))
    except Exception as error:  # PEFT raises many types: unknown settings, missing modules, other shapes
        raise ValueError(
            f"The adapter in {path / ADAPTER_FOLDER} does not fit the base model ({error}). Load the base model "
            f"that the scorer was fitted with ({config.base_model or 'in memory'})."
        ) from error


def _load_base_model(config: ScorerConfig, name: str) -> PreTrainedModel:
    """
    Load the base model that a scorer names; `name` is the scorer's own, for errors.

    Raises:
        ValueError: if it was built in memory, is a folder that is not there, or brings code of its own.
    """
    base = config.base_model
    if not base:
        raise ValueError(
            f"The scorer in {name} was fitted with a base model in memory. Pass it: "
            "`InfluenceScorer.from_pretrained(..., model=model, processing_class=tokenizer)`."
        )
    if base.startswith(("/", ".", "~")) and not Path(base).is_dir():
        raise ValueError(
            f"The scorer in {name} was fitted with a base model in the folder {base}, which is not on this machine. "
            "Pass it: `InfluenceScorer.from_pretrained(..., model=model)`."
        )
    return _load(base, config, name, revision=config.base_model_revision)


def _load(source: str, config: ScorerConfig, name: str, **options: Any) -> PreTrainedModel:
    dtype = getattr(torch, config.base_model_dtype)
    try:
        model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=False, dtype=dtype, **options)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"The model {source} of the scorer in {name} brings code of its own, which is not run unasked. Load it "
            "yourself and pass it: `InfluenceScorer.from_pretrained(..., model=model)`."
        ) from error
    return model.to(PartialState().device)
