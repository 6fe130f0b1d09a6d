"""The verdict between the arms of a run in words; `hf_in2core.evaluation.judge.judge` computes what it says."""

import math
from typing import Any


BUDGET_NAMES = {"steps": "equal steps", "epochs": "equal epochs"}
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


def say_verdict(by_fraction: list[dict[str, Any]], cost: dict[str, Any], margin: float) -> str:
    r"""
    Put the verdict into two to five sentences.

    Args:
        by_fraction (`list[dict]`):
            `by_fraction` of [`~hf_in2core.evaluation.judge.judge`], the headline first.
        cost (`dict`):
            `cost` of [`~hf_in2core.evaluation.judge.judge`].
        margin (`float`):
            The margin within which the coreset counts as no worse than the full pool.

    Returns:
        `str`: the sentences, plain text in one paragraph.
    """
    if not by_fraction:
        return f"Nothing was compared: there is no coreset, random or opponents arm. {_say_cost(cost)}"
    head = by_fraction[0]
    sentences = [_say_random(head), _say_full(head, margin), _say_others(by_fraction[1:]), _say_cost(cost)]
    # A ranking that points the wrong way is read first.
    sentences.insert(0 if _opponents_won(head) else 2, _say_opponents(head))
    return " ".join(sentence for sentence in sentences if sentence)


def say_headline(head: dict[str, Any]) -> str:
    """Say in one line what one entry of `by_fraction` shows; the title of a plot."""
    where = f" ({_where(head)})" if head["losses"] else ""
    opponents = ", and had a higher loss than the opponents" if _opponents_won(head) else ""
    return f"Coreset{where}: {_say_outcomes(head)}{opponents}"


def _where(entry: dict[str, Any]) -> str:
    return f"fraction {entry['fraction']:g}, {BUDGET_NAMES[entry['budget']]}"


def _say_outcomes(entry: dict[str, Any]) -> str:
    said = [
        AGAINST_RANDOM.get(get_outcome(entry["intervals"]["coreset_minus_random"])),
        AGAINST_FULL.get(get_outcome(entry["intervals"]["coreset_minus_full"])),
    ]
    return " and ".join(part for part in said if part) or "no conclusion"


def get_outcome(interval: dict[str, Any] | None) -> str:
    """Outcome of one comparison; `"not run"` where one of its arms is missing."""
    return "not run" if interval is None else interval["outcome"]


def _numbers(head: dict[str, Any], first: str, second: str) -> str:
    """Both losses and their difference with its interval."""
    interval = head["intervals"][f"{first}_minus_{second}"]
    losses = f"test loss {head['losses'][first]['mean']:.3f} against {head['losses'][second]['mean']:.3f}"
    if interval["low"] is None:
        return losses
    # Two digits of the half-width, so that an end close to 0 does not read as 0.
    half_width = interval["half_width"]
    decimals = 3 if half_width < 1e-6 else max(3, 1 - math.floor(math.log10(half_width)))
    return (
        f"{losses}, difference {interval['mean']:+.{decimals}f}, {interval['level'] * 100:g} % interval "
        f"{interval['low']:+.{decimals}f} to {interval['high']:+.{decimals}f}, {interval['n']} seeds"
    )


def _why_no_interval(head: dict[str, Any], first: str, second: str) -> str:
    diverged = [arm for arm in (first, second) if arm in head["diverged"]]
    if diverged:
        return f"the test loss of the {' and the '.join(diverged)} arm is not finite for at least one seed"
    n = head["intervals"][f"{first}_minus_{second}"]["n"]
    if n < 2:
        return f"with {n} seed no confidence interval can be given, which takes at least 2 (better 3)"
    return f"all {n} seeds gave exactly the same loss, so they say nothing about noise"


def _say_random(head: dict[str, Any]) -> str:
    where = f"At fraction {head['fraction']:g} and {BUDGET_NAMES[head['budget']]}"
    outcome = get_outcome(head["intervals"]["coreset_minus_random"])
    if "coreset" not in head["losses"]:
        return f"{where} there is no coreset arm, so nothing is known about the coreset."
    if outcome == "not run":
        return f"{where} there is no random arm, so it is not known whether the coreset is better than random rows."
    if outcome == "no interval":
        return f"{where} nothing is concluded: {_why_no_interval(head, 'coreset', 'random')}."
    return f"{where} the coreset {AGAINST_RANDOM[outcome]} ({_numbers(head, 'coreset', 'random')})."


def _say_full(head: dict[str, Any], margin: float) -> str:
    interval = head["intervals"]["coreset_minus_full"]
    outcome = get_outcome(interval)
    if "coreset" not in head["losses"]:
        return ""
    if outcome == "not run":
        return "There is no full arm, so it is not known what leaving rows out costs."
    if outcome == "no interval":
        if get_outcome(head["intervals"]["coreset_minus_random"]) == "no interval":
            return ""
        return f"Against the full pool nothing is concluded: {_why_no_interval(head, 'coreset', 'full')}."
    numbers = _numbers(head, "coreset", "full")
    if outcome == "no worse":
        return f"It {AGAINST_FULL[outcome]}, within the margin of {margin * 100:g} % of its loss ({numbers})."
    if outcome == "inconclusive":
        return f"Whether it matches the full pool is inconclusive, the interval is too wide ({numbers})."
    return f"It {AGAINST_FULL[outcome]} ({numbers})."


def _opponents_won(head: dict[str, Any]) -> bool:
    interval = head["intervals"]["coreset_minus_opponents"]
    return interval is not None and interval["mean"] is not None and interval["mean"] > 0


def _say_opponents(head: dict[str, Any]) -> str:
    against_coreset = head["intervals"]["coreset_minus_opponents"]
    if _opponents_won(head):
        noise = {"worse": "beyond noise", "inconclusive": "within noise"}.get(
            get_outcome(against_coreset), "without an interval"
        )
        return (
            f"WARNING: the opponents did better than the coreset, {noise} ({_numbers(head, 'coreset', 'opponents')}); "
            "the ranking does not point the right way: check the validation set and the reference model before use."
        )
    outcome = get_outcome(head["intervals"]["opponents_minus_random"])
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


def _say_others(others: list[dict[str, Any]]) -> str:
    if not others:
        return ""
    if len(others) > 3:
        random = sum(entry["beats_random"] for entry in others)
        full = sum(entry["matches_full"] for entry in others)
        return (
            f"Of the {len(others)} other fractions and budgets, the coreset beat random rows beyond noise in {random} "
            f"and was better or no worse than the full pool in {full}."
        )
    return f"Elsewhere, {'; '.join(f'at {_where(entry)}: {_say_outcomes(entry)}' for entry in others)}."


def _say_cost(cost: dict[str, Any]) -> str:
    total, saving = cost["selection_seconds"], cost["saving_per_run"]
    if total is None:
        return "What selecting cost was not recorded."
    parts = f"influence {_seconds(cost['influence_seconds'])}"
    if cost["reference_seconds"]:
        parts = f"reference {_seconds(cost['reference_seconds'])}, {parts}"
    else:
        parts += ", no training of a reference counted"
    spent = f"Selecting cost {_seconds(total)} ({parts})"
    if saving is None:
        return f"{spent}; what it saves was not measured, which takes the full and the coreset arm at equal epochs."
    took = f"{_seconds(cost['full_seconds'])} on the full pool, {_seconds(cost['coreset_seconds'])} on the coreset"
    if saving <= 0:
        return f"{spent} and saved nothing: a target run at equal epochs took {took}, so it never pays."
    if cost["break_even_runs"] == "never":
        than = "on the full pool" if cost["against_full"] == "worse" else "on as many random rows"
        return (
            f"{spent}; a target run at equal epochs was {_seconds(saving)} shorter ({took}), but worse than {than}, "
            "so it never pays."
        )
    provisos = []
    if cost["against_random"] != "better":
        provisos.append("as many random rows, which the coreset was not shown to beat, save the same for nothing")
    if cost["against_full"] not in ("better", "no worse"):
        provisos.append("the coreset was not shown to match the full pool")
    proviso = f" (in time alone: at equal epochs {', and '.join(provisos)})" if provisos else ""
    if total <= saving:
        return (
            f"{spent}, no more than the {_seconds(saving)} that a target run at equal epochs saves ({took}): it pays "
            f"with the first run{proviso}."
        )
    return (
        f"{spent}, more than the {_seconds(saving)} that a target run at equal epochs saves ({took}): it pays after "
        f"{cost['break_even_runs']} target runs, or with one if reference and influence cost "
        f"{cost['break_even_cost_fraction']:.2g} of that{proviso}."
    )


def _seconds(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds >= 100 else f"{seconds:.3g} s"
