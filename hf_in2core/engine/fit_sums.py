"""The sums over rows that DataInf's fit is made of, and the directions that they come to."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from .batches import TokenBatch
from .blocks import Blocks
from .datainf import compute_damping, compute_ihvp, compute_inner_damping_error, correct_damping
from .gradients import GradientRecorder, accumulation_dtype
from .passes import Passes, accumulate, make_zeros
from .reductions import FitDirections, FitTerms, compute_fit_terms
from .store import GradientStore, StoredRows


# Bytes that a fit holds per query and element of the adapter: v and its columns in float32, the sum and its slope in
# float64 and those of a batch in float32, u in float64. A sample that grows has two halves, and what one is given.
FIT_BYTES = 4 + 4 + 16 + 8 + 8
SAMPLED_FIT_BYTES = FIT_BYTES + 2 * 16
# And the mean of a validation set in float64, from which v comes.
MEAN_BYTES = 8


@dataclass
class FitResult:
    """
    Outcome of the fit pass.

    Attributes:
        ihvp (`dict[str, torch.Tensor]`):
            Preconditioned validation gradients `u`, float64 `[Q, out, in]` per block.
        damping (`dict[str, float]`):
            Damping of each block.
        num_examples (`int`):
            Number of training rows fitted.
        inner_damping_error (`float`):
            Bound on the relative error of `u` that the pilot's damping leaves, corrected to first order; 0 where the
            exact one was used.
        agreement (`float`, *optional*):
            Rank correlation of the scores by the two halves of a sampled fit, the lowest of all validation sets;
            `None` where the number of rows was given or all of them were fitted.
        exact_agreement (`float`, *optional*):
            Rank correlation with the exact damped inverse, see [`measure_curvature`]; `None` where unknown.
        validation_agreement (`dict[str, float]`):
            How far halves of each validation set rank the pool alike, see [`measure_halves`], where measured.
        store_error, store_agreement (`float`, *optional*):
            What rounding did to the gradients of the index that it comes from, see [`StoreError`]; `None` where there
            is no index, or one in full precision.
    """

    ihvp: dict[str, Tensor]
    damping: dict[str, float]
    num_examples: int
    inner_damping_error: float
    agreement: float | None = None
    exact_agreement: float | None = None
    validation_agreement: dict[str, float] = field(default_factory=dict)
    store_error: float | None = None
    store_agreement: float | None = None


class GradientSample:
    """
    Gradients of a few of the rows that a fit passes anyway, for a check that needs them one by one.

    Args:
        blocks (`dict[str, Block]`):
            Blocks to keep gradients of.
        num_rows (`int`):
            Rows to keep, at most.
        generator (`numpy.random.Generator`):
            Draws them.
    """

    def __init__(self, blocks: Blocks, num_rows: int, generator: np.random.Generator) -> None:
        self.blocks = blocks
        self.num_rows = num_rows
        self._generator = generator
        self._wanted: list[int] = []
        self._kept: dict[str, dict[int, Tensor]] = {name: {} for name in blocks}

    def draw(self, prepared: Dataset, positions: np.ndarray | None) -> None:
        """Draw from the rows that are about to be passed, until there are enough."""
        rows = (prepared if positions is None else prepared.select(positions)).with_format("numpy")["row"][:]
        count = min(self.num_rows - len(self._wanted), len(rows))
        self._wanted += self._generator.choice(rows, count, replace=False).tolist()

    def keep(self, name: str, batch: TokenBatch, gradients: Tensor) -> None:
        """Keep those of a batch's gradients `[B, out * in]` that were drawn."""
        if name in self.blocks:
            for index in np.flatnonzero(np.isin(batch.rows, self._wanted)):
                self._kept[name][int(batch.rows[index])] = gradients[index].clone()

    def gather(self, passes: Passes, least: int) -> dict[str, Tensor] | None:
        """
        The gradients, `[rows, out * in]` per block, rows in the same order and the same on every process; they are not
        kept beside them. All processes have to call.

        `None` where fewer than `least` of the rows that were drawn have been passed: the others were read from disk.
        """
        kept = list(self._kept.values())
        own = [bool(kept) and all(row in rows for rows in kept) for row in self._wanted]
        # Each row is in the shard of one process; the others add zeros.
        passed = passes.sum_over_processes({"rows": torch.tensor(own, dtype=torch.int64, device=passes.device)})[
            "rows"
        ]
        chosen = [(row, mine) for row, mine, count in zip(self._wanted, own, passed.tolist(), strict=True) if count]
        if len(chosen) < max(min(least, len(self._wanted)), 1):
            return None
        found = {}
        for name, rows in self._kept.items():
            tensor = self.blocks[name].tensor
            nothing = torch.zeros(tensor.numel(), dtype=accumulation_dtype(tensor), device=tensor.device)
            found[name] = torch.stack([rows.pop(row) if mine else nothing for row, mine in chosen])
        return passes.sum_over_processes(found)


@dataclass
class FitSums:
    """
    Sums of the fit pass over some rows.

    Attributes:
        sums (`dict[str, torch.Tensor]`):
            Float64. Per block `[2, Q, out, in]`, the weighted sum and minus its derivative by the damping;
            `square_norms` `[blocks]` and `error_weights` `[blocks, Q]`.
        num_examples (`int`):
            Number of rows.
    """

    sums: dict[str, Tensor]
    num_examples: int

    def add(self, other: "FitSums") -> None:
        """Add the sums over other rows, in place."""
        for key, value in other.sums.items():
            self.sums[key] += value
        self.num_examples += other.num_examples

    def finish(
        self,
        passes: Passes,
        validation_gradients: dict[str, Tensor],
        inner_damping: dict[str, float],
        damping_scale: float,
    ) -> FitResult:
        """`u` from the sums, corrected to first order for the damping that they were summed with."""
        num_queries = next(iter(validation_gradients.values())).shape[0]
        ihvp, damping = {}, {}
        squared_error, squared_norm = torch.zeros(num_queries).double(), torch.zeros(num_queries).double()
        parts = zip(
            passes.blocks.items(), self.sums["square_norms"].cpu(), self.sums["error_weights"].cpu(), strict=True
        )
        for (key, block), square_norm, weight in parts:
            mean_square_norm = float(square_norm) / self.num_examples
            damping[key] = compute_damping(mean_square_norm, block.tensor.numel(), damping_scale)
            weighted_sum, slope = self.sums[key]
            weighted_sum = correct_damping(weighted_sum, slope, damping[key], inner_damping[key])
            v = validation_gradients[key].double()
            ihvp[key] = compute_ihvp(v, weighted_sum, self.num_examples, damping[key])
            error = compute_inner_damping_error(weight, self.num_examples, damping[key], inner_damping[key])
            squared_error += error.square()
            squared_norm += ihvp[key].flatten(1).square().sum(1).cpu()
        relative = torch.where(squared_norm > 0, (squared_error / squared_norm).sqrt(), torch.zeros_like(squared_norm))
        return FitResult(ihvp, damping, self.num_examples, float(relative.max()))


def fit_rows(
    passes: Passes,
    name: str,
    prepared: Dataset,
    positions: np.ndarray | None,
    validation_gradients: dict[str, Tensor],
    inner_damping: dict[str, float],
    damping_scale: float,
    is_stored: bool,
    sample: GradientSample | None = None,
) -> FitResult:
    """The fit on some rows at a given inner damping; parameters as those of [`run_fit_pass`]."""
    sums = sum_fit_terms(passes, name, prepared, positions, validation_gradients, inner_damping, is_stored, sample)
    return sums.finish(passes, validation_gradients, inner_damping, damping_scale)


def sum_fit_terms(
    passes: Passes,
    name: str,
    prepared: Dataset,
    positions: np.ndarray | None,
    validation_gradients: dict[str, Tensor],
    inner_damping: dict[str, float],
    is_stored: bool = False,
    sample: GradientSample | None = None,
) -> FitSums:
    """Pass the rows at sorted `positions` (all where `None`); parameters as those of [`run_fit_pass`]."""
    num_queries, num_blocks = next(iter(validation_gradients.values())).shape[0], len(passes.blocks)
    dtype = accumulation_dtype(next(iter(passes.blocks.values())).tensor)
    first = next(iter(passes.blocks.values())).tensor
    sums: dict[str, Tensor] = {
        "square_norms": torch.zeros(num_blocks, dtype=torch.float64, device=first.device),
        "error_weights": torch.zeros(num_blocks, num_queries, dtype=torch.float64, device=first.device),
    }
    for key, block in passes.blocks.items():
        sums[key] = make_zeros(block.tensor, (2, num_queries))  # the weighted sum, and minus its slope
    directions = FitDirections({key: value.to(dtype) for key, value in validation_gradients.items()}, inner_damping)
    # What a store of this run's own holds is whole, what an index holds is what was asked for.
    indexed = passes.store is not None and passes.store.kept
    store = passes.store if positions is None or indexed else None
    keepers: list[Callable[[str, TokenBatch, Tensor], None]] = []
    if sample is not None:
        sample.draw(prepared, positions)
        keepers.append(sample.keep)
    if store is not None and not indexed:
        keepers.append(partial(_keep, store))

    def add(block_sums: dict[str, Tensor], terms: FitTerms) -> None:
        for key, value in block_sums.items():
            sums[key] += value.view_as(sums[key])
        sums["square_norms"] += terms.square_norms.to(first.device)
        sums["error_weights"] += terms.error_weights.to(first.device)

    def make_step(recorder: GradientRecorder) -> Callable[[TokenBatch], None]:
        def step(batch: TokenBatch) -> None:
            add(
                *compute_fit_terms(
                    recorder, batch, passes.loss_reduction, directions, partial(_hand_out, keepers, batch)
                )
            )

        return step

    def add_stored(rows: StoredRows) -> None:
        norms, dots = [], []
        for key, block in passes.blocks.items():
            parts = [
                directions.compute_block_sums(key, gradients)
                for _, gradients in rows.read(key, block.tensor.device, dtype)
            ]
            block_sums, block_norms, block_dots = zip(*parts, strict=True)
            for value in block_sums:
                sums[key] += value.view_as(sums[key])
            norms.append(torch.cat(block_norms))
            dots.append(torch.cat(block_dots))
        add({}, directions.summarize(norms, dots, first.device))

    sums = accumulate(
        passes,
        name,
        "Influence: fit pass",
        prepared,
        positions,
        sums,
        make_step,
        store,
        add_stored if is_stored or indexed else None,
    )
    return FitSums(sums, len(prepared) if positions is None else len(positions))


def _hand_out(
    keepers: list[Callable[[str, TokenBatch, Tensor], None]], batch: TokenBatch, name: str, gradients: Tensor
) -> None:
    for keeper in keepers:
        keeper(name, batch, gradients)


def _keep(store: GradientStore, name: str, batch: TokenBatch, gradients: Tensor) -> None:
    store.keep(name, batch.indices, gradients)
