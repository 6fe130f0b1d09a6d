"""Influence at several checkpoints of the reference run, averaged as LESS does.

A single reading sees the reference where it stopped. LESS (arXiv 2402.04333), after TracIn (arXiv 2002.08484), sums
over checkpoints `t` of the run, weighted by the mean learning rate `eta_t` of the steps that led to each:

    influence_k = sum_t eta_t influence_k(t) / sum_t eta_t
"""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
from datasets import Dataset
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor
from transformers.trainer import TRAINER_STATE_NAME

from hf_in2core.engine.blocks import read_adapter_settings
from hf_in2core.engine.sharding import reshard, scatter_like
from hf_in2core.names import INFLUENCE, NUM_LOSS_TOKENS, PER_CHECKPOINT, PER_QUERY, RANK
from hf_in2core.rows.scored import add_influence_columns, read_query_scores, read_record, read_scores


logger = logging.getLogger(__name__)


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
        ValueError: if the model has no adapter; if there is no checkpoint, one is given twice, is no adapter's folder,
            or holds another adapter than the model's; or if some are a trainer's checkpoints and others are not.
    """
    if not isinstance(model, PeftModel):
        raise ValueError(
            "`checkpoints` are read of an adapter, and this reference has none: its own weights were trained. Train "
            "LoRA (`peft_config=LoraConfig()`), or leave them out."
        )
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
    name = model.active_adapter
    # PEFT saves every adapter but the one named `default` into a folder of its own.
    inner = folder / name if name != "default" and (folder / name).is_dir() else folder
    if not (inner / SAFETENSORS_WEIGHTS_NAME).is_file() or not (inner / CONFIG_NAME).is_file():
        raise ValueError(
            f"{inner} holds no adapter ({SAFETENSORS_WEIGHTS_NAME} and {CONFIG_NAME}). Give folders such as "
            '`output_dir/checkpoint-50`, which `save_strategy="steps"` keeps.'
        )
    adapter = load_file(inner / SAFETENSORS_WEIGHTS_NAME)
    expected = get_peft_model_state_dict(model, adapter_name=name)
    shapes = {name: tuple(tensor.shape) for name, tensor in adapter.items()}
    settings = json.loads((inner / CONFIG_NAME).read_text(encoding="utf-8"))
    ours = read_adapter_settings(model)
    different = [name for name in ours if settings.get(name) != ours[name]]
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


@contextmanager
def kept_adapter(model: PeftModel) -> Iterator[Callable[[Checkpoint], None]]:
    """Yields what puts a checkpoint's tensors into the active adapter; afterwards its own are put back."""
    name = model.active_adapter
    reshard(model)
    own = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(model, adapter_name=name).items()}

    def put(checkpoint: Checkpoint) -> None:
        logger.info("Influence at %s.", checkpoint.folder)
        reshard(model)
        adapter = {key: scatter_like(tensor, own[key]) for key, tensor in checkpoint.adapter.items()}
        set_peft_model_state_dict(model, adapter, adapter_name=name)

    try:
        yield put
    finally:
        reshard(model)
        set_peft_model_state_dict(model, own, adapter_name=name)


def average_readings(pool: Dataset, readings: list[Dataset], names: list[str], weights: np.ndarray) -> Dataset:
    """
    Weighted mean of scored datasets of the same pool, row by row.

    Args:
        pool ([`~datasets.Dataset`]):
            Raw rows, whose columns of the same names are replaced.
        readings (`list[Dataset]`):
            The pool as `score_influence` returned it at each of `C` checkpoints.
        names (`list[str]`):
            The columns that a scorer adds, `InfluenceScorer.column_names`.
        weights (`numpy.ndarray` of shape `[C]`):
            Shares that sum to 1.

    Returns:
        [`~datasets.Dataset`]: as `score_influence` returns it, with the averages, and `influence_per_checkpoint` (list
        of `C` float64 in the order of the steps; null where a row carries no loss).
    """
    scores = [name for name in names if name not in (NUM_LOSS_TOKENS, PER_QUERY)]
    per_checkpoint = {name: np.stack([read_scores(one, name) for one in readings], axis=1) for name in scores}
    columns: dict[str, np.ndarray] = {name: values @ weights for name, values in per_checkpoint.items()}
    columns[NUM_LOSS_TOKENS] = np.array(readings[0][NUM_LOSS_TOKENS][:], dtype=np.int64)
    replaced = {*names, RANK, PER_CHECKPOINT, *read_record(pool.features)}
    raw = pool.select_columns([name for name in pool.column_names if name not in replaced])
    if PER_QUERY in names:
        matrices = np.stack([read_query_scores(one).T for one in readings])
        columns[PER_QUERY] = np.einsum("c,cnq->nq", weights, matrices)
    return add_influence_columns(raw, columns | {PER_CHECKPOINT: per_checkpoint[INFLUENCE]})
