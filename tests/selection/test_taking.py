"""What is kept of rows that validation rows took in turn, and how far halves of those rows choose alike."""

import itertools
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, Value

from hf_in2core.rows.scored import forget_record
from hf_in2core.selection.taking import (
    MIN_GAIN,
    SHARES,
    find_overlap,
    make_turn_columns,
    measure_halves,
    read_overlap,
    say_overlap,
)


def make_scores(signal: float, num_tasks: int = 1, num_queries: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Scores on validation rows of the first of ten tasks, smallest for rows of the same; and which rows those are."""
    generator = np.random.default_rng(0)
    tasks = generator.integers(0, 10, 2000)
    same = tasks == np.arange(num_queries)[:, None] % num_tasks
    return generator.normal(size=same.shape) - signal * same, tasks < num_tasks


def take(scores: np.ndarray, count: int) -> set[int]:
    """The definition of taking in turn."""
    taken: list[int] = []
    for query in itertools.cycle(range(len(scores))):
        if len(taken) == count:
            return set(taken)
        taken.append(next(int(row) for row in np.argsort(scores[query]) if row not in taken))
    raise AssertionError


def test_the_overlap_is_that_of_two_coresets() -> None:
    scores, _ = make_scores(1.0)
    scores = scores[:12, :100]
    found = measure_halves(scores, seed=3)
    assert found is not None and found["shares"] == list(SHARES)
    generator, shared = np.random.default_rng(3), []
    for _ in range(10):
        first, second = np.array_split(generator.permutation(12), 2)
        shared.append(len(take(scores[first], 20) & take(scores[second], 20)) / 20)
    assert found["overlap"][SHARES.index(0.2)] == pytest.approx(np.mean(shared), abs=1e-4)
    assert find_overlap(found, 0.2) == found["overlap"][SHARES.index(0.2)] and find_overlap(found, 1.0) == 1


def test_of_a_few_rows_nothing_is_told() -> None:
    scores, _ = make_scores(1.0)
    assert measure_halves(scores[:9]) is None and measure_halves(scores[:, :29]) is None
    told, warning = say_overlap(find_overlap(measure_halves(scores[:9]), 0.25), 0.25)
    assert "not measured for rows taken in turn" in told and warning is None


@pytest.mark.parametrize("num_tasks", [1, 4])
def test_only_where_little_is_found_there_is_a_warning(num_tasks: int) -> None:
    """Of what there was to find beyond chance: less than half below the threshold, more above it."""
    shares = []
    for signal in (0.0, 0.25, 1.5, 2.0):
        scores, wanted = make_scores(signal, num_tasks)
        told, warning = say_overlap(find_overlap(measure_halves(scores), 0.2), 0.2)
        taken = list(take(scores, 400))
        best = min(1.0, wanted.mean() / 0.2)
        shares.append(((wanted[taken].mean() - wanted.mean()) / (best - wanted.mean()), warning))
        assert "random rows have 20 %" in told
    assert (
        [warning is None for _, warning in shares] == [share > 0.5 for share, _ in shares] == [False] * 2 + [True] * 2
    )
    said = shares[0][1] or ""
    assert "more validation rows" in said and "--strategy auto" in said
    assert say_overlap(0.24, 0.2)[1] is not None  # a twentieth of the way
    assert say_overlap(0.2 + MIN_GAIN * 0.8 + 0.01, 0.2)[1] is None and say_overlap(1.0, 1.0)[1] is None


def test_what_was_measured_goes_with_the_columns(tmp_path: Any) -> None:
    scores, _ = make_scores(1.0)
    columns, records = make_turn_columns("cosine", scores)
    assert {name: values.dtype.kind for name, values in columns.items()} == {
        "cosine_rank": "i",
        "cosine_score": "f",
        "cosine_taker": "i",
    }
    rows = Dataset.from_dict({"text": ["a"] * 2000})
    for name, values in columns.items():
        rows = rows.add_column(name, values, feature=Value(str(values.dtype), id=records.get(name)))
    rows.select(range(1500)).to_parquet(tmp_path / "rows.parquet")
    again = Dataset.from_parquet(str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path / "cache"))
    expected = find_overlap(measure_halves(scores), 0.25)
    # What comes of the rank is chosen by the same validation rows.
    for column in ("cosine_rank", "cosine_clean_rank"):
        assert read_overlap(again, column, 0.25) == expected is not None
    for column in ("rds_rank", "fused_rank", "influence"):
        assert read_overlap(again, column, 0.25) is None
    strange = rows.cast_column("cosine_taker", Value("int64", id="somebody's"))
    assert read_overlap(strange, "cosine_rank", 0.25) is None
    # Rows with another record, or none, are of the same types.
    assert forget_record(again.features) == forget_record(strange.features)
