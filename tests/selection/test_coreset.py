"""`select_coreset` against a naive oracle in plain Python, plus its errors."""

import math
import random
import warnings
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, List, Value, concatenate_datasets
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_in2core.selection.coreset import select_coreset


# Few distinct values, so that ties are common; None and NaN are rows without loss.
SCORES = st.one_of(st.none(), st.just(math.nan), st.integers(-4, 4).map(float), st.floats(-1e6, 1e6))
HYPOTHESIS = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def make_scored(influence: list[float | None], **columns: list[Any]) -> Dataset:
    data = {"position": list(range(len(influence))), "influence": influence} | columns
    features = Features({"position": Value("int64"), "influence": Value("float64")})
    for name, values in columns.items():
        features[name] = Dataset.from_dict({name: values}).features[name]
    return Dataset.from_dict(data, features=features)


def carries_loss(value: float | None) -> bool:
    return value is not None and not math.isnan(value)


def oracle_top(influence: list[float | None], candidates: list[int], count: int, largest: bool = False) -> list[int]:
    """Take the best row `count` times, looking at every candidate each time."""
    left, taken = list(candidates), list[int]()
    for _ in range(count):
        best = left[0]
        for row in left:
            value, best_value = influence[row], influence[best]
            assert value is not None and best_value is not None
            if (value > best_value) if largest else (value < best_value):
                best = row
        left.remove(best)
        taken.append(best)
    return taken


def oracle_round_robin(sets: list[list[float]], candidates: list[int], count: int) -> list[int]:
    left, taken = list(candidates), list[int]()
    while len(taken) < count:
        scores = sets[len(taken) % len(sets)]
        best = min(left, key=lambda row: (scores[row], row))
        left.remove(best)
        taken.append(best)
    return taken


def oracle_proportional(sizes: list[int], count: int) -> list[int]:
    shares = [Fraction(count * size, sum(sizes)) for size in sizes]
    quotas = [math.floor(share) for share in shares]
    while sum(quotas) < count:
        remainders = [share - quota for share, quota in zip(shares, quotas, strict=True)]
        quotas[remainders.index(max(remainders))] += 1
    return quotas


def oracle_equal(sizes: list[int], count: int) -> list[int]:
    """Hand out the rows one by one, always to the first of the groups that have the fewest and are not full."""
    quotas = [0] * len(sizes)
    for _ in range(count):
        open_groups = [i for i, size in enumerate(sizes) if quotas[i] < size]
        quotas[min(open_groups, key=lambda i: (quotas[i], i))] += 1
    return quotas


@st.composite
def pools(draw: st.DrawFn) -> tuple[list[float | None], int]:
    influence = draw(st.lists(SCORES, min_size=1, max_size=25).filter(lambda values: any(map(carries_loss, values))))
    return influence, draw(st.integers(1, sum(map(carries_loss, influence))))


@HYPOTHESIS
@given(pools(), st.sampled_from(["top", "bottom"]))
def test_top_and_bottom_equal_the_oracle(pool: tuple[list[float | None], int], strategy: str) -> None:
    influence, count = pool
    candidates = [row for row, value in enumerate(influence) if carries_loss(value)]
    expected = oracle_top(influence, candidates, count, largest=strategy == "bottom")

    original = select_coreset(make_scored(influence), size=count, strategy=strategy, order="original")
    assert original["position"][:] == sorted(expected)
    by_influence = select_coreset(make_scored(influence), size=count, strategy=strategy, order="influence")
    assert by_influence["position"][:] == sorted(expected, key=lambda row: (influence[row], row))


@HYPOTHESIS
@given(pools(), st.integers(0, 2**32))
def test_random_draws_rows_with_loss_and_is_nested(pool: tuple[list[float | None], int], seed: int) -> None:
    influence, count = pool
    scored = make_scored(influence)
    drawn = select_coreset(scored, size=count, strategy="random", seed=seed)["position"][:]
    assert len(set(drawn)) == count
    assert all(carries_loss(influence[row]) for row in drawn)
    assert drawn == sorted(drawn, key=lambda row: (influence[row], row))
    assert drawn == select_coreset(scored, size=count, strategy="random", seed=seed)["position"][:]
    if count > 1:
        assert set(select_coreset(scored, size=count - 1, strategy="random", seed=seed)["position"][:]) < set(drawn)


def test_random_ignores_influence_and_covers_every_row() -> None:
    influence = [float(i) if i % 5 else None for i in range(20)]
    drawn = [
        row
        for seed in range(300)
        for row in select_coreset(make_scored(influence), size=4, strategy="random", seed=seed)["position"][:]
    ]
    counts = np.bincount(drawn, minlength=20)
    assert (counts[::5] == 0).all()
    # 16 rows share 1,200 draws: 75 each, with a standard deviation of 7.5; six of them is far beyond chance.
    assert np.abs(counts[[i for i in range(20) if i % 5]] - 75).max() < 45


@HYPOTHESIS
@given(st.data())
def test_round_robin_equals_the_oracle(data: st.DataObject) -> None:
    num_rows, num_sets = data.draw(st.integers(1, 20)), data.draw(st.integers(2, 4))
    one_set = st.lists(st.integers(-3, 3).map(float), min_size=num_rows, max_size=num_rows)
    sets = [data.draw(one_set) for _ in range(num_sets)]
    lossless = data.draw(st.sets(st.integers(0, num_rows - 1), max_size=num_rows - 1))
    columns: dict[str, list[Any]] = {
        f"influence_set{q}": [None if row in lossless else scores[row] for row in range(num_rows)]
        for q, scores in enumerate(sets)
    }
    influence = [
        None if row in lossless else sum(scores[row] for scores in sets) / num_sets for row in range(num_rows)
    ]
    candidates = [row for row in range(num_rows) if row not in lossless]
    count = data.draw(st.integers(1, len(candidates)))

    # Columns that look like sets and are none of them: all would change the selection.
    distractors: dict[str, list[Any]] = {
        "influence_rank": [float(-row) for row in range(num_rows)],
        "influence_per_query": [[float(-row)] for row in range(num_rows)],
        "influence_note": [str(-row) for row in range(num_rows)],
        "influence_bounds": [{"low": float(-row)} for row in range(num_rows)],
    }
    scored = make_scored(influence, **columns, **distractors)
    coreset = select_coreset(scored, size=count, strategy="round_robin", order="original")
    assert coreset["position"][:] == sorted(oracle_round_robin(sets, candidates, count))


@HYPOTHESIS
@given(
    st.lists(st.tuples(SCORES, st.sampled_from(["a", "b", "c", "d", None])), min_size=1, max_size=25),
    st.sampled_from(["equal", "proportional"]),
    st.sampled_from(["top", "bottom", "random"]),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_groups_equal_the_oracle(
    rows: list[tuple[float | None, str | None]],
    group_quota: str,
    strategy: str,
    proponents_only: bool,
    rng: random.Random,
) -> None:
    influence = [value for value, _ in rows]
    candidates = [row for row, value in enumerate(influence) if carries_loss(value)]
    if proponents_only:
        candidates = [row for row in candidates if (influence[row] or 0) < 0]
    if not candidates:
        return
    count = rng.randint(1, len(candidates))
    members: dict[str | None, list[int]] = {}
    for row in candidates:
        members.setdefault(rows[row][1], []).append(row)
    sizes = [len(group) for group in members.values()]
    quotas = (oracle_equal if group_quota == "equal" else oracle_proportional)(sizes, count)

    scored = make_scored(influence, task=[group for _, group in rows])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        coreset = select_coreset(
            scored,
            size=count,
            strategy=strategy,
            proponents_only=proponents_only,
            group_column="task",
            group_quota=group_quota,
            order="original",
        )
    selected = coreset["position"][:]
    assert len(selected) == count and set(selected) <= set(candidates)
    for group, quota in zip(members.values(), quotas, strict=True):
        chosen = [row for row in selected if row in group]
        assert len(chosen) == quota
        if strategy != "random":
            assert chosen == sorted(oracle_top(influence, group, quota, largest=strategy == "bottom"))


@pytest.mark.parametrize(
    ("sizes", "count", "quota", "expected"),
    [
        # A group of one cannot fill its third of 9: the two others share what it leaves.
        ([1, 10, 10], 9, "equal", [1, 4, 4]),
        # Two groups run out one after the other.
        ([1, 2, 10], 12, "equal", [1, 2, 9]),
        ([5, 5, 5], 4, "equal", [2, 1, 1]),
        # 10 * (3, 3, 1) / 7 = 4.29, 4.29, 1.43: the last one has the largest remainder.
        ([9, 9, 3], 10, "proportional", [4, 4, 2]),
        # Equal remainders go to the group that comes first in the pool.
        ([3, 3, 3], 4, "proportional", [2, 1, 1]),
    ],
)
def test_group_quotas_by_hand(sizes: list[int], count: int, quota: str, expected: list[int]) -> None:
    task = [f"task {i}" for i, size in enumerate(sizes) for _ in range(size)]
    scored = make_scored([-float(i) for i in range(len(task))], task=task)
    coreset = select_coreset(scored, size=count, group_column="task", group_quota=quota)
    assert [coreset["task"][:].count(f"task {i}") for i in range(len(sizes))] == expected


def test_round_robin_within_groups() -> None:
    scored = make_scored(
        [0.0] * 8,
        influence_a=[-4.0, -3.0, 3.0, 4.0] * 2,
        influence_b=[4.0, 3.0, -3.0, -4.0] * 2,
        task=["x"] * 4 + ["y"] * 4,
    )
    coreset = select_coreset(scored, size=4, strategy="round_robin", group_column="task", order="original")
    assert coreset["position"][:] == [0, 3, 4, 7]


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.25, 0.29, 0.5, 0.625, 0.999, 1.0, 1])
def test_fraction_counts_rows_with_loss(fraction: float) -> None:
    influence = [None if i % 3 == 0 else math.nan if i % 3 == 1 else float(i) for i in range(300)]
    assert len(select_coreset(make_scored(influence), fraction=fraction)) == round(fraction * 100)


def test_all_columns_come_back_untouched() -> None:
    scored = make_scored(
        [0.5, -1.0, None, -2.0],
        messages=[[{"role": "user", "content": f"text {i}"}] for i in range(4)],
        influence_rank=[2, 1, None, 0],
        num_loss_tokens=[3, 4, 0, 5],
    )
    coreset = select_coreset(scored, fraction=1.0)
    assert coreset.features == scored.features
    assert [coreset[i] for i in range(3)] == [scored[i] for i in (3, 1, 0)]


def test_only_the_influence_column_is_read(tmp_path: Any) -> None:
    make_scored([3.0, -1.0, 2.0, -5.0], text=["a", "b", "c", "d"]).save_to_disk(tmp_path / "scored")
    scored = Dataset.load_from_disk(tmp_path / "scored")
    # The user's format hides influence and would turn it into torch tensors; it must neither matter nor get lost.
    scored = scored.with_format("numpy", columns=["text"])
    coreset = select_coreset(scored, size=2)
    assert coreset.format["type"] == "numpy" and coreset.format["columns"] == ["text"]
    assert coreset.with_format(None)["position"][:] == [3, 1]


def test_pool_of_several_tables_and_an_indices_mapping() -> None:
    parts = [make_scored([float(v)] * 3, task=[f"{v}", "odd", f"{v}"]) for v in (3, 1, 2)]
    whole = concatenate_datasets(parts)
    assert whole.data.column("task").num_chunks == 3
    coreset = select_coreset(whole, size=4, group_column="task", group_quota="equal", order="original")
    assert coreset["task"][:] == ["3", "1", "odd", "2"]

    scored = whole.select([8, 7, 6, 5, 4, 3, 2, 1, 0])
    assert select_coreset(scored, size=3, order="original")["influence"][:] == [1.0, 1.0, 1.0]
    coreset = select_coreset(scored, size=4, group_column="task", group_quota="equal", order="original")
    assert coreset["task"][:] == ["2", "1", "odd", "3"]
    assert coreset["influence"][:] == [2.0, 1.0, 1.0, 3.0]


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64"])
def test_influence_of_any_numeric_type(dtype: str) -> None:
    scored = Dataset.from_dict({"influence": [2, None, -3, 1]}, features=Features({"influence": Value(dtype)}))
    assert select_coreset(scored, size=2)["influence"][:] == [-3, 1]


def test_proponents_only_drops_zero_and_warns_with_the_counts() -> None:
    scored = make_scored([-1.0, 0.0, -0.0, 2.0, None, -3.0])
    with pytest.warns(UserWarning, match=r"4 rows were asked for, but only 2 of the 5 rows"):
        coreset = select_coreset(scored, size=4, proponents_only=True)
    assert coreset["influence"][:] == [-3.0, -1.0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(select_coreset(scored, fraction=0.4, proponents_only=True)) == 2
        assert len(select_coreset(scored, size=4)) == 4


def test_proponents_only_without_proponents() -> None:
    with pytest.raises(ValueError, match=r"none of the 3 rows that carry loss is left \(smallest influence: 0.5\)"):
        select_coreset(make_scored([0.5, 1.0, 2.0, None]), size=1, proponents_only=True)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({}, ValueError, "exactly one of fraction and size"),
        ({"fraction": 0.5, "size": 1}, ValueError, "exactly one of fraction and size"),
        ({"fraction": 0.0}, ValueError, r"outside \(0, 1\]"),
        ({"fraction": -0.1}, ValueError, r"outside \(0, 1\]"),
        ({"fraction": 25}, ValueError, r"fraction=25 is outside \(0, 1\]"),
        ({"fraction": math.nan}, ValueError, r"outside \(0, 1\]"),
        ({"fraction": True}, TypeError, "not a number"),
        ({"fraction": "half"}, TypeError, "not a number"),
        ({"fraction": 0.05}, ValueError, "rounds to 0 rows"),
        ({"size": 0}, ValueError, "at least 1"),
        ({"size": 2.0}, TypeError, "whole number of rows"),
        ({"size": True}, TypeError, "whole number of rows"),
        ({"size": 4}, ValueError, r"size=4 is more than the 3 rows that carry loss \(of 4 rows"),
        ({"size": 1, "strategy": "best"}, ValueError, "'top', 'bottom', 'random', 'round_robin'"),
        ({"size": 1, "order": "random"}, ValueError, "'influence', 'original'"),
        ({"size": 1, "group_column": "task", "group_quota": "even"}, ValueError, "'proportional', 'equal'"),
        ({"size": 1, "group_column": "source"}, ValueError, r"'source' is not a column.*'position'"),
        ({"size": 1, "group_quota": "equal"}, ValueError, "Pass group_column"),
        ({"size": 1, "group_column": "tags"}, TypeError, "nested values do not name a group"),
        ({"size": 1, "strategy": "round_robin"}, ValueError, r"at least two validation sets.*\['influence_only'\]"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    scored = make_scored(
        [1.0, -1.0, 0.5, None],
        task=["a", "b", "a", "b"],
        tags=[["a"], ["b"], [], []],
        influence_only=[1.0, -1.0, 0.5, None],
        influence_rank=[2, 0, 1, None],
    )
    with pytest.raises(error, match=message):
        select_coreset(scored, **kwargs)


def test_bad_datasets() -> None:
    scored = make_scored([1.0, -1.0])
    with pytest.raises(TypeError, match="a stream cannot be ranked"):
        select_coreset(scored.to_iterable_dataset(), size=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"splits \['train'\]"):
        select_coreset(DatasetDict(train=scored), size=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got list"):
        select_coreset([{"influence": 1.0}], size=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"no column 'influence' \(its columns: \['position'\]\).*score_influence"):
        select_coreset(scored.remove_columns("influence"), size=1)
    with pytest.raises(ValueError, match="no rows"):
        select_coreset(scored.select([]), size=1)
    with pytest.raises(ValueError, match="null or NaN in all 2 rows"):
        select_coreset(make_scored([None, math.nan]), size=1)
    with pytest.raises(ValueError, match=r"infinite in 1 rows \(the first is row 1\)"):
        select_coreset(make_scored([1.0, -math.inf]), size=1)
    with pytest.raises(TypeError, match="scores are numbers"):
        select_coreset(Dataset.from_dict({"influence": ["-1", "2"]}), size=1)
    with pytest.raises(TypeError, match="scores are numbers"):
        select_coreset(Dataset.from_dict({"influence": [[1.0], [2.0]]}), size=1)
    with pytest.raises(ValueError, match=r"'influence_b' is null or NaN in 1 rows.*row 1"):
        select_coreset(
            make_scored([1.0, -1.0], influence_a=[1.0, -1.0], influence_b=[1.0, None]), size=1, strategy="round_robin"
        )


def test_another_column_selects_as_influence_would() -> None:
    values = [3.0, None, -1.0, 2.0, 0.5, 2.0]
    scored = make_scored([0.0, 1.0, None, 3.0, 4.0, 5.0], loss=values, rank=[5, 4, 3, 2, 1, 0])
    for strategy in ("top", "bottom", "random"):
        by_column = select_coreset(scored, size=3, strategy=strategy, column="loss", seed=5)
        by_influence = select_coreset(make_scored(values), size=3, strategy=strategy, seed=5)
        assert by_column["position"][:] == by_influence["position"][:]
    assert select_coreset(scored, size=2, column="rank")["rank"][:] == [0, 1]
    # The column stands alone: the rows need no influence.
    assert len(select_coreset(scored.remove_columns("influence"), fraction=0.4, column="loss")) == 2


def test_another_column_is_checked() -> None:
    scored = make_scored([0.0, 1.0], loss=[1.0, 2.0], name=["a", "b"])
    with pytest.raises(ValueError, match="no column 'rds_rank'.*hf_in2core.selection.baselines"):
        select_coreset(scored, size=1, column="rds_rank")
    with pytest.raises(TypeError, match="'name' holds string"):
        select_coreset(scored, size=1, column="name")
    with pytest.raises(ValueError, match="proponents_only=True needs influence"):
        select_coreset(scored, size=1, column="loss", proponents_only=True)
    with pytest.raises(ValueError, match="strategy='round_robin' needs influence"):
        select_coreset(scored, size=1, column="loss", strategy="round_robin")


def test_every_validation_row_takes_its_strongest_row_in_turn() -> None:
    generator = np.random.default_rng(0)
    per_query = generator.integers(-3, 4, (12, 5)).astype(np.float64)
    influence = [None if row == 4 else float(values.mean()) for row, values in enumerate(per_query)]
    feature = List(Value("float64"), length=5)
    values = [None if row == 4 else values.tolist() for row, values in enumerate(per_query)]
    scored = make_scored(influence).add_column("influence_per_query", values, feature=feature)
    candidates = [row for row in range(12) if row != 4]
    for size in (1, 4, 11):
        expected = oracle_round_robin(per_query.T.tolist(), candidates, size)
        found = select_coreset(scored, size=size, strategy="round_robin_rows", order="original")
        assert found["position"][:] == sorted(expected)
    with pytest.raises(ValueError, match=r"needs the column influence_per_query.*fit_influence\(per_example=True\)"):
        select_coreset(make_scored(influence), size=1, strategy="round_robin_rows")
