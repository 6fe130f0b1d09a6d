"""A check, before the first pass, that the recorded gradients are those of automatic differentiation."""

from contextlib import nullcontext, suppress

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F

from .batches import collate, read_token_rows
from .forwards import checkpointed_layers, unwrapped_forward
from .gradients import GradientRecorder, Gradients, ScaleTooLargeError, form_gradients, frozen_eval_mode
from .passes import Passes
from .sharding import gather, is_sharded, reshard


# Relative error accepted between two ways of computing the same gradient, by precision of the forward. Some models
# compute rotary embeddings and norms in float32, whatever the precision of the rest.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1, torch.int8: 0.1}


def verify_gradients(passes: Passes, prepared: Dataset) -> None:
    """
    Compare the recorded per-example gradients of two rows with plain automatic differentiation, one row at a time.

    Two short rows of different length run as one padded batch through the masked head and the recorded linears, and
    each alone through the model as it is, with full logits. Whatever would break the recording silently (a module
    called in another way, rows mixed within a batch, a head that scales its logits after the fact) shows here.

    Args:
        passes ([`Passes`]):
            The pass to verify.
        prepared (`datasets.Dataset`):
            Prepared rows.

    Raises:
        ValueError: naming the block with the largest difference.
    """
    rows = read_token_rows(prepared, 0, min(len(prepared), 256))
    order = np.argsort(rows.lengths, kind="stable")
    chosen = np.unique([order[0], order[min(len(order) - 1, len(order) // 4)]])
    batch = collate(rows, chosen)
    # Which token is the hardest may hang on rounding, which differs between a batch and a row alone; recording does
    # not depend on it.
    loss_reduction = "sum" if passes.loss_reduction == "max" else passes.loss_reduction
    recorded: dict[str, list[Gradients]] = {}
    with GradientRecorder(passes.model, passes.blocks, passes.autocast) as recorder:
        dtype = recorder.accumulation_dtype

        def reduce(name: str, found: Gradients) -> None:
            gradients = form_gradients(found, dtype)
            recorded.setdefault(name, []).extend(found._replace(x=row, grad_output=None) for row in gradients)

        with checkpointed_layers(passes.model) if passes.is_checkpointed(batch) else nullcontext():
            for _ in range(10):  # a smaller scale each time, which ends at 1
                recorded.clear()
                with suppress(ScaleTooLargeError):
                    recorder.run(batch, loss_reduction, reduce)
                    break
        device = recorder.device
    tolerances = find_tolerances(passes)
    for index, row in enumerate(chosen):
        alone = collate(rows, np.array([row])).to(device)
        expected = differentiate(passes, alone.input_ids, alone.targets, alone.positions, loss_reduction)
        total_norm = torch.stack([gradient.norm().double().cpu() for gradient in expected.values()]).norm()
        for name, gradient in expected.items():
            found = recorded[name][index]
            difference = gradient.view(-1, found.x.shape[1]).to(found.x.dtype, copy=True)
            if found.tokens is None:
                difference -= found.x
            else:
                difference.index_add_(0, found.tokens, found.x, alpha=-1)
            # A block with hardly any gradient is all rounding, and adds as little to the influence.
            error = difference.norm()
            if not float(error) <= tolerances[name] * max(float(gradient.norm()), 0.01 * float(total_norm)):
                raise ValueError(
                    f"The per-example gradient recorded for `{name}` differs from automatic differentiation by "
                    f"{float(error / gradient.norm()):.1e} of its norm (row {rows.row[row]}; at most "
                    f"{tolerances[name]} is accepted): this model or adapter uses the module in a way that cannot be "
                    "recorded. Leave it out of `target_modules`."
                )


def find_tolerances(passes: Passes) -> dict[str, float]:
    """Relative error accepted between two ways of computing the gradient of each block."""
    # The coarsest precision counts. TRL keeps the adapter of a quantised model in bfloat16, and weights in 8 bits
    # round their inputs to as many.
    forward = {passes.autocast or _model_dtype(passes)}
    forward |= {torch.int8} & {parameter.dtype for parameter in passes.model.parameters()}
    return {
        name: max(TOLERANCES[dtype] for dtype in {*forward, block.tensor.dtype})
        for name, block in passes.blocks.items()
    }


def _model_dtype(passes: Passes) -> torch.dtype:
    return next(passes.model.parameters()).dtype if passes.model.dtype is None else passes.model.dtype  # type: ignore[return-value]


def differentiate(
    passes: Passes, input_ids: Tensor, targets: Tensor, positions: Tensor, loss_reduction: str
) -> dict[str, Tensor]:
    """Gradient of the loss of one unpadded row for every block, by the model's own forward with full logits."""
    tensors = {name: block.tensor for name, block in passes.blocks.items()}
    with frozen_eval_mode(passes.model), torch.enable_grad():
        for tensor in tensors.values():
            tensor.requires_grad_(True)
        try:
            with (
                unwrapped_forward(passes.model),
                torch.autocast(input_ids.device.type, dtype=passes.autocast, enabled=passes.autocast is not None),
            ):
                logits = passes.model(input_ids=input_ids, use_cache=False).logits
            logits = logits if logits.dtype == torch.float64 else logits.float()
            losses = F.cross_entropy(
                logits[0, positions.to(logits.device)], targets.to(logits.device), reduction="none"
            )
            loss = losses.mean() if loss_reduction == "mean" else losses.sum()
            if loss_reduction == "sqrt":
                loss = loss / len(losses) ** 0.5
            if is_sharded(passes.model):
                return _differentiate_sharded(passes, loss)
            found = torch.autograd.grad(loss, list(tensors.values()))
        finally:
            for tensor in tensors.values():
                tensor.requires_grad_(False)
    return dict(zip(tensors, found, strict=True))


def _differentiate_sharded(passes: Passes, loss: Tensor) -> dict[str, Tensor]:
    """Gradients for sharded tensors: FSDP reduces them in the backward, to the mean over processes with one row."""
    loss.backward()
    reshard(passes.model)
    found = {name: gather(block.tensor.grad) for name, block in passes.blocks.items()}  # type: ignore[arg-type]
    passes.model.zero_grad(set_to_none=True)
    return found
