"""Losses of rows, with logits built at labelled positions only."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F

from hf_in2core.progress import make_bar

from .batches import (
    TokenBatch,
    choose_forward_tokens,
    collate,
    iterate_batches,
    make_dummy_rows,
    plan_batches,
    read_token_rows,
)
from .forwards import unwrapped_forward
from .sharding import count_together, is_sharded


# Elements of logits that are held at once: 2 GiB in float32 where those of a batch are needed together, and chunks of
# 512 MiB where they are not.
MAX_LOGITS_PER_BATCH = 2**29
MAX_LOGITS_PER_CHUNK = 2**27


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
    hidden: list[Tensor] = []
    logits = _run_model(model, batch, autocast, hidden)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, batch.targets.to(logits.device), reduction="none"), logits


def _run_model(
    model: nn.Module, batch: TokenBatch, autocast: torch.dtype | None, hidden: list[Tensor], only_first: bool = False
) -> Tensor:
    """Logits at the labelled positions, or at the first of them; what the head received at all of them is appended."""
    head = model.get_output_embeddings()  # type: ignore[operator]

    def keep_labelled(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        kept = args[0].reshape(-1, args[0].shape[-1]).index_select(0, batch.positions.to(args[0].device))
        hidden.append(kept)
        return (kept[:1] if only_first else kept, *args[1:])

    handle = head.register_forward_pre_hook(keep_labelled)
    try:
        with unwrapped_forward(model), _mixed_precision(batch.input_ids.device, autocast):
            outputs = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    finally:
        handle.remove()
    return outputs.logits


def _mixed_precision(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


_PLAIN_HEADS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@torch.no_grad()
def has_plain_head(model: nn.Module, autocast: torch.dtype | None) -> bool:
    """
    Whether the model's logits are what its output head returns, so that they may be built chunk by chunk.

    Seen on two tokens, once for a model: some scale the head's output or cap it. Not so where weights are sharded,
    since the head gathers its own within the model's forward only.
    """
    if is_sharded(model):
        return False
    if model in _PLAIN_HEADS:
        return _PLAIN_HEADS[model]
    device = model.get_input_embeddings().weight.device  # type: ignore[operator, union-attr]
    hidden: list[Tensor] = []
    batch = collate(make_dummy_rows(), np.array([0])).to(device)
    with frozen_eval_mode(model), _mixed_precision(device, autocast):
        logits = _run_model(model, batch, autocast, hidden, only_first=True)
        alone = model.get_output_embeddings()(hidden[0][:1])  # type: ignore[operator]
    # Logits that are all zero are equal after any scaling.
    _PLAIN_HEADS[model] = torch.equal(alone.flatten(), logits.flatten()) and bool(logits.any())
    return _PLAIN_HEADS[model]


def find_max_loss_tokens(model: nn.Module, autocast: torch.dtype | None = None, whole: bool = False) -> int | None:
    """Labelled tokens that a batch may have: any number with a plain head, unless logits are needed `whole`."""
    if not whole and has_plain_head(model, autocast):
        return None
    vocab_size = model.get_output_embeddings().weight.shape[0]  # type: ignore[operator, union-attr]
    return max(MAX_LOGITS_PER_BATCH // vocab_size, 1)


def run_to_head(model: nn.Module, batch: TokenBatch, autocast: torch.dtype | None = None) -> Tensor:
    """What the output head receives at the labelled positions, `[N, hidden]`, with its graph."""
    hidden: list[Tensor] = []
    _run_model(model, batch, autocast, hidden, only_first=True)
    return hidden[0]


def differentiate_head(
    model: nn.Module,
    hidden: Tensor,
    batch: TokenBatch,
    loss_reduction: str,
    autocast: torch.dtype | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""
    Losses of the labelled tokens and their gradient with respect to the head's input, with one chunk of logits at a
    time.

    Args:
        model (`torch.nn.Module`):
            Causal language model with a plain head, see [`has_plain_head`].
        hidden (`torch.Tensor` of shape `[N, hidden]`):
            From [`run_to_head`].
        batch ([`TokenBatch`]):
            The batch.
        loss_reduction (`str`):
            See [`compute_token_weights`].
        autocast (`torch.dtype`, *optional*):
            Mixed precision of the head.
        scale (`float`, *optional*, defaults to 1.0):
            Factor of the gradient, which keeps float16 from vanishing.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: losses and weights `[N]`, and the gradient of `scale * sum_t
        w_t nll_t`, `[N, hidden]`.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    size = max(MAX_LOGITS_PER_CHUNK // head.weight.shape[0], 1)
    starts = range(0, len(hidden), size)
    hidden = hidden.detach()

    def compute(part: Tensor, start: int) -> Tensor:
        with _mixed_precision(hidden.device, autocast):
            logits = head(part)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(logits, batch.targets[start : start + size].to(logits.device), reduction="none")

    nll = torch.empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
    if loss_reduction == "max":  # its weights look at the losses of all tokens
        with torch.no_grad():
            for start in starts:
                nll[start : start + size] = compute(hidden[start : start + size], start)
    weights = compute_token_weights(batch, loss_reduction, nll)
    gradients: list[Tensor] = []
    for start in starts:
        part = hidden[start : start + size].requires_grad_()
        with torch.enable_grad():
            losses = compute(part, start)
            loss = (losses * weights[start : start + size].to(losses.device)).sum() * scale
        nll[start : start + size] = losses.detach()
        gradients += torch.autograd.grad(loss, part)
    return nll, weights, torch.cat(gradients)


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
    tokens_per_batch: int | None = None,
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
        tokens_per_batch (`int`, *optional*):
            Token budget of a batch, padding included; by default what suits the device.
        autocast (`torch.dtype`, *optional*):
            Mixed precision of the forward.
        description (`str`, *optional*):
            What a progress bar says; there is none by default.

    Returns:
        [`RowLosses`]
    """
    token_rows = read_token_rows(rows)
    nll, correct = np.zeros(len(token_rows)), np.zeros(len(token_rows), dtype=np.int64)
    device = model.get_input_embeddings().weight.device  # type: ignore[operator, union-attr]
    tokens_per_batch = choose_forward_tokens(tokens_per_batch, device)
    batches = plan_batches(token_rows, tokens_per_batch, find_max_loss_tokens(model, whole=True))
    idle = count_together(len(batches), device) - len(batches) if is_sharded(model) else 0
    bar = make_bar(len(token_rows), description or "", shown=description is not None, brief=True)
    with frozen_eval_mode(model), bar:
        for batch in iterate_batches(token_rows, batches):
            token_nll, logits = compute_token_nll(model, batch.to(device), autocast)
            row_of_target = batch.row_of_target.numpy()
            np.add.at(nll, batch.indices[row_of_target], token_nll.double().cpu().numpy())
            hits = logits.argmax(dim=-1).cpu() == batch.targets
            np.add.at(correct, batch.indices[row_of_target], hits.numpy().astype(np.int64))
            bar.update(len(batch.rows))
        for _ in range(idle):  # other processes need this one's part of the weights
            _run_model(model, collate(make_dummy_rows(), np.array([0])).to(device), autocast, [])
    return RowLosses(nll, token_rows.num_loss_tokens, correct)
