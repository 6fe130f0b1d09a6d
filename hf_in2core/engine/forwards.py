"""Forwards of modules replaced for a while: those of recorded linears, and of layers that are checkpointed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


Forward = Callable[..., Any]


def _forward_attribute(module: nn.Module) -> str:
    # accelerate's hooks (`device_map`) have put their own forward into the module: they stay around the replaced one.
    return "_old_forward" if "_hf_hook" in module.__dict__ else "forward"


@contextmanager
def replaced_forwards(forwards: dict[nn.Module, Forward]) -> Iterator[None]:
    """Give modules other forwards; each is put back as it was."""
    originals = [(module, _forward_attribute(module)) for module in forwards]
    previous = [module.__dict__.get(attribute) for module, attribute in originals]
    for (module, attribute), forward in zip(originals, forwards.values(), strict=True):
        setattr(module, attribute, forward)
    try:
        yield
    finally:
        for (module, attribute), own in zip(originals, previous, strict=True):
            if own is None:
                delattr(module, attribute)  # back to the class's
            else:
                setattr(module, attribute, own)


@contextmanager
def unwrapped_forward(model: nn.Module) -> Iterator[None]:
    """
    A model's own forward, without the mixed precision that accelerate has put around it when it was trained here.

    What a pass computes would otherwise hang on whether `.train()` ran in this process.
    """
    original, wrapper = model.__dict__.get("_original_forward"), model.__dict__.get("forward")
    if original is None or wrapper is None:
        yield
        return
    model.forward = original
    try:
        yield
    finally:
        model.forward = wrapper


def find_checkpointable_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a Transformers model that activation checkpointing applies to."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@contextmanager
def checkpointed_layers(model: nn.Module) -> Iterator[None]:
    """
    Activation checkpointing in evaluation mode: a layer keeps its input only, and runs again when its backward comes.

    Transformers checkpoints in training mode alone, where dropout is on as well. A layer whose output needs no
    gradient keeps nothing and does not run again. Each recorded linear runs twice and takes part in the backward once.
    Nothing is drawn at random in either run, and the state of a GPU's generator would be waited for in every layer.
    """

    def make_forward(inner: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            return checkpoint(partial(inner, **kwargs), *args, use_reentrant=False, preserve_rng_state=False)

        return forward

    layers = find_checkpointable_layers(model)
    with replaced_forwards({layer: make_forward(getattr(layer, _forward_attribute(layer))) for layer in layers}):
        yield
