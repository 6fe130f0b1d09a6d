"""The record of a run's coresets: chosen once, and read as it stands."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from hf_in2core import select_coreset
from hf_in2core.names import name_coreset, parse_coreset
from hf_in2core.selection.record import RECORD, describe_choice, read_choice, take_coresets
from hf_in2core.selection.taking import make_turn_columns


INFLUENCE = [0.5, -1.0, None, -3.0, 2.0, -2.0, 0.0, -0.5, float("nan")]
WANTED = dict(
    [describe_choice("coreset", 0.5), describe_choice("random", 0.5, seed=3), describe_choice("opponents", 0.25)]
)


def make_scored(**changes: float) -> Dataset:
    influence = list(INFLUENCE)
    for row, value in changes.items():
        influence[int(row[1:])] = value
    return Dataset.from_dict({"id": [f"row {row}" for row in range(len(influence))], "influence": influence})


def alter(run: Path, change: Any) -> None:
    content = json.loads((run / RECORD).read_text(encoding="utf-8"))
    change(content)
    (run / RECORD).write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize("strategy", ["top", "round_robin"])
def test_recorded_rows_are_those_of_select_coreset(tmp_path, strategy) -> None:
    scored = make_scored()
    for name, sign in (("a", 1), ("b", -1)):
        values = [None if value is None else sign * value for value in INFLUENCE]
        scored = scored.add_column(f"influence_{name}", values)
    name, arguments = describe_choice("coreset", 0.5, strategy=strategy)
    coreset = take_coresets(tmp_path, scored, {name: arguments})[name]
    expected = select_coreset(scored, fraction=0.5, strategy=strategy)
    assert coreset.take_from(scored)["id"][:] == expected["id"][:]
    assert sorted(coreset.positions) == coreset.positions and coreset.rows_with_loss == 7
    assert take_coresets(tmp_path, scored, {}) == {name: coreset}


def make_scored_by_row(num_rows: int = 40, num_queries: int = 3) -> Dataset:
    """Rows with influence on single validation rows, and on two sets; the first carries no loss."""
    per_query = np.random.default_rng(0).normal(size=(num_rows, num_queries))
    columns = {
        "influence": per_query.mean(axis=1),
        "influence_math": per_query[:, 0],
        "influence_code": per_query[:, 1],
        "influence_per_query": list(per_query),
    }
    return Dataset.from_dict({name: [None, *values[1:]] for name, values in columns.items()})


def take_in_turn(scores: dict[Any, dict[int, float]], count: int) -> list[tuple[int, Any, float]]:
    """The definition: each taker in turn takes its smallest score that is left; row, taker and score."""
    taken: list[tuple[int, Any, float]] = []
    while len(taken) < count:
        taker = list(scores)[len(taken) % len(scores)]
        left = {row: score for row, score in scores[taker].items() if row not in [row for row, _, _ in taken]}
        row = min(left, key=lambda row: left[row])
        taken.append((row, taker, left[row]))
    return taken


@pytest.mark.parametrize("strategy", ["round_robin", "round_robin_rows"])
def test_the_record_tells_who_took_each_row_for_what_and_when(tmp_path, strategy) -> None:
    scored = make_scored_by_row()
    names: list[Any] = ["math", "code"] if strategy == "round_robin" else [0, 1, 2]
    scores = {
        name: {row: scored["influence_per_query"][row][query] for row in range(1, len(scored))}
        for query, name in enumerate(names)
    }
    name, arguments = describe_choice("coreset", 0.25, strategy=strategy)
    take_coresets(tmp_path, scored, {name: arguments})
    entry = json.loads((tmp_path / RECORD).read_text(encoding="utf-8"))["coresets"][name]
    by_turn = sorted(zip(*(entry[key] for key in ("turns", "positions", "takers", "scores")), strict=True))
    assert [tuple(found) for _, *found in by_turn] == take_in_turn(scores, 10)
    assert [turn for turn, *_ in by_turn] == list(range(10))


def test_a_column_decides_by_its_values_and_a_draw_by_none(tmp_path) -> None:
    scored = make_scored_by_row()
    wanted = dict(describe_choice(arm, 0.25) for arm in ("coreset", "opponents", "random"))
    coresets: Any = take_coresets(tmp_path, scored, wanted)
    coreset, opponents, random = coresets.values()
    for found, sign in ((coreset, 1), (opponents, -1)):
        assert found.scores == [scored["influence"][row] for row in found.positions] and found.takers is None
        assert np.argsort(found.turns).tolist() == np.argsort(sign * np.array(found.scores)).tolist()
    assert random.scores is None and random.takers is None and sorted(random.turns) == list(range(10))


@pytest.mark.parametrize("method", ["cosine", "rds", "bm25"])
def test_of_a_rank_in_turn_the_record_tells_who_took_each_row_for_what(tmp_path, method) -> None:
    """The same rows as by the rank alone, which is all that a version before this has kept."""
    similarities = np.random.default_rng(1).normal(size=(3, 40))
    sign = 1 if method == "cosine" else -1
    columns, _ = make_turn_columns(method, similarities)
    scored = make_scored_by_row()
    for name, values in columns.items():
        scored = scored.add_column(name, values)
    name, arguments = describe_choice("coreset", 0.25, strategy=method)
    coreset: Any = take_coresets(tmp_path / "new", scored, {name: arguments}, write=False)[name]
    before = scored.select_columns(["influence", f"{method}_rank"])
    old: Any = take_coresets(tmp_path / "old", before, {name: arguments}, write=False)[name]
    assert coreset.positions == old.positions and coreset.turns == old.turns and old.takers is None
    assert set(old.describe_rows({}).values()) == {f"taken in turn {turn}" for turn in range(10)}
    scores = {query: {row: sign * similarities[query][row] for row in range(40)} for query in range(3)}
    by_turn = sorted(zip(coreset.turns, coreset.positions, coreset.takers, coreset.scores, strict=True))
    assert [(row, taker, sign * score) for _, row, taker, score in by_turn] == take_in_turn(scores, 10)
    kept = {row: f"taken in turn {turn} by validation row {taker}, " for turn, row, taker, _ in by_turn}
    assert all(words.startswith(kept[row]) for row, words in coreset.describe_rows({}).items())


def test_greedy_tells_the_influence_given_the_rows_before(tmp_path) -> None:
    scored = make_scored_by_row()
    name, arguments = describe_choice("coreset", 0.25, strategy="greedy")
    coreset: Any = take_coresets(tmp_path, scored, {name: arguments})[name]
    first = coreset.turns.index(0)
    plain = np.array(scored["influence_per_query"][1:])
    # Before anything is taken it is the plain influence, whose smallest wins.
    assert coreset.takers[first] == 0 and coreset.positions[first] == 1 + plain[:, 0].argmin()
    assert coreset.scores[first] == pytest.approx(plain[:, 0].min())
    again = [row for row, taker in zip(coreset.positions, coreset.takers, strict=True) if taker == 0 and row - 1]
    given = [coreset.scores[coreset.positions.index(row)] for row in again]
    assert given != pytest.approx([plain[row - 1, 0] for row in again])


@pytest.mark.parametrize("fraction, num_kept", [(0.25, 0), (0.5, 0), (0.75, 20)])
def test_opponents_are_rows_that_the_coreset_leaves(tmp_path, fraction, num_kept) -> None:
    scored = make_scored_by_row(num_rows=41)
    wanted = dict(describe_choice(arm, fraction, strategy="round_robin_rows") for arm in ("coreset", "opponents"))
    coreset, opponents = take_coresets(tmp_path, scored, wanted).values()
    influence = np.array(scored["influence"][:], dtype=float)
    left = set(range(1, 41)) - set(coreset.positions)
    assert len(opponents.positions) == len(coreset.positions) == 40 * fraction
    # Rows of the coreset fill the arm only where too few others are left.
    assert len(set(opponents.positions) & set(coreset.positions)) == num_kept
    others = set(opponents.positions) - set(coreset.positions)
    assert others == set(sorted(left, key=lambda row: -influence[row])[: len(others)])
    assert opponents.arguments["spared"] == coreset.arguments
    by_influence = select_coreset(scored, fraction=fraction, strategy="bottom")["influence"]
    assert fraction > 0.5 or min(influence[opponents.positions]) < min(by_influence)


def test_a_record_of_version_1_is_read_and_completed(tmp_path) -> None:
    scored = make_scored_by_row()
    wanted = dict([describe_choice("coreset", 0.25, strategy="round_robin_rows"), describe_choice("random", 0.25)])
    complete = take_coresets(tmp_path, scored, wanted)

    def make_old(content: Any) -> None:
        content["format_version"] = 1
        for entry in content["coresets"].values():
            for name in ("turns", "scores", "takers"):
                del entry[name]
        content["coresets"]["random_25-seed0"]["positions"][0] = 0  # would be drawn otherwise now

    alter(tmp_path, make_old)
    old = take_coresets(tmp_path, scored, {}, write=False)
    assert old["coreset_25"].turns is None and old["coreset_25"].positions == complete["coreset_25"].positions
    read = take_coresets(tmp_path, scored, wanted)
    assert read["coreset_25"] == complete["coreset_25"]
    assert read["random_25-seed0"].positions[0] == 0 and read["random_25-seed0"].turns is None


def test_names_of_the_record() -> None:
    assert list(WANTED) == ["coreset_50", "random_50-seed3", "opponents_25"]
    assert describe_choice("full", 1.0)[0] == "full"
    for fraction in (0.25, 0.125, 1 / 3, 1.0):
        arm, share = parse_coreset(name_coreset(fraction))
        assert arm == "coreset" and share == pytest.approx(fraction, rel=1e-5)
    for name in ("by_hand", "coreset_0", "coreset_101", "_50"):
        assert parse_coreset(name) == (name, None)


def test_what_is_recorded_stays_though_it_would_be_chosen_otherwise(tmp_path) -> None:
    scored = make_scored()
    take_coresets(tmp_path, scored, WANTED)
    altered = [0, 1, 4, 6]
    alter(tmp_path, lambda content: content["coresets"]["coreset_50"].update(positions=altered))
    for renew in (False, True):
        assert take_coresets(tmp_path, scored, WANTED, renew=renew)["coreset_50"].positions == altered


def test_other_scores_and_other_arguments(tmp_path) -> None:
    before = take_coresets(tmp_path, make_scored(), WANTED)
    other = make_scored(r4=-9.0)
    with pytest.raises(ValueError, match="chosen from other scores"):
        take_coresets(tmp_path, other, WANTED)
    after = take_coresets(tmp_path, other, WANTED, renew=True)
    assert 4 in after["coreset_50"].positions and 4 not in before["coreset_50"].positions
    name, arguments = describe_choice("coreset", 0.5, strategy="bottom")
    assert take_coresets(tmp_path, other, {name: arguments})[name] == after[name]
    assert take_coresets(tmp_path, other, {name: arguments}, renew=True)[name] != after[name]


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["coresets"]["coreset_50"].update(positions=[1, 99]),
        lambda content: content["coresets"]["coreset_50"].update(positions=[3, 1]),
        lambda content: content["coresets"]["coreset_50"].update(positions=[1, 1]),
        lambda content: content["coresets"]["coreset_50"].update(positions=["1"]),
        lambda content: content["coresets"]["coreset_50"].update(positions=[]),
        lambda content: content["coresets"]["coreset_50"].update(turns=[0, 1]),
        lambda content: content["coresets"]["coreset_50"].update(scores=["a"] * 4),
        lambda content: content["coresets"].update(coreset_50=None),
        lambda content: content.pop("scores"),
        lambda content: content.clear(),
    ],
)
def test_a_damaged_record_is_made_again(tmp_path, change) -> None:
    scored = make_scored()
    before = take_coresets(tmp_path, scored, WANTED)
    alter(tmp_path, change)
    assert take_coresets(tmp_path, scored, WANTED) == before


def test_a_record_of_a_newer_version_is_refused(tmp_path) -> None:
    take_coresets(tmp_path, make_scored(), WANTED)
    alter(tmp_path, lambda content: content.update(format_version=3))
    with pytest.raises(ValueError, match="Upgrade"):
        take_coresets(tmp_path, make_scored(), WANTED)


def test_only_the_process_that_writes_writes(tmp_path) -> None:
    take_coresets(tmp_path, make_scored(), WANTED, renew=True, write=False)
    assert not list(tmp_path.iterdir())


def test_what_chose_a_pool_is_that_of_its_last_run(tmp_path, monkeypatch) -> None:
    """The record keeps what a run with more fractions chose before, by another strategy."""
    scored = make_scored()
    assert read_choice(tmp_path / "scored") == {}
    quarter, half = ("top", 0.25), ("random", 0.5)
    wanted = [describe_choice("coreset", fraction, strategy=strategy) for strategy, fraction in (quarter, half)]
    take_coresets(tmp_path, scored, dict(wanted))
    (tmp_path / "results.json").write_text(json.dumps({"config": {"fractions": [0.25]}}), encoding="utf-8")
    top = {"strategy": "top", "column": "influence"}
    assert read_choice(tmp_path / "scored") == read_choice(tmp_path / "scored", 0.1) == top
    assert read_choice(tmp_path / "scored", 0.5)["strategy"] == "random"
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert read_choice(f"~/{tmp_path.name}/scored") == top
