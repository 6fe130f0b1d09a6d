"""Where the defaults of the commands differ from TRL's."""

from typing import Any


# `None` is settled by the machine or by what is trained. A command trains LoRA unless it is told not to; TRL advises
# every linear layer for it, where PEFT takes two of a Llama, and ten times the learning rate of full fine-tuning (its
# guide "LoRA Without Regret", the examples of its own `sft` script).
DEFAULTS: dict[str, Any] = {
    "save_strategy": "no",
    "dataloader_pin_memory": None,
    "use_peft": True,
    "learning_rate": None,
    "lora_target_modules": ["all-linear"],
}
LEARNING_RATES = {True: 2e-4, False: 2e-5}  # with LoRA and without


def resolve_defaults(values: dict[str, Any]) -> None:
    """Settle what depends on the machine or on another setting."""
    import torch

    if values["dataloader_pin_memory"] is None:
        values["dataloader_pin_memory"] = torch.accelerator.is_available()
    # SFTConfig trains in bf16 by default, which a CPU emulates slowly: on only where an accelerator has it.
    if values["bf16"] is None:
        values["bf16"] = not values["fp16"] and not values["use_cpu"] and _accelerator_has_bf16()
    if values["learning_rate"] is None:
        values["learning_rate"] = LEARNING_RATES[values.get("use_peft", True)]
        if "reference_use_peft" in values:
            values.setdefault("reference_learning_rate", LEARNING_RATES[values["reference_use_peft"]])
    # TRL's name for the column of text: said as the other columns are, it holds for every set and every step.
    if values["dataset_text_field"] != "text" and values.get("columns", ()) is None:
        values["columns"], values["dataset_text_field"] = [f"text={values['dataset_text_field']}"], "text"
    # Transformers warns of the old name, which SFTConfig still sets by default.
    for prefix in ("", "reference_"):
        old, new = f"{prefix}gradient_checkpointing", f"{prefix}activation_checkpointing"
        if old in values and values.get(new) is None:
            values[new] = values[old]


def _accelerator_has_bf16() -> bool:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return torch.xpu.is_available()
