"""Per-example gradients of the matrices that have a row for every token of the vocabulary, one example at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor


class HeadRows:
    """
    Gradients of the output head, `G_k = sum_t p_kt h_kt^T`: `p` is the gradient of the logits, `h` the head's input.

    The labelled tokens of a batch come row after row, in chunks that end anywhere: only the row in which a chunk ends
    is kept from one to the next.

    Args:
        ends (`list[int]`):
            One past the last labelled token of each row of the batch.
    """

    def __init__(self, ends: list[int]) -> None:
        self._ends = ends
        self._row = 0
        self._seen = 0
        self._unfinished: Tensor | None = None

    def add(self, x: Tensor, grad_output: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        """
        Take the next chunk.

        Args:
            x (`torch.Tensor` of shape `[n, in]`):
                What the head received at the labelled tokens.
            grad_output (`torch.Tensor` of shape `[n, vocabulary]`):
                Gradient of the summed loss with respect to their logits.
            dtype (`torch.dtype`):
                Dtype of the result and of the sum.

        Returns:
            `Iterator[tuple[int, torch.Tensor]]`: each row of the batch that is complete now, and its gradient
            `[vocabulary, in]`.
        """
        start, end = self._seen, self._seen + len(x)
        while self._row < len(self._ends) and (self._seen < end or self._ends[self._row] <= end):
            stop = min(self._ends[self._row], end)
            part = slice(self._seen - start, stop - start)
            gradient = grad_output[part].to(dtype).T @ x[part].to(dtype)
            if self._unfinished is not None:
                gradient += self._unfinished
                self._unfinished = None
            self._seen = stop
            if stop < self._ends[self._row]:
                self._unfinished = gradient
                return
            row, self._row = self._row, self._row + 1
            yield row, gradient


def iterate_embedding_rows(
    ids: Tensor, grad_output: Tensor, padding_idx: int | None, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor]]:
    """
    Gradients of the input embedding at the tokens of each example, `G_k[i] = sum_{t: id_kt = i} g_kt`; zero elsewhere.

    Args:
        ids (`torch.Tensor` of shape `[B, T]`):
            Token ids.
        grad_output (`torch.Tensor` of shape `[B, T, hidden]`):
            Gradient of the summed loss with respect to their embeddings.
        padding_idx (`int`, *optional*):
            Token whose embedding gets no gradient (`nn.Embedding` leaves it as it is).
        dtype (`torch.dtype`):
            Dtype of the result and of the sum.

    Returns:
        `Iterator[tuple[torch.Tensor, torch.Tensor]]`: for every row the distinct tokens `[m]`, and their gradients
        `[m, hidden]`.
    """
    for row, gradient in zip(ids.cpu(), grad_output.to(dtype), strict=True):  # one transfer for all rows
        tokens, position = row.unique(return_inverse=True)
        tokens, position = tokens.to(gradient.device), position.to(gradient.device)
        values = gradient.new_zeros(len(tokens), gradient.shape[1]).index_add_(0, position, gradient)
        yield tokens, values if padding_idx is None else values * (tokens != padding_idx)[:, None]


def mark_tokens(ids: Tensor, chosen: list[int], padding_idx: int | None, dtype: torch.dtype) -> Tensor:
    """Which of a few tokens stands where, `[B, T, tokens]` of ones and zeros; a padding token nowhere."""
    wanted = torch.tensor([-1 if token == padding_idx else token for token in chosen], device=ids.device)
    return (ids[..., None] == wanted).to(dtype)
