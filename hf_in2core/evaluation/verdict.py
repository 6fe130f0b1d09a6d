"""The verdict between the arms of a run in words; `hf_in2core.evaluation.judge.judge` computes what it says."""

from collections.abc import Mapping
from dataclasses import dataclass

from hf_in2core.names import ARMS, BUDGETS
from hf_in2core.notebook import render_html, show_figure

from .arms import name_arm
from .formats import format_seconds, say_difference
from .gain import TrainingGain, say_no_gain
from .intervals import Interval, JudgedDifference


AGAINST_RANDOM = {
    "better": "beat random rows",
    "worse": "lost to random rows",
    "inconclusive": "did not beat random rows beyond noise",
}
AGAINST_FULL = {
    "better": "beat the full pool",
    "no worse": "was no worse than the full pool",
    "worse": "was worse than the full pool",
    "inconclusive": "was not shown to match the full pool",
}


AGAINST_METHOD = {
    "better": "worse than the coreset beyond noise",
    "worse": "better than the coreset beyond noise",
    "inconclusive": "not told apart from the coreset",
}


@dataclass(frozen=True)
class FractionVerdict:
    """
    What the seeds say at one fraction and budget.

    Attributes:
        fraction (`float`): Share of the pool's rows in the coreset.
        budget (`str`): `"steps"` or `"epochs"`.
        losses (`dict[str, Interval]`): Of each arm's own loss.
        diverged (`list[str]`): Arms with a loss that is not finite.
        intervals (`dict[str, JudgedDifference | None]`): `coreset_minus_random`, `coreset_minus_full`,
            `opponents_minus_random` and `coreset_minus_opponents`, and of each other method `<method>_minus_random`
            and `coreset_minus_<method>`. `None` where an arm is missing.
        beats_random (`bool`): The whole interval of coreset - random is below 0.
        matches_full (`bool`): The upper end of coreset - full is below the margin.
        beats_full (`bool`): The whole interval of coreset - full is below 0.
        gain (`TrainingGain`, *optional*): What training did to the untrained model, where its loss is known. Where
            that is not clear nothing is concluded: the three are `False`, whatever the intervals say.
    """

    fraction: float
    budget: str
    losses: dict[str, Interval]
    diverged: list[str]
    intervals: Mapping[str, JudgedDifference | None]
    beats_random: bool
    matches_full: bool
    beats_full: bool
    gain: TrainingGain | None = None

    @property
    def where(self) -> str:
        """Fraction and budget in words."""
        return f"fraction {self.fraction:g}, {BUDGETS[self.budget]}"

    @property
    def taught(self) -> bool:
        """Whether training taught something, as far as is known."""
        return self.gain is None or self.gain.clear

    @property
    def opponents_won(self) -> bool:
        """Whether the opponents have the lower mean loss, so that the ranking does not point the right way."""
        interval = self.intervals["coreset_minus_opponents"]
        return self.taught and interval is not None and interval.mean is not None and interval.mean > 0

    def get_outcome(self, first: str, second: str) -> str:
        """Outcome of one comparison; `"not run"` without one of its arms, `"not concluded"` if nothing was taught."""
        interval = self.intervals[f"{first}_minus_{second}"]
        if interval is None:
            return "not run"
        return interval.outcome if self.taught else "not concluded"


@dataclass(frozen=True)
class SelectionCost:
    """
    What selecting cost and saves, in seconds; `None` where it was not measured.

    Attributes:
        selection_seconds (`float`): Reference, influence, ranking and tournament together; then each of them.
        full_seconds, coreset_seconds, saving_per_run (`float`): A target run at equal epochs and the headline's
            fraction, and the difference.
        against_random, against_full (`str`): Outcomes at equal epochs.
        break_even_runs (`int` or `str`): Target runs after which selecting has paid; `"never"` if nothing is saved or
            the coreset is worse than the full pool or as many random rows; `None` where training taught nothing.
        break_even_cost_fraction (`float`): Fraction of `selection_seconds` that one target run saves: where it is
            below 1, reference and influence would have to cost that fraction of what they did to pay with one run.
    """

    selection_seconds: float | None
    reference_seconds: float
    influence_seconds: float | None
    ranking_seconds: float
    tournament_seconds: float
    full_seconds: float | None
    coreset_seconds: float | None
    saving_per_run: float | None
    against_random: str
    against_full: str
    break_even_runs: int | str | None
    break_even_cost_fraction: float | None


@dataclass(frozen=True, repr=False)
class Verdict:
    """
    What [`~hf_in2core.evaluation.judge.judge`] returns; the `verdict` of results.json is `dataclasses.asdict` of it.

    Attributes:
        text (`str`): The verdict in a few sentences.
        headline (`str`): In a few words: the first fraction at every budget, and whether selecting pays.
        beats_random, matches_full, beats_full, intervals, gain: Those of the first of `by_fraction`.
        fraction (`float`, *optional*), budget (`str`, *optional*): Of the first of `by_fraction`.
        margin (`float`): How much worse than the full pool still counts as no worse, relative to its loss.
        level (`float`): Confidence level of every interval.
        by_fraction (`list[FractionVerdict]`): For every fraction and budget, the headline first.
        cost (`SelectionCost`): Whether selecting pays.
    """

    text: str
    headline: str
    beats_random: bool
    matches_full: bool
    beats_full: bool
    fraction: float | None
    budget: str | None
    margin: float
    level: float
    intervals: Mapping[str, JudgedDifference | None]
    by_fraction: list[FractionVerdict]
    cost: SelectionCost
    gain: TrainingGain | None = None

    def __repr__(self) -> str:
        return f"Verdict: {self.headline}. {self.text}"

    def _repr_html_(self) -> str:
        rows = [
            (
                name_arm(arm, entry.fraction),
                BUDGETS[entry.budget],
                *map(show_figure, (loss.mean, loss.half_width)),
                loss.n,
            )
            for entry in self.by_fraction
            for arm, loss in entry.losses.items()
        ]
        half = f"± (half the {self.level:.0%} interval)"
        columns = ["arm", "budget", "test loss (lower is better)", half, "seeds"]
        return render_html(self.headline, rows, columns=columns, notes=[self.text])


def say_verdict(by_fraction: list[FractionVerdict], cost: SelectionCost, margin: float) -> str:
    r"""
    Put the verdict into a few sentences.

    Args:
        by_fraction (`list[FractionVerdict]`):
            Every fraction and budget, the headline first.
        cost (`SelectionCost`):
            Whether selecting pays.
        margin (`float`):
            The margin within which the coreset counts as no worse than the full pool.

    Returns:
        `str`: the sentences, plain text in one paragraph.
    """
    if not by_fraction:
        return f"Nothing was compared: there is no coreset, random or opponents arm. {_say_cost(cost)}"
    head = by_fraction[0]
    if head.gain is not None and not head.taught:
        coreset_loss = head.losses["coreset"].mean if "coreset" in head.losses else None
        refusal = say_no_gain(head.gain, head.where, coreset_loss)
        return " ".join(filter(None, [refusal, _say_others(by_fraction[1:]), _say_cost(cost)]))
    sentences = [
        _say_random(head),
        _say_full(head, margin),
        _say_methods(head),
        _say_others(by_fraction[1:]),
        _say_cost(cost),
    ]
    # A ranking that points the wrong way is read first.
    sentences.insert(0 if head.opponents_won else 2, _say_opponents(head))
    return " ".join(sentence for sentence in sentences if sentence)


def say_headline(by_fraction: list[FractionVerdict], cost: SelectionCost) -> str:
    r"""
    Say in one line what the first fraction shows at every budget, and whether selecting pays; the title of a plot.

    Args:
        by_fraction (`list[FractionVerdict]`):
            Every fraction and budget, the headline first.
        cost (`SelectionCost`):
            Whether selecting pays.

    Returns:
        `str`: a win at one budget never stands there without what the other shows.
    """
    if not by_fraction:
        return "Coreset: no conclusion"
    budgets: dict[str, list[str]] = {}
    for entry in by_fraction:
        if entry.fraction == by_fraction[0].fraction:
            opponents = ", and had a higher loss than the opponents" if entry.opponents_won else ""
            budgets.setdefault(f"{_say_outcomes(entry)}{opponents}", []).append(BUDGETS[entry.budget])
    said = [f"at {' and '.join(where)} {outcome}" for outcome, where in budgets.items()]
    said += _say_payment(cost) if by_fraction[0].taught else []
    return f"Coreset (fraction {by_fraction[0].fraction:g}): {'; '.join(said)}"


def _say_payment(cost: SelectionCost) -> list[str]:
    """Whether selecting pays, in a few words; nothing where it was not measured."""
    if cost.break_even_runs is None:
        return []
    if isinstance(cost.break_even_runs, str):
        return ["does not pay"]
    runs = "the first run" if cost.break_even_runs == 1 else f"{cost.break_even_runs:,} runs"
    shown = cost.against_random == "better" and cost.against_full in ("better", "no worse")
    return [f"pays {'with' if cost.break_even_runs == 1 else 'after'} {runs}{'' if shown else ', in time alone'}"]


def _say_outcomes(entry: FractionVerdict) -> str:
    if not entry.taught:
        return "no conclusion, since training did not clearly improve the untrained model"
    said = [
        AGAINST_RANDOM.get(entry.get_outcome("coreset", "random")),
        AGAINST_FULL.get(entry.get_outcome("coreset", "full")),
    ]
    return " and ".join(part for part in said if part) or "no conclusion"


def _numbers(head: FractionVerdict, first: str, second: str) -> str:
    """Both losses and their difference with its interval."""
    interval = head.intervals[f"{first}_minus_{second}"]
    losses = f"test loss {head.losses[first].mean:.3f} against {head.losses[second].mean:.3f}"
    if interval is None or interval.low is None:
        return losses
    return f"{losses}, difference {say_difference(interval)}, {interval.n} seeds"


def _why_no_interval(head: FractionVerdict, first: str, second: str) -> str:
    diverged = [arm for arm in (first, second) if arm in head.diverged]
    if diverged:
        return f"the test loss of the {' and the '.join(diverged)} arm is not finite for at least one seed"
    n = min(head.losses[first].n, head.losses[second].n)
    if n < 2:
        return f"with {n} seed no confidence interval can be given, which takes at least 2 (better 3)"
    return f"all {n} seeds gave exactly the same loss, so they say nothing about noise"


def _say_random(head: FractionVerdict) -> str:
    where = f"At fraction {head.fraction:g} and {BUDGETS[head.budget]}"
    outcome = head.get_outcome("coreset", "random")
    if "coreset" not in head.losses:
        return f"{where} there is no coreset arm, so nothing is known about the coreset."
    if outcome == "not run":
        return f"{where} there is no random arm, so it is not known whether the coreset is better than random rows."
    if outcome == "no interval":
        return f"{where} nothing is concluded: {_why_no_interval(head, 'coreset', 'random')}."
    return f"{where} the coreset {AGAINST_RANDOM[outcome]} ({_numbers(head, 'coreset', 'random')})."


def _say_full(head: FractionVerdict, margin: float) -> str:
    outcome = head.get_outcome("coreset", "full")
    if "coreset" not in head.losses:
        return ""
    if outcome == "not run":
        return "There is no full arm, so it is not known what leaving rows out costs."
    if outcome == "no interval":
        if head.get_outcome("coreset", "random") == "no interval":
            return ""
        return f"Against the full pool nothing is concluded: {_why_no_interval(head, 'coreset', 'full')}."
    numbers = _numbers(head, "coreset", "full")
    if outcome == "no worse":
        return f"It {AGAINST_FULL[outcome]}, within the margin of {margin * 100:g} % of its loss ({numbers})."
    if outcome == "inconclusive":
        return f"Whether it matches the full pool is inconclusive, the interval is too wide ({numbers})."
    return f"It {AGAINST_FULL[outcome]} ({numbers})."


def _say_opponents(head: FractionVerdict) -> str:
    if head.opponents_won:
        noise = {"worse": "beyond noise", "inconclusive": "within noise"}.get(
            head.get_outcome("coreset", "opponents"), "without an interval"
        )
        return (
            f"WARNING: the opponents did better than the coreset, {noise} ({_numbers(head, 'coreset', 'opponents')}); "
            "the ranking does not point the right way: check the validation set and the reference model before use."
        )
    outcome = head.get_outcome("opponents", "random")
    if outcome == "worse":
        return "The opponents were worse than random rows beyond noise, as they should be."
    if outcome == "better":
        return (
            f"WARNING: the opponents beat random rows ({_numbers(head, 'opponents', 'random')}), which the sign of "
            "influence does not explain."
        )
    if outcome == "inconclusive":
        return "The opponents did not differ from random rows beyond noise, so they do not confirm the ranking."
    return ""


def _say_methods(head: FractionVerdict) -> str:
    """What the other ways to choose did: against random rows, and the coreset against each."""
    methods = [arm for arm in head.losses if arm not in ARMS]
    said = []
    for method in methods:
        outcomes = [
            AGAINST_RANDOM.get(head.get_outcome(method, "random")) if "random" in head.losses else None,
            AGAINST_METHOD.get(head.get_outcome("coreset", method)) if "coreset" in head.losses else None,
        ]
        mean = head.losses[method].mean
        shown = "a loss that is not finite" if mean is None else f"{mean:.3f}"
        said.append(", ".join([f"{method} {shown}", *filter(None, outcomes)]))
    return f"Other ways to choose as many rows: {'; '.join(said)}." if said else ""


def _say_others(others: list[FractionVerdict]) -> str:
    if not others:
        return ""
    if len(others) > 3:
        random = sum(entry.beats_random for entry in others)
        full = sum(entry.matches_full for entry in others)
        return (
            f"Of the {len(others)} other fractions and budgets, the coreset beat random rows beyond noise in {random} "
            f"and was better or no worse than the full pool in {full}."
        )
    return f"Elsewhere, {'; '.join(f'at {entry.where}: {_say_outcomes(entry)}' for entry in others)}."


def _say_cost(cost: SelectionCost) -> str:
    total, saving = cost.selection_seconds, cost.saving_per_run
    saved = format_seconds(saving)
    if total is None:
        return "What selecting cost was not recorded."
    parts = f"influence {format_seconds(cost.influence_seconds)}"
    if cost.ranking_seconds:
        parts = f"{parts}, ranking {format_seconds(cost.ranking_seconds)}"
    if cost.tournament_seconds:
        parts = f"{parts}, tournament {format_seconds(cost.tournament_seconds)}"
    if cost.reference_seconds:
        parts = f"reference {format_seconds(cost.reference_seconds)}, {parts}"
    else:
        parts += ", no training of a reference counted"
    spent = f"Selecting cost {format_seconds(total)} ({parts})"
    if saving is None:
        return f"{spent}; what it saves was not measured, which takes the full and the coreset arm at equal epochs."
    took = (
        f"{format_seconds(cost.full_seconds)} on the full pool, {format_seconds(cost.coreset_seconds)} on the coreset"
    )
    if saving <= 0:
        return f"{spent} and saved nothing: a target run at equal epochs took {took}, so it never pays."
    if cost.break_even_runs is None:
        return (
            f"{spent}; a target run at equal epochs was {saved} shorter ({took}), but training taught nothing there."
        )
    if cost.break_even_runs == "never":
        than = "on the full pool" if cost.against_full == "worse" else "on as many random rows"
        return (
            f"{spent}; a target run at equal epochs was {saved} shorter ({took}), but worse than {than}, "
            "so it never pays."
        )
    provisos = []
    if cost.against_random != "better":
        provisos.append("as many random rows, which the coreset was not shown to beat, save the same for nothing")
    if cost.against_full not in ("better", "no worse"):
        provisos.append("the coreset was not shown to match the full pool")
    proviso = f" (in time alone: at equal epochs {', and '.join(provisos)})" if provisos else ""
    if total <= saving:
        return (
            f"{spent}, no more than the {saved} that a target run at equal epochs saves ({took}): it pays "
            f"with the first run{proviso}."
        )
    return (
        f"{spent}, more than the {saved} that a target run at equal epochs saves ({took}): it pays after "
        f"{cost.break_even_runs} target runs, or with one if reference and influence cost "
        f"{cost.break_even_cost_fraction:.2g} of that{proviso}."
    )
