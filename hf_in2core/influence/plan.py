"""A plan before the work: what the influence passes over some data will read, take and leave behind."""

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from datasets import Dataset

from hf_in2core.engine.batches import TokenBatch, TokenRows, plan_batches, read_token_rows
from hf_in2core.engine.blocks import count_elements
from hf_in2core.engine.curvature import draw_curvature_sample
from hf_in2core.engine.fit import count_pilot_rows
from hf_in2core.engine.fit_sums import FIT_BYTES, MEAN_BYTES, SAMPLED_FIT_BYTES
from hf_in2core.engine.gradients import GradientRecorder, accumulation_dtype
from hf_in2core.engine.passes import Passes, finish_together, make_zeros, run_batches
from hf_in2core.engine.reductions import FitDirections, compute_dots, compute_fit_terms, compute_gradient_sum
from hf_in2core.engine.sample import count_held_rows, is_sampled, list_sample_sizes
from hf_in2core.notebook import render_html

from .quality import count_checked_rows


if TYPE_CHECKING:
    from .trainer import InfluenceTrainer


@dataclass
class PassPlan:
    """One pass over rows: what this process's shard of it will read, padding included, and about how long it takes."""

    name: str
    rows: int
    tokens: int
    seconds: float


@dataclass(repr=False)
class InfluencePlan:
    """
    What fitting and scoring will take; see [`plan_influence`].

    Attributes:
        rows, tokens, loss_tokens (`int`):
            The whole pool, without padding.
        validation (`dict[str, tuple[int, int]]`):
            Rows and loss tokens of each validation set.
        length_histogram (`list[tuple[int, int, int]]`):
            Shortest and longest length and number of rows, by powers of two.
        num_processes (`int`):
            Processes that share the rows.
        passes (`list[PassPlan]`):
            The passes in their order, for this process; `checks` are those that tell what the fit is worth.
        tokens_per_batch (`int`):
            Tokens of a batch, padding included, as given or chosen.
        timed_batches (`int`):
            Batches that the seconds were estimated from.
        peak_memory (`int`):
            Bytes of this process at the peak: of the device where it is a GPU, resident otherwise.
        disk (`int`):
            Bytes under `output_dir/influence/` at the end, without the gradient store.
        store (`int`):
            Bytes of the gradient store while it exists; 0 without one.
        sampled (`str`):
            Rows that `fit_examples="auto"` fits at least and at most; empty where how many is known.
        queries_per_block (`int`):
            Queries whose gradients are held together, where every validation row is one; 0 otherwise.
        index (`str`):
            Where they are kept for later runs, and how many rows are; empty without an index. The fit and the score
            pass then read the disk alone, which is in none of the times.
        reduced (`int`):
            Bytes that each process hands to sums over processes; 0 for one process.
    """

    rows: int
    tokens: int
    loss_tokens: int
    validation: dict[str, tuple[int, int]]
    length_histogram: list[tuple[int, int, int]]
    num_processes: int
    passes: list[PassPlan]
    tokens_per_batch: int
    timed_batches: int
    peak_memory: int
    disk: int
    store: int
    reduced: int
    sampled: str = ""
    queries_per_block: int = 0
    index: str = ""

    @property
    def seconds(self) -> float:
        """All passes together."""
        return sum(item.seconds for item in self.passes)

    def __repr__(self) -> str:
        lengths = "  ".join(f"{low}-{high}: {rows:,}" for low, high, rows in self.length_histogram)
        lines = [
            f"Pool: {self.rows:,} rows, {self.tokens:,} tokens, {self.loss_tokens:,} of them with loss.",
            *(
                f"Validation set {name}: {rows:,} rows, {tokens:,} tokens with loss."
                for name, (rows, tokens) in self.validation.items()
            ),
            f"Rows by length in tokens: {lengths}",
            f"Passes of each of {self.num_processes} process(es), seconds from {self.timed_batches} timed batches:",
            *(
                f"  {item.name:<10} {item.rows:>11,} rows, {item.tokens:>13,} padded tokens, {item.seconds:,.0f} s"
                for item in self.passes
            ),
            f"Batches: up to {self.tokens_per_batch:,} tokens, padding included"
            f"{f'; {self.queries_per_block:,} queries at a time' if self.queries_per_block else ''}.",
            f"Time: about {show_seconds(self.seconds)} on this machine, without loading and tokenising.",
            f"Peak memory of a process: about {self.peak_memory / 1e9:.2f} GB.",
            f"Disk: {self.disk / 1e9:.3f} GB of state, {self.store / 1e9:.3f} GB of stored gradients"
            f"{'' if self.index else ' until scored'}.",
        ]
        if self.sampled:
            lines.append(f"Fit: {self.sampled}; counted as halfway between.")
        if self.index:
            lines.append(f"Gradient index: {self.index}; fit and score read it, in times that are not counted here.")
        if self.num_processes > 1:
            lines.append(f"Summed over processes: {self.reduced / 1e9:.3f} GB handed in by each.")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = [(item.name, f"{item.rows:,}", f"{item.tokens:,}", show_seconds(item.seconds)) for item in self.passes]
        columns = ["pass of each process", "rows", "padded tokens", "about"]
        lines = str(self).splitlines()
        top = 1 + len(self.validation)
        notes = [*lines[1:top], *lines[top + 2 + len(rows) :]]
        return render_html(lines[0], rows, columns=columns, notes=notes)


def show_seconds(seconds: float) -> str:
    """A duration in words."""
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if hours < 2 else f"{hours:.1f} h"


def plan_influence(
    trainer: "InfluenceTrainer",
    per_example: bool = False,
    timed_batches: int = 6,
    clock: Callable[[], float] = time.perf_counter,
) -> InfluencePlan:
    """
    Plan what `fit_influence` and `score_influence` of a trainer will take, from its prepared data and a few batches.

    Nothing is written. The timed batches are spread evenly over the tokens of the pass, so that short and long rows
    count as they occur; the largest batch is among those run, so that the memory seen is the memory needed.

    Args:
        trainer ([`InfluenceTrainer`]):
            The trainer; its adapter need not be trained yet.
        per_example (`bool`, *optional*, defaults to `False`):
            Whether every validation row will be a query of its own.
        timed_batches (`int`, *optional*, defaults to `6`):
            Batches of each kind of pass to time.
        clock (`Callable`, *optional*):
            What seconds are read from: wall time by default.

    Returns:
        [`InfluencePlan`]
    """
    blocks = trainer.blocks
    passes = trainer.make_passes(blocks, "plan")  # nothing of which is made
    passes.folder = None
    indexed = passes.store is not None and passes.store.kept
    pool, sets = trainer.prepared_pool, list(trainer.prepared_validation.values())
    args = trainer.args
    datainf, halved = args.estimator == "datainf", not per_example and args.estimator != "gradient_cosine"
    elements = count_elements(blocks)
    itemsize = accumulation_dtype(next(iter(blocks.values())).tensor).itemsize

    # The queries that each fit pass and each run of the score pass carry.
    queries = sum(map(len, sets)) if per_example else len(sets)
    at_once = min(trainer.count_queries_per_block(blocks), max(map(len, sets))) if per_example else queries
    num_fits = sum(-(-len(rows) // at_once) for rows in sets) if per_example else 1
    num_scores = -(-queries // at_once)

    shapes = [_Shape.measure(passes, rows) for rows in (pool, *sets)]
    shape = shapes[0]
    timings = _time_batches(passes, [pool, *sets], shapes, at_once, args.estimator, timed_batches, clock)
    plans = [
        PassPlan("validation", found.shard_rows, found.padded_tokens, seconds * found.padded_tokens)
        for found, seconds in zip(shapes[1:], timings.validation, strict=True)
    ]
    sampled = index = ""
    if indexed:
        start, end = passes.shard(pool)
        missing = passes.store.list_missing(start, end, with_content=False)  # type: ignore[union-attr]
        rows = sum(last - first for first, last in missing)
        tokens = int(rows * shape.mean_width)
        plans.append(PassPlan("index", rows, tokens, timings.fit * tokens))
        known = len(pool) - sum(passes.gather_objects([rows]))
        index = f"{known:,} of {len(pool):,} rows are in {args.gradient_store_dir}"
    else:
        plans += _plan_pool(passes, len(pool), shape, timings, args.fit_examples, num_fits * datainf, num_scores)
    drawn = draw_curvature_sample(passes, len(pool), args.seed) if datainf or halved else None
    checked = count_checked_rows(len(pool), [len(rows) for rows in sets], datainf or indexed) if halved else 0
    if drawn is not None and checked:
        tokens = int(checked * max(found.mean_width for found in shapes))
        found = PassPlan("checks", checked, tokens, max(timings.validation) * tokens)
        plans.insert(len(plans) if indexed else -num_scores, found)
    scores = len(pool) * queries * 8
    # The sum of the fit, and its slope.
    fitted = num_fits * at_once * elements * (8 + 8) if datainf else 0
    # What the timed batches do without: the means in float64, and the sample of the curvature.
    means = 0 if per_example else queries * elements * MEAN_BYTES
    sample = 0 if drawn is None else drawn.num_rows * count_elements(drawn.blocks) * itemsize
    halves = 0
    if args.fit_examples == "auto" and is_sampled(len(pool), passes.store is not None):
        sampled = f"{list_sample_sizes(len(pool))[0]:,} rows or more, and all {len(pool):,} where halves do not agree"
        # Both halves lie in memory, and each step of both on the disk.
        halves = at_once * elements * (SAMPLED_FIT_BYTES - FIT_BYTES) if datainf else 0
        fitted *= 2 * len(list_sample_sizes(len(pool))) + 1
    sums = (0 if per_example else queries * elements * 8) + fitted
    return InfluencePlan(
        rows=len(pool),
        tokens=shape.tokens,
        loss_tokens=shape.loss_tokens,
        validation={
            name: (len(rows), found.loss_tokens)
            for (name, rows), found in zip(trainer.prepared_validation.items(), shapes[1:], strict=True)
        },
        length_histogram=shape.histogram,
        num_processes=passes.world_size,
        passes=plans,
        timed_batches=timings.num_batches,
        peak_memory=_peak_memory(passes) + halves + means + sample + 2 * scores,
        disk=passes.world_size * sums + queries * elements * itemsize + scores,
        store=0 if passes.store is None else len(pool) * passes.store.row_bytes,
        reduced=sums + scores if passes.world_size > 1 else 0,
        tokens_per_batch=passes.tokens_per_batch,
        sampled=sampled if datainf else "",
        queries_per_block=at_once if per_example else 0,
        index=index,
    )


def _plan_pool(
    passes: Passes,
    num_rows: int,
    shape: "_Shape",
    timings: "_Timings",
    fit_examples: int | str | None,
    num_fits: int,
    num_scores: int,
) -> list[PassPlan]:
    """The passes of the pool through the model, where no index holds it."""
    share = 1.0 if fit_examples is None else _guess_share(fit_examples, num_rows, passes.store is not None)
    pilot = count_pilot_rows(num_rows)
    rows, tokens = int(share * shape.shard_rows) + pilot, int(share * shape.padded_tokens + pilot * shape.mean_width)
    plans = [PassPlan("fit", rows, tokens, timings.fit * tokens)] * num_fits
    rows, tokens = shape.shard_rows, shape.padded_tokens
    return [*plans, *[PassPlan("score", rows, tokens, timings.score * tokens)] * num_scores]


def _guess_share(fit_examples: int | str, num_rows: int, is_stored: bool) -> float:
    """
    Share of the pool that a fit takes.

    Of a sample that grows, halfway between the second one and all rows, for only the fit tells whether halves agree;
    beside it the rows held back, by either half.
    """
    if isinstance(fit_examples, int):
        return min(fit_examples / num_rows, 1.0)
    if not is_sampled(num_rows, is_stored):
        return 1.0
    return ((list_sample_sizes(num_rows)[1] + num_rows) / 2 + 2 * count_held_rows(num_rows)) / num_rows


class _Timings(NamedTuple):
    """Seconds per token, padding included."""

    validation: list[float]
    fit: float
    score: float
    num_batches: int


def _time_batches(
    passes: Passes,
    datasets: list[Dataset],
    shapes: list["_Shape"],
    num_queries: int,
    estimator: str,
    count: int,
    clock: Callable[[], float],
) -> _Timings:
    """Time batches of every pass; the first dataset is the pool, the others are the validation sets."""
    blocks = passes.blocks
    dtype = accumulation_dtype(next(iter(blocks.values())).tensor)
    directions = {name: make_zeros(block.tensor, (num_queries,), dtype) + 1e-4 for name, block in blocks.items()}
    sums = {name: make_zeros(block.tensor, (2, num_queries)) for name, block in blocks.items()}
    fit_directions = FitDirections(directions, dict.fromkeys(blocks, 1.0))
    cosine = estimator == "gradient_cosine"
    num_batches = 0
    with GradientRecorder(passes.model, blocks, passes.autocast) as recorder:

        def validate(batch: TokenBatch) -> None:
            for name, gradient in compute_gradient_sum(recorder, batch, passes.loss_reduction).items():
                sums[name][0, 0] += gradient

        def fit(batch: TokenBatch) -> None:
            block_sums, _ = compute_fit_terms(recorder, batch, passes.loss_reduction, fit_directions)
            for name, value in block_sums.items():
                sums[name] += value.view_as(sums[name])

        def score(batch: TokenBatch) -> None:
            compute_dots(recorder, batch, passes.loss_reduction, directions, with_norms=cosine)

        def seconds_per_token(rows: Dataset, shape: _Shape, step: Callable[[TokenBatch], None]) -> float:
            nonlocal num_batches
            chosen = _spread(rows, shape.batches, count)
            if not chosen:
                return 0.0  # more processes than rows
            run_batches(passes, chosen[0], step)  # the first run is slower
            _synchronize()
            start = clock()
            for token_rows in chosen:
                run_batches(passes, token_rows, step)
            _synchronize()
            num_batches += len(chosen)
            return (clock() - start) / sum(len(rows) * int(rows.lengths.max()) for rows in chosen)

        pool, shape = datasets[0], shapes[0]
        # The batches of the longest rows and of the most rows, for the memory that they take.
        for batch_rows in (*shape.batches[:1], *sorted(shape.batches, key=len)[-1:]):
            run_batches(passes, read_token_rows(pool.select(batch_rows)), fit if estimator == "datainf" else score)
        validation = [seconds_per_token(*found, validate) for found in zip(datasets[1:], shapes[1:], strict=True)]
        # An index is filled with gradients that are formed, as a fit forms them; a score pass need not.
        indexed = passes.store is not None and passes.store.kept
        fit_seconds = seconds_per_token(pool, shape, fit) if estimator == "datainf" or indexed else 0.0
        score_seconds = seconds_per_token(pool, shape, score)
        finish_together(passes, recorder)
        return _Timings(validation, fit_seconds, score_seconds, num_batches)


@dataclass
class _Shape:
    """Lengths and batches of some rows: of all of them, and of this process's shard."""

    tokens: int
    loss_tokens: int
    histogram: list[tuple[int, int, int]]
    shard_rows: int
    padded_tokens: int
    batches: list[np.ndarray]

    @property
    def mean_width(self) -> float:
        """Padded tokens per row."""
        return self.padded_tokens / max(self.shard_rows, 1)

    @classmethod
    def measure(cls, passes: Passes, rows: Dataset) -> "_Shape":
        """Read the lengths of all rows, and plan the shard's batches as the passes do."""
        start, end = passes.shard(rows)
        tokens = loss_tokens = padded = 0
        counts = np.zeros(64, dtype=np.int64)
        for first in range(0, len(rows), 10_000):
            token_rows = read_token_rows(rows, first, min(first + 10_000, len(rows)))
            tokens += int(token_rows.lengths.sum())
            loss_tokens += int(token_rows.num_loss_tokens.sum())
            counts += np.bincount(np.log2(np.maximum(token_rows.lengths, 1)).astype(int), minlength=64)
        batches: list[np.ndarray] = []
        for first in range(start, end, passes.chunk_size):
            token_rows = read_token_rows(rows, first, min(first + passes.chunk_size, end))
            for indices in plan_batches(token_rows, passes.tokens_per_batch, passes.max_loss_tokens):
                padded += len(indices) * int(token_rows.lengths[indices].max())
                batches.append(first + indices)
        powers = np.flatnonzero(counts).tolist()
        histogram = [(2**power, 2 ** (power + 1) - 1, int(counts[power])) for power in powers]
        return cls(tokens, loss_tokens, histogram, end - start, padded, batches)


def _spread(rows: Dataset, batches: list[np.ndarray], count: int) -> list[TokenRows]:
    """Some of the batches, evenly spread over all of them, as rows."""
    if not batches:
        return []
    chosen = np.unique(np.linspace(0, len(batches) - 1, min(2 * count + 1, len(batches))).astype(int))
    if len(chosen) > count:
        chosen = chosen[1::2]
    return [read_token_rows(rows.select(batches[index])) for index in chosen]


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _peak_memory(passes: Passes) -> int:
    if passes.device.type == "cuda":
        return torch.cuda.max_memory_allocated(passes.device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
