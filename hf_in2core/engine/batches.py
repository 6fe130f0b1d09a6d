"""Token batches: rows of a prepared dataset, sorted by length, padded, cut by a token budget."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from torch import Tensor


# In `benchmarks/speed.py` larger batches are slower on a CPU: their activations leave its caches.
CPU_TOKENS = 2048
# For forwards alone on a GPU; where gradients are taken the budget is measured.
GPU_TOKENS = 8192


def choose_forward_tokens(tokens_per_batch: int | None, device: torch.device) -> int:
    """Tokens of a batch in a pass of forwards alone; `tokens_per_batch` where it is given."""
    return tokens_per_batch or (CPU_TOKENS if device.type == "cpu" else GPU_TOKENS)


@dataclass
class TokenRows:
    """
    Rows of a prepared dataset as flat arrays.

    Attributes:
        row (`numpy.ndarray` of shape `[n]`, int64):
            Position of each row in the dataset that was prepared.
        offsets (`numpy.ndarray` of shape `[n + 1]`, int64):
            Row `i` owns tokens `offsets[i]:offsets[i + 1]`.
        input_ids (`numpy.ndarray` of shape `[tokens]`, int64):
            Token ids of all rows, one after the other.
        labels (`numpy.ndarray` of shape `[tokens]`, int64):
            Labels, -100 where a token carries no loss.
    """

    row: np.ndarray
    offsets: np.ndarray
    input_ids: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.row)

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each row, int64 `[n]`."""
        return np.diff(self.offsets)

    @property
    def num_loss_tokens(self) -> np.ndarray:
        """Tokens of each row that carry loss, int64 `[n]`; a label at position 0 has nothing to predict it."""
        labelled = self.labels != -100
        labelled[self.offsets[:-1][self.lengths > 0]] = False
        return np.add.reduceat(np.append(labelled, False).astype(np.int64), self.offsets[:-1]) * (self.lengths > 0)

    def take(self, indices: np.ndarray) -> "TokenRows":
        """The rows at `indices`, in that order."""
        lengths = self.lengths[indices]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        starts = np.repeat(self.offsets[:-1][indices] - offsets[:-1], lengths)
        tokens = starts + np.arange(offsets[-1])
        return TokenRows(self.row[indices], offsets, self.input_ids[tokens], self.labels[tokens])


def read_token_rows(prepared: Dataset, start: int = 0, end: int | None = None) -> TokenRows:
    """
    Read rows `start:end` of a prepared dataset (columns `row`, `input_ids`, `labels`) without building Python lists.

    Args:
        prepared (`datasets.Dataset`):
            Dataset from [`preparation.prepare_rows`].
        start (`int`, *optional*, defaults to `0`):
            First row.
        end (`int`, *optional*):
            One past the last row; all rows by default.

    Returns:
        [`TokenRows`]
    """
    table = prepared.with_format("arrow")[start : len(prepared) if end is None else end]
    input_ids, labels = table["input_ids"], table["labels"]
    lengths = input_ids.combine_chunks().value_lengths().to_numpy(zero_copy_only=False)
    return TokenRows(
        row=table["row"].to_numpy().astype(np.int64),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        input_ids=_flatten(input_ids),
        labels=_flatten(labels),
    )


def read_lengths(prepared: Dataset) -> np.ndarray:
    """Number of tokens of every row, int64 `[n]`, without reading the tokens."""
    parts = [np.zeros(0, dtype=np.int64)]
    for start in range(0, len(prepared), 10_000):
        column = prepared.select_columns(["input_ids"]).with_format("arrow")[start : start + 10_000]["input_ids"]
        parts.append(column.combine_chunks().value_lengths().to_numpy(zero_copy_only=False).astype(np.int64))
    return np.concatenate(parts)


def _flatten(column: pa.ChunkedArray) -> np.ndarray:
    return column.combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(np.int64)


@dataclass
class TokenBatch:
    """
    A right-padded batch, with labels in the form the masked head needs.

    Attributes:
        indices (`numpy.ndarray` of shape `[B]`, int64):
            Position of each row in the [`TokenRows`] the batch was made of.
        rows (`numpy.ndarray` of shape `[B]`, int64):
            Position of each row in the dataset that was prepared, to name it in messages.
        input_ids, attention_mask (`torch.Tensor` of shape `[B, T]`, int64):
            Model inputs.
        positions (`torch.Tensor` of shape `[N]`, int64):
            Positions in the flattened `[B * T]` hidden states that predict a labelled token.
        targets (`torch.Tensor` of shape `[N]`, int64):
            The labelled tokens.
        row_of_target (`torch.Tensor` of shape `[N]`, int64):
            Which row of the batch each target belongs to.
        num_loss_tokens (`torch.Tensor` of shape `[B]`, int64):
            Labelled tokens of each row.
    """

    indices: np.ndarray
    rows: np.ndarray
    input_ids: Tensor
    attention_mask: Tensor
    positions: Tensor
    targets: Tensor
    row_of_target: Tensor
    num_loss_tokens: Tensor

    def to(self, device: torch.device) -> "TokenBatch":
        """The same batch with its tensors on `device`; a GPU does not wait for them."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        if device.type == "cuda" and self.input_ids.device.type == "cpu":
            tensors = {name: value.pin_memory() for name, value in tensors.items()}
        tensors = {name: value.to(device, non_blocking=True) for name, value in tensors.items()}
        return TokenBatch(self.indices, self.rows, **tensors)


def collate(token_rows: TokenRows, indices: np.ndarray) -> TokenBatch:
    """
    Pad the rows at `indices` on the right into a [`TokenBatch`] on the CPU.

    The pad token is token 0: the attention mask hides it, and in a causal model nothing to its left sees it.
    """
    lengths = token_rows.lengths[indices]
    width = int(lengths.max())
    columns = np.arange(width)
    filled = columns[None, :] < lengths[:, None]
    source = token_rows.offsets[:-1][indices][:, None] + columns[None, :]
    source = np.where(filled, source, 0)
    input_ids = np.where(filled, token_rows.input_ids[source], 0)
    labels = np.where(filled, token_rows.labels[source], -100)
    labelled = labels[:, 1:] != -100
    row_of_target, previous = np.nonzero(labelled)
    return TokenBatch(
        indices=indices,
        rows=token_rows.row[indices],
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy(filled.astype(np.int64)),
        positions=torch.from_numpy(row_of_target * width + previous),
        targets=torch.from_numpy(labels[:, 1:][labelled]),
        row_of_target=torch.from_numpy(row_of_target),
        num_loss_tokens=torch.from_numpy(labelled.sum(axis=1)),
    )


def make_dummy_rows() -> TokenRows:
    """One row of two tokens, the second with loss: for a forward that only has to happen."""
    one = np.ones(1, dtype=np.int64)
    # Not token 0, which may be the padding, whose embedding is zero in some models.
    return TokenRows(row=one, offsets=np.array([0, 2]), input_ids=np.array([1, 1]), labels=np.array([-100, 1]))


def plan_batches(token_rows: TokenRows, tokens_per_batch: int, max_loss_tokens: int | None = None) -> list[np.ndarray]:
    """
    Cut rows into batches of at most `tokens_per_batch` tokens, padding included.

    Rows are sorted by length, longest first (a batch that does not fit in memory then fails at once, not after an
    hour), ties by position, so that the batches are a function of the rows alone. A row longer than the budget gets a
    batch of its own. Rows without a loss token are left out.

    Args:
        token_rows ([`TokenRows`]):
            The rows.
        tokens_per_batch (`int`):
            Token budget, padding included.
        max_loss_tokens (`int`, *optional*):
            Labelled tokens of a batch, where the logits of all of them are held at once (see
            [`losses.find_max_loss_tokens`]); without a bound by default.

    Returns:
        `list[numpy.ndarray]`: positions in `token_rows`, one int64 array per batch.
    """
    lengths, num_loss_tokens = token_rows.lengths, token_rows.num_loss_tokens
    order = np.argsort(-lengths, kind="stable")
    order = order[num_loss_tokens[order] > 0]
    most = len(token_rows.labels) if max_loss_tokens is None else max_loss_tokens
    batches: list[np.ndarray] = []
    start, loss_tokens = 0, 0
    for end, index in enumerate(order):
        width = int(lengths[order[start]])
        loss_tokens += int(num_loss_tokens[index])
        if end > start and ((end - start + 1) * width > tokens_per_batch or loss_tokens > most):
            batches.append(order[start:end])
            start, loss_tokens = end, int(num_loss_tokens[index])
    if start < len(order):
        batches.append(order[start:])
    return batches


def iterate_batches(token_rows: TokenRows, batches: list[np.ndarray]) -> Iterator[TokenBatch]:
    """Collate planned batches one by one."""
    for indices in batches:
        yield collate(token_rows, indices)
