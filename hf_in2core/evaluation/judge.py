"""The verdict between the arms of a run.

Losses are mean negative log-likelihoods per labelled token (nats), lower is better; a difference a - b below 0 means
that a is better. Seconds are wall-clock.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import mannwhitneyu

from hf_in2core.names import ALL_ARMS, ARMS, BUDGETS

from .gain import measure_gain
from .intervals import (
    LEVEL,
    Interval,
    JudgedDifference,
    LossDifference,
    compare_losses,
    compute_confidence_interval,
)
from .verdict import FractionVerdict, SelectionCost, Verdict, say_headline, say_verdict


COMPARISONS = (("coreset", "random"), ("coreset", "full"), ("opponents", "random"), ("coreset", "opponents"))


def compute_auc(scores: Sequence[float] | np.ndarray, labels: Sequence[bool] | np.ndarray) -> float | None:
    r"""
    Area under the ROC curve: the probability that a row with label `True` has a higher score than one with `False`.

    Influence is negative for proponents. To ask whether it puts rows first, pass `-influence`.

    Args:
        scores (`Sequence[float]` or `np.ndarray` of shape `[n]`):
            Scores; ties count half. Rows whose score is `None` or NaN (no loss) are left out.
        labels (`Sequence[bool]` or `np.ndarray` of shape `[n]`):
            Whether the row is of the kind looked for.

    Returns:
        `float` or `None`: AUC in [0, 1], 0.5 for no relation; `None` if only one class is left.

    Raises:
        `ValueError`: `scores` and `labels` have different lengths.
    """
    values = np.asarray(scores, dtype=np.float64)
    positive = np.asarray(labels, dtype=bool)
    if values.shape != positive.shape or values.ndim != 1:
        raise ValueError(
            f"compute_auc needs one label per score, but got scores of shape {values.shape} and labels of shape "
            f"{positive.shape}."
        )
    scored = ~np.isnan(values)
    values, positive = values[scored], positive[scored]
    found, others = values[positive], values[~positive]
    if len(found) == 0 or len(others) == 0:
        return None
    # Only the statistic is wanted; the exact p-value would take long on large pools.
    return float(mannwhitneyu(found, others, method="asymptotic").statistic) / (len(found) * len(others))


def judge(
    arms: Iterable[Mapping[str, Any]],
    selection: Mapping[str, Any],
    *,
    fractions: Sequence[float] | None = None,
    margin: float = 0.01,
    level: float = LEVEL,
    base_loss: float | None = None,
) -> Verdict:
    r"""
    Judge a run: did the coreset beat random rows beyond noise, did it match the full pool, and did selecting it pay?

    The headline is the first fraction of the run at every budget, so that no outcome decides which comparison is
    reported; `budget` and what goes with it is at equal steps, where the run has them. An outcome is claimed only if
    the whole confidence interval over seeds supports it, and if training clearly improved on the untrained model.

    Args:
        arms (`Iterable[Mapping[str, Any]]`):
            The `arms` of `results.json`: `arm` (one of `ALL_ARMS`; others are left out), `fraction`, `seed`, `budget`
            (`"steps"` or `"epochs"`), `test_loss` and `seconds`. The fraction of the full arm is not looked at.
        selection (`Mapping[str, Any]`):
            The `selection` of `results.json`: `seconds`, what computing influence took, and `reference_seconds`, what
            training the reference model took, not contained in `seconds` (0 or `None` for a given adapter);
            `ranking_seconds`, of the columns beside influence that the coreset was chosen by; and
            `tournament_seconds`, of the runs and columns of a tournament, where there was one, and what it found in
            words, `tournament`.
        fractions (`Sequence[float]`, *optional*):
            Fractions of the run, the headline first. Defaults to those in `arms`, in their order.
        margin (`float`, *optional*, defaults to `0.01`):
            How much worse than the full pool still counts as "no worse than", relative to the full pool's loss.
        level (`float`, *optional*, defaults to `0.95`):
            Confidence level of every interval.
        base_loss (`float`, *optional*):
            Test loss of the untrained model, `base["test_loss"]` of `results.json`. Where the full arm (else the
            random one, else the coreset's) is not at least 3 % below it with every seed below, nothing is concluded
            and the verdict says what to do; without it that is not looked at.

    Returns:
        [`~hf_in2core.evaluation.verdict.Verdict`], which a notebook shows as a table.

    Raises:
        `ValueError`: a fraction that was not run, an arm run twice with the same seed, an unknown budget, or a margin
            below 0.
    """
    if margin < 0:
        raise ValueError(f"margin={margin} is below 0. Whether the coreset beat the full pool is in beats_full.")
    runs = _group_runs(arms)
    available = list(dict.fromkeys(fraction for _, fraction, _ in runs if fraction is not None))
    chosen = available if fractions is None else list(dict.fromkeys(float(fraction) for fraction in fractions))
    if available and (missing := [fraction for fraction in chosen if fraction not in available]):
        raise ValueError(
            f"There are no results at the fractions {missing}, only at {available}. Pass the fractions of this run."
        )
    by_fraction = [
        _judge_fraction(runs, fraction, budget, margin, level, base_loss)
        for fraction in chosen
        for budget in BUDGETS
        if any((arm, fraction, budget) in runs for arm in ALL_ARMS)
    ]
    # A run of the full arm alone has nothing to compare; its results must not be lost over that.
    head = by_fraction[0] if by_fraction else _judge_fraction({}, math.nan, "steps", margin, level, None)
    cost = _compute_cost(runs, selection, head.fraction, by_fraction)
    return Verdict(
        text=" ".join(filter(None, [say_verdict(by_fraction, cost, margin), selection.get("tournament")])),
        headline=say_headline(by_fraction, cost),
        beats_random=head.beats_random,
        matches_full=head.matches_full,
        beats_full=head.beats_full,
        fraction=head.fraction if by_fraction else None,
        budget=head.budget if by_fraction else None,
        margin=margin,
        level=level,
        intervals=head.intervals,
        by_fraction=by_fraction,
        cost=cost,
        gain=head.gain,
    )


# Loss and seconds by seed of one arm at one budget; the full arm's fraction is None. A diverged loss is NaN.
_Runs = dict[tuple[str, float | None, str], dict[int, tuple[float, float | None]]]


def _group_runs(arms: Iterable[Mapping[str, Any]]) -> _Runs:
    runs: _Runs = {}
    for entry in arms:
        arm, budget, seed = entry["arm"], entry["budget"], entry["seed"]
        if arm not in ALL_ARMS:
            continue
        if budget not in BUDGETS:
            raise ValueError(f"budget={budget!r} of the arm {arm!r} does not exist. Use one of {tuple(BUDGETS)}.")
        key = (arm, None if arm == "full" else float(entry["fraction"]), budget)
        seeds = runs.setdefault(key, {})
        if seed in seeds:
            raise ValueError(
                f"The arm {arm!r} (fraction {entry['fraction']}, budget {budget!r}) has two results for seed {seed}, "
                "so its seeds are not independent runs. Keep one result per seed."
            )
        loss = entry["test_loss"]
        seconds = entry.get("seconds")
        seeds[seed] = (math.nan if loss is None else float(loss), None if seconds is None else float(seconds))
    return runs


def _key(arm: str, fraction: float, budget: str) -> tuple[str, float | None, str]:
    return (arm, None if arm == "full" else fraction, budget)


def _judge_fraction(
    runs: _Runs, fraction: float, budget: str, margin: float, level: float, base_loss: float | None
) -> FractionVerdict:
    losses = {
        arm: {seed: loss for seed, (loss, _) in runs[_key(arm, fraction, budget)].items()}
        for arm in ALL_ARMS
        if _key(arm, fraction, budget) in runs
    }
    diverged = [arm for arm, by_seed in losses.items() if not all(map(math.isfinite, by_seed.values()))]
    intervals: dict[str, JudgedDifference | None] = {}
    others = [arm for arm in losses if arm not in ARMS]
    for first, second in [*COMPARISONS, *((arm, "random") for arm in others), *(("coreset", arm) for arm in others)]:
        name = f"{first}_minus_{second}"
        if first not in losses or second not in losses:
            intervals[name] = None
        elif first in diverged or second in diverged:
            n = min(len(losses[first]), len(losses[second]))
            intervals[name] = JudgedDifference(None, None, None, None, n, level, None, "no interval")
        else:
            interval = compare_losses(losses[first], losses[second], level)
            allowed = margin * sum(losses["full"].values()) / len(losses["full"]) if second == "full" else 0.0
            intervals[name] = JudgedDifference(**vars(interval), outcome=_read_outcome(interval, allowed))
    gain = measure_gain({arm: found for arm, found in losses.items() if arm not in diverged}, base_loss, level)
    outcomes = {name: found.outcome for name, found in intervals.items() if found is not None}
    if gain is not None and not gain.clear:
        outcomes = {}
    return FractionVerdict(
        fraction=fraction,
        budget=budget,
        losses={
            arm: Interval(None, None, None, None, len(by_seed), level)
            if arm in diverged
            else compute_confidence_interval(list(by_seed.values()), level)
            for arm, by_seed in losses.items()
        },
        diverged=diverged,
        intervals=intervals,
        beats_random=outcomes.get("coreset_minus_random") == "better",
        matches_full=outcomes.get("coreset_minus_full") in ("better", "no worse"),
        beats_full=outcomes.get("coreset_minus_full") == "better",
        gain=gain,
    )


def _read_outcome(interval: LossDifference, allowed: float) -> str:
    """What an interval of a difference of losses says; up to `allowed` above 0 is "no worse"."""
    if interval.low is None or interval.high is None:
        return "no interval"
    if interval.high < 0:
        return "better"
    if interval.high < allowed:
        return "no worse"
    return "worse" if interval.low > 0 else "inconclusive"


def _compute_cost(
    runs: _Runs, selection: Mapping[str, Any], fraction: float, by_fraction: list[FractionVerdict]
) -> SelectionCost:
    influence, reference = selection.get("seconds"), selection.get("reference_seconds") or 0.0
    tournament = selection.get("tournament_seconds") or 0.0
    ranking = selection.get("ranking_seconds") or 0.0
    cost = None if influence is None else influence + reference + ranking + tournament
    full = _mean_seconds(runs.get(("full", None, "epochs"), {}))
    coreset = _mean_seconds(runs.get(("coreset", fraction, "epochs"), {}))
    saving = None if full is None or coreset is None else full - coreset
    at_epochs = [entry for entry in by_fraction if entry.fraction == fraction and entry.budget == "epochs"]
    against_random, against_full = (
        at_epochs[0].get_outcome("coreset", arm) if at_epochs else "not run" for arm in ("random", "full")
    )
    runs_to_pay: int | str | None = None
    cost_fraction = None
    if cost is not None and saving is not None and "not concluded" not in (against_random, against_full):
        # Random rows take as little time and need no selecting: a coreset that loses to them has saved nothing.
        if saving <= 0 or "worse" in (against_random, against_full):
            runs_to_pay = "never"
        else:
            runs_to_pay = max(1, math.ceil(cost / saving))
            cost_fraction = saving / cost if cost > 0 else None
    return SelectionCost(
        selection_seconds=cost,
        reference_seconds=reference,
        influence_seconds=influence,
        ranking_seconds=ranking,
        tournament_seconds=tournament,
        full_seconds=full,
        coreset_seconds=coreset,
        saving_per_run=saving,
        against_random=against_random,
        against_full=against_full,
        break_even_runs=runs_to_pay,
        break_even_cost_fraction=cost_fraction,
    )


def _mean_seconds(seeds: dict[int, tuple[float, float | None]]) -> float | None:
    seconds = [value for _, value in seeds.values() if value is not None and math.isfinite(value)]
    return sum(seconds) / len(seconds) if seconds else None
