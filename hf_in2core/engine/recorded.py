"""Forwards of modules whose backward hands over what the gradients of their parameters are made of."""

from collections.abc import Callable
from copy import copy
from functools import cache
from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, nn
from torch.nn import functional as F

from .forwards import Forward


Record = Callable[[Tensor, Tensor], None]


@cache
def _find_anchor(device: torch.device) -> Tensor:
    """What makes outputs require a gradient though no parameter does; it never gets one itself."""
    return torch.ones((), requires_grad=True, device=device)


class _RecordedLinear(torch.autograd.Function):
    """A linear whose backward hands its input and output gradient to `record` in place of a weight gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        anchor: Tensor,
        record: Record,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.record = record
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        x, weight = ctx.saved_tensors
        ctx.record(x, grad_output)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_output.matmul(weight.to(grad_output.dtype)).to(x.dtype)
        return grad_x, None, None, None, None


class _RecordedOutput(torch.autograd.Function):
    """The output of a module as it is, whose gradient is handed to `record` on its way, after what was `seen`."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, seen: Tensor, anchor: Tensor, record: Record) -> Tensor:
        ctx.save_for_backward(seen)
        ctx.record = record
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.record(*ctx.saved_tensors, grad_output)
        return grad_output, None, None, None


def record_output(output: Tensor, seen: Tensor, record: Record) -> Tensor:
    """The output of a module; the backward hands what was `seen` and the output's gradient to `record`."""
    return _RecordedOutput.apply(output, seen.detach(), _find_anchor(output.device), record)


def make_linear_forward(module: nn.Linear, kept: Tensor | None, record: Record) -> Forward:
    """Of a linear, with its input and output gradient recorded; by the `kept` weight, where it is not its own."""

    def forward(x: Tensor) -> Tensor:
        weight = module.weight.detach() if kept is None else kept
        return _RecordedLinear.apply(x, weight, module.bias, _find_anchor(x.device), record)

    return forward


def make_embedding_forward(module: nn.Module, record: Record) -> Forward:
    """Of an embedding or what PEFT has made of it, with its ids and output gradient recorded."""
    embed = module.forward

    def forward(ids: Tensor) -> Tensor:
        return record_output(embed(ids), ids, record)

    return forward


def make_dora_forward(module: DoraLinearLayer, dtype: torch.dtype, record: Record) -> Forward:
    """
    Of DoRA's part of a linear, `m * y - base` where the base gives `base`: the magnitudes `m` scale what has norm one.

    Recorded are `y` and its product with the output gradient, which sums to the gradient of `m`.
    """
    add = module.forward
    magnitude: Tensor = module.weight  # type: ignore[assignment]

    def multiply(y: Tensor, grad_output: Tensor) -> None:
        record(y, grad_output.to(dtype) * y.to(dtype))

    def forward(x: Tensor, *, base_layer: nn.Linear, base_result: Tensor, **kwargs: Any) -> Tensor:
        result = add(x, base_layer=base_layer, base_result=base_result, **kwargs)
        output = base_result.detach() + result.detach()
        if base_layer.bias is not None:  # which DoRA does not scale
            output = output - base_layer.bias.detach()
        return record_output(result, output / magnitude.detach(), multiply)

    return forward


def make_norm_forward(module: nn.Module, dtype: torch.dtype, records: dict[str, Record]) -> Forward:
    """
    Of a norm, `w * y + b` or `(1 + w) * y`, whose vectors have the gradients `sum_t g_t * y_t` and `sum_t g_t`.

    `y` comes from the module itself, as the difference that a weight of one makes; so does what it adds to the weight.

    Args:
        module (`torch.nn.Module`):
            The norm.
        dtype (`torch.dtype`):
            Dtype of the products.
        records (`dict[str, Callable]`):
            Who is told of the input and of these products, for the `"weight"` and the `"bias"`.
    """
    original = module.forward

    def normalise(x: Tensor, weight: float) -> Tensor:
        plain = copy(module)
        values = {"weight": weight, "bias": 0.0}
        plain.__dict__["_parameters"] = {
            name: None if tensor is None else torch.full_like(tensor, values[name])
            for name, tensor in module._parameters.items()
        }
        return type(module).forward(plain, x)

    def record(x: Tensor, grad_output: Tensor) -> None:
        if "weight" in records:
            y = normalise(x, 1.0).to(dtype) - normalise(x, 0.0).to(dtype)
            records["weight"](y, grad_output.to(dtype) * y)
        if "bias" in records:
            records["bias"](x, grad_output)

    return lambda x: record_output(original(x), x, record)
