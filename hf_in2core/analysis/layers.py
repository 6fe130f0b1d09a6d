"""Which decoder layers suffice: rank correlation with the influence through all layers against gradient memory.

In2Core (arXiv 2408.03560) uses fewer layers for nearly the same ranking. Influence is a sum over blocks,
`- sum_b u_b . g_b`, and `u_b` depends on its own block alone (DataInf, arXiv 2310.00902), so one pass that keeps a dot
product for every layer gives the influence through any set of layers exactly, as if only those had been fitted.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset
from torch import Tensor
from tqdm import tqdm

from hf_in2core.engine.batches import TokenBatch, read_token_rows
from hf_in2core.engine.fit import fit_directions
from hf_in2core.engine.gradients import GradientRecorder, check_finite
from hf_in2core.engine.passes import Passes, run_batches
from hf_in2core.engine.reductions import compute_dots_by_block, stack_on
from hf_in2core.evaluation.intervals import compute_rank_correlation
from hf_in2core.rows.hashes import find_shared_tokens


if TYPE_CHECKING:
    from hf_in2core.influence.trainer import InfluenceTrainer


MIN_PILOT_ROWS = 30
HALVES = 20


@dataclass
class LayerScores:
    """
    Influence of some rows split by decoder layer; from [`compute_layer_scores`].

    Attributes:
        layers (`list[int]`):
            The `L` decoder layers that carry adapter tensors, ascending.
        elements (`list[int]`):
            Gradient elements of each layer.
        rows (`numpy.ndarray` of shape `[n]`, int64):
            Positions of the rows in the pool.
        parts (`numpy.ndarray` of shape `[n, S, L]`, float64):
            Each layer's part of the influence on each of `S` validation sets; negative = proponent.
        square_norms (`numpy.ndarray` of shape `[n, L]`, float64, *optional*):
            Squared norms of the rows' gradients, for `estimator="gradient_cosine"` alone.
        direction_square_norms (`numpy.ndarray` of shape `[S, L]`, float64, *optional*):
            Squared norms of the validation gradients, likewise.
    """

    layers: list[int]
    elements: list[int]
    rows: np.ndarray
    parts: np.ndarray
    square_norms: np.ndarray | None = None
    direction_square_norms: np.ndarray | None = None

    def compute_influence(self, layers: Iterable[int] | None = None, rows: np.ndarray | None = None) -> np.ndarray:
        """
        Influence through some layers, what `influence_layers=layers` gives (mean over the validation sets).

        Args:
            layers (`Iterable[int]`, *optional*):
                Decoder layers; all by default.
            rows (`numpy.ndarray`, *optional*):
                Indices of the rows wanted; all by default.

        Returns:
            `numpy.ndarray` of shape `[n]`, float64; negative = proponent.

        Raises:
            ValueError: if a layer carries no adapter tensor, or none is given.
        """
        chosen = self.layers if layers is None else list(layers)
        unknown = sorted(set(chosen) - set(self.layers))
        if unknown or not chosen:
            raise ValueError(f"layers={chosen} names {unknown or 'none'}, but these carry tensors: {self.layers}.")
        columns = [self.layers.index(layer) for layer in chosen]
        picked = slice(None) if rows is None else rows
        influence = self.parts[picked][:, :, columns].sum(2)
        if self.square_norms is not None and self.direction_square_norms is not None:
            norms = self.square_norms[picked][:, columns].sum(1)[:, None]
            norms = np.sqrt(norms * self.direction_square_norms[:, columns].sum(1))
            influence = influence / np.maximum(norms, np.finfo(np.float64).tiny)
        return influence.mean(1)

    def measure_memory(self, layers: Iterable[int]) -> float:
        """Share of all layers' gradient memory that some layers take, in (0, 1]."""
        return sum(self.elements[self.layers.index(layer)] for layer in layers) / sum(self.elements)


@dataclass
class LayerChoice:
    """
    Layers chosen under a memory budget, and how far to trust the choice; from [`select_layers`].

    Attributes:
        layers (`list[int]`):
            Decoder layers, ascending; pass them on as `InfluenceConfig(influence_layers=choice.layers)`.
        memory (`float`):
            Their share of the gradient memory of all layers, in (0, 1].
        memory_efficiency (`float`):
            `s = memory(all) / memory(layers)`, as in In2Core.
        backward_layers (`int`):
            Decoder layers that the backward pass still runs through, down to the lowest one chosen.
        spearman, low, high (`float`):
            Rank correlation with the influence through all layers over the pilot rows, and its 95 % interval.
        held_out_spearman (`float`):
            The same where one half of the pilot rows chooses and the other half judges, mean over 20 halves.
        overlap (`float`):
            Layers that the choice shares with those of the halves, over the layers in either (mean Jaccard index):
            1 = every half chooses the same.
        candidates (`list[dict]`):
            Every set of layers that was compared: `name`, `layers`, `memory`, `backward_layers` and `spearman`,
            highest Spearman first.
    """

    layers: list[int]
    memory: float
    memory_efficiency: float
    backward_layers: int
    spearman: float
    low: float
    high: float
    held_out_spearman: float
    overlap: float
    candidates: list[dict[str, Any]]

    def __str__(self) -> str:
        return (
            f"Layers {self.layers}: {self.memory:.0%} of the gradient memory ({self.memory_efficiency:.1f} times "
            f"less). Spearman with all layers {self.spearman:.3f} [{self.low:.3f}, {self.high:.3f}]; chosen by one "
            f"half of the pilot rows and judged by the other {self.held_out_spearman:.3f}, with {self.overlap:.0%} of "
            "the layers in common."
        )


def select_layers(trainer: "InfluenceTrainer", *, budget: float, pilot_rows: int = 512, seed: int = 0) -> LayerChoice:
    r"""
    Choose the decoder layers whose influence ranks rows most like that of all layers, under a memory budget.

    A pilot sample of the pool is fitted and scored through all layers, by every process alike. Compared are the first,
    last, middle and evenly spread layers of every number that fits the budget, and layers added one by one, each time
    the one that raises the Spearman correlation most. Among equals the one with the shorter backward pass is taken.

    ```python
    >>> choice = select_layers(trainer, budget=0.5)
    >>> print(choice)
    >>> args = InfluenceConfig("ref", influence_layers=choice.layers)
    ```

    Args:
        trainer ([`InfluenceTrainer`]):
            Trainer of the reference, whose adapter is trained. Nothing of it is changed.
        budget (`float`):
            Largest share of all layers' gradient memory, in (0, 1]. The gradient store, the queries of
            `fit_influence(per_example=True)` and the scorer's directions all take that share.
        pilot_rows (`int`, *optional*, defaults to `512`):
            Rows of the pilot sample, drawn at random; all rows of a smaller pool.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the pilot sample and of its halves.

    Returns:
        [`LayerChoice`]

    Raises:
        ValueError: if the budget is outside (0, 1] or holds no layer, if the adapter covers fewer than two layers, if
            fewer than 30 rows can be compared, or if their influence is constant.
    """
    _check_budget(budget)
    return choose_layers(compute_layer_scores(trainer, pilot_rows, seed), budget=budget, seed=seed)


def compute_layer_scores(trainer: "InfluenceTrainer", pilot_rows: int | None = None, seed: int = 0) -> LayerScores:
    r"""
    Fit and score rows of the pool through all layers, keeping each layer's part of the influence.

    Rows that also stand in a validation set are left out: their influence on themselves says nothing of other rows.

    Args:
        trainer ([`InfluenceTrainer`]):
            Trainer of the reference; `args.influence_layers`, where set, says what "all" layers are.
        pilot_rows (`int`, *optional*):
            Rows of a random sample to fit and score; the whole pool by default.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the sample.

    Returns:
        [`LayerScores`]

    Raises:
        ValueError: if the adapter covers fewer than two layers, or fewer than 30 rows are left.
    """
    blocks = {name: block for name, block in trainer.blocks.items() if block.layer is not None}
    layers = sorted({block.layer for block in blocks.values() if block.layer is not None})
    if len(layers) < 2:
        raise ValueError(
            f"The adapter covers the decoder layers {layers}: with fewer than two there is nothing to choose. Use an "
            "adapter on more layers, or leave `influence_layers` unset."
        )
    prepared = trainer.prepared_pool
    validation = trainer.prepared_validation
    rows = np.flatnonzero(~find_shared_tokens(prepared, validation.values()))
    if pilot_rows is not None and pilot_rows < len(rows):
        rows = np.sort(np.random.default_rng(seed).choice(rows, pilot_rows, replace=False))
    if len(rows) < MIN_PILOT_ROWS:
        raise ValueError(
            f"{len(rows)} rows are left to compare layers by (of a pool of {len(prepared)}, without rows that are in "
            f"a validation set), but their ranking says something from {MIN_PILOT_ROWS} on. Raise `pilot_rows` or use "
            "a larger pool."
        )
    # By every process alike, with what the trainer knows of the memory, and leaving nothing behind.
    passes = replace(trainer.make_passes(blocks, ""), accelerator=None, folder=None, store=None)
    pilot = prepared.select(rows)
    directions = fit_rows(trainer, passes, pilot)
    return _score_by_layer(passes, pilot, directions, layers, trainer.args.estimator == "gradient_cosine")


def fit_rows(trainer: "InfluenceTrainer", passes: Passes, rows: Dataset) -> dict[str, Tensor]:
    """Directions of the trainer's validation sets, fitted on some rows of its pool and with its settings."""
    return fit_directions(
        passes,
        rows,
        trainer.prepared_validation,
        estimator=trainer.args.estimator,
        damping_scale=trainer.args.damping_scale,
        fit_examples=trainer.args.fit_examples,
        seed=trainer.args.seed,
    ).ihvp


def _score_by_layer(
    passes: Passes, pilot: Dataset, directions: dict[str, Tensor], layers: list[int], cosine: bool
) -> LayerScores:
    token_rows = read_token_rows(pilot)
    column = {name: layers.index(block.layer) for name, block in passes.blocks.items()}  # type: ignore[arg-type]
    num_sets = next(iter(directions.values())).shape[0]
    parts = np.zeros((len(token_rows), num_sets, len(layers)))
    square_norms = np.zeros((len(token_rows), len(layers)))

    def make_step(recorder: GradientRecorder, bar: tqdm) -> Callable[[TokenBatch], None]:
        def step(batch: TokenBatch) -> None:
            losses, found = compute_dots_by_block(recorder, batch, passes.loss_reduction, directions, cosine)
            # [B, blocks, sets], and the squared norms after the sets
            dots = check_finite(losses, stack_on(list(found.values()), losses.device).movedim(0, 1), batch)
            by_layer = np.zeros((len(batch.rows), len(layers), dots.shape[2]))
            for index, name in enumerate(found):
                by_layer[:, column[name]] += dots[:, index]
            parts[batch.indices] = -by_layer[:, :, :num_sets].transpose(0, 2, 1)
            if cosine:
                square_norms[batch.indices] = by_layer[:, :, num_sets]
            bar.update(len(batch.rows))

        return step

    with (
        GradientRecorder(passes.model, passes.blocks, passes.autocast) as recorder,
        passes.progress(len(token_rows), "Influence by layer") as bar,
    ):
        run_batches(passes, token_rows, make_step(recorder, bar))
    elements, direction_norms = [0] * len(layers), np.zeros((num_sets, len(layers)))
    for name, block in passes.blocks.items():
        elements[column[name]] += block.tensor.numel()
        direction_norms[:, column[name]] += directions[name].flatten(1).double().square().sum(1).cpu().numpy()
    norms = (square_norms, direction_norms) if cosine else (None, None)
    return LayerScores(layers, elements, token_rows.row, parts, *norms)


def choose_layers(scores: LayerScores, *, budget: float, seed: int = 0) -> LayerChoice:
    """
    The choice of [`select_layers`] from scores that were computed before, for other budgets at no cost.

    Args:
        scores ([`LayerScores`]):
            From [`compute_layer_scores`].
        budget (`float`):
            Largest share of all layers' gradient memory, in (0, 1].
        seed (`int`, *optional*, defaults to `0`):
            Seed of the halves.

    Returns:
        [`LayerChoice`]

    Raises:
        ValueError: as [`select_layers`].
    """
    _check_budget(budget)
    if len(scores.rows) < MIN_PILOT_ROWS:
        raise ValueError(
            f"{len(scores.rows)} rows cannot compare layers; at least {MIN_PILOT_ROWS} are needed. Use a larger pilot."
        )
    if np.ptp(scores.compute_influence()) == 0:
        raise ValueError(
            "All pilot rows have the same influence, so there is no ranking that fewer layers could keep. Train the "
            "reference's adapter first, and check that the rows differ."
        )
    smallest = min(scores.elements) / sum(scores.elements)
    if budget < smallest - 1e-9:
        raise ValueError(
            f"budget={budget} holds no layer: the smallest of {len(scores.layers)} layers takes {smallest:.3g} of the "
            "gradient memory. Give at least that."
        )
    everyone = np.arange(len(scores.rows))
    candidates = _compare_candidates(scores, budget, everyone)
    best = candidates[0]
    spearman, low, high = _correlate(scores, best["layers"], everyone)
    generator = np.random.default_rng(seed)
    held_out, overlaps = [], []
    for _ in range(HALVES):
        half, other = np.array_split(generator.permutation(len(everyone)), 2)
        found = _compare_candidates(scores, budget, half)[0]["layers"]
        held_out.append(_correlate(scores, found, other)[0])
        overlaps.append(len(set(found) & set(best["layers"])) / len(set(found) | set(best["layers"])))
    return LayerChoice(
        layers=best["layers"],
        memory=best["memory"],
        memory_efficiency=1 / best["memory"],
        backward_layers=best["backward_layers"],
        spearman=spearman,
        low=low,
        high=high,
        held_out_spearman=float(np.mean(held_out)),
        overlap=float(np.mean(overlaps)),
        candidates=candidates,
    )


def list_layer_sets(layers: list[int], count: int) -> dict[str, list[int]]:
    """The `first`, `last`, `middle` and evenly `spread` `count` of some layers, ascending."""
    middle = (len(layers) - count) // 2
    spread = np.round((np.arange(count) + 0.5) * len(layers) / count - 0.5).astype(int)
    return {
        "first": layers[:count],
        "last": layers[-count:],
        "middle": layers[middle : middle + count],
        "spread": [layers[position] for position in spread],
    }


def _compare_candidates(scores: LayerScores, budget: float, rows: np.ndarray) -> list[dict[str, Any]]:
    """Every candidate that fits the budget, by its Spearman over `rows`; among equals the shorter backward first."""
    named: dict[tuple[int, ...], str] = {}
    for count in range(1, len(scores.layers) + 1):
        for name, layers in list_layer_sets(scores.layers, count).items():
            if scores.measure_memory(layers) <= budget + 1e-9:
                named.setdefault(tuple(layers), "all" if count == len(scores.layers) else f"{name} {count}")
    for layers in grow_layers(scores, budget, rows):
        named.setdefault(tuple(sorted(layers)), f"greedy {len(layers)}")
    candidates = [
        {
            "name": name,
            "layers": list(layers),
            "memory": scores.measure_memory(layers),
            "backward_layers": scores.layers[-1] - layers[0] + 1,
            "spearman": _correlate(scores, list(layers), rows)[0],
        }
        for layers, name in named.items()
    ]
    return sorted(candidates, key=lambda entry: (-entry["spearman"], entry["backward_layers"], entry["memory"]))


def grow_layers(scores: LayerScores, budget: float, rows: np.ndarray | None = None) -> list[list[int]]:
    """
    Layers added one by one, each time the one with the highest Spearman of the set, while the budget holds.

    Returns:
        `list[list[int]]`: the set after every step, in the order of adding.
    """
    picked = np.arange(len(scores.rows)) if rows is None else rows
    steps: list[list[int]] = []
    chosen: list[int] = []
    while True:
        fitting = [
            layer
            for layer in scores.layers
            if layer not in chosen and scores.measure_memory([*chosen, layer]) <= budget + 1e-9
        ]
        if not fitting:
            return steps
        # Later layers first: among equals the one with the shorter backward pass.
        correlations = {layer: _correlate(scores, [*chosen, layer], picked)[0] for layer in reversed(fitting)}
        chosen = [*chosen, max(correlations, key=correlations.__getitem__)]
        steps.append(chosen)


def _correlate(scores: LayerScores, layers: list[int], rows: np.ndarray) -> tuple[float, float, float]:
    """Rank correlation of the influence through some layers with all, and its interval; 0 where it is constant."""
    found = compute_rank_correlation(scores.compute_influence(layers, rows), scores.compute_influence(None, rows))
    if found.estimate is None or found.low is None or found.high is None:
        return 0.0, -1.0, 1.0
    return found.estimate, found.low, found.high


def _check_budget(budget: float) -> None:
    if not 0 < budget <= 1:
        raise ValueError(f"budget={budget} is outside (0, 1]: a quarter of all layers' gradient memory is 0.25.")
