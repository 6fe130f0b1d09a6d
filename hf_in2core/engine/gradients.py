"""Per-example gradients of an adapter out of one batched backward.

Every trainable tensor is a block. Most are the weight or bias of an `nn.Linear` (a LoRA `A` or `B`): with input `x`
of shape `[B, T, in]` and output gradient `g` of shape `[B, T, out]`, the per-example gradient of its weight is
`G_k = sum_t g_kt x_kt^T`, shape `[out, in]`. The linear is replaced, for the length of a pass, by a function whose
backward hands `(x, g)` to a reducer, so that no `[n, d]` matrix is ever built and no weight gradient is computed
twice. The backward stops below the lowest block, and layers below it run without a graph.

The output head and the input embedding have a row for every token of the vocabulary, so that the gradients of a batch
would be as many copies of the largest matrix of the model: they are handed over one example after the other, the
head's summed over the chunks of its logits, the embedding's at the tokens of the example alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import Embedding as LoraEmbedding
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from torch import Tensor, nn
from torch.nn import functional as F

from .batches import TokenBatch
from .blocks import Block, Blocks, explain_idle_blocks
from .experts import Records, make_parameter_forwards
from .forwards import Forward, replaced_forwards
from .losses import (
    compute_token_nll,
    compute_token_weights,
    differentiate_head,
    frozen_eval_mode,
    has_plain_head,
    run_to_head,
)
from .recorded import Record, make_dora_forward, make_embedding_forward, make_linear_forward, make_norm_forward
from .sharding import is_sharded
from .vocabulary import HeadRows, iterate_embedding_rows, mark_tokens


class Gradients(NamedTuple):
    """
    What the backward hands over of the per-example gradients of a block; [`form_gradients`] makes them of it.

    Attributes:
        x (`torch.Tensor`):
            Input of the linear, `[B, T, in]`. Of a vocabulary's matrix, the gradient itself at some of its tokens,
            `[1, m, in]`.
        grad_output (`torch.Tensor`, *optional*):
            Gradient of the summed loss with respect to the output of the linear, `[B, T, out]`; `None` of a
            vocabulary's matrix.
        row (`int`, *optional*):
            Which row of the batch it is, where there is a call for each of them, in their order; `None` for all.
        tokens (`torch.Tensor`, *optional*):
            Rows of the matrix that `x` has, `[m]`; the gradient is zero in all others. `None` for all.
    """

    x: Tensor
    grad_output: Tensor | None
    row: int | None = None
    tokens: Tensor | None = None


Reducer = Callable[[str, Gradients], None]
Transform = Callable[[str, Tensor], Tensor]

# float16 holds nothing below 6e-8: of long rows most gradients would vanish, so the loss is scaled while they pass.
LOSS_SCALE = 2.0**14


class ScaleTooLargeError(Exception):
    """A scaled gradient has left float16; the recorder's scale is smaller now, and the batch has to run again."""


class GradientRecorder:
    """
    Runs batches forward and backward with the blocks' modules replaced, feeding a reducer.

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
        transform (`Callable`, *optional*):
            Called with a block's name and its per-example gradients, `[B, out, in]`; what it returns, of that shape,
            is handed to the reducer in their place.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Blocks,
        autocast: torch.dtype | None = None,
        transform: Transform | None = None,
    ) -> None:
        self.model = model
        self.blocks = blocks
        self.autocast = autocast
        self.transform = transform
        first = next(iter(blocks.values())).tensor
        self.device = first.device
        self.accumulation_dtype = accumulation_dtype(first)
        self.sharded = is_sharded(model)
        self._plain_head: bool | None = None
        self._batch_shape: tuple[int, int] = (0, 0)
        self._head_rows: dict[str, HeadRows] = {}
        self._reducer: Reducer | None = None
        self._recorded: dict[str, int] = {}
        half = torch.float16 in (autocast, getattr(model, "dtype", None))
        self.loss_scale = LOSS_SCALE if half else 1.0
        self._fits: Tensor | None = None

    def __enter__(self) -> GradientRecorder:
        by_module: dict[nn.Module, list[str]] = {}
        for name, block in self.blocks.items():
            by_module.setdefault(block.module, []).append(name)
            if block.kind == "tied":
                by_module.setdefault(self.model.get_output_embeddings(), []).append(name)  # type: ignore[operator]
        self._entered = ExitStack()
        self._entered.enter_context(frozen_eval_mode(self.model))
        if self.autocast is not None:
            # The adapter's input is cast by autocast; PEFT would keep a float32 copy of it for the backward.
            self._entered.enter_context(disable_input_dtype_casting(self.model))
        wrappers = {module: by_module.pop(module) for module in list(by_module) if isinstance(module, ParamWrapper)}
        forwards = {module: self._make_forward(module, names) for module, names in by_module.items()}
        records: Records = {
            wrapper: {self.blocks[name].parameter.partition(".")[0]: partial(self._record, name) for name in names}
            for wrapper, names in wrappers.items()
        }
        forwards |= make_parameter_forwards(self.model, records)
        self._entered.enter_context(replaced_forwards(forwards))
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._entered.close()

    def _make_forward(self, module: nn.Module, names: list[str]) -> Forward:
        def record(seen: Tensor, grad_output: Tensor) -> None:
            for name in names:
                self._record(name, seen, grad_output)

        if isinstance(module, DoraLinearLayer):
            return make_dora_forward(module, self.accumulation_dtype, record)
        if self.blocks[names[0]].kind == "norm":
            records: dict[str, Record] = {self.blocks[name].parameter: partial(self._record, name) for name in names}
            return make_norm_forward(module, self.accumulation_dtype, records)
        if not isinstance(module, nn.Linear):
            return make_embedding_forward(module, partial(self._record_embedding, names))
        # The weights stand still while gradients are recorded: autocast need not cast them in every forward. Where
        # they are sharded, the module has a whole one within the forward of its layer only.
        kept = None if self.sharded else module.weight
        if kept is not None and self.autocast is not None:
            kept = kept.detach().to(self.autocast)
        return make_linear_forward(module, kept, record)

    def _record(self, name: str, x: Tensor, grad_output: Tensor) -> None:
        rows, tokens = self._batch_shape
        block = self.blocks[name]
        if block.kind in ("head", "tied"):  # of the labelled tokens alone
            pass
        elif x.dim() > 1 and len(x) == rows * tokens or x.dim() > 3 and len(x) == rows:
            # Flattened before the linear (OPT, shared experts): the order of the tokens is the batch's. Heads, parts
            # of a token or its experts may stand between rows and features.
            x, grad_output = (part.reshape(rows, -1, part.shape[-1]) for part in (x, grad_output))
        elif tuple(x.shape[:-1]) != self._batch_shape:
            raise ValueError(
                f"`{name}` received an input of shape {tuple(x.shape)} where [batch, tokens, features] = "
                f"[{rows}, {tokens}, {x.shape[-1]}] was expected: its rows cannot be told apart, so it has no "
                "per-example gradient. Leave this module out of `target_modules`."
            )
        grad_output = self._unscale(grad_output)
        if block.tensor.dim() == 1:  # a bias, or what is multiplied into its gradient already
            x = x.new_ones(1).expand(*x.shape[:-1], 1)
        if block.kind == "tied":
            self._head_parts.append((x, grad_output))
        elif block.kind == "head":
            found = self._head_rows[name].add(x, grad_output, self.accumulation_dtype)
            self._hand_over(name, (Gradients(values[None], None, row) for row, values in found))
        else:
            self._hand_over(name, [Gradients(x, grad_output)])

    def _record_embedding(self, names: list[str], ids: Tensor, grad_output: Tensor) -> None:
        if tuple(ids.shape) != self._batch_shape:
            raise ValueError(
                f"`{names[0]}` received ids of shape {tuple(ids.shape)} where [batch, tokens] = "
                f"{list(self._batch_shape)} was expected: its rows cannot be told apart, so it has no per-example "
                "gradient. Leave this module out of `modules_to_save` and `target_modules`."
            )
        grad_output = self._unscale(grad_output)
        for name in names:
            self._hand_over(name, self._find_embedding_gradients(self.blocks[name], ids, grad_output))

    def _find_embedding_gradients(self, block: Block, ids: Tensor, grad_output: Tensor) -> Iterator[Gradients]:
        module, dtype = block.module, self.accumulation_dtype
        base: Any = module if isinstance(module, nn.Embedding) else module.get_base_layer()  # type: ignore[operator]
        if isinstance(module, TrainableTokensLayer):
            chosen = module.token_indices[block.parameter.rpartition(".")[2]]
            yield Gradients(grad_output, mark_tokens(ids, chosen, base.padding_idx, dtype))
        elif isinstance(module, nn.Embedding):
            grad_output = grad_output * getattr(base, "embed_scale", 1.0)
            found = iterate_embedding_rows(ids, grad_output, base.padding_idx, dtype)
            heads = self._iterate_head_parts() if block.kind == "tied" else None
            for row, (tokens, values) in enumerate(found):
                if heads is None:
                    yield Gradients(values[None], None, row, tokens)
                else:
                    yield Gradients(next(heads).index_add_(0, tokens, values)[None], None, row)
        else:
            assert isinstance(module, LoraEmbedding)
            field, _, adapter = block.parameter.rpartition(".")
            a, b = (weights[adapter].detach() for weights in (module.lora_embedding_A, module.lora_embedding_B))
            if field == "lora_embedding_B":
                yield Gradients(F.embedding(ids, a.T) * module.scaling[adapter], grad_output)
                return
            inner = (grad_output.to(dtype) @ b.to(dtype)) * module.scaling[adapter]
            found = iterate_embedding_rows(ids, inner, base.padding_idx, dtype)
            for row, (tokens, values) in enumerate(found):
                # A column for every token; as thin as A is, a row of the batch has it whole.
                yield Gradients(values.new_zeros(a.shape).index_add_(1, tokens, values.T)[None], None, row)

    def _iterate_head_parts(self) -> Iterator[Tensor]:
        """Gradients of the rows of a tied matrix as the head, which the backward has come through before."""
        rows = HeadRows(self._ends)
        for x, grad_output in self._head_parts:
            yield from (values for _, values in rows.add(x, grad_output, self.accumulation_dtype))

    def _unscale(self, grad_output: Tensor) -> Tensor:
        if self.loss_scale == 1.0:
            return grad_output
        fits = torch.isfinite(grad_output).all()
        self._fits = fits if self._fits is None else self._fits & fits.to(self._fits.device)
        return grad_output.to(self.accumulation_dtype) / self.loss_scale

    def _hand_over(self, name: str, found: Iterable[Gradients]) -> None:
        for gradients in found:
            if not gradients.row:  # all rows, or the first of them
                self._recorded[name] = self._recorded.get(name, 0) + 1
            if self._reducer is not None and self.transform is not None:
                formed = self.transform(name, form_gradients(gradients, self.accumulation_dtype))
                self._reducer(name, Gradients(formed, None, gradients.row))
            elif self._reducer is not None:
                self._reducer(name, gradients)

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
                Called with a block's name and its [`Gradients`], which it must not keep: once per block, or once per
                block and row for the matrices of a vocabulary.

        Returns:
            `torch.Tensor` of shape `[B]`: per-example losses, detached; look at them with [`check_finite`].

        Raises:
            ScaleTooLargeError: if a gradient has left float16; the same call again has a smaller scale.
            ValueError: if a block took no part in the backward or took part more than once.
        """
        self._ends = np.cumsum(batch.num_loss_tokens.cpu().numpy()).tolist()
        self._head_rows = {name: HeadRows(self._ends) for name, block in self.blocks.items() if block.kind == "head"}
        self._head_parts: list[tuple[Tensor, Tensor]] = []
        batch = batch.to(self.device)
        self._batch_shape = (batch.input_ids.shape[0], batch.input_ids.shape[1])
        self._reducer = reducer
        self._recorded.clear()
        self._fits = None
        with torch.enable_grad():
            nll, weights = self._run_backward(batch, loss_reduction)
        self._check_scale()
        wrong = [name for name in self.blocks if self._recorded.get(name, 0) != 1]
        if wrong:
            raise ValueError(
                f"{len(wrong)} trainable tensors took part in the backward pass "
                f"{self._recorded.get(wrong[0], 0)} times where once was expected, first of them `{wrong[0]}`: "
                + explain_idle_blocks(wrong)
            )
        losses = torch.zeros(len(batch.rows), dtype=nll.dtype, device=nll.device)
        return losses.index_add_(0, batch.row_of_target.to(nll.device), nll * weights)

    def _run_backward(self, batch: TokenBatch, loss_reduction: str) -> tuple[Tensor, Tensor]:
        """Losses and weights of the labelled tokens, detached, the backward done."""
        if self._plain_head is None:
            self._plain_head = has_plain_head(self.model, self.autocast)
        # Where nothing requires a gradient no block took part, which is reported below.
        if self._plain_head:
            hidden = run_to_head(self.model, batch, self.autocast)
            nll, weights, gradient = differentiate_head(
                self.model, hidden, batch, loss_reduction, self.autocast, self.loss_scale
            )
            if hidden.requires_grad:
                hidden.backward(gradient)
            return nll, weights
        nll = compute_token_nll(self.model, batch, self.autocast)[0]  # the logits go before the backward comes
        weights = compute_token_weights(batch, loss_reduction, nll)
        if nll.requires_grad:
            ((nll * weights).sum() * self.loss_scale).backward()
        return nll.detach(), weights


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
    if x.is_cuda and x.dtype == grad_output.dtype and x.dtype in (torch.bfloat16, torch.float16):
        return torch.bmm(grad_output.transpose(1, 2), x, out_dtype=dtype)  # summed in float32, without copies in it
    return torch.bmm(grad_output.to(dtype).transpose(1, 2), x.to(dtype))


def form_gradients(gradients: Gradients, dtype: torch.dtype) -> Tensor:
    """Per-example gradients, `[B, out, in]`, or those of one row at some tokens of a vocabulary, `[1, m, in]`."""
    if gradients.grad_output is None:
        return gradients.x.to(dtype)
    return compute_per_example_gradients(gradients.x, gradients.grad_output, dtype)


def check_finite(losses: Tensor, values: Tensor, batch: TokenBatch) -> np.ndarray:
    """
    Bring what a batch has given to the CPU, in the one transfer that waits for it, and look whether it is finite.

    Args:
        losses (`torch.Tensor` of shape `[B]`):
            Losses of its rows.
        values (`torch.Tensor` of shape `[B, ...]`):
            What was made of their gradients, any dtype and device.
        batch ([`TokenBatch`]):
            The batch.

    Returns:
        `numpy.ndarray` of shape `[B, ...]`, float64: the values.

    Raises:
        ValueError: naming the rows with a loss, or else a gradient, that is NaN or infinite.
    """
    columns = [losses[:, None], values.flatten(1).to(losses.device)]
    found = torch.cat([column.double() for column in columns], dim=1).cpu().numpy()
    finite = np.isfinite(found)
    for what, bad in (("loss", ~finite[:, 0]), ("gradient", ~finite.all(axis=1))):
        if bad.any():
            raise ValueError(
                f"The {what} of row(s) {batch.rows[bad].tolist()[:10]} is not finite, so they have no influence. Look "
                "at these rows, or run the influence passes in float32 (`bf16=False`, `fp16=False`)."
            )
    return found[:, 1:].reshape(tuple(values.shape))
