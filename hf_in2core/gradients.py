"""Per-example gradients of an adapter out of one batched backward; their dots, norms and weighted sums.

Every trainable tensor is a block. A block is the weight or bias of an `nn.Linear` (a LoRA `A` or `B`): with input `x`
of shape `[B, T, in]` and output gradient `g` of shape `[B, T, out]`, the per-example gradient of its weight is
`G_k = sum_t g_kt x_kt^T`, shape `[out, in]`. The linear is replaced, for the length of a pass, by a function whose
backward hands `(x, g)` to a reducer, so that no `[n, d]` matrix is ever built and no weight gradient is computed
twice. The backward stops below the lowest block, and layers below it run without a graph.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from .batches import TokenBatch, iterate_batches, plan_batches, read_token_rows
from .datainf import compute_coefficients


class Block(NamedTuple):
    """A trainable tensor: the `parameter` (`"weight"` or `"bias"`) of `module`, in decoder layer `layer`."""

    module: nn.Linear
    parameter: str
    layer: int | None

    @property
    def tensor(self) -> nn.Parameter:
        """The trainable tensor."""
        return getattr(self.module, self.parameter)


Blocks = dict[str, Block]
Reducer = Callable[[str, Tensor, Tensor], None]


def find_blocks(model: nn.Module, adapter_name: str | None = None) -> Blocks:
    """
    List every trainable tensor of the model, refusing those whose per-example gradients cannot be taken.

    Args:
        model (`torch.nn.Module`):
            Model whose trainable tensors have `requires_grad=True`.
        adapter_name (`str`, *optional*):
            Name of the PEFT adapter, left out of the block names so that they do not depend on it.

    Returns:
        `dict[str, Block]`: blocks by name, in the model's order.

    Raises:
        ValueError: if nothing is trainable, or if a trainable tensor is not the weight or bias of an `nn.Linear` that
            sees each row on its own (the tensors are listed by name).
    """
    owners: dict[int, list[tuple[str, nn.Module, str]]] = {}
    refused: dict[str, str] = {}
    blocks: Blocks = {}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    head_modules = set(head.modules()) if head is not None else set()
    unsupported_parents = _find_unsupported_parents(model)
    for module_name, module in model.named_modules():
        for parameter, tensor in module.named_parameters(recurse=False):
            if not tensor.requires_grad:
                continue
            name = f"{module_name}.{parameter}"
            owners.setdefault(id(tensor), []).append((name, module, parameter))
            reason = next((why for parent, why in unsupported_parents.items() if name.startswith(f"{parent}.")), None)
            if reason is None and module in head_modules:
                reason = "part of the output head"
            if reason is None and type(module) is not nn.Linear:
                reason = f"a tensor of {type(module).__name__}, not the weight or bias of an nn.Linear"
            if reason is None:
                blocks[_strip_adapter(name, adapter_name)] = Block(module, parameter, _layer_index(name))
            else:
                refused[name] = reason
    for names in owners.values():
        if len(names) > 1:
            refused.update({name: f"shared with {names[0][0]}" for name, _, _ in names[1:]})
    if refused:
        shown = "\n".join(f"  - {name}: {reason}" for name, reason in list(refused.items())[:10])
        more = f"\n  … and {len(refused) - 10} more" if len(refused) > 10 else ""
        raise ValueError(
            f"{len(refused)} trainable tensors have no per-example gradient here, and leaving them out would make the "
            f"influence wrong:\n{shown}{more}\nUse plain LoRA (or rsLoRA) on linear layers: no DoRA, no LoRA on "
            "embeddings, `lm_head` or `target_parameters`, no `trainable_token_indices`, `modules_to_save` only for "
            "linear layers, and no full fine-tuning."
        )
    if not blocks:
        raise ValueError(
            "No tensor of the model is trainable, so there is no gradient to take the influence of. Pass "
            "`peft_config=LoraConfig(...)`, or load the trained adapter with "
            "`PeftModel.from_pretrained(model, adapter, is_trainable=True)`."
        )
    return blocks


def _find_unsupported_parents(model: nn.Module) -> dict[str, str]:
    """PEFT layers that use their linears in another way than calling them on the layer's input."""
    parents = {}
    for name, module in model.named_modules():
        if type(module).__name__ == "ParamWrapper":
            parents[name] = "LoRA on `target_parameters` (MoE experts), which never calls its matrices as modules"
        for adapter, variant in (getattr(module, "lora_variant", None) or {}).items():
            if getattr(module, "use_dora", {}).get(adapter):
                parents[name] = "DoRA, whose magnitude has no per-example gradient here"
            else:
                parents[name] = f"the LoRA variant {type(variant).__name__}"
    return parents


def _strip_adapter(name: str, adapter_name: str | None) -> str:
    return name if adapter_name is None else name.replace(f".{adapter_name}.", ".")


def _layer_index(name: str) -> int | None:
    match = re.search(r"\.(?:layers|h|blocks|layer)\.(\d+)\.", name)
    return int(match.group(1)) if match else None


def select_blocks(blocks: Blocks, influence_layers: str | list[int] | None, num_layers: int) -> Blocks:
    """
    Keep the blocks of some decoder layers (In2Core's layer reduction).

    Args:
        blocks (`dict[str, Block]`):
            Blocks from [`find_blocks`].
        influence_layers (`str` or `list[int]` or `None`):
            `None` for all, `"last:8"` or `"first:8"`, or a list of layer indices (negative ones count from the end).
        num_layers (`int`):
            Number of decoder layers of the model.

    Returns:
        `dict[str, Block]`: the selected blocks, in the same order.

    Raises:
        ValueError: if a layer does not exist or carries no block.
    """
    if influence_layers is None:
        return blocks
    if isinstance(influence_layers, str):
        end, _, count = influence_layers.partition(":")
        chosen = list(range(num_layers))
        chosen = chosen[-int(count) :] if end == "last" else chosen[: int(count)]
    else:
        chosen = [layer + num_layers if layer < 0 else layer for layer in influence_layers]
    missing = sorted(set(chosen) - {block.layer for block in blocks.values() if block.layer is not None})
    if missing:
        raise ValueError(
            f"`influence_layers={influence_layers!r}` names layers {missing}, which carry no trainable tensor; the "
            f"model has layers 0 to {num_layers - 1}. Choose layers that the adapter covers."
        )
    return {name: block for name, block in blocks.items() if block.layer in set(chosen)}


class _RecordedLinear(torch.autograd.Function):
    """A linear whose backward hands its input and output gradient to `record` in place of a weight gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, anchor: Tensor, record: Callable[[Tensor, Tensor], None]
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


@contextmanager
def frozen_eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) with every parameter frozen; both are put back as they were."""
    training = [module for module in model.modules() if module.training]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Inputs that require gradients (set for activation checkpointing) would take the backward down to the embeddings.
    with_input_grads = [module for module in model.modules() if module.__dict__.get("_require_grads_hooks")]
    for module in with_input_grads:
        module.disable_input_require_grads()
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
            module.enable_input_require_grads()


class GradientRecorder:
    """
    Runs batches forward and backward with the blocks' linears replaced, feeding a reducer.

    Example:

    ```python
    with GradientRecorder(model, blocks) as recorder:
        losses = recorder.run(batch, "mean", reducer)
    ```

    Args:
        model (`torch.nn.Module`):
            Unwrapped causal language model (with its adapter).
        blocks (`dict[str, Block]`):
            Blocks to record.
        autocast (`torch.dtype`, *optional*):
            Mixed precision of the forward, as in training; none by default.
    """

    def __init__(self, model: nn.Module, blocks: Blocks, autocast: torch.dtype | None = None) -> None:
        self.model = model
        self.blocks = blocks
        self.autocast = autocast
        first = next(iter(blocks.values())).tensor
        self.device = first.device
        self.accumulation_dtype = accumulation_dtype(first)
        self._anchor = torch.ones((), requires_grad=True)
        self._batch_shape: tuple[int, int] = (0, 0)
        self._reducer: Reducer | None = None
        self._recorded: dict[str, int] = {}

    def __enter__(self) -> GradientRecorder:
        by_module: dict[nn.Linear, list[str]] = {}
        for name, block in self.blocks.items():
            by_module.setdefault(block.module, []).append(name)
        self._mode = frozen_eval_mode(self.model)
        self._mode.__enter__()
        self._patched = list(by_module)
        for module, names in by_module.items():
            module.forward = self._make_forward(module, names)  # type: ignore[method-assign]
        return self

    def __exit__(self, *exc_info: object) -> None:
        for module in self._patched:
            del module.forward  # back to the class's own
        self._mode.__exit__(None, None, None)

    def _make_forward(self, module: nn.Linear, names: list[str]) -> Callable[[Tensor], Tensor]:
        def record(x: Tensor, grad_output: Tensor) -> None:
            for name in names:
                self._record(name, x, grad_output)

        def forward(x: Tensor) -> Tensor:
            anchor = self._anchor.to(x.device)
            return _RecordedLinear.apply(x, module.weight, module.bias, anchor, record)

        return forward

    def _record(self, name: str, x: Tensor, grad_output: Tensor) -> None:
        if tuple(x.shape[:-1]) != self._batch_shape:
            raise ValueError(
                f"`{name}` received an input of shape {tuple(x.shape)} where [batch, tokens, features] = "
                f"[{self._batch_shape[0]}, {self._batch_shape[1]}, {x.shape[-1]}] was expected: its rows cannot be "
                "told apart, so it has no per-example gradient. Leave this module out of `target_modules`."
            )
        self._recorded[name] = self._recorded.get(name, 0) + 1
        if self.blocks[name].parameter == "bias":
            x = x.new_ones(1).expand(*x.shape[:-1], 1)
        if self._reducer is not None:
            self._reducer(name, x, grad_output)

    def run(self, batch: TokenBatch, loss_reduction: str, reducer: Reducer) -> Tensor:
        """
        One forward and backward of the sum of the per-example losses of `batch`.

        Args:
            batch ([`TokenBatch`]):
                The batch, on any device.
            loss_reduction (`str`):
                `"mean"` (per-example loss = mean over its labelled tokens) or `"sum"`.
            reducer (`Callable`):
                Called once per block with the block's name, its input `[B, T, in]` and its output gradient
                `[B, T, out]`; it must not keep them.

        Returns:
            `torch.Tensor` of shape `[B]`: per-example losses, detached.

        Raises:
            ValueError: if a loss is not finite (the rows are named), or if a block took no part in the backward or
                took part more than once.
        """
        batch = batch.to(self.device)
        self._batch_shape = (batch.input_ids.shape[0], batch.input_ids.shape[1])
        self._reducer = reducer
        self._recorded.clear()
        with torch.enable_grad():
            nll, _ = compute_token_nll(self.model, batch, self.autocast)
            weights = _token_weights(batch, loss_reduction, nll)
            weighted = nll * weights
            losses = torch.zeros(len(batch.rows), dtype=nll.dtype, device=nll.device)
            losses = losses.index_add(0, batch.row_of_target.to(nll.device), weighted.detach())
            if not torch.isfinite(losses).all():
                bad = batch.rows[(~torch.isfinite(losses)).cpu().numpy()]
                raise ValueError(
                    f"The loss of row(s) {bad.tolist()[:10]} is not finite, so their gradients cannot be used. Look at "
                    "these rows, or run the influence passes in float32 (`bf16=False`, `fp16=False`)."
                )
            if weighted.requires_grad:  # else no block took part, which is reported below
                weighted.sum().backward()
        wrong = [name for name in self.blocks if self._recorded.get(name, 0) != 1]
        if wrong:
            raise ValueError(
                f"{len(wrong)} trainable tensors took part in the backward pass "
                f"{self._recorded.get(wrong[0], 0)} times where once was expected, first of them `{wrong[0]}`: the "
                "adapter may be merged or disabled, or the module is bypassed or called repeatedly. Unmerge and enable "
                "the adapter, or leave these modules out of `target_modules`."
            )
        return losses


def _token_weights(batch: TokenBatch, loss_reduction: str, like: Tensor) -> Tensor:
    """Weight of each labelled token in its row's loss, shape `[N]`."""
    if loss_reduction == "sum":
        return torch.ones_like(like)
    return (1.0 / batch.num_loss_tokens.to(like.dtype))[batch.row_of_target].to(like.device)


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
        with torch.autocast(batch.input_ids.device.type, dtype=autocast, enabled=autocast is not None):
            outputs = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    finally:
        handle.remove()
    logits = outputs.logits
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, batch.targets.to(logits.device), reduction="none"), logits


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for float64 tensors, float32 for everything else."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def compute_per_example_gradients(x: Tensor, grad_output: Tensor, dtype: torch.dtype) -> Tensor:
    """
    Per-example gradients of one linear, `G_k = sum_t g_kt x_kt^T`.

    Args:
        x (`torch.Tensor` of shape `[B, T, in]`):
            Input of the linear.
        grad_output (`torch.Tensor` of shape `[B, T, out]`):
            Gradient of the summed loss with respect to its output.
        dtype (`torch.dtype`):
            Dtype of the result and of the sum.

    Returns:
        `torch.Tensor` of shape `[B, out, in]`
    """
    return torch.bmm(grad_output.to(dtype).transpose(1, 2), x.to(dtype))


def compute_gradient_sum(recorder: GradientRecorder, batch: TokenBatch, loss_reduction: str) -> dict[str, Tensor]:
    """
    Sum of the per-example gradients of a batch.

    Returns:
        `dict[str, torch.Tensor]`: `[out, in]` (a bias: `[out, 1]`) per block.
    """
    sums: dict[str, Tensor] = {}

    def reduce(name: str, x: Tensor, grad_output: Tensor) -> None:
        dtype = recorder.accumulation_dtype
        sums[name] = grad_output.to(dtype).flatten(0, 1).T @ x.to(dtype).flatten(0, 1)

    recorder.run(batch, loss_reduction, reduce)
    return sums


class FitTerms(NamedTuple):
    """What one batch adds to the sums of the fit pass, for one block."""

    square_norms: Tensor  # [B]
    weighted_sum: Tensor  # [Q, out, in]
    error_weight: Tensor  # [Q], see compute_inner_damping_error


def compute_fit_terms(
    recorder: GradientRecorder,
    batch: TokenBatch,
    loss_reduction: str,
    validation_gradients: dict[str, Tensor],
    damping: dict[str, float],
) -> dict[str, FitTerms]:
    """
    The terms of DataInf's sum over training examples for one batch.

    Args:
        recorder ([`GradientRecorder`]):
            An entered recorder.
        batch ([`TokenBatch`]):
            Training rows.
        loss_reduction (`str`):
            `"mean"` or `"sum"`.
        validation_gradients (`dict[str, torch.Tensor]`):
            `v`, shape `[Q, out, in]` per block.
        damping (`dict[str, float]`):
            Damping of each block inside the fraction (the pilot's).

    Returns:
        `dict[str, FitTerms]`
    """
    terms: dict[str, FitTerms] = {}

    def reduce(name: str, x: Tensor, grad_output: Tensor) -> None:
        v = validation_gradients[name]
        gradients = compute_per_example_gradients(x, grad_output, v.dtype).flatten(1)
        square_norms = torch.linalg.vector_norm(gradients, dim=1).square()
        dots = gradients @ v.flatten(1).T
        coefficients = compute_coefficients(dots, square_norms, damping[name])
        inverse = compute_coefficients(torch.ones_like(dots), square_norms, damping[name])
        error_weight = (coefficients.abs() * inverse * square_norms.sqrt()[:, None]).sum(0)
        terms[name] = FitTerms(square_norms, (coefficients.T @ gradients).view_as(v), error_weight)

    recorder.run(batch, loss_reduction, reduce)
    return terms


def compute_square_norms(recorder: GradientRecorder, batch: TokenBatch, loss_reduction: str) -> dict[str, Tensor]:
    """Squared norms of the per-example gradients of a batch, shape `[B]` per block."""
    norms: dict[str, Tensor] = {}

    def reduce(name: str, x: Tensor, grad_output: Tensor) -> None:
        norms[name] = compute_per_example_gradients(x, grad_output, recorder.accumulation_dtype).square().sum(dim=(1, 2))

    recorder.run(batch, loss_reduction, reduce)
    return norms


def compute_dots(
    recorder: GradientRecorder,
    batch: TokenBatch,
    loss_reduction: str,
    directions: dict[str, Tensor],
    with_norms: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """
    Dot products of the per-example gradients of a batch with `Q` directions, summed over blocks.

    With one direction `U` no per-example gradient is formed: `<U, G_k> = sum_t g_kt . (U x_kt)`, one thin matrix
    product on the smaller side.

    Args:
        recorder ([`GradientRecorder`]):
            An entered recorder.
        batch ([`TokenBatch`]):
            The rows.
        loss_reduction (`str`):
            `"mean"` or `"sum"`.
        directions (`dict[str, torch.Tensor]`):
            Shape `[Q, out, in]` per block.
        with_norms (`bool`, *optional*, defaults to `False`):
            Whether to return the squared norms of the whole (concatenated) per-example gradients too.

    Returns:
        `tuple[torch.Tensor, torch.Tensor | None]`: dots `[B, Q]` and squared norms `[B]` (or `None`), both float64.
    """
    num_queries = next(iter(directions.values())).shape[0]
    dots = torch.zeros(len(batch.rows), num_queries, dtype=torch.float64)
    square_norms = torch.zeros(len(batch.rows), dtype=torch.float64)
    per_device: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def reduce(name: str, x: Tensor, grad_output: Tensor) -> None:
        u = directions[name]
        if x.device not in per_device:
            per_device[x.device] = (dots.to(x.device), square_norms.to(x.device))
        device_dots, device_norms = per_device[x.device]
        if num_queries == 1 and not with_norms:
            x, grad_output = x.to(u.dtype), grad_output.to(u.dtype)
            if u.shape[1] <= u.shape[2]:
                products = (x @ u[0].T).mul_(grad_output)
            else:
                products = (grad_output @ u[0]).mul_(x)
            device_dots[:, 0] += products.sum(dim=(1, 2))
            return
        gradients = compute_per_example_gradients(x, grad_output, u.dtype).flatten(1)
        device_dots += gradients @ u.flatten(1).T
        if with_norms:
            device_norms += torch.linalg.vector_norm(gradients, dim=1).square()

    recorder.run(batch, loss_reduction, reduce)
    # Layers of one model can lie on several devices (`device_map`).
    total_dots = torch.stack([device_dots.cpu() for device_dots, _ in per_device.values()]).sum(0)
    total_norms = torch.stack([device_norms.cpu() for _, device_norms in per_device.values()]).sum(0)
    return total_dots, total_norms if with_norms else None


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
    progress: bool = False,
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
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.

    Returns:
        [`RowLosses`]
    """
    token_rows = read_token_rows(rows)
    vocab_size = model.get_output_embeddings().weight.shape[0]  # type: ignore[operator, union-attr]
    batches = plan_batches(token_rows, tokens_per_batch, vocab_size)
    nll, correct = np.zeros(len(token_rows)), np.zeros(len(token_rows), dtype=np.int64)
    device = model.get_input_embeddings().weight.device  # type: ignore[operator, union-attr]
    with frozen_eval_mode(model):
        for batch in tqdm(iterate_batches(token_rows, batches), "Loss", total=len(batches), disable=not progress):
            token_nll, logits = compute_token_nll(model, batch.to(device), autocast)
            row_of_target = batch.row_of_target.numpy()
            np.add.at(nll, batch.indices[row_of_target], token_nll.double().cpu().numpy())
            hits = logits.argmax(dim=-1).cpu() == batch.targets
            np.add.at(correct, batch.indices[row_of_target], hits.numpy().astype(np.int64))
    return RowLosses(nll, token_rows.num_loss_tokens, correct)
