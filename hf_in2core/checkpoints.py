"""Influence at several checkpoints of the reference run, averaged as LESS does.

A single reading sees the reference where it stopped. LESS (arXiv 2402.04333), after TracIn (arXiv 2002.08484), sums
over checkpoints `t` of the run, weighted by the mean learning rate `eta_t` of the steps that led to each:

    influence_k = sum_t eta_t influence_k(t) / sum_t eta_t
"""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset, List, Value
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor
from transformers.trainer import TRAINER_STATE_NAME

from .annotate import add_influence_columns, add_query_column
from .coreset import read_query_scores, read_scores


if TYPE_CHECKING:
    from .trainer import InfluenceTrainer


logger = logging.getLogger(__name__)

CHECKPOINT_COLUMN = "influence_per_checkpoint"
# Settings of the adapter that change what its tensors do; its shape is seen from the tensors themselves.
ADAPTER_SETTINGS = ("peft_type", "lora_alpha", "use_rslora", "use_dora")


@dataclass
class Checkpoint:
    """
    A saved adapter of the reference run.

    Attributes:
        folder (`pathlib.Path`):
            Where it lies.
        adapter (`dict[str, torch.Tensor]`):
            Its tensors, as PEFT saves them.
        step (`int`, *optional*):
            Step of the run, where the folder is a trainer's checkpoint.
        rates (`list[tuple[int, float]]`):
            Steps and learning rates that the trainer had logged by then.
    """

    folder: Path
    adapter: dict[str, Tensor]
    step: int | None
    rates: list[tuple[int, float]]


def read_checkpoints(checkpoints: Sequence[str | PathLike], model: PeftModel) -> list[Checkpoint]:
    """
    Read checkpoints of a run and check that their adapters are the model's.

    Args:
        checkpoints (`Sequence[str or os.PathLike]`):
            Folders that a trainer saved (`output_dir/checkpoint-50`), or of adapters alone.
        model ([`~peft.PeftModel`]):
            The reference.

    Returns:
        `list[Checkpoint]`: by step, or in the given order where no step is known.

    Raises:
        ValueError: if there is none, one is given twice, is no adapter's folder, or holds another adapter than the
            model's; or if some are a trainer's checkpoints and others are not.
    """
    if isinstance(checkpoints, (str, PathLike)) or not checkpoints:
        raise ValueError(
            f"checkpoints={checkpoints!r} is no list of folders. Give for example "
            '["ref/checkpoint-50", "ref/checkpoint-100"], which `save_strategy="steps"` keeps.'
        )
    found = [_read_checkpoint(Path(folder), model) for folder in checkpoints]
    steps = [checkpoint.step for checkpoint in found]
    if len(set(steps)) < len(steps) and None not in steps or len({one.folder.resolve() for one in found}) < len(found):
        raise ValueError(
            f"checkpoints={[str(one) for one in checkpoints]} names a step twice ({steps}). Give each once."
        )
    known = [checkpoint for checkpoint in found if checkpoint.step is not None]
    if known and len(known) < len(found):
        without = [str(checkpoint.folder) for checkpoint in found if checkpoint.step is None]
        raise ValueError(
            f"{', '.join(without)} has no {TRAINER_STATE_NAME}, so its learning rate is unknown while that of others "
            "is known. Give checkpoints of one run."
        )
    return sorted(found, key=lambda checkpoint: checkpoint.step or 0)


def _read_checkpoint(folder: Path, model: PeftModel) -> Checkpoint:
    if not (folder / SAFETENSORS_WEIGHTS_NAME).is_file() or not (folder / CONFIG_NAME).is_file():
        raise ValueError(
            f"{folder} holds no adapter ({SAFETENSORS_WEIGHTS_NAME} and {CONFIG_NAME}). Give folders such as "
            '`output_dir/checkpoint-50`, which `save_strategy="steps"` keeps.'
        )
    adapter = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    expected = get_peft_model_state_dict(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in adapter.items()}
    settings = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    ours = json.loads(json.dumps(model.peft_config[model.active_adapter].to_dict(), default=str))
    different = [name for name in ADAPTER_SETTINGS if settings.get(name) != ours.get(name)]
    if different or shapes != {name: tuple(tensor.shape) for name, tensor in expected.items()}:
        raise ValueError(
            f"{folder} holds another adapter than the model's "
            f"(other {', '.join(different) if different else 'tensors'}). Give checkpoints of the run that trained "
            "this reference."
        )
    if not (folder / TRAINER_STATE_NAME).is_file():
        return Checkpoint(folder, adapter, None, [])
    state = json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    rates = [(entry["step"], entry["learning_rate"]) for entry in state["log_history"] if "learning_rate" in entry]
    return Checkpoint(folder, adapter, state["global_step"], rates)


def compute_checkpoint_weights(checkpoints: list[Checkpoint]) -> np.ndarray:
    """
    Mean learning rate of the steps that led to each checkpoint, from those logged, as shares that sum to 1.

    Args:
        checkpoints (`list[Checkpoint]`):
            By step, from [`read_checkpoints`].

    Returns:
        `numpy.ndarray` of shape `[C]`, float64. Equal where no folder is a trainer's checkpoint.

    Raises:
        ValueError: if no learning rate was logged on the way to a checkpoint, or all of them are 0.
    """
    if checkpoints[0].step is None:
        logger.warning("The checkpoints come without %s: they are weighted equally.", TRAINER_STATE_NAME)
        return np.full(len(checkpoints), 1 / len(checkpoints))
    weights, previous = [], 0
    for checkpoint in checkpoints:
        assert checkpoint.step is not None
        rates = [rate for step, rate in checkpoint.rates if previous < step <= checkpoint.step]
        if not rates:
            raise ValueError(
                f"No learning rate was logged between steps {previous} and {checkpoint.step}, so {checkpoint.folder} "
                "has no weight. Train with `logging_steps` of at most the distance between checkpoints."
            )
        weights.append(float(np.mean(rates)))
        previous = checkpoint.step
    total = sum(weights)
    if total <= 0:
        raise ValueError(
            f"The learning rates logged are all 0 ({weights}), so no checkpoint counts. Give earlier ones."
        )
    return np.array(weights) / total


def score_checkpoints(
    trainer: "InfluenceTrainer", checkpoints: Sequence[str | PathLike], overwrite: bool, per_example: bool
) -> Dataset:
    """
    Score the pool at every checkpoint and average; what `InfluenceTrainer.score_influence(checkpoints=...)` does.

    Each checkpoint is a fit and a score pass with a state of its own under `output_dir/influence/`, so that an
    interrupted call goes on where it stopped. The trainer's adapter and scorer are put back afterwards.

    Returns:
        [`~datasets.Dataset`]: as `score_influence`, with the averages, and `influence_per_checkpoint` (list of `C`
        float64 in the order of the steps; null where a row carries no loss).

    Raises:
        ValueError: as [`read_checkpoints`] and [`compute_checkpoint_weights`].
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    found = read_checkpoints(checkpoints, model)
    weights = compute_checkpoint_weights(found)
    if CHECKPOINT_COLUMN in trainer.pool.column_names and not overwrite:
        raise ValueError(
            f"The pool already has the column {CHECKPOINT_COLUMN}. Pass `overwrite=True` to replace it, or rename it."
        )
    readings: list[Dataset] = []
    with kept_adapter(trainer, model):
        for checkpoint in found:
            logger.info("Influence at %s.", checkpoint.folder)
            set_peft_model_state_dict(model, checkpoint.adapter, adapter_name=model.active_adapter)
            names = trainer.fit_influence(per_example).column_names
            readings.append(trainer.score_influence(overwrite))
    return average_readings(trainer.pool, readings, names, weights)


@contextmanager
def kept_adapter(trainer: "InfluenceTrainer", model: PeftModel) -> Iterator[None]:
    """Put the trainer's adapter and scorer back as they were."""
    adapter = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
    scorer, fingerprint = trainer._scorer, trainer._fingerprint
    try:
        yield
    finally:
        set_peft_model_state_dict(model, adapter, adapter_name=model.active_adapter)
        trainer._scorer, trainer._fingerprint = scorer, fingerprint


def average_readings(pool: Dataset, readings: list[Dataset], names: list[str], weights: np.ndarray) -> Dataset:
    """
    Weighted mean of scored datasets of the same pool, row by row.

    Args:
        pool ([`~datasets.Dataset`]):
            Raw rows.
        readings (`list[Dataset]`):
            The pool as `score_influence` returned it at each of `C` checkpoints.
        names (`list[str]`):
            The columns that a scorer adds, `InfluenceScorer.column_names`.
        weights (`numpy.ndarray` of shape `[C]`):
            Shares that sum to 1.

    Returns:
        [`~datasets.Dataset`]: as [`score_checkpoints`].
    """
    set_names = [name for name in names if name.startswith("influence") and name != "influence_per_query"]
    per_checkpoint = {name: np.stack([read_scores(one, name) for one in readings], axis=1) for name in set_names}
    columns: dict[str, np.ndarray] = {name: values @ weights for name, values in per_checkpoint.items()}
    columns["num_loss_tokens"] = np.array(readings[0]["num_loss_tokens"][:], dtype=np.int64)
    replaced = [name for name in [*names, "influence_rank", CHECKPOINT_COLUMN] if name in pool.column_names]
    scored = add_influence_columns(pool.remove_columns(replaced), columns)
    if "influence_per_query" in names:
        matrices = np.stack([read_query_scores(one).T for one in readings])
        scored = add_query_column(scored, np.einsum("c,cnq->nq", weights, matrices))
    values: list[Any] = [None if np.isnan(row).any() else row.tolist() for row in per_checkpoint["influence"]]
    feature = List(Value("float64"), length=len(readings))
    return scored.add_column(CHECKPOINT_COLUMN, values, feature=feature)
