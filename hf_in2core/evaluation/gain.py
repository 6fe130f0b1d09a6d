"""Whether training taught the test set anything: without it, the arms differ by what no rows have taught."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from .formats import say_difference
from .intervals import Interval, compute_confidence_interval


# Three times the margin within which a coreset is no worse than the full pool: it has kept two thirds of what training
# gave, at least. Where training gave less, the untrained model is hardly told apart from the arms by that margin.
MIN_GAIN = 0.03
# Which arm stands for the training: the one that had all rows, else one of rows that nothing chose.
PREFERRED = ("full", "random", "coreset")


@dataclass(frozen=True)
class TrainingGain:
    """
    What training did to the test loss of the untrained model, by one arm.

    Attributes:
        arm (`str`): The arm that stands for the training: `"full"`, or the best suited one where that was not run.
        before (`float`): Test loss of the untrained model.
        after (`float`): Mean test loss of the arm over its seeds.
        difference ([`~hf_in2core.evaluation.intervals.Interval`]): Of the arm's loss minus `before`, over seeds.
        share (`float`): How much lower `after` is, as a share of `before`; negative where training raised the loss.
        min_share (`float`): The share that is asked for.
        clear (`bool`): Every seed is below `before`, and the share is as large as asked for. The interval does not
            decide: with two seeds that differ a little it is wide enough to hold any gain.
    """

    arm: str
    before: float
    after: float
    difference: Interval
    share: float
    min_share: float
    clear: bool


def measure_gain(
    losses: Mapping[str, Mapping[int, float]], base_loss: float | None, level: float
) -> TrainingGain | None:
    r"""
    Measure what training did at one fraction and budget.

    Args:
        losses (`Mapping[str, Mapping[int, float]]`):
            Finite test loss by seed of each arm.
        base_loss (`float`, *optional*):
            Test loss of the untrained model.
        level (`float`):
            Confidence level of the interval.

    Returns:
        [`TrainingGain`] or `None`: `None` where the base's loss or every arm's is unknown.
    """
    arm = next((name for name in (*PREFERRED, *losses) if name in losses), None)
    if arm is None or base_loss is None or not 0 < base_loss < math.inf:
        return None
    difference = compute_confidence_interval([loss - base_loss for loss in losses[arm].values()], level)
    assert difference.mean is not None
    share = -difference.mean / base_loss
    return TrainingGain(
        arm=arm,
        before=base_loss,
        after=base_loss + difference.mean,
        difference=difference,
        share=share,
        min_share=MIN_GAIN,
        clear=share >= MIN_GAIN and max(losses[arm].values()) < base_loss,
    )


def say_no_gain(gain: TrainingGain, where: str, coreset_loss: float | None) -> str:
    """Why nothing is concluded, and what to do, in a few sentences; `coreset_loss`: mean of the coreset's arm."""
    difference = say_difference(gain.difference)
    found = f"test loss {gain.before:.3f} before and {gain.after:.3f} after it, difference {difference}"
    if gain.share <= 0:
        why = "did not lower the test loss of the untrained model"
        advice = (
            "Look whether pool and test set are of one kind and form, then lower --learning_rate or train for fewer "
            "--num_train_epochs"
        )
    elif gain.share < gain.min_share:
        why = (
            f"has hardly changed the untrained model: {gain.share * 100:.1f} % of its test loss, where at least "
            f"{gain.min_share * 100:g} % is asked for"
        )
        advice = (
            "Raise --learning_rate (TRL advises 2e-4 for LoRA), --max_steps or --num_train_epochs, and train every "
            "linear layer (--lora_target_modules all-linear)"
        )
    else:
        why = "did not lower the test loss of the untrained model with every seed"
        advice = "Give more --seeds, and a larger test set; where a seed diverges, lower --learning_rate"
    rows = "the full pool" if gain.arm == "full" else f"the rows of the {gain.arm} arm (there is no full one to go by)"
    # A pool that teaches little as a whole may still hold rows that do; more training tells.
    if coreset_loss is not None and coreset_loss <= gain.before * (1 - gain.min_share):
        reason = (
            f"The coreset's arm did lower it, to {coreset_loss:.3f}, but what the pool gives in time is not known."
        )
    else:
        reason = "Where training teaches nothing, no difference between arms tells which rows teach."
    return (
        f"WARNING: nothing is concluded at {where}, since training on {rows} {why} ({found}). {reason} {advice}, and "
        "run again."
    )
