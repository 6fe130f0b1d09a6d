"""Influence in nats: what one more step on a row changes the validation loss by, seen on a few rows."""

from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from datasets import Dataset
from scipy import stats

from hf_in2core.engine.batches import collate, read_token_rows
from hf_in2core.engine.forwards import checkpointed_layers
from hf_in2core.engine.losses import compute_row_losses
from hf_in2core.engine.passes import Passes
from hf_in2core.engine.sharding import is_sharded
from hf_in2core.engine.verification import differentiate
from hf_in2core.influence.trainer import InfluenceTrainer
from hf_in2core.names import INFLUENCE
from hf_in2core.rows.scored import read_scores


NUM_ROWS, MAX_VALIDATION_ROWS = 16, 64
# Of 16 rows that have nothing to do with one another, one time in seventy.
MIN_SPEARMAN = 0.6


@dataclass(frozen=True)
class Calibration:
    """
    How influence stands to the change of the validation loss by one more step on a row.

    Attributes:
        nats_per_influence (`float`): The change for an influence of 1, in nats per labelled token.
        error (`float`): Mean distance of the changes from those predicted by the other rows, in nats.
        spearman (`float`): Rank correlation of influence and change; 1 = the same order.
        rows (`int`): Rows on which a step was taken.
        learning_rate (`float`): Of the steps.
        agrees (`bool`): Whether the changes follow influence (Spearman of 0.6 or more, and an error below the mean
            size of the changes): it may then be told in nats.
    """

    nats_per_influence: float
    error: float
    spearman: float
    rows: int
    learning_rate: float
    agrees: bool


def calibrate_influence(trainer: InfluenceTrainer, scored: Dataset) -> Calibration:
    r"""
    Take one more step on each of a few rows, and see what it does to the validation loss.

    A step is plain gradient descent from the reference, `theta - eta g_k` at the learning rate of its training, on the
    row's mean loss per labelled token; the validation loss is the mean over sets of the mean over validation rows of
    theirs. Rows stand at even distances in the ranking. The scale is that of the least absolute deviations,
    `argmin_c sum_k |change_k - c i_k|`: a few rows of large gradients, on which a step overshoots, do not make it.

    ```python
    >>> from hf_in2core.analysis.calibration import calibrate_influence
    >>> calibration = calibrate_influence(trainer, scored)
    >>> calibration.nats_per_influence * scored["influence"][0], calibration.error
    ```

    Args:
        trainer ([`InfluenceTrainer`]):
            Trainer of a trained reference. Its weights are put back as they were.
        scored ([`~datasets.Dataset`]):
            Its pool as `score_influence` returns it.

    Returns:
        [`Calibration`]: the same on every process.

    Raises:
        ValueError: if nothing can be compared: fewer than 16 rows with loss, the same influence on all of them, or a
            learning rate of 0; if a loss is not finite after a step; if the model's weights are sharded, or in a
            precision in which a single step does not show; or if memory does not suffice.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    if is_sharded(model):
        raise ValueError(
            "A step on a single row cannot be taken on sharded weights. Calibrate in one process without FSDP or ZeRO."
        )
    dtypes = {model.dtype, *(block.tensor.dtype for block in trainer.blocks.values())}
    if coarse := dtypes - {torch.float32, torch.float64}:
        name = str(coarse.pop()).removeprefix("torch.")
        raise ValueError(
            f"What a single step does to the loss does not show in {name}. Load the model in float32 (`--dtype "
            'float32`, `model_init_kwargs={"dtype": "float32"}`).'
        )
    influence = read_scores(scored, INFLUENCE)
    order = np.argsort(influence, kind="stable")[: int(np.isfinite(influence).sum())]
    eta = trainer.args.learning_rate
    if len(order) < NUM_ROWS:
        raise ValueError(
            f"Steps on {NUM_ROWS} rows are compared, but the pool has {len(order)} rows with loss. Use a larger pool."
        )
    if eta <= 0 or influence[order[0]] == influence[order[-1]]:
        raise ValueError(
            f"Nothing moves: learning_rate={eta}, and influence goes from {influence[order[0]]:.3g} to "
            f"{influence[order[-1]]:.3g}. Give the learning rate of the reference's training, and train it first."
        )
    chosen = order[np.linspace(0, len(order) - 1, NUM_ROWS).round().astype(int)]
    sets = [_thin(rows) for rows in trainer.prepared_validation.values()]
    # Mixed precision rounds more than a step changes.
    passes = replace(trainer.make_passes(trainer.blocks, ""), autocast=None)
    try:
        changes = _take_steps(passes, trainer.prepared_pool, chosen, sets, eta)
    except torch.OutOfMemoryError as error:
        raise ValueError(f"A step on a single row needs more memory than there is: {error}") from error
    if not np.isfinite(changes).all():
        raise ValueError(
            f"The validation loss is not finite after a step at learning_rate={eta}: the reference has diverged or is "
            "about to. Train it with a lower learning rate."
        )
    values = influence[chosen]
    scale = _fit_scale(values, changes)
    others = [_fit_scale(np.delete(values, k), np.delete(changes, k)) for k in range(NUM_ROWS)]
    distance = float(np.abs(changes - others * values).mean())
    spearman = float(np.nan_to_num(stats.spearmanr(values, changes).statistic))
    return Calibration(
        nats_per_influence=scale,
        error=distance,
        spearman=spearman,
        rows=NUM_ROWS,
        learning_rate=eta,
        agrees=scale > 0 and spearman >= MIN_SPEARMAN and distance < float(np.abs(changes).mean()),
    )


def _thin(prepared: Dataset) -> Dataset:
    count = min(len(prepared), MAX_VALIDATION_ROWS)
    return prepared.select(np.linspace(0, len(prepared) - 1, count).round().astype(int))


def _take_steps(passes: Passes, pool: Dataset, rows: np.ndarray, sets: list[Dataset], eta: float) -> np.ndarray:
    """Changes of the validation loss by a step on each row alone, float64 `[rows]`."""
    positions = np.searchsorted(pool.with_format("numpy")["row"][:], rows)
    token_rows = read_token_rows(pool.select(positions))
    tensors = {name: block.tensor for name, block in passes.blocks.items()}
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    start, changes = _compute_loss(passes, sets), []
    for row in range(len(rows)):
        batch = collate(token_rows, np.array([row])).to(passes.device)
        with checkpointed_layers(passes.model) if passes.is_checkpointed(batch) else nullcontext():
            gradients = differentiate(passes, batch.input_ids, batch.targets, batch.positions, "mean")
        try:
            with torch.no_grad():
                for name, gradient in gradients.items():
                    tensors[name].sub_(eta * gradient)
            changes.append(_compute_loss(passes, sets) - start)
        finally:
            with torch.no_grad():
                for name, tensor in tensors.items():
                    tensor.copy_(before[name])
    return np.array(changes)


def _compute_loss(passes: Passes, sets: list[Dataset]) -> float:
    found = [compute_row_losses(passes.model, rows, passes.tokens_per_batch, passes.autocast) for rows in sets]
    return float(np.mean([np.mean(losses.nll / losses.num_loss_tokens) for losses in found]))


def _fit_scale(influence: np.ndarray, changes: np.ndarray) -> float:
    """The `c` of least absolute deviations: the median of `change / influence`, each weighing as its influence."""
    known = influence != 0
    ratios, weights = changes[known] / influence[known], np.abs(influence[known])
    order = np.argsort(ratios)
    total = np.cumsum(weights[order])
    return float(ratios[order][np.searchsorted(total, total[-1] / 2)])
