"""Models whose weights are sharded over the processes (FSDP2, `fully_shard`): each forward then needs all of them.

A weight is a `DTensor` of which each process holds a part; it is whole within the forward and backward of its layer.
What hashes, saves or replaces weights gathers them first, on all processes in the same order.
"""

import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(model: nn.Module) -> bool:
    """Whether weights of the model are sharded over the processes."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def is_sharding_launch() -> bool:
    """Whether the launcher has accelerate shard the models that are trained by FSDP, which it does on GPUs only."""
    wanted = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return wanted and PartialState().distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU)


def shard_model(model: Any) -> None:
    """
    Shard a model in place as accelerate does for training, where the launcher says FSDP.

    Trainers shard when their training starts. Passes that run before it, or without any, shard the same way: weights
    that only the first process has loaded (`fsdp_cpu_ram_efficient_loading`) reach the others here.
    """
    if is_sharding_launch() and not is_sharded(model):
        fsdp2_prepare_model(Accelerator(), model)


def reshard(model: nn.Module) -> None:
    """Let go of weights that are still whole after a forward, so that every parameter is its `DTensor` again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gather(tensor: Tensor) -> Tensor:
    """The whole of a tensor; on all processes together where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def scatter_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same on all processes, sharded like another."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def gather_adapter(model: Any) -> dict[str, Tensor] | None:
    """The active adapter's tensors, whole and on the CPU, by the model's names; `None` where it is not sharded."""
    if not is_sharded(model) or not isinstance(model, PeftModel):
        return None
    reshard(model)
    part = f".{model.active_adapter}."
    return {name: gather(tensor.detach()).cpu() for name, tensor in model.named_parameters() if part in name}


def save_adapter(model: Any, folder: str | os.PathLike) -> None:
    """Write the active adapter, or a model that has none; called on every process, the main one writes."""
    state = gather_adapter(model)
    if PartialState().is_main_process:
        model.save_pretrained(str(folder), state_dict=state)
        card = Path(folder) / "README.md"
        # PEFT's form, with nothing filled in: whoever knows what was trained writes a card, and may never get there.
        if card.is_file() and "# Model Card for Model ID" in card.read_text(encoding="utf-8"):
            card.unlink()


def count_together(number: int, device: torch.device) -> int:
    """The largest of the processes' numbers."""
    largest = torch.tensor(number, device=device)
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    return int(largest)
