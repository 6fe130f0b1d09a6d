"""Statistics of influence for the trackers that `report_to` names (TensorBoard, trackio, wandb, …), beside SFT's."""

from collections.abc import Mapping

import numpy as np
from transformers import Trainer
from transformers.integrations import get_reporting_integration_callbacks

from hf_in2core.engine.fit_sums import FitResult
from hf_in2core.names import INFLUENCE
from hf_in2core.selection.lengths import correlate_with_length


QUANTILES = {"minimum": 0.0, "quantile_05": 0.05, "median": 0.5, "quantile_95": 0.95, "maximum": 1.0}


def summarize_influence(columns: Mapping[str, np.ndarray], num_loss_tokens: np.ndarray) -> dict[str, float]:
    """
    Statistics of a scored pool.

    Args:
        columns (`Mapping[str, np.ndarray]`):
            `influence` and `influence_<name>` of each of several validation sets, float64 `[n]`; negative = proponent,
            NaN where a row carries no loss.
        num_loss_tokens (`np.ndarray` of shape `[n]`):
            Loss tokens of each row.

    Returns:
        `dict[str, float]`: `influence/rows` and `influence/rows_without_loss`; for each column (`influence/median`,
        `influence_math/median`) `minimum`, `quantile_05`, `median`, `quantile_95`, `maximum`, `mean` and `proponents`,
        the share of rows below 0 among those that carry loss; and `influence/length_correlation`, the rank correlation
        of influence and loss tokens, where there are three such rows and both vary.
    """
    has_loss = ~np.isnan(columns[INFLUENCE])
    statistics = {"influence/rows": float(len(has_loss)), "influence/rows_without_loss": float((~has_loss).sum())}
    if not has_loss.any():
        return statistics
    for name, column in columns.items():
        values = column[has_loss]
        found = dict(zip(QUANTILES, np.quantile(values, list(QUANTILES.values())), strict=True))
        found |= {"mean": values.mean(), "proponents": (values < 0).mean()}
        statistics |= {f"{name}/{key}": float(value) for key, value in found.items()}
    if (correlation := correlate_with_length(columns[INFLUENCE][has_loss], num_loss_tokens[has_loss])) is not None:
        statistics["influence/length_correlation"] = correlation
    return statistics


def summarize_fit(result: FitResult, validation_rows: int, seconds: float) -> dict[str, float]:
    """Figures of a fit: `influence/fit_rows`, `fit_agreement` of a sampled one, `inner_damping_error` and others."""
    measured = {
        "influence/fit_agreement": result.agreement,
        "influence/store_error": result.store_error,
        "influence/store_agreement": result.store_agreement,
    }
    return {name: value for name, value in measured.items() if value is not None} | {
        "influence/fit_rows": float(result.num_examples),
        "influence/validation_rows": float(validation_rows),
        "influence/inner_damping_error": result.inner_damping_error,
        "influence/fit_seconds": seconds,
    }


def report(trainer: Trainer, statistics: dict[str, float]) -> None:
    """
    Log statistics as the trainer logs its losses: into its history, to its callbacks and to its trackers.

    Trackers open their run when training begins and may close it when it ends; without a training, or after one, they
    are told to open it (again) first. What has a run already goes on in it: TensorBoard in its folder, wandb in its
    run, trackio in the run of the same `run_name`.
    """
    trackers = tuple(get_reporting_integration_callbacks(trainer.args.report_to))
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, trackers):
            callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)
    trainer.log(statistics)
