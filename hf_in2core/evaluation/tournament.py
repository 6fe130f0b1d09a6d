"""A tournament between ways to choose rows: short runs on the reference model, judged on held-back validation rows."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hf_in2core.names import METHODS

from .formats import say_difference
from .gain import MIN_GAIN
from .intervals import Interval, compare_losses


# Fewer steps than this say more of the warm-up than of the rows.
MIN_STEPS = 20
NUM_SEEDS = 3
NUM_FINALISTS = 2
# Where the budget has fewer first runs than this beside two finalists, one finalist leaves room for more candidates.
FEW_CANDIDATES = 4
CONTROLS = ("random", "full")
# Whether rows are better is a question of one side: 5 % of this interval lie above it.
LEVEL = 0.9


@dataclass(frozen=True)
class Tournament:
    """
    What [`run_tournament`] found.

    Attributes:
        outcome (`str`): `"won"`; `"random"`, where no finalist's mean is below that of random rows, or each of those
            that are cannot gain 3 % of their loss (the whole interval is above that) or was no better than the whole
            pool with the first seed; `"undecided"`, where a finalist is below random rows, and the runs neither show a
            gain nor leave it out.
        winner (`str`): What to take: the winner, or `"random"`.
        text (`str`): The same in words.
        losses (`dict[str, dict[int, float]]`): Held-back loss by candidate and seed, nats per labelled token; `inf`
            where a run diverged.
        steps (`int`): Optimiser steps of each run.
        num_runs (`int`): Runs that there were.
        left_out (`list[str]`): Candidates for which the budget had no runs.
        intervals (`dict[str, Interval]`): `<finalist>_minus_random` and `<first>_minus_<second>`.
    """

    outcome: str
    winner: str
    text: str
    losses: dict[str, dict[int, float]]
    steps: int
    num_runs: int
    left_out: list[str]
    intervals: dict[str, Interval]


class TournamentPlan(NamedTuple):
    """Candidates that take part and those that do not, optimiser steps of each run, and how many runs there are."""

    chosen: list[str]
    left_out: list[str]
    steps: int
    num_runs: int

    def count_finalists(self) -> int:
        """How many candidates run with all seeds."""
        return (self.num_runs - len(CONTROLS) - len(self.chosen)) // (NUM_SEEDS - 1) - 1


def plan_tournament(candidates: Sequence[str], budget_steps: int, max_steps: int) -> TournamentPlan:
    """
    Divide a budget of steps between the runs of a tournament; arguments and error as of [`run_tournament`].

    Returns:
        [`TournamentPlan`]
    """
    shortest = min(MIN_STEPS, max_steps)
    finalists = NUM_FINALISTS
    room = budget_steps // max(shortest, 1) - (NUM_SEEDS - 1) * (finalists + 1) - len(CONTROLS)
    if room < min(FEW_CANDIDATES, len(candidates)):
        finalists = 1
        room = budget_steps // max(shortest, 1) - (NUM_SEEDS - 1) * (finalists + 1) - len(CONTROLS)
    if room < 1 or not candidates:
        raise ValueError(
            f"A tournament of {len(candidates)} candidates with {budget_steps} steps in all is too little: one "
            f"candidate beside the controls takes {(2 * NUM_SEEDS + 1) * shortest} (7 runs of {shortest} steps). Give "
            "a larger budget (--auto_budget), or name a --strategy."
        )
    chosen = list(candidates[:room])
    num_runs = len(CONTROLS) + len(chosen) + (NUM_SEEDS - 1) * (min(finalists, len(chosen)) + 1)
    steps = min(max(budget_steps // num_runs, shortest), max_steps)
    return TournamentPlan(chosen, list(candidates[room:]), steps, num_runs)


def run_tournament(
    run: Callable[[str, int, int], float],
    candidates: Sequence[str],
    budget_steps: int,
    max_steps: int,
    costs: Mapping[str, float] | None = None,
) -> Tournament:
    r"""
    Let candidates compete by successive halving: one seed for all, two more for the best and for random rows.

    The best two go on where the budget has first runs for four candidates beside that, and otherwise the best one.

    All runs are equally long, and the same seed gives the same order to each, so that differences are paired. Random
    rows and the whole pool are always among them. The best mean over the seeds wins if its whole 90 % interval against
    random rows is below 0 (one-sided, 5 %); of two finalists that are not told apart the cheaper one does. The seed
    that chose the finalists counts among theirs: where all rows are alike, about one tournament in eight still has a
    winner, which then is as good as random rows. Where none wins, selecting is not worth it, unless a finalist is
    below random rows by the mean, its interval reaches a gain of 3 % of their loss, and with the first seed it was
    better than the whole pool: that is undecided.

    ```python
    >>> tournament = run_tournament(train_and_judge, ["bm25", "cosine", "rds"], budget_steps=300, max_steps=150)
    >>> tournament.winner
    ```

    Args:
        run (`Callable[[str, int, int], float]`):
            Trains on the rows of a candidate (or `"random"`, `"full"`) with a seed for some steps, and returns the
            loss on rows that neither chose nor trained, lower is better. Random rows are drawn anew for each seed.
        candidates (`Sequence[str]`):
            Names, those that the budget is spent on first at the front: the cheapest and most different ones.
        budget_steps (`int`):
            Optimiser steps of all runs together, at most.
        max_steps (`int`):
            Of a single run, at most: those of a target run.
        costs (`Mapping[str, float]`, *optional*):
            What choosing by a candidate costs. By default a later candidate costs more.

    Returns:
        [`Tournament`]

    Raises:
        ValueError: if the budget has not 20 steps for each run of one candidate and the controls, or a run may not
            have 20 steps.
    """
    costs = {name: position for position, name in enumerate(candidates)} if costs is None else costs
    plan = plan_tournament(candidates, budget_steps, max_steps)
    chosen, left_out, steps, num_runs = plan
    names, finalists_at_most = [*CONTROLS, *chosen], plan.count_finalists()

    losses: dict[str, dict[int, float]] = {name: {} for name in names}

    def compete(name: str, seed: int) -> None:
        loss = run(name, seed, steps)
        losses[name][seed] = loss if math.isfinite(loss) else math.inf

    for name in names:
        compete(name, 0)
    finalists = sorted(chosen, key=lambda name: losses[name][0])[:finalists_at_most]
    for seed in range(1, NUM_SEEDS):
        for name in ("random", *finalists):
            compete(name, seed)

    def mean(name: str) -> float:
        return sum(losses[name].values()) / len(losses[name])

    finalists = sorted((name for name in finalists if math.isfinite(mean(name))), key=mean)
    intervals = {f"{name}_minus_random": _compare(losses, name, "random") for name in finalists}
    beating = [name for name in finalists if _is_below(intervals[f"{name}_minus_random"])]
    if len(finalists) == NUM_FINALISTS:
        first, second = finalists
        intervals[f"{first}_minus_{second}"] = between = _compare(losses, first, second)
        if second in beating and not _is_below(between) and costs[second] < costs[first]:
            beating = [second]
    if beating:
        outcome, winner = "won", beating[0]
    else:
        smallest = -MIN_GAIN * mean("random")
        better = [name for name in finalists if losses[name][0] < losses["full"][0]]
        hopeful = [name for name in better if _may_gain(intervals[f"{name}_minus_random"], smallest)]
        outcome, winner = ("undecided" if hopeful else "random"), "random"
        # The text names it first.
        finalists = sorted(finalists, key=lambda name: name not in hopeful)
    text = _say(outcome, winner, finalists, intervals, losses, steps, num_runs, left_out)
    return Tournament(outcome, winner, text, losses, steps, num_runs, left_out, intervals)


def _compare(losses: Mapping[str, Mapping[int, float]], first: str, second: str) -> Interval:
    if not all(map(math.isfinite, [*losses[first].values(), *losses[second].values()])):
        return Interval(None, None, None, None, len(losses[first]), LEVEL)
    return compare_losses(losses[first], losses[second], LEVEL)


def _is_below(interval: Interval) -> bool:
    """Whether a whole interval is below 0; random rows that diverged are beaten by rows that did not."""
    return interval.mean is None or (interval.high is not None and interval.high < 0)


def _may_gain(interval: Interval, smallest: float) -> bool:
    """Whether the mean is below 0, and the interval leaves room for a gain that is worth selecting for."""
    return interval.mean is not None and interval.mean < 0 and (interval.low is None or interval.low < smallest)


def _say(
    outcome: str,
    winner: str,
    finalists: Sequence[str],
    intervals: Mapping[str, Interval],
    losses: Mapping[str, Mapping[int, float]],
    steps: int,
    num_runs: int,
    left_out: Sequence[str],
) -> str:
    """The tournament in a few sentences."""
    head = f"Tournament on held-back validation rows, {num_runs} runs of {steps} steps"
    against = {name: intervals[f"{name}_minus_random"] for name in finalists}
    known = {name: interval for name, interval in against.items() if interval.low is not None}
    shown = [f"{name} \N{MINUS SIGN} random {say_difference(interval)}" for name, interval in known.items()]
    numbers = f" ({'; '.join(shown)})" if shown else ""
    if outcome == "won":
        words = f" ({METHODS[winner].words})" if winner in METHODS else ""
        others = [name for name in finalists if name != winner]
        closest = f"; {others[0]} was the other finalist" if others else ""
        said = f"{head}: {winner}{words} won{closest}{numbers}."
    elif outcome == "undecided":
        said = (
            f"{head}: undecided. {finalists[0]} was below random rows by the mean, but not beyond noise{numbers}; the "
            "coreset is random rows. Take random rows, or the whole pool; a larger --auto_budget may tell more."
        )
    else:
        below = [name for name, interval in against.items() if interval.mean is not None and interval.mean < 0]
        small = [name for name in below if losses[name][0] < losses["full"][0]]
        room = f", and {' and '.join(small)} can gain less than {100 * MIN_GAIN:g} % of their loss" if small else ""
        if others := [name for name in below if name not in small]:
            room += f", and the whole pool was no worse than {' and '.join(others)}"
        said = (
            f"{head}: nothing beat random rows{room}{numbers}, so selecting is not worth it here; the coreset is "
            "random rows. Take random rows, or the whole pool."
        )
    best = min((name for name in losses), key=lambda name: losses[name][0])
    if best == "full":
        said += " With its first seed the whole pool was better than every candidate."
    return said + (f" No runs were left for {', '.join(left_out)}." if left_out else "")
