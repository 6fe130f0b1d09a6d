"""Clusters of rows and of answers, within which a coreset can choose."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, load_from_disk
from helpers import make_model, make_tokenizer
from recipe_runs import run_command, write_config
from yaml import safe_load

from hf_in2core import select_coreset
from hf_in2core.names import CLUSTERS
from hf_in2core.rows.preparation import Preparation
from hf_in2core.selection.clusters import add_clusters, count_clusters


ANSWERS = ("yes yes yes yes", "1 2 3 4 5 6 7", "the cat and the dog")


@pytest.fixture(scope="module")
def rows() -> Dataset:
    """Sixty rows whose answers are of three kinds, under prompts that say nothing of it; one carries no loss."""
    words = np.random.default_rng(0).permutation(60)
    made = [{"prompt": f"question {word}", "completion": f"{ANSWERS[n % 3]} {n % 5}"} for n, word in enumerate(words)]
    return Dataset.from_list([*made, {"prompt": "long " * 80, "completion": "lost"}])


@pytest.fixture(scope="module")
def options() -> tuple[Any, Preparation]:
    return make_model(), Preparation(make_tokenizer(), completion_only_loss=True, max_length=48)


def test_answers_of_a_kind_are_a_cluster(rows: Dataset, options: tuple[Any, Preparation]) -> None:
    found = add_clusters(rows, *options, num_clusters=3)["answer_cluster"]
    assert found[60] is None
    kinds = [set(found[kind:60:3]) for kind in range(3)]
    assert [len(kind) for kind in kinds] == [1, 1, 1] and len(set.union(*kinds)) == 3
    # The same numbers each time, whatever was drawn before.
    np.random.seed(7)
    assert add_clusters(rows, *options, num_clusters=3)["answer_cluster"] == found


def test_a_coreset_within_clusters_holds_some_of_each(rows: Dataset, options: tuple[Any, Preparation]) -> None:
    # A ranking that wants one kind of answer alone.
    scored = add_clusters(rows, *options, num_clusters=3)
    scored = scored.add_column("influence", [float(n % 3) for n in range(60)] + [None])
    kinds = {answer[:3] for answer in select_coreset(scored, fraction=0.2)["completion"]}
    assert len(kinds) == 1
    balanced = select_coreset(scored, fraction=0.2, group_column="answer_cluster", group_quota="equal")
    counts = np.unique([answer[:3] for answer in balanced["completion"]], return_counts=True)[1]
    assert counts.tolist() == [4, 4, 4]


def test_clusters_are_no_more_than_rows_that_differ(options: tuple[Any, Preparation]) -> None:
    alike = Dataset.from_list([{"prompt": "a", "completion": "b"}] * 9)
    for column in CLUSTERS:
        assert set(add_clusters(alike, *options, column=column, num_clusters=4)[column]) == {0}
    with pytest.raises(ValueError, match="9 of 9 rows carry loss, which make no 10 clusters"):
        add_clusters(alike, *options, num_clusters=10)
    with pytest.raises(ValueError, match="column='clusters' is not one of"):
        add_clusters(alike, *options, column="clusters")
    with pytest.raises(ValueError, match="has a column row_cluster already"):
        add_clusters(alike.add_column("row_cluster", [0] * 9), *options, column="row_cluster")


def test_a_run_makes_the_clusters_that_it_chooses_within(finished: Path, tmp_path: Path) -> None:
    config = safe_load((finished / "settings.yaml").read_text(encoding="utf-8"))
    config |= {"output_dir": str(tmp_path / "run"), "arms": ["coreset"], "budgets": ["steps"], "seeds": [0]}
    config |= {"reference_adapter": str(finished / "run" / "reference"), "max_steps": 1, "fractions": [0.5]}
    config |= {"group_column": "answer_cluster", "group_quota": "equal"}
    run_command("run", "--config", write_config(tmp_path, config))
    scored = load_from_disk(str(tmp_path / "run" / "scored"))
    clusters = np.array(scored["answer_cluster"])
    assert len(set(clusters)) == count_clusters(len(scored))
    kept = np.isin(scored["id"], load_from_disk(str(tmp_path / "run" / "coresets" / "coreset_50"))["id"])
    sizes, taken = np.bincount(clusters), np.bincount(clusters[kept])
    # Each the same, or all that it has.
    assert all(count >= taken.max() - 1 or count == size for count, size in zip(taken, sizes, strict=True))
    config |= {"fractions": [0.01], "output_dir": str(tmp_path / "small")}
    with pytest.raises(ValueError, match="--group_column answer_cluster has 5 values in 60 rows, but the smallest"):
        run_command("run", "--config", write_config(tmp_path, config))
