r"""Cosines between gradients of rows and of single validation rows: with DataInf's inverse between them, and as LESS.

LESS (arXiv 2402.04333) asks on which rows an Adam step would help. At each checkpoint of the reference run, after `t`
steps, with `m` and `s` the moments that Adam had there and `g` a row's gradient,

    Gamma(g) = m' / (sqrt(s') + eps)
    m' = (b1 m + (1 - b1) g) / (1 - b1^(t+1)),  s' = (b2 s + (1 - b2) g^2) / (1 - b2^(t+1))
    less_k = - max over sets of mean over a set's rows q of sum_t eta_t cos(Gamma(g_k(t)), g_q(t)) / sum_t eta_t

with `eta_t` the mean learning rate of the steps that led to `t`. LESS projects gradients at random; these are whole.
"""

import hashlib
from collections.abc import Sequence
from copy import copy
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from hf_in2core.engine.passes import Transform
from hf_in2core.engine.scoring import Scores, run_score_pass
from hf_in2core.engine.state import hash_json, open_state
from hf_in2core.names import LESS
from hf_in2core.selection.baselines import add_prepared_columns
from hf_in2core.selection.taking import make_turn_columns

from .checkpoints import compute_checkpoint_weights, kept_adapter, read_checkpoints


if TYPE_CHECKING:
    from .trainer import InfluenceTrainer


OPTIMIZER = "optimizer.pt"
MOMENTS = ("exp_avg", "exp_avg_sq")


def add_cosine(scored: Dataset, trainer: "InfluenceTrainer") -> Dataset:
    r"""
    Add `cosine_rank`: the turn at which a row is taken when each validation row in turn takes that of smallest cosine.

    The cosine is that of influence: `influence / (|g_k| |u_q|)`, of the row's gradient `g_k` and the validation row's
    `u_q`, preconditioned by DataInf (arXiv 2310.00902); negative = proponent. So a row with a large gradient does not
    come first for its size alone. It is what `in2core run` chooses by (`--strategy cosine`).

    ```python
    >>> from hf_in2core.influence.cosines import add_cosine
    >>> scored = add_cosine(trainer.score_influence(), trainer)
    >>> coreset = select_coreset(scored, fraction=0.25, strategy="cosine")
    ```

    Args:
        scored ([`~datasets.Dataset`]):
            The trainer's pool, scored or not, in its order.
        trainer ([`InfluenceTrainer`]):
            Trainer of a trained reference. Validation rows are queries of its own afterwards.

    Returns:
        [`~datasets.Dataset`]: the rows with `cosine_rank` (int64, 0 = taken first), `cosine_score` (float64, the
        cosine with the validation row that took it) and `cosine_taker` (int64, which of all validation rows that was,
        in the order of the sets); null where a row carries no loss. The same on every process.

    Raises:
        ValueError: if these are not as many rows as the trainer's pool has, or as
            [`~hf_in2core.InfluenceTrainer.fit_influence`].
    """
    _check_pool(scored, trainer)
    cosines = compute_cosines(trainer, "Influence: cosines").per_query
    assert cosines is not None
    return add_prepared_columns(scored, trainer.prepared_pool, *make_turn_columns("cosine", cosines.T))


def add_less(scored: Dataset, trainer: "InfluenceTrainer", checkpoints: Sequence[str | PathLike]) -> Dataset:
    """
    Add `less`: the score of LESS (arXiv 2402.04333) at checkpoints of the reference, with its sign turned.

    Args:
        scored ([`~datasets.Dataset`]):
            The trainer's pool, scored or not, in its order.
        trainer ([`InfluenceTrainer`]):
            Trainer of the reference, with `estimator="gradient_dot"`: LESS takes the plain gradients of validation
            rows. Its adapter is put back as it was.
        checkpoints (`Sequence[str or os.PathLike]`):
            Folders that the reference's trainer saved, with their optimizer.

    Returns:
        [`~datasets.Dataset`]: the rows with `less` (float64 in [-1, 1], negative = proponent; null where a row carries
        no loss).

    Raises:
        ValueError: if these are not as many rows as the trainer's pool has, or if a folder is no checkpoint of the
            reference, or holds no moments of Adam.
    """
    _check_pool(scored, trainer)
    return add_prepared_columns(scored, trainer.prepared_pool, {LESS: compute_less(trainer, checkpoints)})


def _check_pool(scored: Dataset, trainer: "InfluenceTrainer") -> None:
    if len(scored) != len(trainer.pool):
        raise ValueError(
            f"{len(scored):,} rows are to get a column, but the trainer's pool has {len(trainer.pool):,}. Give the "
            "pool as `trainer.score_influence()` returns it, whole and in its order."
        )


def compute_cosines(
    trainer: "InfluenceTrainer", description: str, transform: Transform | None = None, state: str = ""
) -> Scores:
    """
    Influence of each row of the pool on each validation row, over the norms of both vectors.

    Args:
        trainer ([`InfluenceTrainer`]):
            Trainer of a trained reference. Its scorer is the one of single rows afterwards.
        description (`str`):
            What the progress bar says.
        transform (`Callable`, *optional*):
            What a row's gradient becomes before the cosine is taken, as of [`~engine.passes.Passes`].
        state (`str`, *optional*):
            What else identifies `transform`.

    Returns:
        [`~engine.scoring.Scores`]: `per_query` in [-1, 1], negative = proponent.
    """
    scorer = trainer.fit_influence(per_example=True)
    identity = {"cosines of": trainer.fingerprint} | ({"transform": state} if transform is not None else {})
    passes = trainer.make_passes(trainer.blocks, hash_json(identity))
    passes.transform = transform
    if passes.store is not None and (transform is not None or not passes.store.kept):
        passes.store = None  # what an index holds are the gradients as they are
    if trainer.is_world_process_zero():
        open_state(passes.folder, identity)  # type: ignore[arg-type]
    trainer.accelerator.wait_for_everyone()
    return run_score_pass(
        passes,
        trainer.prepared_pool,
        scorer.directions,
        cosine=True,
        set_sizes=list(scorer.config.validation_sets.values()),
        queries_per_block=trainer.count_queries_per_block(trainer.blocks),
        description=description,
    )


def compute_less(trainer: "InfluenceTrainer", checkpoints: Sequence[str | PathLike]) -> np.ndarray:
    """
    The score of [`add_less`] for each prepared row of the pool.

    Returns:
        `numpy.ndarray` of shape `[rows]`, float64 in [-1, 1]; negative = proponent.

    Raises:
        ValueError: if a folder is no checkpoint of the reference, or holds no moments of Adam.
    """
    if trainer.args.estimator != "gradient_dot":
        raise ValueError(
            f"LESS compares with the plain gradients of validation rows, but "
            f'estimator={trainer.args.estimator!r}. Give the trainer `InfluenceConfig(estimator="gradient_dot")`.'
        )
    check_moments(checkpoints)
    model = trainer.accelerator.unwrap_model(trainer.model)
    found = read_checkpoints(checkpoints, model)
    scores: Any = 0.0
    with kept_adapter(model) as put_adapter:
        for weight, checkpoint in zip(compute_checkpoint_weights(found), found, strict=True):
            put_adapter(checkpoint)
            path = checkpoint.folder / OPTIMIZER
            state = hashlib.sha256(path.read_bytes()).hexdigest()
            update = AdamUpdate(trainer, path)
            scores = (
                scores + weight * compute_cosines(trainer, f"LESS: {checkpoint.folder.name}", update, state).influence
            )
    return scores.min(axis=1)


def check_moments(checkpoints: Sequence[str | PathLike]) -> None:
    """Raise unless each folder has the state of an optimizer."""
    missing = [str(folder) for folder in checkpoints if not (Path(folder) / OPTIMIZER).is_file()]
    if missing or not checkpoints:
        raise ValueError(
            f"LESS reads Adam's moments from checkpoints of the reference run, but "
            f"{f'{missing[0]} holds no {OPTIMIZER}' if missing else 'none are given'}. Train the reference with "
            '`save_strategy="steps"`, without `save_only_model`, and give its checkpoint folders (`--checkpoints` of '
            "`in2core score`), or let `in2core run` keep some (`--reference_checkpoints 4`)."
        )


class AdamUpdate:
    """
    The direction in which Adam would step on a row's gradient alone, from the moments of a checkpoint.

    Args:
        trainer ([`InfluenceTrainer`]):
            Of the model that the optimizer trained, which tells whose moments are whose.
        path (`Path`):
            The `optimizer.pt` of the checkpoint.

    Raises:
        ValueError: if the state is none of Adam's over the model's trainable tensors.
    """

    def __init__(self, trainer: "InfluenceTrainer", path: Path) -> None:
        stored = torch.load(path, map_location="cpu", weights_only=True)
        kept = trainer.optimizer
        trainer.optimizer = None
        groups = trainer.create_optimizer().param_groups
        trainer.optimizer = kept
        parameters = [parameter for group in groups for parameter in group["params"]]
        states, numbers = stored["state"], [n for group in stored["param_groups"] for n in group["params"]]
        self.moments: dict[str, tuple[Tensor, Tensor, int]] = {}
        by_id = {id(parameter): states.get(n, {}) for n, parameter in zip(numbers, parameters, strict=False)}
        self.betas, self.eps = (stored["param_groups"][0].get(name) for name in ("betas", "eps"))
        for name, block in trainer.blocks.items():
            if block.kind == "embedding":
                raise ValueError(
                    f"`{name}` is a matrix with a row for every token, of which a pass holds the gradients of a "
                    "row's own tokens alone, while Adam moves them all. Leave it out of `modules_to_save`."
                )
            state = by_id.get(id(block.tensor), {})
            if (
                len(numbers) != len(parameters)
                or self.betas is None
                or not all(key in state and state[key].shape == block.tensor.shape for key in MOMENTS)
            ):
                raise ValueError(
                    f"{path} holds no moments of Adam ({', '.join(MOMENTS)}) for `{name}` of the shape "
                    f"{tuple(block.tensor.shape)}: another optimizer (`optim`) or another adapter was trained. LESS "
                    "needs a reference trained with `adamw_torch` or `adamw_torch_fused`."
                )
            first, second = (state[key].to(block.tensor.device) for key in MOMENTS)
            self.moments[name] = first, second, int(state["step"]) + 1

    def __call__(self, name: str, gradients: Tensor) -> Tensor:
        """Updates of a block, `[B, out, in]`, from its per-example gradients of the same shape."""
        first, second, step = self.moments[name]
        b1, b2 = self.betas
        first, second = (moment.to(gradients.dtype).reshape(gradients.shape[1:]) for moment in (first, second))
        mean = (b1 * first + (1 - b1) * gradients) / (1 - b1**step)
        square = (b2 * second + (1 - b2) * gradients.square()) / (1 - b2**step)
        return mean / (square.sqrt() + self.eps)


def make_gradient_dot(args: Any) -> Any:
    """The same settings with the plain gradients of validation rows, which LESS takes."""
    args = copy(args)
    args.estimator = "gradient_dot"
    # It reads Adam's steps, of which an index of gradients holds none.
    args.gradient_store_gb, args.gradient_store_dir = 0.0, None
    return args
