"""The record of a run's coresets: chosen once, and read as it stands."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from hf_in2core import select_coreset
from hf_in2core.names import name_coreset, parse_coreset
from hf_in2core.selection.record import RECORD, describe_choice, take_coresets


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
    altered = [0, 1, 4]
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
    alter(tmp_path, lambda content: content.update(format_version=2))
    with pytest.raises(ValueError, match="Upgrade"):
        take_coresets(tmp_path, make_scored(), WANTED)


def test_only_the_process_that_writes_writes(tmp_path) -> None:
    take_coresets(tmp_path, make_scored(), WANTED, renew=True, write=False)
    assert not list(tmp_path.iterdir())
