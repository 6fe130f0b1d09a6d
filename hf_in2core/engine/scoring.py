"""The score pass: influence of rows as dot products with fitted directions."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from .batches import TokenBatch, TokenRows, read_token_rows
from .gradients import GradientRecorder
from .passes import Passes, finish_together, run_batches
from .reductions import compute_dots
from .state import read_tensors, write_tensors
from .store import StoredRows


Directions = dict[str, Tensor]


def count_queries(directions: Directions) -> int:
    """Number `Q` of directions."""
    return next(iter(directions.values())).shape[0]


def score_token_rows(
    passes: Passes,
    recorder: GradientRecorder,
    token_rows: TokenRows,
    directions: Directions,
    cosine: bool,
    queries_per_block: int | None = None,
    report: Callable[[int], object] | None = None,
) -> np.ndarray:
    """
    Influence of some rows.

    Args:
        passes ([`Passes`]):
            The pass.
        recorder ([`GradientRecorder`]):
            An entered recorder.
        token_rows ([`TokenRows`]):
            The rows.
        directions (`dict[str, torch.Tensor]`):
            `u` (or `v`), `[Q, out, in]` per block, on any device.
        cosine (`bool`):
            Whether to divide by the norms of both gradients.
        queries_per_block (`int`, *optional*):
            Directions held beside the model at a time, each block of them taking a pass of its own; all by default.
        report (`Callable`, *optional*):
            Called with the number of rows of each batch done.

    Returns:
        `numpy.ndarray` of shape `[n, Q]`, float64; negative = proponent, NaN for a row without a loss token.
    """
    num_queries = count_queries(directions)
    block_size = queries_per_block or num_queries
    influence = np.full((len(token_rows), num_queries), np.nan)
    for start in range(0, num_queries, block_size):
        queries = slice(start, start + block_size)
        block = {
            name: tensor[queries].to(passes.blocks[name].tensor.device, recorder.accumulation_dtype)
            for name, tensor in directions.items()
        }
        norm = torch.zeros(count_queries(block), dtype=torch.float64)
        if cosine:
            for u in block.values():
                norm += u.flatten(1).double().square().sum(1).cpu()
            norm = norm.sqrt()
        last = queries.stop >= num_queries
        step = _make_step(
            passes, recorder, block, norm if cosine else None, influence[:, queries], report if last else None
        )
        run_batches(passes, token_rows, step)
    return influence


def score_stored_rows(
    stored: StoredRows, token_rows: TokenRows, directions: Directions, cosine: bool, passes: Passes
) -> np.ndarray:
    """
    Influence of stored rows, from their gradients on disk instead of the model.

    Returns:
        `numpy.ndarray` of shape `[n, Q]`, float64; negative = proponent, NaN for a row without a loss token.
    """
    influence = np.zeros((len(token_rows), count_queries(directions)))
    square_norms, direction_norms = np.zeros(len(token_rows)), np.zeros(count_queries(directions))
    for name, tensor in directions.items():
        u = tensor.to(passes.blocks[name].tensor.device).flatten(1)
        direction_norms += u.double().square().sum(1).cpu().numpy()
        for places, gradients in stored.read(name, u.device, u.dtype):
            influence[places] -= (gradients @ u.T).double().cpu().numpy()
            if cosine:
                square_norms[places] += torch.linalg.vector_norm(gradients, dim=1).square().double().cpu().numpy()
    if cosine:
        norms = np.sqrt(square_norms)[:, None] * np.sqrt(direction_norms)
        influence /= np.maximum(norms, np.finfo(np.float64).tiny)
    influence[token_rows.num_loss_tokens == 0] = np.nan
    return influence


def _make_step(
    passes: Passes,
    recorder: GradientRecorder,
    directions: Directions,
    direction_norm: Tensor | None,
    influence: np.ndarray,
    report: Callable[[int], object] | None,
) -> Callable[[TokenBatch], None]:
    """Work on one batch: writes its rows of `influence`, a view of shape `[n, Q]`."""

    def step(batch: TokenBatch) -> None:
        with_norms = direction_norm is not None
        dots, square_norms = compute_dots(recorder, batch, passes.loss_reduction, directions, with_norms)
        if direction_norm is not None and square_norms is not None:
            norms = np.sqrt(square_norms)[:, None] * direction_norm.numpy()
            dots = dots / np.maximum(norms, np.finfo(np.float64).tiny)
        influence[batch.indices] = -dots
        if report is not None:
            report(len(batch.rows))

    return step


@dataclass
class TopRows:
    """
    The strongest training rows of every query.

    Attributes:
        rows (`numpy.ndarray` of shape `[Q, 2k]`, int64):
            Positions in the pool: the `k` strongest proponents, strongest first, then the `k` strongest opponents,
            strongest first; -1 where the pool has fewer rows.
        influence (`numpy.ndarray` of shape `[Q, 2k]`, float64):
            Their influence on the query; negative = proponent.
    """

    rows: np.ndarray
    influence: np.ndarray

    @classmethod
    def find(cls, rows: np.ndarray, influence: np.ndarray, top_k: int) -> "TopRows":
        """Find them among candidates: `rows` `[c]` or `[Q, c]`, `influence` `[Q, c]` (NaN = no candidate)."""
        rows = np.broadcast_to(rows, influence.shape)
        parts = []
        for sign in (1.0, -1.0):
            keys = np.where(np.isnan(influence), np.inf, sign * influence)
            padding = max(top_k - keys.shape[1], 0)
            order = np.argsort(keys, axis=1, kind="stable")[:, :top_k]
            values = np.take_along_axis(influence, order, axis=1)
            found = np.where(np.isnan(values), -1, np.take_along_axis(rows, order, axis=1))
            parts.append((np.pad(found, ((0, 0), (0, padding)), constant_values=-1), _pad_nan(values, padding)))
        return cls(np.hstack([part[0] for part in parts]), np.hstack([part[1] for part in parts]))


def _pad_nan(values: np.ndarray, padding: int) -> np.ndarray:
    return np.pad(values, ((0, 0), (0, padding)), constant_values=np.nan)


@dataclass
class Scores:
    """
    Outcome of the score pass, the same on every process; negative = proponent.

    Attributes:
        influence (`numpy.ndarray` of shape `[rows, S]`, float64):
            Influence on each of `S` validation sets: the mean over a set's queries.
        per_query (`numpy.ndarray` of shape `[rows, Q]`, float64, *optional*):
            Influence on each query, where every validation row is one and no `top_k` was asked for.
        top (`TopRows`, *optional*):
            The strongest rows of every query, where `top_k` was asked for.
    """

    influence: np.ndarray
    per_query: np.ndarray | None = None
    top: TopRows | None = None


def run_score_pass(
    passes: Passes,
    prepared: Dataset,
    directions: Directions,
    cosine: bool,
    set_sizes: list[int] | None = None,
    queries_per_block: int | None = None,
    top_k: int | None = None,
    description: str = "Influence: score pass",
) -> Scores:
    """
    Influence of every prepared row, chunk by chunk, each chunk kept on disk.

    Args:
        passes ([`Passes`]):
            The pass.
        prepared (`datasets.Dataset`):
            Prepared pool.
        directions (`dict[str, torch.Tensor]`):
            `[Q, out, in]` per block.
        cosine (`bool`):
            Whether to divide by the norms of both gradients.
        set_sizes (`list[int]`, *optional*):
            Queries of each validation set, where every validation row is a query; by default each direction is a set.
        queries_per_block (`int`, *optional*):
            Directions held beside the model at a time.
        top_k (`int`, *optional*):
            Keep only the strongest rows of every query instead of `[rows, Q]` numbers.
        description (`str`, *optional*):
            What the progress bar says.

    Returns:
        [`Scores`]
    """
    num_queries = count_queries(directions)
    sizes = set_sizes or [1] * num_queries
    # A pass that keeps the strongest rows only has files of its own.
    prefix = "scores" if top_k is None else f"top{top_k}"
    start, end = passes.shard(prepared)
    width = num_queries if top_k is None else len(sizes)
    kept = np.zeros((len(prepared), width))
    tops: list[TopRows] = []
    done = _read_chunks(passes, prefix, kept, tops, (start, end))
    with (
        GradientRecorder(passes.model, passes.blocks, passes.autocast, passes.transform) as recorder,
        passes.progress(end - start, description, initial=int(done[start:end].sum())) as bar,
    ):
        for first in range(start, end, passes.chunk_size):
            last = min(first + passes.chunk_size, end)
            if done[first:last].all():
                continue
            token_rows = read_token_rows(prepared, first, last)
            stored = passes.store.find(np.arange(first, last)) if passes.store is not None else None
            if stored is not None:
                scores = score_stored_rows(stored, token_rows, directions, cosine, passes)
                bar.update(len(token_rows))
            else:
                scores = score_token_rows(
                    passes, recorder, token_rows, directions, cosine, queries_per_block, bar.update
                )
            kept[first:last] = scores if top_k is None else average_over_sets(scores, sizes)
            tensors = {"influence": torch.from_numpy(kept[first:last])}
            if top_k is not None:
                top = TopRows.find(token_rows.row, scores.T, top_k)
                tops.append(top)
                tensors |= {"top_rows": torch.from_numpy(top.rows), "top_influence": torch.from_numpy(top.influence)}
            if passes.folder is not None:
                metadata = {"fingerprint": passes.fingerprint, "start": str(first), "end": str(last)}
                write_tensors(passes.folder / f"{prefix}-{first:09d}-{last:09d}.safetensors", tensors, metadata)
        finish_together(passes, recorder)
    kept[:start], kept[end:] = 0.0, 0.0
    total = (
        passes.sum_over_processes({"influence": torch.from_numpy(kept).to(passes.device)})["influence"].cpu().numpy()
    )
    if top_k is not None:
        return Scores(total, top=_merge(passes, tops, num_queries, top_k))
    return Scores(average_over_sets(total, sizes), per_query=None if set_sizes is None else total)


def average_over_sets(influence: np.ndarray, sizes: list[int]) -> np.ndarray:
    """Mean over the queries of each validation set, `[n, Q]` to `[n, S]`: the influence on the set's mean loss."""
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    return np.add.reduceat(influence, starts, axis=1) / np.array(sizes)


def _read_chunks(
    passes: Passes, prefix: str, kept: np.ndarray, tops: list[TopRows], shard: tuple[int, int]
) -> np.ndarray:
    """Read the finished chunks; returns which rows are done, bool `[rows]`."""
    done = np.zeros(len(kept), dtype=bool)
    if passes.folder is None:
        return done
    for path in sorted(passes.folder.glob(f"{prefix}-*.safetensors")):
        stored = read_tensors(path, passes.fingerprint)
        if stored is None:
            continue
        tensors, first, last = stored[0], int(stored[1]["start"]), int(stored[1]["end"])
        if "top_rows" in tensors:
            # Only whole chunks of this shard: a chunk of another layout would be counted twice.
            if not (shard[0] <= first and last <= shard[1] and (first - shard[0]) % passes.chunk_size == 0):
                continue
            tops.append(TopRows(tensors["top_rows"].numpy(), tensors["top_influence"].numpy()))
        kept[first:last] = tensors["influence"].numpy()
        done[first:last] = True
    return done


def _merge(passes: Passes, tops: list[TopRows], num_queries: int, top_k: int) -> TopRows:
    """Merge the strongest rows of all chunks and all processes."""
    nothing = TopRows(np.full((num_queries, 2 * top_k), -1), np.full((num_queries, 2 * top_k), np.nan))
    merged = nothing
    for top in passes.gather_objects([nothing, *tops]):
        rows, influence = np.hstack([merged.rows, top.rows]), np.hstack([merged.influence, top.influence])
        merged = _find_distinct(rows, influence, top_k)
    return merged


def _find_distinct(rows: np.ndarray, influence: np.ndarray, top_k: int) -> TopRows:
    """Like [`TopRows.find`], where a row can stand among the proponents and the opponents at once (a small pool)."""
    influence = influence.copy()
    for query, row in enumerate(rows):
        _, first = np.unique(row, return_index=True)
        repeated = np.ones(len(row), dtype=bool)
        repeated[first] = False
        influence[query, repeated] = np.nan
    order = np.argsort(rows, axis=1, kind="stable")  # ties go to the earlier row, as within a chunk
    return TopRows.find(np.take_along_axis(rows, order, axis=1), np.take_along_axis(influence, order, axis=1), top_k)
