"""ZeRO-3 of DeepSpeed: it trains, and all else runs on models that FSDP2 shards, in the same processes.

Influence is taken through layers whose weights come and go by FSDP2. Under a ZeRO-3 launch the libraries are told of
FSDP2 from the start, as `--accelerate_config fsdp` tells them, and of DeepSpeed while a model is trained.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import yaml
from accelerate.utils import DeepSpeedPlugin
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from hf_in2core.shipped import find_shipped


# Whether the launcher asked for ZeRO-3: its own variable changes with what is at work.
ZERO_VARIABLE = "IN2CORE_ZERO3"


def is_zero_launch() -> bool:
    """Whether models are trained by ZeRO-3, and sharded by FSDP2 for everything else."""
    return os.environ.get(ZERO_VARIABLE) == "true"


def shard_beside_zero() -> None:
    """
    Under a ZeRO-3 launch, have all but trainings sharded by FSDP2; before anything joins the processes.

    Raises:
        ValueError: if the launcher keeps the weights on the CPU.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return
    plugin = DeepSpeedPlugin()
    if plugin.zero_stage != 3:
        return  # the model is whole on each GPU: commands that only train need nothing else
    if plugin.offload_param_device not in (None, "none"):
        raise ValueError(
            f"The launcher's `offload_param_device: {plugin.offload_param_device}` cannot work here: weights on the "
            "CPU are not where the rows are. Set `offload_param_device: none`, as --accelerate_config zero3 does."
        )
    os.environ[ZERO_VARIABLE] = "true"
    # That of the training arguments holds: DeepSpeed refuses another one, after the model has been loaded.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    say_fsdp()


def say_fsdp() -> None:
    """Set the variables that `accelerate launch` sets for the shipped configuration of FSDP2."""
    config = yaml.safe_load(find_shipped("recipes/accelerate_configs/fsdp.yaml").read_text(encoding="utf-8"))
    for name, value in config["fsdp_config"].items():
        os.environ[name.upper()] = str(value).lower() if isinstance(value, bool) else str(value)
    _say("FSDP")


@contextmanager
def launched_by_zero() -> Iterator[None]:
    """Within, training arguments that are made, models that are loaded and trainers are ZeRO-3's."""
    _say("DEEPSPEED")
    try:
        yield
    finally:
        _say("FSDP")
        unset_hf_deepspeed_config()


def let_go(engine: Any) -> None:
    """
    Free the memory of a training by ZeRO-3 that is over.

    DeepSpeed keeps each model that it has trained in a cache of a function (`lru_cache`, seen in 0.19.8), and by it
    all weights and the optimizer's state, though the engine is destroyed.
    """
    for parameter in engine.module.parameters():
        for tensor in (parameter, parameter.ds_tensor):
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    for holder in (engine.optimizer, engine):
        vars(holder).clear()


def _say(name: str) -> None:
    for each in ("DEEPSPEED", "FSDP"):
        os.environ[f"ACCELERATE_USE_{each}"] = str(each == name).lower()
