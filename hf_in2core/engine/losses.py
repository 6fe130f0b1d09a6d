"""Losses of rows, with logits built at labelled positions only."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F

from hf_in2core.progress import make_bar

from .batches import TokenBatch, iterate_batches, plan_batches, read_token_rows
from .forwards import unwrapped_forward


@contextmanager
def frozen_eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) with every parameter frozen; both are put back as they were."""
    training = [module for module in model.modules() if module.training]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Inputs that require gradients (set for activation checkpointing) would take the backward down to the embeddings.
    with_input_grads = [module for module in model.modules() if module.__dict__.get("_require_grads_hooks")]
    for module in with_input_grads:
        module.disable_input_require_grads()  # type: ignore[operator]
    model.eval()
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module in with_input_grads:
            module.enable_input_require_grads()  # type: ignore[operator]


def compute_token_nll(
    model: nn.Module, batch: TokenBatch, autocast: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """
    Negative log-likelihood of every labelled token; logits are built at labelled positions only.

    The model's own forward is used up to and after its output head, so that every architecture's scaling and
    soft-capping of logits applies: only the head's input is cut to the positions that predict a label.

    Args:
        model (`torch.nn.Module`):
            Causal language model.
        batch ([`TokenBatch`]):
            The batch, on the model's device.
        autocast (`torch.dtype`, *optional*):
            Mixed precision of the forward.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: negative log-likelihoods in nats, shape `[N]`, at least float32, and the
        logits `[N, vocabulary]`.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]

    def keep_labelled(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0]
        return (hidden.reshape(-1, hidden.shape[-1]).index_select(0, batch.positions.to(hidden.device)), *args[1:])

    handle = head.register_forward_pre_hook(keep_labelled)
    try:
        with (
            unwrapped_forward(model),
            torch.autocast(batch.input_ids.device.type, dtype=autocast, enabled=autocast is not None),
        ):
            outputs = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    finally:
        handle.remove()
    logits = outputs.logits
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, batch.targets.to(logits.device), reduction="none"), logits


# Exponent p of n in the weight n^-p of every labelled token of a row with n of them.
_LENGTH_POWERS = {"sum": 0.0, "sqrt": 0.5, "mean": 1.0}


def compute_token_weights(batch: TokenBatch, loss_reduction: str, nll: Tensor) -> Tensor:
    r"""
    Weight `w_t` of each labelled token in its row's loss, which has the value and the gradient of `sum_t w_t nll_t`.

    For a row with `n` labelled tokens

    - `"mean"`: `w_t = 1 / n`
    - `"sum"`: `w_t = 1`
    - `"sqrt"`: `w_t = 1 / sqrt(n)`; gradients of single tokens that point anywhere add up to a length of about
      `sqrt(n)`, so that this is the power of `n` at which such a row's gradient does not grow with its length
    - `"max"`: `w_t = 1` for the token with the largest `nll_t`, the first of those that are equally hard, 0 for all
      others; the gradient of the maximum wherever it has one

    Args:
        batch ([`TokenBatch`]):
            The batch.
        loss_reduction (`str`):
            `"mean"`, `"sum"`, `"sqrt"` or `"max"`.
        nll (`torch.Tensor` of shape `[N]`):
            Negative log-likelihoods of the labelled tokens; only `"max"` looks at their values.

    Returns:
        `torch.Tensor` of shape `[N]`, in the dtype and on the device of `nll`, without a gradient.
    """
    row_of_target = batch.row_of_target.to(nll.device)
    if loss_reduction == "max":
        # By row, as rows of a batch have different numbers of labelled tokens. A NaN marks no token; 0 * NaN is NaN,
        # so that its row's loss still is one.
        nll = nll.detach()
        hardest = nll.new_full((len(batch.rows),), -torch.inf).scatter_reduce(0, row_of_target, nll, "amax")
        positions = torch.arange(len(nll), device=nll.device)
        candidates = torch.where(nll == hardest[row_of_target], positions, len(nll))
        first = positions.new_full((len(batch.rows),), len(nll)).scatter_reduce(0, row_of_target, candidates, "amin")
        return (positions == first[row_of_target]).to(nll.dtype)
    lengths = batch.num_loss_tokens.to(nll.device, nll.dtype)
    return (1.0 / lengths.pow(_LENGTH_POWERS[loss_reduction]))[row_of_target]


class RowLosses(NamedTuple):
    """Losses of prepared rows, in their order."""

    nll: np.ndarray  # float64 [n], summed over the row's labelled tokens, nats
    num_loss_tokens: np.ndarray  # int64 [n]
    num_correct: np.ndarray  # int64 [n], labelled tokens whose most likely prediction is right


@torch.no_grad()
def compute_row_losses(
    model: nn.Module,
    rows: Dataset,
    tokens_per_batch: int = 8192,
    autocast: torch.dtype | None = None,
    description: str | None = None,
) -> RowLosses:
    """
    Summed negative log-likelihood of every prepared row; a forward pass only.

    Args:
        model (`torch.nn.Module`):
            Causal language model, with or without adapter.
        rows (`datasets.Dataset`):
            Prepared rows from [`preparation.prepare_rows`].
        tokens_per_batch (`int`, *optional*, defaults to `8192`):
            Token budget of a batch, padding included.
        autocast (`torch.dtype`, *optional*):
            Mixed precision of the forward.
        description (`str`, *optional*):
            What a progress bar says; there is none by default.

    Returns:
        [`RowLosses`]
    """
    token_rows = read_token_rows(rows)
    vocab_size = model.get_output_embeddings().weight.shape[0]  # type: ignore[operator, union-attr]
    batches = plan_batches(token_rows, tokens_per_batch, vocab_size)
    nll, correct = np.zeros(len(token_rows)), np.zeros(len(token_rows), dtype=np.int64)
    device = model.get_input_embeddings().weight.device  # type: ignore[operator, union-attr]
    bar = make_bar(len(token_rows), description or "", shown=description is not None, brief=True)
    with frozen_eval_mode(model), bar:
        for batch in iterate_batches(token_rows, batches):
            token_nll, logits = compute_token_nll(model, batch.to(device), autocast)
            row_of_target = batch.row_of_target.numpy()
            np.add.at(nll, batch.indices[row_of_target], token_nll.double().cpu().numpy())
            hits = logits.argmax(dim=-1).cpu() == batch.targets
            np.add.at(correct, batch.indices[row_of_target], hits.numpy().astype(np.int64))
            bar.update(len(batch.rows))
    return RowLosses(nll, token_rows.num_loss_tokens, correct)
