"""Greedy selection against dense linear algebra, and what it must do with copies."""

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_in2core import select_coreset
from hf_in2core.selection.greedy import DAMPING_SCALE, take_greedy


def draw(n: int, q: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, q))


def oracle_greedy(influence: np.ndarray, candidates: list[int], count: int) -> list[int]:
    """The definition: the damped curvature of pool and chosen rows is inverted anew for every row taken."""
    scored = np.array([row for row in influence if not np.isnan(row).any()])
    a = -influence / np.sqrt((scored**2).mean(axis=0))
    rows = [row for row in a if not np.isnan(row).any()]
    pool = np.mean([np.outer(row, row) for row in rows], axis=0)
    m = pool + DAMPING_SCALE * np.trace(pool) / len(pool) * np.eye(len(pool))
    taken: list[int] = []
    for step in range(count):
        h = m + sum((np.outer(a[j], a[j]) for j in taken), np.zeros_like(m)) / count
        given_chosen = -a @ np.linalg.solve(h, m)[:, step % len(m)]
        taken.append(min((i for i in candidates if i not in taken), key=lambda i: given_chosen[i]))
    return taken


def make_scored(influence: np.ndarray) -> Dataset:
    return Dataset.from_dict(
        {
            "influence": influence.mean(axis=1),
            "influence_per_query": list(influence),
            "row": np.arange(len(influence)),
        }
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 30), st.integers(2, 6), st.integers(0, 10_000), st.data())
def test_equals_the_definition(n: int, q: int, seed: int, data: st.DataObject) -> None:
    influence = draw(n, q, seed)
    candidates = sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1)))
    count = data.draw(st.integers(1, len(candidates)))
    taken = take_greedy(influence, np.array(candidates), count).rows
    assert taken.tolist() == oracle_greedy(influence, candidates, count)


def test_rows_without_loss_count_for_nothing() -> None:
    influence = draw(12, 3, seed=1)
    holes = np.insert(influence, [4, 9], np.nan, axis=0)
    kept = np.flatnonzero(~np.isnan(holes).any(axis=1))
    assert take_greedy(holes, kept, 6).rows.tolist() == kept[take_greedy(influence, np.arange(12), 6).rows].tolist()


def test_the_scale_of_a_validation_row_does_not_matter() -> None:
    influence = draw(40, 4, seed=2)
    expected = take_greedy(influence, np.arange(40), 15).rows
    assert take_greedy(influence * [1e-6, 1.0, 30.0, 1e5], np.arange(40), 15).rows.tolist() == expected.tolist()


def test_copies_are_left_where_top_takes_them() -> None:
    distinct = draw(50, 8, seed=3)
    origin = np.repeat(np.arange(50), 4)
    scored = make_scored(distinct[origin]).add_column("origin", origin)

    def count(strategy: str) -> int:
        return len(set(select_coreset(scored, size=20, strategy=strategy)["origin"]))

    assert count("top") == 5
    assert count("round_robin_rows") + 3 < count("greedy")


def test_unrelated_rows_keep_their_influence() -> None:
    # Validation rows that share no pool row: what one takes leaves the others' order as it was.
    influence = np.zeros((12, 3))
    influence[np.arange(12), np.arange(12) % 3] = -np.arange(1.0, 13.0)
    assert take_greedy(influence, np.arange(12), 3).rows.tolist() == [9, 10, 11]


def test_select_coreset_takes_the_same_rows_within_groups_and_proponents() -> None:
    influence = draw(30, 4, seed=4)
    task = np.arange(30) % 2
    scored = make_scored(influence).add_column("task", task)
    coreset = select_coreset(scored, size=10, strategy="greedy", order="original")
    assert coreset["row"][:] == sorted(take_greedy(influence, np.arange(30), 10).rows.tolist())
    grouped = select_coreset(scored, size=10, strategy="greedy", group_column="task", order="original")
    expected = [take_greedy(influence, np.flatnonzero(task == group), 5).rows.tolist() for group in (0, 1)]
    assert grouped["row"][:] == sorted(expected[0] + expected[1])
    proponents = select_coreset(scored, size=5, strategy="greedy", proponents_only=True)
    assert max(proponents["influence"]) < 0


def test_what_it_needs_is_named() -> None:
    scored = make_scored(draw(10, 3, seed=5))
    with pytest.raises(ValueError, match=r"strategy='greedy' needs the column influence_per_query.*per_example=True"):
        select_coreset(scored.remove_columns("influence_per_query"), size=3, strategy="greedy")
    with pytest.raises(ValueError, match="1 of 1 validation rows have any influence"):
        select_coreset(make_scored(draw(10, 1, seed=5)), size=3, strategy="greedy")
    with pytest.raises(ValueError, match="0 of 3 validation rows have any influence"):
        select_coreset(make_scored(np.zeros((10, 3))), size=3, strategy="greedy")
    with pytest.raises(ValueError, match="strategy='greedy' needs influence"):
        select_coreset(scored.add_column("loss", np.arange(10.0)), size=3, strategy="greedy", column="loss")
