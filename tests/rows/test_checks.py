"""One bad row among good ones: named by position, column and reason before any work, or counted as a null."""

import datetime
import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from helpers import CHAT_TEMPLATE, ROOT, make_tokenizer, make_trainer

from hf_in2core.rows.checks import check_row, check_rows
from hf_in2core.rows.masks import compare_masks
from hf_in2core.rows.preparation import Preparation
from hf_in2core.rows.presets import RowError
from hf_in2core.rows.scored import count_unscored
from hf_in2core.rows.sources import load_rows


TEMPLATE = CHAT_TEMPLATE.replace(
    "{% for message",
    "{% if messages[0]['role'] == 'assistant' %}{{ raise_exception('the user begins') }}{% endif %}{% for message",
    1,
)
ASKED = {"role": "user", "content": "the cat sat"}
ANSWERED = {"role": "assistant", "content": "on a mat"}
GOOD = {"messages": [ASKED, ANSWERED]}
PLAIN = {"prompt": "the cat :", "completion": " sat"}
TOKENS = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}

# Good row, bad row, column that is named, reason.
BAD: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "null completion": (PLAIN, PLAIN | {"completion": None}, "completion", "is null, neither text nor"),
    "null prompt": (PLAIN, PLAIN | {"prompt": None}, "prompt", "is null, neither text nor"),
    "null text": ({"text": "a"}, {"text": None}, "text", "is null, not text"),
    "null messages": (GOOD, {"messages": None}, "messages", "is null, not a list of turns"),
    "no turns": (GOOD, {"messages": []}, "messages", "is an empty conversation"),
    "no role": (GOOD, {"messages": [ASKED, {"role": None, "content": "a"}]}, "messages", "has no role in turn 1"),
    "unknown role": (
        GOOD,
        {"messages": [ASKED, {"role": "critic", "content": "a"}]},
        "messages",
        "unknown role 'critic'",
    ),
    "speakers": (GOOD, {"messages": [{"role": "human", "content": "a"}, ANSWERED]}, "messages", "--columns sharegpt"),
    "no content": (
        GOOD,
        {"messages": [ASKED, {"role": "assistant", "content": None}]},
        "messages",
        "has no content in turn 1",
    ),
    "template": (GOOD, {"messages": [ANSWERED]}, "messages", "is refused by the chat template: the user begins"),
    "picture": (
        {"messages": [ASKED | {"content": [{"type": "text", "text": "a"}]}, ANSWERED]},
        {"messages": [ASKED | {"content": [{"type": "image", "text": None}]}, ANSWERED]},
        "messages",
        "has a part of type 'image' in turn 0",
    ),
    "empty tools": (GOOD | {"tools": None}, GOOD | {"tools": ""}, "tools", "is text \\(''\\), which is no JSON"),
    "tools of another kind": (GOOD | {"tools": "[]"}, GOOD | {"tools": '{"a": 1}'}, "tools", "not a list of tools"),
    "null settings": (
        GOOD | {"chat_template_kwargs": {"a": True}},
        GOOD | {"chat_template_kwargs": None},
        "chat_template_kwargs",
        "is null; every row needs an object",
    ),
    "unknown token": (TOKENS, TOKENS | {"input_ids": [5, 9999, 7]}, "input_ids", "has the token 9999"),
    "few labels": (TOKENS, TOKENS | {"labels": [5]}, "labels", "has 1 values for 3 tokens"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named(name: str, tmp_path: Path) -> None:
    good, bad, column, reason = BAD[name]
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    rows = [good | {"id": f"r{number}"} for number in range(4)]
    rows[2] = bad | {"id": "r2"}
    pool = Dataset.from_list(rows, on_mixed_types="use_json")
    for number, (train, validation) in enumerate([(pool, pool.select([0])), (pool.select([0, 1]), pool)]):
        what = "pool" if number == 0 else "validation set"
        with pytest.raises(
            ValueError, match=rf"1 of 4 rows of the {what}:\n  - row 2 \(id 'r2'\): `{column}` .*{reason}"
        ):
            make_trainer(tmp_path, train, validation, tokenizer=tokenizer)
    scorer = make_trainer(tmp_path, pool.select([0, 1]), pool.select([3]), tokenizer=tokenizer).fit_influence()
    for scored in (pool.map(scorer, batched=True), list(pool.to_iterable_dataset().map(scorer, batched=True))):
        influence = [row["influence"] for row in scored]
        assert [np.isnan(value) for value in influence] == [False, False, True, False]
    assert count_unscored(pool.map(scorer, batched=True)) == 1


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([2, 4], r"`completion` is a number \(2\)"),
        ([True, False], r"`completion` is a truth value \(True\)"),
        ([datetime.date(2024, 5, 1)] * 2, r"`completion` is a date \(2024-05-01\)"),
        ([{"a": 1}] * 2, "`completion` is an object"),
        ([b"a"] * 2, "`completion` is bytes"),
    ],
)
def test_cells_of_another_type(values: list[Any], reason: str, tmp_path: Path) -> None:
    rows = Dataset.from_list([{"question": "a", "answer": value} for value in values])
    columns = ["prompt=question", "completion=answer"]
    with pytest.raises(ValueError, match=reason.replace("completion", "answer")):
        make_trainer(tmp_path, rows, rows, columns=columns)


def test_conversations_as_json_text_say_how_to_parse_them(tmp_path: Path) -> None:
    rows = Dataset.from_list([{"messages": json.dumps(GOOD["messages"])}] * 2)
    with pytest.raises(ValueError, match=r"JSON as text.*json\.loads"):
        make_trainer(tmp_path, rows, rows)
    rows = Dataset.from_list([{"messages": str(GOOD["messages"])}] * 2)
    with pytest.raises(ValueError, match=r"list of Python's as text.*ast\.literal_eval"):
        make_trainer(tmp_path, rows, rows)


def test_rows_seen_through_a_transform_are_refused(tmp_path: Path) -> None:
    rows = Dataset.from_list([PLAIN] * 2)
    seen = rows.with_transform(lambda batch: {name: [text.upper() for text in batch[name]] for name in PLAIN})
    for sets in ((seen, rows), (rows, seen)):
        with pytest.raises(ValueError, match=r"(pool|validation set) is seen through a transform .*\.map"):
            make_trainer(tmp_path, *sets)
    # Whatever else a format does, it changes no row.
    make_trainer(tmp_path, rows.with_format("numpy"), rows.with_format(None, columns=["prompt"]))


def test_a_template_without_marks_says_what_to_do(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    rows = Dataset.from_list([GOOD])
    with pytest.raises(ValueError, match=r"marks what the assistant says.*generation.*chat_template_path"):
        make_trainer(tmp_path, rows, rows, tokenizer=tokenizer, assistant_only_loss=True)


def test_the_first_five_are_named_and_all_counted(tmp_path: Path) -> None:
    rows = Dataset.from_list([PLAIN | {"completion": None if number % 2 else "a"} for number in range(20)])  # type: ignore
    with pytest.raises(ValueError, match=r"10 of 20 rows of the pool:(\n  - row \d: .*){5}\n  … and 5 more"):
        make_trainer(tmp_path, rows, rows)


def test_mixed_kinds_in_one_set(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [PLAIN, {"prompt": [ASKED], "completion": [ANSWERED]}, PLAIN]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    pool = load_rows(str(path))
    with pytest.raises(ValueError, match="row 1: `prompt` is a conversation, while the rows before it are plain text"):
        make_trainer(tmp_path, pool, pool.select([0]), tokenizer=tokenizer)


def test_rows_without_a_label_are_null(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No assistant turn, and one that the mask leaves nothing of: TRL refuses either."""
    tokenizer = make_tokenizer()
    # The end of the turn is no part of the mask, so that an empty answer has no label.
    tokenizer.chat_template = CHAT_TEMPLATE.replace("</s>{% endgeneration %}", "{% endgeneration %}</s>")
    rows = [GOOD, {"messages": [ASKED]}, GOOD, {"messages": [ASKED, ANSWERED | {"content": ""}]}]
    pool = Dataset.from_list(rows)
    # TRL's own check of a template asks for the end of the turn; what is tested are the rows.
    options: dict[str, Any] = {"assistant_only_loss": True}
    preparation = Preparation(tokenizer, assistant_only_loss=True)
    assert check_rows(pool, preparation, "pool").without_label == [1, 3]
    tokenizer.chat_template = CHAT_TEMPLATE
    pool = pool.select([0, 1, 2])
    trainer = make_trainer(tmp_path, pool, pool.select([0]), tokenizer=tokenizer, **options)
    with caplog.at_level(logging.WARNING, logger="hf_in2core"):
        scored = trainer.score_influence()
        assert [value is None for value in scored["influence"]] == [False, True, False]
        assert scored["num_loss_tokens"][:][1] == 0
        mapped = pool.map(trainer.fit_influence(), batched=True, batch_size=1)
        pool.map(trainer.fit_influence(), batched=True, batch_size=2)
    assert np.isnan(mapped["influence"]).tolist() == [False, True, False]
    warned = [record.getMessage() for record in caplog.records if "gets no influence" in record.getMessage()]
    assert len(warned) == 1 and "Row 0 of a batch of 1" in warned[0] and "no token of it carries loss" in warned[0]


def test_no_row_with_a_label_is_refused(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    pool = Dataset.from_list([{"messages": [ASKED]}] * 3)
    with pytest.raises(ValueError, match="No row of the pool .3 rows. can carry a loss token"):
        make_trainer(tmp_path, pool, pool, tokenizer=tokenizer, assistant_only_loss=True)


def check(rows: list[dict[str, Any]], what: str, preparation: Preparation):
    return check_rows(Dataset.from_list(rows), preparation, what)


def test_sets_are_masked_alike() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    split = {"prompt": [ASKED], "completion": [ANSWERED]}
    everything = Preparation(tokenizer)
    pool = check([GOOD], "pool", everything)
    (said,) = compare_masks(pool, [check([split], "test set", everything)], is_chosen=False)
    assert "every token of the test set" in said and "its prompts included" in said
    assert compare_masks(pool, [check([split], "test set", everything)], is_chosen=True) == []
    completions = Preparation(tokenizer, completion_only_loss=True)
    with pytest.raises(ValueError, match=r"on completions in the pool .*on every token in the validation set"):
        compare_masks(check([split], "pool", completions), [check([GOOD], "validation set", completions)], False)
    assistants = Preparation(tokenizer, assistant_only_loss=True)
    assert compare_masks(check([GOOD], "pool", assistants), [check([split], "test set", assistants)], True) == []
    with pytest.raises(ValueError, match="on assistant turns in the pool .*on every token in the test set"):
        compare_masks(check([GOOD], "pool", assistants), [check([PLAIN], "test set", assistants)], False)
    (said,) = compare_masks(check([TOKENS], "pool", everything), [check([GOOD], "test set", everything)], False)
    assert "its own labels in the pool, every token in the test set" in said
    assert "--completion_only_loss" not in said
    (said,) = compare_masks(check([TOKENS], "pool", everything), [check([PLAIN], "test set", everything)], False)
    assert "With `--completion_only_loss true` it is on their completions" in said


def test_columns_that_are_not_trained_on_are_not_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    notes: list[Any] = [None, 1, "a", {"b": [1, "c"]}, [], [[1], "d"]]
    path.write_text("".join(json.dumps(PLAIN | {"note": note}) + "\n" for note in notes))
    pool = load_rows(str(path))
    trainer = make_trainer(tmp_path, pool, pool.select([0]))
    scored, mapped = trainer.score_influence(), pool.map(trainer.fit_influence(), batched=True, batch_size=4)
    assert scored["note"] == mapped["note"] == notes
    np.testing.assert_allclose(mapped["influence"], scored["influence"], rtol=1e-9)


def test_half_characters_and_damaged_pictures_in_a_stream(tmp_path: Path) -> None:
    pool = Dataset.from_list([PLAIN] * 3)
    scorer = make_trainer(tmp_path, pool, pool).fit_influence()
    batch: dict[str, list] = {
        "prompt": ["the", "cat \ud800", "a"],
        "completion": [" sat"] * 3,
        "photo": [b"no picture"] * 3,
    }
    assert np.isnan(scorer(batch)["influence"]).tolist() == [False, True, False]


GUIDE = (ROOT / "docs" / "your_rows.md").read_text(encoding="utf-8")
ALTERNATE = TEMPLATE.replace("the user begins", "Conversation roles must alternate")


@pytest.mark.parametrize(("row", "said"), re.findall(r"^\| `(\{.*\})` \| (`.*) \|$", GUIDE, flags=re.MULTILINE))
def test_the_guide_says_what_is_said(row: str, said: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = ALTERNATE
    with pytest.raises(RowError) as raised:
        check_row(json.loads(row), Preparation(tokenizer))
    assert str(raised.value).startswith(said)


def test_the_guide_has_a_table() -> None:
    assert GUIDE.count("\n| `{") >= 15
