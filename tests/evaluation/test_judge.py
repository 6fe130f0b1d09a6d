"""Metrics, intervals, AUC and the verdict against scipy, scikit-learn, evaluate itself and hand-made runs."""

import json
import math
import subprocess
import sys
from dataclasses import asdict
from typing import Any

import evaluate
import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from hf_in2core.evaluation.intervals import (
    Interval,
    compare_losses,
    compute_confidence_interval,
    compute_rank_correlation,
)
from hf_in2core.evaluation.judge import compute_auc, judge
from hf_in2core.evaluation.metrics import TokenAccuracy, TokenPerplexity


LOSSES = st.floats(0.01, 20)


# --- metrics ---


def test_metrics_weigh_tokens_not_rows() -> None:
    """Rows of very different length against torch's own token mean over the concatenated tokens."""
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(length, 11, generator=generator, dtype=torch.float64) * 3 for length in (1, 40, 3, 17)]
    labels = [torch.randint(0, 11, (len(row),), generator=generator) for row in logits]
    labels[1][:35] = -100
    labels[2][:] = -100  # a row without loss adds nothing
    expected = torch.nn.functional.cross_entropy(torch.cat(logits), torch.cat(labels), ignore_index=-100)
    kept = torch.cat(labels) != -100
    hits = (torch.cat(logits).argmax(-1) == torch.cat(labels))[kept]

    perplexity, accuracy = TokenPerplexity(), TokenAccuracy()
    for row, row_labels in zip(logits, labels, strict=True):
        nll = torch.nn.functional.cross_entropy(row, row_labels, ignore_index=-100, reduction="sum")
        tokens = (row_labels != -100).sum()
        correct = ((row.argmax(-1) == row_labels) & (row_labels != -100)).sum()
        perplexity.add_batch(nll_sum=nll[None], num_loss_tokens=tokens[None])
        accuracy.add_batch(num_correct=correct[None], num_loss_tokens=tokens[None])
    result = perplexity.compute()
    assert result is not None
    assert result["loss"] == pytest.approx(expected.item(), rel=1e-12)
    assert result["perplexity"] == pytest.approx(expected.exp().item(), rel=1e-12)
    assert accuracy.compute() == {"accuracy": pytest.approx(hits.double().mean().item(), rel=1e-12)}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(LOSSES, st.integers(1, 500)), min_size=1, max_size=30), st.integers(1, 7))
def test_perplexity_does_not_depend_on_batches(rows: list[tuple[float, int]], batch_size: int) -> None:
    nll, tokens = [loss * count for loss, count in rows], [count for _, count in rows]
    metric = TokenPerplexity()
    whole = metric.compute(nll_sum=nll, num_loss_tokens=tokens)
    for start in range(0, len(rows), batch_size):
        stop = start + batch_size
        metric.add_batch(nll_sum=np.array(nll[start:stop]), num_loss_tokens=np.array(tokens[start:stop]))
    assert metric.compute() == whole


def test_metrics_combine_and_start_afresh() -> None:
    perplexity = TokenPerplexity()
    for _ in range(2):
        perplexity.add_batch(nll_sum=[], num_loss_tokens=[])  # an empty shard
        perplexity.add(nll_sum=1.0, num_loss_tokens=2)
        assert perplexity.compute(nll_sum=[5.0], num_loss_tokens=[1]) == {"loss": 2.0, "perplexity": math.exp(2)}
    both = evaluate.combine([perplexity, TokenAccuracy()])
    both.add_batch(nll_sum=[6.0, 2.0], num_loss_tokens=[3, 1], num_correct=[3, 0])
    assert both.compute() == {"loss": 2.0, "perplexity": math.exp(2), "accuracy": 0.75}


def test_perplexity_of_a_diverged_model() -> None:
    assert TokenPerplexity().compute(nll_sum=[1e5], num_loss_tokens=[1]) == {"loss": 1e5, "perplexity": math.inf}
    nan = TokenPerplexity().compute(nll_sum=[math.nan, 1.0], num_loss_tokens=[1, 1])
    assert nan is not None and math.isnan(nan["loss"])


METRIC_PROCESS = """
import sys
from hf_in2core.evaluation.metrics import TokenPerplexity
metrics = [TokenPerplexity() for _ in range(2)]
for step in range(20):
    for metric in metrics:
        metric.add_batch(nll_sum=[float(sys.argv[1])] * 3, num_loss_tokens=[1] * 3)
print(*[metric.compute()["loss"] for metric in metrics])
"""


@pytest.mark.slow
def test_processes_do_not_share_a_cache(tmp_path: Any) -> None:
    """Offline, with a fresh HOME, at the same time: each process sees its own rows, and no lock or file is left."""
    environment = {
        "HOME": str(tmp_path),
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": ":".join(path for path in sys.path if path) + ":.",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", METRIC_PROCESS, str(i)], env=environment, stdout=subprocess.PIPE, text=True
        )
        for i in range(2)
    ]
    assert [process.communicate(timeout=120)[0].strip() for process in processes] == ["0.0 0.0", "1.0 1.0"]
    assert [path for path in tmp_path.rglob("*") if path.suffix in (".lock", ".arrow")] == []


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "was given no rows. Pass num_correct and num_loss_tokens"),
        ({"num_correct": [1]}, "was given num_correct. Pass num_correct and num_loss_tokens"),
        ({"predictions": [1], "references": [1]}, "was given no rows"),
        ({"num_correct": [], "num_loss_tokens": []}, "None of the 0 rows has a labelled token"),
        ({"num_correct": [0, 0], "num_loss_tokens": [0, 0]}, "None of the 2 rows has a labelled token"),
        ({"num_correct": [1, 3], "num_loss_tokens": [2, 2]}, "Row 1 has num_correct=3, but num_loss_tokens=2"),
        ({"num_correct": [7, 9], "num_loss_tokens": [7, -100]}, r"negative count \(-100\)"),
        ({"num_correct": [1, 1], "num_loss_tokens": [1]}, "Mismatch in the number"),
    ],
)
def test_metrics_refuse_bad_input(inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenAccuracy().compute(**inputs)


@pytest.mark.slow
def test_verdict_needs_no_torch() -> None:
    code = (
        "import sys, hf_in2core.selection.coreset, hf_in2core.evaluation.judge, hf_in2core.report.terminal\n"
        "import hf_in2core.report.page, hf_in2core.report.plots\n"
        "print(sorted({'torch', 'transformers', 'trl', 'evaluate', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


# --- intervals and AUC ---


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=12), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_interval_equals_scipy(values: list[float], level: float) -> None:
    assume(np.std(values) > 1e-6)
    interval = compute_confidence_interval(values, level)
    low, high = scipy.stats.t.interval(level, len(values) - 1, np.mean(values), scipy.stats.sem(values))
    assert (interval.low, interval.high) == pytest.approx((low, high), rel=1e-9, abs=1e-9)
    assert interval.half_width == pytest.approx((high - low) / 2)
    assert (interval.mean, interval.n) == (pytest.approx(np.mean(values)), len(values))


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for sample in generator.normal(2.0, 0.3, (2000, 3)):
        interval = compute_confidence_interval(sample)
        assert interval.low is not None and interval.high is not None
        covered += interval.low <= 2.0 <= interval.high
    # 0.95 with a standard error of 0.005; with a normal instead of a t quantile it would be 0.81.
    assert 0.93 < covered / 2000 < 0.97


@given(st.lists(st.tuples(LOSSES, LOSSES), min_size=2, max_size=10))
def test_paired_difference_equals_scipy(pairs: list[tuple[float, float]]) -> None:
    first = {seed: pair[0] for seed, pair in enumerate(pairs)}
    # Another order of the seeds must not change what is paired with what.
    second = {seed: pairs[seed][1] for seed in reversed(range(len(pairs)))}
    differences = [a - b for a, b in pairs]
    assume(np.std(differences) > 1e-6)
    expected = scipy.stats.ttest_rel([a for a, _ in pairs], [b for _, b in pairs]).confidence_interval(0.95)
    interval = compare_losses(first, second)
    assert interval.method == "paired t"
    assert interval.mean == pytest.approx(np.mean(differences), abs=1e-9)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), rel=1e-7, abs=1e-7)


@given(st.lists(LOSSES, min_size=2, max_size=8), st.lists(LOSSES, min_size=2, max_size=8))
def test_unpaired_difference_equals_scipy(a: list[float], b: list[float]) -> None:
    assume(np.std(a) > 1e-3 and np.std(b) > 1e-3)
    expected = scipy.stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.9)
    interval = compare_losses(dict(enumerate(a)), {100 + seed: loss for seed, loss in enumerate(b)}, level=0.9)
    assert interval.method == "Welch t"
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({0: 1.0}, {0: 2.0}),
        ({0: 1.0, 1: 1.1, 2: 1.2}, {0: 2.0}),
        ({0: 1.0, 1: 1.0}, {0: 2.0, 1: 2.0}),  # the seeds changed nothing, so they measure no noise
    ],
)
def test_no_interval(first: dict[int, float], second: dict[int, float]) -> None:
    interval = compare_losses(first, second)
    assert interval.half_width is interval.low is interval.high is None
    assert interval.mean == pytest.approx(np.mean(list(first.values())) - np.mean(list(second.values())))


def test_rank_correlation_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for sample in generator.multivariate_normal([0, 0], [[1, 0.7], [0.7, 1]], (2000, 40)):
        found = compute_rank_correlation(np.exp(sample[:, 0]), sample[:, 1])
        assert found.low is not None and found.high is not None
        assert found.estimate == pytest.approx(scipy.stats.spearmanr(sample[:, 0], sample[:, 1]).statistic)
        covered += found.low <= 6 / math.pi * math.asin(0.7 / 2) <= found.high  # Spearman's of that normal
    # Without the r^2 / 2 of Bonett and Wright it would be 0.926.
    assert 0.935 < covered / 2000 < 0.965


def test_rank_correlation_of_equals_and_of_nothing() -> None:
    rising = list(range(12))
    assert compute_rank_correlation(rising, [x**3 for x in rising]).estimate == pytest.approx(1)
    assert compute_rank_correlation(rising, rising[::-1]).low == pytest.approx(-1)
    constant = compute_rank_correlation(rising, [2.0] * 12)
    assert constant.estimate is constant.low is constant.high is None
    for first, second in ((rising, rising[:-1]), (rising[:9], rising[:9])):
        with pytest.raises(ValueError, match="at least 10"):
            compute_rank_correlation(first, second)


def test_interval_of_one_value() -> None:
    assert compute_confidence_interval([1.5]) == Interval(1.5, None, None, None, n=1, level=0.95)


@pytest.mark.parametrize(
    ("values", "level", "message"),
    [
        ([], 0.95, "one value per seed"),
        ([1.0, math.nan], 0.95, "not all finite"),
        ([1.0, 2.0], 95, r"outside \(0, 1\)"),
    ],
)
def test_interval_refuses(values: list[float], level: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compute_confidence_interval(values, level)


@given(st.lists(st.tuples(st.integers(-3, 3).map(float) | st.floats(-1, 1), st.booleans()), min_size=2, max_size=40))
def test_auc_equals_scikit_learn(rows: list[tuple[float, bool]]) -> None:
    scores, labels = [score for score, _ in rows], [label for _, label in rows]
    if len(set(labels)) == 1:
        assert compute_auc(scores, labels) is None
        return
    assert compute_auc(scores, labels) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    with_lossless_rows = [*scores, math.nan, None]
    assert compute_auc(with_lossless_rows, [*labels, True, False]) == compute_auc(scores, labels)  # type: ignore[arg-type]


def test_auc_by_hand() -> None:
    influence = np.array([-3.0, -2.0, -1.0, 0.5])
    assert compute_auc(-influence, [True, True, False, False]) == 1.0
    assert compute_auc(influence, [True, True, False, False]) == 0.0
    assert compute_auc([1.0, 1.0], [True, False]) == 0.5
    assert compute_auc([], []) is None
    with pytest.raises(ValueError, match=r"shape \(2,\) and labels of shape \(3,\)"):
        compute_auc([1.0, 2.0], [True, False, True])


# --- verdict ---


def make_arms(
    losses: dict[str, list[float]],
    fraction: float = 0.25,
    budget: str = "steps",
    seconds: dict[str, float] | None = None,
) -> list[dict[str, Any]]:
    return [
        {
            "arm": arm,
            "fraction": 1.0 if arm == "full" else fraction,
            "seed": seed,
            "budget": budget,
            "rows": 1600 if arm == "full" else round(1600 * fraction),
            "loss_tokens": 100_000,
            "steps": 100,
            "seconds": (seconds or {}).get(arm, 45.0) + seed - 1,
            "test_loss": loss,
            "test_perplexity": None if loss is None else math.exp(loss),
        }
        for arm, by_seed in losses.items()
        for seed, loss in enumerate(by_seed)
    ]


FULL, RANDOM, OPPONENTS = [3.35, 3.36, 3.34], [3.36, 3.35, 3.37], [3.57, 3.55, 3.60]
GOOD = {"full": FULL, "coreset": [3.16, 3.14, 3.17], "random": RANDOM, "opponents": OPPONENTS}
SELECTION = {"seconds": 62.0, "reference_seconds": 60.0, "rows": 1600}
SECONDS = {"full": 45.0, "coreset": 11.0, "random": 11.0, "opponents": 11.0}


def test_a_coreset_that_wins() -> None:
    verdict = judge(make_arms(GOOD), SELECTION)
    assert verdict.beats_random and verdict.matches_full and verdict.beats_full
    assert "the coreset beat random rows" in verdict.text and "It beat the full pool" in verdict.text
    assert "opponents were worse than random rows beyond noise" in verdict.text
    assert "what it saves was not measured" in verdict.text
    assert verdict.headline == "Coreset (fraction 0.25): at equal steps beat random rows and beat the full pool"
    interval = verdict.intervals["coreset_minus_random"]
    assert interval is not None
    low, high = scipy.stats.ttest_rel(GOOD["coreset"], RANDOM).confidence_interval(0.95)
    assert (interval.low, interval.high) == pytest.approx((low, high))
    assert f"{low:+.3f} to {high:+.3f}" in verdict.text


@given(
    st.lists(st.tuples(*[st.floats(1, 5)] * 4), min_size=2, max_size=6),
    st.floats(0, 0.1),
    st.sampled_from([0.8, 0.95, 0.99]),
)
@settings(max_examples=100, deadline=None)
def test_claims_follow_from_the_intervals(
    losses: list[tuple[float, float, float, float]], margin: float, level: float
) -> None:
    arms = dict(zip(("full", "coreset", "random", "opponents"), map(list, zip(*losses, strict=True)), strict=True))
    assume(all(np.std(np.subtract(arms["coreset"], arms[other])) > 1e-6 for other in ("full", "random", "opponents")))
    verdict = judge(make_arms(arms), SELECTION, margin=margin, level=level)

    random_high = scipy.stats.ttest_rel(arms["coreset"], arms["random"]).confidence_interval(level).high
    full_high = scipy.stats.ttest_rel(arms["coreset"], arms["full"]).confidence_interval(level).high
    allowed = margin * np.mean(arms["full"])
    assume(min(abs(random_high), abs(full_high), abs(full_high - allowed)) > 1e-9)
    assert verdict.beats_random == (random_high < 0)
    assert verdict.beats_full == (full_high < 0)
    assert verdict.matches_full == (full_high < max(allowed, 0))
    assert ("WARNING: the opponents did better" in verdict.text) == (
        np.mean(arms["opponents"]) < np.mean(arms["coreset"])
    )
    json.dumps(asdict(verdict), allow_nan=False)


def test_what_hardly_trained_is_not_concluded_from() -> None:
    """The differences are as clear as can be; but the untrained model is at 3.40, and the full pool at 3.35."""
    arms = make_arms(GOOD) + make_arms(GOOD, budget="epochs", seconds=SECONDS)
    assert judge(arms, SELECTION).beats_random
    verdict = judge(arms, SELECTION, base_loss=3.40)
    assert not (verdict.beats_random or verdict.matches_full or verdict.beats_full)
    assert not any(entry.beats_random or entry.matches_full for entry in verdict.by_fraction)
    gain = verdict.gain
    assert gain is not None and (gain.arm, gain.before, gain.clear) == ("full", 3.40, False)
    assert gain.after == pytest.approx(np.mean(FULL)) and gain.share == pytest.approx(1 - np.mean(FULL) / 3.40)
    test = scipy.stats.ttest_1samp(np.subtract(FULL, 3.40), 0).confidence_interval(0.95)
    assert (gain.difference.low, gain.difference.high) == pytest.approx((test.low, test.high))
    assert "training on the full pool has hardly changed the untrained model: 1.5 % of its test loss" in verdict.text
    assert "test loss 3.400 before and 3.350 after" in verdict.text
    for flag in ("--learning_rate", "--max_steps", "--lora_target_modules all-linear"):
        assert flag in verdict.text
    assert "beat" not in verdict.text and "beat" not in verdict.headline and "pays" not in verdict.headline
    assert "no conclusion" in verdict.headline and verdict.cost.break_even_runs is None
    # What was measured stays, and what may come of it is said.
    assert (interval := verdict.intervals["coreset_minus_random"]) is not None and interval.outcome == "better"
    assert f"The coreset's arm did lower it, to {np.mean(GOOD['coreset']):.3f}" in verdict.text
    json.dumps(asdict(verdict), allow_nan=False)


@pytest.mark.parametrize(("base", "clear"), [(3.455, True), (3.45, False), (8.0, True)])
def test_three_percent_of_the_untrained_loss_is_asked_for(base: float, clear: bool) -> None:
    verdict = judge(make_arms(GOOD), SELECTION, base_loss=base)
    assert verdict.gain is not None and verdict.gain.clear == verdict.beats_random == clear
    if clear:  # and the verdict is what it was
        assert verdict.text == judge(make_arms(GOOD), SELECTION).text


def test_a_gain_within_noise_is_none() -> None:
    verdict = judge(make_arms(GOOD | {"full": [2.4, 3.6, 2.9]}), SELECTION, base_loss=3.4)
    assert verdict.gain is not None and verdict.gain.share > 0.1 and not verdict.gain.clear
    assert "with every seed" in verdict.text and "--seeds" in verdict.text


def test_training_that_hurts_is_told_otherwise() -> None:
    text = judge(make_arms(GOOD), SELECTION, base_loss=2.0).text
    assert "did not lower the test loss" in text and "lower --learning_rate" in text
    assert "Where training teaches nothing" in text


@pytest.mark.parametrize(("left_out", "taken"), [(["full"], "random"), (["full", "random"], "coreset")])
def test_without_a_full_arm_another_stands_for_training(left_out: list[str], taken: str) -> None:
    arms = {arm: losses for arm, losses in GOOD.items() if arm not in left_out}
    verdict = judge(make_arms(arms), SELECTION, base_loss=3.2)
    assert verdict.gain is not None and verdict.gain.arm == taken
    assert f"the rows of the {taken} arm (there is no full one to go by)" in verdict.text


def test_each_budget_is_refused_on_its_own() -> None:
    """At equal epochs the random arm, for want of a full one, has hardly begun."""
    rest = {arm: losses for arm, losses in GOOD.items() if arm != "full"}
    late = {arm: [loss + 0.7 for loss in losses] for arm, losses in rest.items()}
    verdict = judge(make_arms(rest) + make_arms(late, budget="epochs"), SELECTION, base_loss=4.1)
    assert [entry.beats_random for entry in verdict.by_fraction] == [True, False]
    assert "at equal steps beat random rows" in verdict.headline
    assert "at equal epochs no conclusion, since training did not clearly improve" in verdict.headline


@pytest.mark.parametrize("base", [None, math.nan, math.inf])
def test_an_unknown_base_is_not_looked_at(base: float | None) -> None:
    verdict = judge(make_arms(GOOD), SELECTION, base_loss=base)
    assert verdict.gain is None and verdict.beats_random


def test_noise_is_not_a_win() -> None:
    verdict = judge(make_arms(GOOD | {"coreset": [3.36, 3.30, 3.38]}), SELECTION)
    assert not (verdict.beats_random or verdict.matches_full or verdict.beats_full)
    assert "did not beat random rows beyond noise" in verdict.text
    assert "Whether it matches the full pool is inconclusive" in verdict.text


def test_no_worse_than_full_within_the_margin() -> None:
    arms = make_arms(GOOD | {"coreset": [3.36, 3.368, 3.352]})
    verdict = judge(arms, SELECTION)
    assert verdict.matches_full and not verdict.beats_full
    assert "no worse than the full pool, within the margin of 1 % of its loss" in verdict.text
    strict = judge(arms, SELECTION, margin=0.001)
    assert not strict.matches_full and "It was worse than the full pool" in strict.text


def test_losing_is_said() -> None:
    verdict = judge(make_arms(GOOD | {"coreset": [3.46, 3.44, 3.47]}), SELECTION)
    assert not verdict.beats_random and not verdict.matches_full
    assert "the coreset lost to random rows" in verdict.text
    assert "It was worse than the full pool" in verdict.text


def test_opponents_better_than_the_coreset_come_first_in_the_text() -> None:
    arms = make_arms(GOOD | {"opponents": GOOD["coreset"], "coreset": OPPONENTS})
    verdict = judge(arms, SELECTION)
    assert verdict.text.startswith("WARNING: the opponents did better than the coreset, beyond noise")
    assert "had a higher loss than the opponents" in verdict.headline
    assert "within noise" in judge(make_arms(GOOD | {"opponents": [3.20, 3.10, 3.16]}), SELECTION).text


def test_one_seed_concludes_nothing() -> None:
    verdict = judge(make_arms({arm: losses[:1] for arm, losses in GOOD.items()}), SELECTION)
    assert not (verdict.beats_random or verdict.matches_full or verdict.beats_full)
    assert "nothing is concluded: with 1 seed no confidence interval can be given" in verdict.text
    assert verdict.headline.endswith("no conclusion")
    assert "beat" not in verdict.text


def test_seeds_that_change_nothing_conclude_nothing() -> None:
    verdict = judge(make_arms({arm: losses[:1] * 3 for arm, losses in GOOD.items()}), SELECTION)
    assert not verdict.beats_random and "all 3 seeds gave exactly the same loss" in verdict.text


@pytest.mark.parametrize("loss", [math.nan, math.inf, None])
def test_a_diverged_arm_concludes_nothing(loss: Any) -> None:
    verdict = judge(make_arms(GOOD | {"coreset": [3.1, loss, 3.1]}), SELECTION)
    assert not verdict.beats_random and not verdict.matches_full
    assert "the test loss of the coreset arm is not finite" in verdict.text
    json.dumps(asdict(verdict), allow_nan=False)
    assert "opponents were worse than random" in verdict.text


def test_headline_is_the_first_fraction_at_equal_steps() -> None:
    losing = GOOD | {"coreset": [3.46, 3.44, 3.47]}
    arms = make_arms(GOOD, 0.5, "epochs", SECONDS) + make_arms(losing, 0.25, "epochs", SECONDS)[3:]
    arms += make_arms(GOOD, 0.5) + make_arms(losing, 0.25)[3:]
    verdict = judge(arms, SELECTION, fractions=[0.25, 0.5])
    assert (verdict.fraction, verdict.budget, verdict.beats_random) == (0.25, "steps", False)
    assert [(entry.fraction, entry.budget) for entry in verdict.by_fraction] == [
        (0.25, "steps"),
        (0.25, "epochs"),
        (0.5, "steps"),
        (0.5, "epochs"),
    ]
    assert [entry.beats_random for entry in verdict.by_fraction] == [False, False, True, True]
    assert "at fraction 0.5, equal steps: beat random rows and beat the full pool" in verdict.text
    assert judge(arms, SELECTION, fractions=[0.5, 0.25]).beats_random
    assert judge(arms, SELECTION).fraction == 0.5
    only_epochs = [entry for entry in arms if entry["budget"] == "epochs"]
    assert judge(only_epochs, SELECTION, fractions=[0.5]).budget == "epochs"


def test_the_headline_weighs_both_budgets_and_the_cost() -> None:
    losing = GOOD | {"coreset": [3.46, 3.44, 3.47]}

    def say(at_steps: dict[str, Any], at_epochs: dict[str, Any], seconds: float = 62.0) -> str:
        arms = make_arms(at_steps) + make_arms(at_epochs, 0.25, "epochs", SECONDS)
        return judge(arms, SELECTION | {"seconds": seconds}).headline

    mixed = say(GOOD, losing)
    assert "at equal steps beat random rows" in mixed and "at equal epochs lost to random rows" in mixed
    assert mixed.endswith("; does not pay")
    assert say(GOOD, GOOD).startswith("Coreset (fraction 0.25): at equal steps and equal epochs beat random rows")
    assert say(GOOD, GOOD).endswith("; pays after 4 runs")
    noisy = GOOD | {"coreset": [3.36, 3.30, 3.38]}
    assert say(GOOD, noisy).endswith("; pays after 4 runs, in time alone")


def test_unequal_seeds_are_not_paired() -> None:
    verdict = judge(make_arms(GOOD | {"random": [*RANDOM, 3.35]}), SELECTION)
    against = {name: interval and interval.method for name, interval in verdict.intervals.items()}
    assert (against["coreset_minus_random"], against["coreset_minus_full"]) == ("Welch t", "paired t")


@pytest.mark.parametrize(
    ("selection", "seconds", "expected_runs", "expected_fraction", "text"),
    [
        # 122 s / (45 - 11) s = 3.6 runs; one run saves 34 of 122 s.
        (
            SELECTION,
            SECONDS,
            4,
            34 / 122,
            "it pays after 4 target runs, or with one if reference and influence cost 0.28",
        ),
        ({"seconds": 68.0, "reference_seconds": 0.0}, SECONDS, 2, 0.5, "no training of a reference counted"),
        ({"seconds": 17.0, "reference_seconds": 17.0}, SECONDS, 1, 1.0, "it pays with the first run"),
        ({"seconds": 8.5, "reference_seconds": None}, SECONDS, 1, 4.0, "it pays with the first run"),
        (SELECTION, SECONDS | {"coreset": 45.0}, "never", None, "saved nothing"),
        (SELECTION, SECONDS | {"coreset": 50.0}, "never", None, "so it never pays"),
        ({}, SECONDS, None, None, "What selecting cost was not recorded."),
    ],
)
def test_cost(
    selection: dict[str, Any], seconds: dict[str, float], expected_runs: Any, expected_fraction: Any, text: str
) -> None:
    # What the arms took at equal steps has nothing to do with it.
    at_steps = make_arms(GOOD, seconds=dict.fromkeys(GOOD, 99.0))
    verdict = judge(at_steps + make_arms(GOOD, budget="epochs", seconds=seconds), selection)
    assert verdict.cost.break_even_runs == expected_runs
    assert verdict.cost.break_even_cost_fraction == (expected_fraction and pytest.approx(expected_fraction))
    assert text in verdict.text


def test_cost_is_measured_at_equal_epochs_only() -> None:
    verdict = judge(make_arms(GOOD, seconds=SECONDS), SELECTION)
    assert verdict.cost.saving_per_run is None and verdict.cost.break_even_runs is None
    assert verdict.cost.selection_seconds == 122.0


@pytest.mark.parametrize(
    ("coreset", "runs", "text"),
    [
        # Beats random, but is worse than the full pool: the quality is lost.
        ([3.26, 3.24, 3.27], "never", "but worse than on the full pool, so it never pays"),
        # As good as the full pool, but random rows are better and cost nothing.
        ([2.96, 2.94, 2.97], "never", "but worse than on as many random rows, so it never pays"),
        ([2.80, 2.94, 2.85], 4, "random rows, which the coreset was not shown to beat, save the same for nothing"),
    ],
)
def test_cost_when_quality_is_lost(coreset: list[float], runs: Any, text: str) -> None:
    full, random = (
        ([3.06, 3.04, 3.07], [3.36, 3.34, 3.37]) if coreset[0] > 3.2 else ([3.0, 3.01, 2.99], [2.86, 2.84, 2.87])
    )
    epochs = {"full": full, "coreset": coreset, "random": random}
    verdict = judge(make_arms(GOOD) + make_arms(epochs, budget="epochs", seconds=SECONDS), SELECTION)
    assert verdict.beats_random  # at equal steps, the headline
    assert verdict.cost.break_even_runs == runs
    assert text in verdict.text


@pytest.mark.parametrize(
    ("left_out", "text"),
    [
        ("random", "there is no random arm"),
        ("full", "There is no full arm"),
        ("coreset", "there is no coreset arm"),
        ("opponents", "beat random rows"),
    ],
)
def test_missing_arms_lose_nothing(left_out: str, text: str) -> None:
    verdict = judge(make_arms({arm: losses for arm, losses in GOOD.items() if arm != left_out}), SELECTION)
    assert text in verdict.text
    assert verdict.beats_random == (left_out in ("full", "opponents"))
    json.dumps(asdict(verdict), allow_nan=False)


def test_only_the_full_arm() -> None:
    verdict = judge(make_arms({"full": FULL, "zero_shot": [8.0]}), SELECTION, fractions=[0.25])
    assert verdict.text.startswith("Nothing was compared") and verdict.by_fraction == []
    json.dumps(asdict(verdict), allow_nan=False)


def test_judge_refuses() -> None:
    arms = make_arms(GOOD)
    with pytest.raises(ValueError, match=r"'coreset' \(fraction 0.25, budget 'steps'\) has two results for seed 1"):
        judge([*arms, arms[4]], SELECTION)
    with pytest.raises(ValueError, match=r"no results at the fractions \[0.1\], only at \[0.25\]"):
        judge(arms, SELECTION, fractions=[0.25, 0.1])
    with pytest.raises(ValueError, match="budget='tokens'"):
        judge([arms[0] | {"budget": "tokens"}], SELECTION)
    with pytest.raises(ValueError, match="margin=-0.1 is below 0"):
        judge(arms, SELECTION, margin=-0.1)
