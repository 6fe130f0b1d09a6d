"""Rows that are tokens already, and pictures beside text: refused by row where SFT would train on something else."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, Image
from helpers import make_tokenizer, make_trainer

from hf_in2core.rows.checks import check_rows
from hf_in2core.rows.doubts import say_doubts
from hf_in2core.rows.preparation import Preparation


IDS = [5, 6, 7, 8]
LABELS = [-100, -100, 7, 8]
PLAIN = {"prompt": "the cat :", "completion": " sat"}

BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "shifted": ({"input_ids": IDS, "labels": [-100, 7, 8, -100]}, "labels", "has 7 at 1, where `input_ids` has 6"),
    "of no token": ({"input_ids": IDS, "labels": [-1, -1, 7, 8]}, "labels", "has -1 at 0"),
    "too large": ({"input_ids": IDS, "labels": [-100, -100, 7, 99999]}, "labels", "has 99999 at 3"),
    "a mask": (
        {"input_ids": IDS, "labels": [False, False, True, True]},
        "labels",
        r"has a truth value \(False\) at 0",
    ),
    "numbers": ({"input_ids": IDS, "labels": [-100.0, -100.0, 7.0, 8.0]}, "labels", r"has a number \(-100.0\) at 0"),
    "no mask": ({"input_ids": IDS, "completion_mask": [0, 0, 2, 1]}, "completion_mask", r"has a number \(2\)"),
    "padded": (
        {"input_ids": [*IDS, 0], "attention_mask": [1, 1, 1, 1, 0]},
        "attention_mask",
        "is 0 for 1 of 5 tokens",
    ),
    "packed": ({"input_ids": IDS, "position_ids": [0, 1, 0, 1]}, "position_ids", "shows several documents packed"),
    "packed by lengths": ({"input_ids": IDS, "seq_lengths": [2, 2]}, "seq_lengths", "shows several documents packed"),
}


@pytest.mark.parametrize("name", BAD)
def test_tokens_that_would_be_trained_on_as_something_else(name: str, tmp_path: Path) -> None:
    row, column, reason = BAD[name]
    rows = Dataset.from_list([row])
    with pytest.raises(ValueError, match=f"row 0: `{column}` {reason}"):
        make_trainer(tmp_path, rows, rows)
    good = Dataset.from_list([{"input_ids": IDS, "labels": LABELS}] * 2)
    scorer = make_trainer(tmp_path, good, good).fit_influence()
    batch = {key: [value] for key, value in row.items()}
    assert np.isnan(scorer(batch)["influence"]).all()


@pytest.mark.parametrize("name", ["padded", "packed", "packed by lengths"])
def test_tokens_of_another_name_are_looked_at_alike(name: str) -> None:
    row, column, reason = BAD[name]
    renamed = {"tokens" if key == "input_ids" else key: value for key, value in row.items()}
    (bad,) = check_rows(Dataset.from_list([renamed]), Preparation(make_tokenizer(), ["input_ids=tokens"]), "pool").bad
    assert bad.column == column and re.match(reason, bad.reason)


def test_tokens_that_are_whole(tmp_path: Path) -> None:
    whole = {"attention_mask": [1] * 4, "position_ids": [0, 1, 2, 3], "seq_lengths": [4]}
    rows = Dataset.from_list([{"input_ids": IDS, "labels": LABELS} | whole] * 2)
    assert make_trainer(tmp_path, rows, rows).score_influence()["num_loss_tokens"][:] == [2, 2]


@pytest.mark.parametrize("mask", ["completion_mask", "loss_mask"])
def test_a_mask_that_is_not_read(mask: str, tmp_path: Path) -> None:
    """TRL reads `completion_mask` only where it is told to, and no other."""
    rows = Dataset.from_list([{"input_ids": IDS, mask: [0, 0, 1, 1]}])
    (said,) = say_doubts(check_rows(rows, Preparation(make_tokenizer()), "pool"))
    assert f"The column `{mask}` of the pool is not read" in said and "--completion_only_loss true" in said
    if mask == "completion_mask":
        trainer = make_trainer(tmp_path, rows, rows, completion_only_loss=True)
        assert trainer.score_influence()["num_loss_tokens"][:] == [2]
    else:
        with pytest.raises(ValueError, match="does nothing on rows of `input_ids` alone"):
            make_trainer(tmp_path, rows, rows, completion_only_loss=True)


PICTURES: dict[str, list[Any]] = {
    "paths": ["a.png", "b.png", None, ""],
    "lists": [["a.png"], ["b.png", "c.png"], [], None],
    "objects": [{"path": "a.png"}, {"path": "b.png"}, None, {"path": None}],
    "bytes": [{"bytes": b"a", "path": None}, {"bytes": None, "path": "b.png"}, {"bytes": None, "path": None}, None],
    "lists of little": [["", "a.png"], ["b.png"], [""], [None]],
    "lists of objects": [[{"path": "a.png"}], [{}, {"path": "b.png"}], [{"path": ""}], [None]],
    "truth values": [True, True, False, None],
    "numbers": [1.0, 2.0, 0.0, float("nan")],
}


@pytest.mark.parametrize("kind", PICTURES)
@pytest.mark.parametrize("name", ["image", "videos"])
def test_pictures_are_refused_by_row(kind: str, name: str, tmp_path: Path) -> None:
    rows = Dataset.from_list([PLAIN | {name: value} for value in PICTURES[kind]])
    with pytest.raises(ValueError, match=rf"2 of 4 rows of the pool:\n  - row 0: `{name}` is not empty.*\n  - row 1:"):
        make_trainer(tmp_path, rows, rows)
    trainer = make_trainer(tmp_path, rows, rows, columns=["prompt=prompt", "completion=completion"])
    assert all(trainer.score_influence()["num_loss_tokens"])
    # A preset names what is read, too.
    alpaca = rows.rename_columns({"prompt": "instruction", "completion": "output"})
    checked = check_rows(alpaca, Preparation(make_tokenizer(), ["alpaca"]), "pool")
    assert not checked.bad and "2 rows of the pool have pictures, sound or films" in " ".join(say_doubts(checked))
    empty = rows.select([2, 3])
    assert all(make_trainer(tmp_path, empty, empty).score_influence()["num_loss_tokens"])


def test_pictures_are_not_decoded_to_be_found() -> None:
    rows = Dataset.from_list([PLAIN | {"image": {"bytes": b"no picture", "path": None}}]).cast_column("image", Image())
    (bad,) = check_rows(rows, Preparation(make_tokenizer()), "pool").bad
    assert bad.column == "image" and "is not empty" in bad.reason
