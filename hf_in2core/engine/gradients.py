"""Per-example gradients of an adapter out of one batched backward; their dots, norms and weighted sums.

Every trainable tensor is a block. A block is the weight or bias of an `nn.Linear` (a LoRA `A` or `B`): with input `x`
of shape `[B, T, in]` and output gradient `g` of shape `[B, T, out]`, the per-example gradient of its weight is
`G_k = sum_t g_kt x_kt^T`, shape `[out, in]`. The linear is replaced, for the length of a pass, by a function whose
backward hands `(x, g)` to a reducer, so that no `[n, d]` matrix is ever built and no weight gradient is computed
twice. The backward stops below the lowest block, and layers below it run without a graph.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .batches import TokenBatch
from .blocks import Blocks
from .datainf import compute_coefficients
from .forwards import replaced_forwards
from .losses import compute_token_nll, compute_token_weights, frozen_eval_mode


Reducer = Callable[[str, Tensor, Tensor], None]

# float16 holds nothing below 6e-8: of long rows most gradients would vanish, so the loss is scaled while they pass.
LOSS_SCALE = 2.0**14


class ScaleTooLargeError(Exception):
    """A scaled gradient has left float16; the recorder's scale is smaller now, and the batch has to run again."""


class _RecordedLinear(torch.autograd.Function):
    """A linear whose backward hands its input and output gradient to `record` in place of a weight gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        anchor: Tensor,
        record: Callable[[Tensor, Tensor], None],
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
        half = torch.float16 in (autocast, getattr(model, "dtype", None))
        self.loss_scale = LOSS_SCALE if half else 1.0
        self._fits: Tensor | None = None

    def __enter__(self) -> GradientRecorder:
        by_module: dict[nn.Linear, list[str]] = {}
        for name, block in self.blocks.items():
            by_module.setdefault(block.module, []).append(name)
        self._entered = ExitStack()
        self._entered.enter_context(frozen_eval_mode(self.model))
        forwards = {module: self._make_forward(module, names) for module, names in by_module.items()}
        self._entered.enter_context(replaced_forwards(forwards))  # type: ignore[arg-type]
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._entered.close()

    def _make_forward(self, module: nn.Linear, names: list[str]) -> Callable[[Tensor], Tensor]:
        def record(x: Tensor, grad_output: Tensor) -> None:
            for name in names:
                self._record(name, x, grad_output)

        def forward(x: Tensor) -> Tensor:
            anchor = self._anchor.to(x.device)
            return _RecordedLinear.apply(x, module.weight, module.bias, anchor, record)

        return forward

    def _record(self, name: str, x: Tensor, grad_output: Tensor) -> None:
        rows, tokens = self._batch_shape
        if x.dim() == 2 and len(x) == rows * tokens:
            # Flattened before the linear (OPT, shared experts): the order of the tokens is the batch's.
            x, grad_output = x.reshape(rows, tokens, -1), grad_output.reshape(rows, tokens, -1)
        elif x.dim() > 3 and len(x) == rows:
            # Heads or parts of a token between rows and features (latent attention).
            x, grad_output = x.flatten(1, -2), grad_output.flatten(1, -2)
        elif tuple(x.shape[:-1]) != self._batch_shape:
            raise ValueError(
                f"`{name}` received an input of shape {tuple(x.shape)} where [batch, tokens, features] = "
                f"[{rows}, {tokens}, {x.shape[-1]}] was expected: its rows cannot be told apart, so it has no "
                "per-example gradient. Leave this module out of `target_modules`."
            )
        self._recorded[name] = self._recorded.get(name, 0) + 1
        if self.loss_scale != 1.0:
            fits = torch.isfinite(grad_output).all()
            self._fits = fits if self._fits is None else self._fits & fits.to(self._fits.device)
            grad_output = grad_output.to(self.accumulation_dtype) / self.loss_scale
        if self.blocks[name].parameter == "bias":
            x = x.new_ones(1).expand(*x.shape[:-1], 1)
        if self._reducer is not None:
            self._reducer(name, x, grad_output)

    def _check_scale(self) -> None:
        if self._fits is not None and self.loss_scale > 1.0 and not bool(self._fits):
            self.loss_scale = max(self.loss_scale / 16, 1.0)
            raise ScaleTooLargeError

    def run(self, batch: TokenBatch, loss_reduction: str, reducer: Reducer) -> Tensor:
        """
        One forward and backward of the sum of the per-example losses of `batch`.

        Args:
            batch ([`TokenBatch`]):
                The batch, on any device.
            loss_reduction (`str`):
                `"mean"`, `"sum"`, `"sqrt"` or `"max"`: the per-example loss from the losses of its labelled
                tokens, see [`losses.compute_token_weights`].
            reducer (`Callable`):
                Called once per block with the block's name, its input `[B, T, in]` and its output gradient
                `[B, T, out]`; it must not keep them.

        Returns:
            `torch.Tensor` of shape `[B]`: per-example losses, detached.

        Raises:
            ScaleTooLargeError: if a gradient has left float16; the same call again has a smaller scale.
            ValueError: if a loss is not finite (the rows are named), or if a block took no part in the backward or
                took part more than once.
        """
        batch = batch.to(self.device)
        self._batch_shape = (batch.input_ids.shape[0], batch.input_ids.shape[1])
        self._reducer = reducer
        self._recorded.clear()
        self._fits = None
        with torch.enable_grad():
            nll, _ = compute_token_nll(self.model, batch, self.autocast)
            weights = compute_token_weights(batch, loss_reduction, nll)
            weighted = nll * weights
            losses = torch.zeros(len(batch.rows), dtype=nll.dtype, device=nll.device)
            losses = losses.index_add(0, batch.row_of_target.to(nll.device), weighted.detach())
            if not torch.isfinite(losses).all():
                bad = batch.rows[(~torch.isfinite(losses)).cpu().numpy()]
                raise ValueError(
                    f"The loss of row(s) {bad.tolist()[:10]} is not finite, so their gradients cannot be used. Look "
                    "at these rows, or run the influence passes in float32 (`bf16=False`, `fp16=False`)."
                )
            if weighted.requires_grad:  # else no block took part, which is reported below
                (weighted.sum() * self.loss_scale).backward()
            self._check_scale()
        wrong = [name for name in self.blocks if self._recorded.get(name, 0) != 1]
        if wrong:
            raise ValueError(
                f"{len(wrong)} trainable tensors took part in the backward pass "
                f"{self._recorded.get(wrong[0], 0)} times where once was expected, first of them `{wrong[0]}`: the "
                "adapter may be merged or disabled, or the module is bypassed or called repeatedly. Unmerge and "
                "enable the adapter, or leave these modules out of `target_modules`."
            )
        return losses


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
    weighted_slope: Tensor  # [Q, out, in], minus its derivative with respect to the damping
    error_weight: Tensor  # [Q], see compute_inner_damping_error


def compute_fit_terms(
    recorder: GradientRecorder,
    batch: TokenBatch,
    loss_reduction: str,
    validation_gradients: dict[str, Tensor],
    damping: dict[str, float],
    keep: Callable[[str, Tensor], None] | None = None,
) -> dict[str, FitTerms]:
    """
    The terms of DataInf's sum over training examples for one batch.

    Args:
        recorder ([`GradientRecorder`]):
            An entered recorder.
        batch ([`TokenBatch`]):
            Training rows.
        loss_reduction (`str`):
            `"mean"`, `"sum"`, `"sqrt"` or `"max"`.
        validation_gradients (`dict[str, torch.Tensor]`):
            `v`, shape `[Q, out, in]` per block.
        damping (`dict[str, float]`):
            Damping of each block inside the fraction (the pilot's).
        keep (`Callable`, *optional*):
            Called with each block's name and its per-example gradients, `[B, out * in]`.

    Returns:
        `dict[str, FitTerms]`
    """
    terms: dict[str, FitTerms] = {}

    def reduce(name: str, x: Tensor, grad_output: Tensor) -> None:
        v = validation_gradients[name]
        gradients = compute_per_example_gradients(x, grad_output, v.dtype).flatten(1)
        if keep is not None:
            keep(name, gradients)
        terms[name] = compute_block_fit_terms(gradients, v, damping[name])

    recorder.run(batch, loss_reduction, reduce)
    return terms


def compute_block_fit_terms(gradients: Tensor, v: Tensor, damping: float) -> FitTerms:
    """The same terms for one block, from its per-example gradients `[B, out * in]` and `v` `[Q, out, in]`."""
    square_norms = torch.linalg.vector_norm(gradients, dim=1).square()
    dots = gradients @ v.flatten(1).T
    coefficients = compute_coefficients(dots, square_norms, damping)
    inverse = compute_coefficients(torch.ones_like(dots), square_norms, damping)
    slopes = coefficients * inverse
    error_weight = (slopes.abs() * inverse * square_norms.sqrt()[:, None]).sum(0)
    sums = torch.cat([coefficients, slopes], dim=1).T @ gradients
    weighted_sum, weighted_slope = sums.view(2, *v.shape)
    return FitTerms(square_norms, weighted_sum, weighted_slope, error_weight)


def compute_square_norms(recorder: GradientRecorder, batch: TokenBatch, loss_reduction: str) -> dict[str, Tensor]:
    """Squared norms of the per-example gradients of a batch, shape `[B]` per block."""
    norms: dict[str, Tensor] = {}

    def reduce(name: str, x: Tensor, grad_output: Tensor) -> None:
        norms[name] = (
            compute_per_example_gradients(x, grad_output, recorder.accumulation_dtype).square().sum(dim=(1, 2))
        )

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

    Args:
        recorder ([`GradientRecorder`]):
            An entered recorder.
        batch ([`TokenBatch`]):
            The rows.
        loss_reduction (`str`):
            `"mean"`, `"sum"`, `"sqrt"` or `"max"`.
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
        block_dots, block_norms = compute_block_dots(x, grad_output, u, with_norms)
        device_dots += block_dots
        if block_norms is not None:
            device_norms += block_norms

    recorder.run(batch, loss_reduction, reduce)
    # Layers of one model can lie on several devices (`device_map`).
    total_dots = torch.stack([device_dots.cpu() for device_dots, _ in per_device.values()]).sum(0)
    total_norms = torch.stack([device_norms.cpu() for _, device_norms in per_device.values()]).sum(0)
    return total_dots, total_norms if with_norms else None


def compute_block_dots(
    x: Tensor, grad_output: Tensor, u: Tensor, with_norms: bool = False
) -> tuple[Tensor, Tensor | None]:
    """
    Dot products of the per-example gradients of one block with `Q` directions.

    With one direction `U` no per-example gradient is formed: `<U, G_k> = sum_t g_kt . (U x_kt)`, one thin matrix
    product on the smaller side.

    Args:
        x (`torch.Tensor` of shape `[B, T, in]`):
            Input of the linear.
        grad_output (`torch.Tensor` of shape `[B, T, out]`):
            Gradient of the summed loss with respect to its output.
        u (`torch.Tensor` of shape `[Q, out, in]`):
            Directions.
        with_norms (`bool`, *optional*, defaults to `False`):
            Whether to return the squared norms of the per-example gradients too.

    Returns:
        `tuple[torch.Tensor, torch.Tensor | None]`: dots `[B, Q]` and squared norms `[B]` (or `None`), in the dtype of
        the directions.
    """
    if u.shape[0] == 1 and not with_norms:
        x, grad_output = x.to(u.dtype), grad_output.to(u.dtype)
        a_side = u.shape[1] <= u.shape[2]  # the product that ends on the smaller side
        products = (x @ u[0].T).mul_(grad_output) if a_side else (grad_output @ u[0]).mul_(x)
        return products.sum(dim=(1, 2))[:, None], None
    gradients = compute_per_example_gradients(x, grad_output, u.dtype).flatten(1)
    dots = gradients @ u.flatten(1).T
    return dots, torch.linalg.vector_norm(gradients, dim=1).square() if with_norms else None
