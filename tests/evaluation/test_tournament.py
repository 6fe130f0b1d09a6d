"""The tournament: who wins, when nobody does, and what it costs; the runs are made up, the rules are not."""

import math

import numpy as np
import pytest

from hf_in2core.evaluation.tournament import run_tournament


CANDIDATES = ["bm25", "cosine", "rds", "turns", "loss"]


def make_run(means: dict[str, float], noise: float, seen: list[tuple[str, int, int]] | None = None):
    """Runs whose losses are a mean of the candidate's, a part of the seed's own, and noise."""

    def run(name: str, seed: int, steps: int) -> float:
        if seen is not None:
            seen.append((name, seed, steps))
        generator = np.random.default_rng([seed, sorted(means).index(name)])
        return means[name] + np.random.default_rng(seed).normal() + noise * generator.normal()

    return run


def look_up(table: np.ndarray):
    """Runs whose losses stand in a table, `[names, seeds]`."""
    names = ["random", "full", *CANDIDATES]
    return lambda name, seed, steps: float(table[names.index(name), seed])


def test_the_best_wins_within_the_budget_and_each_run_once() -> None:
    means = dict.fromkeys(["random", "full", *CANDIDATES], 2.0) | {"rds": 1.2, "cosine": 1.5}
    seen: list[tuple[str, int, int]] = []
    found = run_tournament(make_run(means, 0.01, seen), CANDIDATES, budget_steps=400, max_steps=200)
    assert (found.outcome, found.winner) == ("won", "rds")
    assert len(seen) == len(set(seen)) == found.num_runs
    assert sum(steps for _, _, steps in seen) <= 400 and {steps for *_, steps in seen} == {found.steps}
    assert found.steps >= 20
    assert {seed for name, seed, _ in seen if name == "rds"} == {0, 1, 2}
    assert {seed for name, seed, _ in seen if name == "turns"} == {0}
    assert "rds" in found.text and "won" in found.text


def test_of_two_that_are_not_told_apart_the_cheaper_one_is_taken() -> None:
    means = dict.fromkeys(["random", "full", *CANDIDATES], 2.0) | {"cosine": 1.0, "bm25": 1.0001}
    found = run_tournament(make_run(means, 0.01), CANDIDATES, 400, 200)
    assert found.winner == "bm25"
    assert (
        run_tournament(make_run(means, 0.01), CANDIDATES, 400, 200, costs={"bm25": 2, "cosine": 1}).winner == "cosine"
    )
    # Told apart, the better one is taken whatever it costs.
    means["bm25"] = 1.5
    assert run_tournament(make_run(means, 0.01), CANDIDATES, 400, 200).winner == "cosine"


@pytest.mark.parametrize("seed", range(20))
def test_where_all_rows_are_alike_nobody_wins_but_by_chance(seed: int) -> None:
    table = np.random.default_rng(seed).normal(2.0, 0.1, size=(2 + len(CANDIDATES), 3))
    found = run_tournament(look_up(table), CANDIDATES, 400, 200)
    assert (found.winner == "random") == (found.outcome != "won")
    if found.outcome == "won":
        interval = found.intervals[f"{found.winner}_minus_random"]
        assert interval.low is not None and interval.high is not None and interval.low < interval.high < 0


def test_chance_wins_seldom() -> None:
    generator = np.random.default_rng(0)
    won = 0
    for _ in range(300):
        table = generator.normal(2.0, 0.1, size=(2 + len(CANDIDATES), 3))
        found = run_tournament(look_up(table), CANDIDATES, 400, 200)
        won += found.outcome == "won"
    assert won / 300 < 0.15


def test_worse_than_random_rows_is_said() -> None:
    means = dict.fromkeys(CANDIDATES, 3.0) | {"random": 2.0, "full": 1.5}
    found = run_tournament(make_run(means, 0.01), CANDIDATES, 400, 200)
    assert (found.outcome, found.winner) == ("random", "random")
    assert "not worth it" in found.text and "the whole pool was better" in found.text


def test_a_small_budget_leaves_candidates_out_and_says_which() -> None:
    means = dict.fromkeys(["random", "full", *CANDIDATES], 2.0)
    found = run_tournament(make_run(means, 0.1), CANDIDATES, 200, 100)
    # One finalist leaves room for a fourth candidate, where two would leave room for two.
    assert found.left_out == CANDIDATES[4:] and "No runs were left for loss" in found.text
    assert found.steps * found.num_runs <= 200
    found = run_tournament(make_run(means, 0.1), CANDIDATES, 160, 100)
    assert found.left_out == CANDIDATES[2:] and "No runs were left for rds, turns, loss" in found.text
    found = run_tournament(make_run(means, 0.1), CANDIDATES, 140, 100)
    assert found.left_out == CANDIDATES[1:] and found.num_runs == 7
    with pytest.raises(ValueError, match=r"takes 140 .*--auto_budget"):
        run_tournament(make_run(means, 0.1), CANDIDATES, 139, 100)


def test_a_run_that_diverges_cannot_win_and_breaks_nothing() -> None:
    means = dict.fromkeys(["random", "full", *CANDIDATES], 2.0) | {"rds": 1.0}
    run = make_run(means, 0.01)

    def diverge(name: str, seed: int, steps: int) -> float:
        return math.nan if name == "bm25" or (name == "cosine" and seed == 2) else run(name, seed, steps)

    means["cosine"] = 1.1
    found = run_tournament(diverge, CANDIDATES, 400, 200)
    assert found.winner == "rds" and found.losses["bm25"][0] == math.inf


@pytest.mark.parametrize(
    "differences, outcome, said",
    [
        # The 90 % intervals: 3 % of the loss of random rows are 0.06 here.
        ([-0.02, 0.005, -0.012], "random", "bm25 can gain less than 3 % of their loss (bm25"),  # -0.031 to 0.013
        ([-0.04, 0.01, -0.01], "random", "bm25 can gain less than 3 % of their loss (bm25"),  # -0.056 to 0.029
        ([-0.05, 0.01, -0.01], "undecided", "bm25 was below random rows by the mean"),  # -0.068 to 0.035
        ([0.2, -0.1, 0.1], "random", "nothing beat random rows (bm25"),  # -0.191 to 0.324
    ],
)
def test_undecided_is_only_what_leaves_room_for_a_gain(differences: list[float], outcome: str, said: str) -> None:
    table = np.full((2 + len(CANDIDATES), 3), 3.0)
    table[:2] = 2.0
    table[2] += np.array(differences) - 1.0
    # With so small a budget the best of the first seed alone goes on.
    found = run_tournament(look_up(table), CANDIDATES[:4], budget_steps=200, max_steps=200)
    assert list(found.intervals) == ["bm25_minus_random"]
    assert (found.outcome, found.winner) == (outcome, "random")
    assert said in found.text and ("not worth it" in found.text) == (outcome == "random")
    assert "Take random rows, or the whole pool" in found.text


@pytest.mark.parametrize(("full", "outcome"), [(1.9, "random"), (1.95, "random"), (1.96, "undecided")])
def test_what_is_no_better_than_the_whole_pool_is_not_worth_it(full: float, outcome: str) -> None:
    table = np.full((2 + len(CANDIDATES), 3), 3.0)
    table[0], table[1] = 2.0, full
    table[2] = [1.95, 2.01, 1.99]  # below random rows by the mean, with room for a gain
    found = run_tournament(look_up(table), CANDIDATES[:4], budget_steps=200, max_steps=200)
    assert (found.outcome, found.winner) == (outcome, "random")
    said = "nothing beat random rows, and the whole pool was no worse than bm25 (bm25"
    assert (said in found.text and "not worth it" in found.text) == (outcome == "random")
