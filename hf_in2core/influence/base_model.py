"""The base model that a saved scorer names."""

from pathlib import Path

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, PreTrainedModel

from .scorer_files import ScorerConfig


def load_base_model(config: ScorerConfig, name: str) -> PreTrainedModel:
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
    options = {"revision": config.base_model_revision, "dtype": getattr(torch, config.base_model_dtype)}
    try:
        model = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=False, **options)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"The base model {base} of the scorer in {name} brings code of its own, which is not run unasked. Load it "
            "yourself and pass it: `InfluenceScorer.from_pretrained(..., model=model)`."
        ) from error
    return model.to(PartialState().device)
