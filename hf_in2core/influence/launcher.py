"""What an [`InfluenceTrainer`] refuses of `accelerate launch`: settings in which influence cannot be taken."""

import os

import torch
import transformers
from accelerate import DeepSpeedPlugin, PartialState
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hf_in2core.engine.sharding import is_sharding_launch

from .config import InfluenceConfig


# Settings of FSDP by the variable that carries them: what is needed, what accelerate takes without it, and why.
FSDP_SETTINGS = {
    "FSDP_VERSION": ("fsdp_version", "2", "1", "influence is taken through the modules of FSDP2"),
    "FSDP_STATE_DICT_TYPE": (
        "fsdp_state_dict_type",
        "FULL_STATE_DICT",
        "SHARDED_STATE_DICT",
        "trained adapters would not be written where they can be loaded",
    ),
    "FSDP_OFFLOAD_PARAMS": ("fsdp_offload_params", "false", "false", "weights on the CPU are not where the rows are"),
    "FSDP_ACTIVATION_CHECKPOINTING": (
        "fsdp_activation_checkpointing",
        "false",
        "false",
        "it replaces layers once they are in use; give `gradient_checkpointing` and "
        "`influence_activation_checkpointing` instead",
    ),
    "ACCELERATE_DYNAMO_BACKEND": (
        "dynamo_backend",
        "no",
        "no",
        "compiled layers would be traced anew for every pass, and the compiled model is no `PeftModel` any more",
    ),
}
# The same of any launch.
OTHER_SETTINGS = {
    "ACCELERATE_USE_PARALLELISM_CONFIG": (
        *("parallelism_config", "true"),
        "tensor and context parallelism give each process a part of every row or weight",
        "Leave it out and launch with --accelerate_config fsdp, which shards the model too, or multi_gpu",
    ),
    "ACCELERATE_MIXED_PRECISION": (
        *("mixed_precision", "fp8"),
        "its layers are replaced by others, whose gradients cannot be told apart by row",
        "Set `mixed_precision: bf16`",
    ),
}


def check_launcher(needs_whole: str | None = None) -> None:
    """
    Refuse a launch that shards the model in a way in which influence cannot be taken.

    Args:
        needs_whole (`str`, *optional*):
            The setting or command in which each process works alone, so that it needs the whole model.

    Raises:
        ValueError: naming the setting of the launcher, before a model is loaded.
    """
    for variable, (setting, refused, reason, remedy) in OTHER_SETTINGS.items():
        if os.environ.get(variable, "").lower() == refused:
            shown = "" if refused == "true" else f": {refused}"
            raise ValueError(f"The launcher's `{setting}{shown}` (`{variable}`) cannot work here: {reason}. {remedy}.")
    if _is_set("ACCELERATE_USE_MEGATRON_LM"):
        raise ValueError(
            "The launcher shards the model (Megatron-LM, `ACCELERATE_USE_MEGATRON_LM`) in a way in which influence "
            "cannot be taken. Launch with --accelerate_config fsdp, which shards it too, or multi_gpu."
        )
    if _is_set("ACCELERATE_USE_DEEPSPEED"):  # no more so where the commands have passed from ZeRO-3 on to FSDP2
        raise ValueError(
            "The launcher's DeepSpeed (`ACCELERATE_USE_DEEPSPEED`) cannot work here, "
            f"`zero_stage: {DeepSpeedPlugin().zero_stage}`: influence is taken through the modules of FSDP2. The "
            "commands of `in2core` train with `zero_stage: 3` and take influence by FSDP2, launched with "
            "--accelerate_config zero3; launch a script of your own with fsdp or multi_gpu."
        )
    if not _is_set("ACCELERATE_USE_FSDP"):
        return
    if needs_whole is not None:
        raise ValueError(
            f"The launcher shards the model (`distributed_type` FSDP or DEEPSPEED), but with {needs_whole} each "
            "process needs the whole one. Launch with --accelerate_config multi_gpu."
        )
    for variable, (setting, needed, default, reason) in FSDP_SETTINGS.items():
        given = os.environ.get(variable, default)
        if given.lower() != needed.lower():
            raise ValueError(
                f"The launcher's `{setting}: {given}` cannot work here: {reason}. Set `{setting}: {needed}`, as "
                "--accelerate_config fsdp does."
            )
    if not is_sharding_launch():
        kind = PartialState().distributed_type.value
        raise ValueError(
            f"The launcher asks for FSDP (`ACCELERATE_USE_FSDP`), but nothing would be sharded: the launch is {kind}, "
            "and accelerate shards over several GPUs only. Launch with `--num_processes` of two or more on GPUs, or "
            "with --accelerate_config single_gpu or cpu."
        )


def check_layer_classes(model: str | PreTrainedModel | PeftModel, args: InfluenceConfig) -> None:
    """
    Refuse layers to shard by that the model does not have; of a model that is not loaded yet, without its weights.

    Raises:
        ValueError: naming the setting of the launcher, and the layers that the model has.
    """
    given = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "")
    by_class = os.environ.get("FSDP_AUTO_WRAP_POLICY", "").upper() == "TRANSFORMER_BASED_WRAP"
    if not (_is_set("ACCELERATE_USE_FSDP") and by_class and given):
        return
    if isinstance(model, str):
        trusted = args.trust_remote_code
        options = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
        config = AutoConfig.from_pretrained(model, revision=options.get("revision"), trust_remote_code=trusted)
        architecture = getattr(transformers, (config.architectures or [""])[0], None)
        with torch.device("meta"):
            if architecture is not None:
                model = architecture(config)
            else:
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)
    names = {type(module).__name__ for module in model.modules()}  # type: ignore[union-attr]
    missing = [name for name in given.split(",") if name not in names]
    if missing:
        layers = getattr(model, "_no_split_modules", None) or []
        raise ValueError(
            f"The launcher's `fsdp_transformer_layer_cls_to_wrap: {given}` cannot work here: the model has no "
            f"{', '.join(missing)}. Leave it out (the model's own layers are then taken"
            f"{': ' + ', '.join(sorted(layers)) if layers else ''})."
        )


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"
