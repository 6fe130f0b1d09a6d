"""What counts as the same row, and as nearly the same."""

import random
from typing import Any

import pytest
from datasets import Dataset
from helpers import make_tokenizer

from hf_in2core import InfluenceConfig
from hf_in2core.rows.checks import check_rows
from hf_in2core.rows.overlap import find_near_copies, find_overlap, list_words
from hf_in2core.rows.preparation import Preparation


# Takes contents of any kind.
TEMPLATE = "{% for turn in messages %}{{ turn['role'] }} {{ turn['content'] }}\n{% endfor %}"


def turn(role: str, content: Any, **others: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **others}


def is_same(one: dict[str, Any], other: dict[str, Any], columns: list[str] | None = None) -> bool:
    """Whether a set with one row counts as sharing it with a set with the other."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    found = []
    for row in (one, other):
        rows = Dataset.from_list([row])
        args = InfluenceConfig("unused", bf16=False, columns=columns)
        preparation = Preparation.from_args(args, tokenizer, rows)
        checked = check_rows(rows, preparation, "set")
        assert not checked.bad, checked.bad
        found.append(checked)
    return find_overlap(*found) is not None


PAIR = {"prompt": "The straße is\n long:", "completion": " Oﬃce 1"}
CALL = [{"type": "function", "function": {"name": "look", "arguments": {"what": "cat"}}}]
TALK = [turn("user", "Hi there"), turn("assistant", "Yo")]
PARTS = [said | {"content": [{"type": "text", "text": said["content"]}]} for said in TALK]


@pytest.mark.parametrize(
    "one, other, same",
    [
        (PAIR, {"prompt": "  the STRASSE is long:\t", "completion": "office １", "id": 7}, True),  # noqa: RUF001
        (PAIR, PAIR | {"completion": " Oﬃce 2"}, False),
        (PAIR, PAIR | {"prompt": "The straße is long"}, False),
        ({"prompt": "a b", "completion": "c"}, {"prompt": "a", "completion": "b c"}, False),
        ({"text": "A  b"}, {"text": "a b\n"}, True),
        ({"text": "a b"}, {"text": "ab"}, False),
        ({"messages": TALK}, {"messages": [turn("user", "hi  THERE"), turn("assistant", "yo\n")]}, True),
        ({"messages": TALK}, {"prompt": TALK[:1], "completion": TALK[1:]}, True),
        ({"messages": TALK}, {"messages": PARTS}, True),
        ({"messages": TALK}, {"messages": [turn("system", "Hi there"), TALK[1]]}, False),
        ({"messages": TALK}, {"messages": [turn("user", "Hi there Yo"), turn("assistant", "")]}, False),
        ({"messages": TALK, "tools": [{"name": "look"}]}, {"messages": TALK}, True),
        ({"messages": [TALK[0], turn("assistant", "", tool_calls=CALL)]}, {"messages": TALK[:1]}, False),
        (
            {"messages": [TALK[0], turn("assistant", "", tool_calls=CALL)]},
            {"messages": [TALK[0], turn("assistant", "", tool_calls=[CALL[0] | {"function": {"name": "x"}}])]},
            False,
        ),
        ({"input_ids": [3, 4, 5]}, {"input_ids": [3, 4, 5], "labels": [-100, 4, 5]}, True),
        ({"input_ids": [3, 4, 5]}, {"input_ids": [3, 4, 6]}, False),
    ],
)  # fmt: skip
def test_what_counts_as_the_same(one: dict[str, Any], other: dict[str, Any], same: bool) -> None:
    assert is_same(one, one) and is_same(one, other) == is_same(other, one) == same


def test_rows_are_compared_as_a_preset_reads_them() -> None:
    row = {"instruction": "Add", "input": "1 2", "output": "3"}
    assert is_same(row, row | {"instruction": "ADD ", "source": "x"}, ["alpaca"])
    assert not is_same(row, row | {"input": "1 3"}, ["alpaca"])


def test_counts_and_positions_are_of_the_raw_sets() -> None:
    preparation = Preparation.from_args(
        InfluenceConfig("unused", bf16=False), make_tokenizer(), Dataset.from_list([PAIR])
    )
    rows = [{"prompt": None, "completion": "x"}, *({"prompt": f"p{n}", "completion": "x"} for n in range(4))]
    others = [{"prompt": None, "completion": "x"}, {"prompt": "P3", "completion": "x "}, rows[2]]
    first, second = (
        check_rows(Dataset.from_list(part), preparation, what) for part, what in ((rows, "pool"), (others, "test set"))
    )
    found = find_overlap(first, second)
    assert found is not None and found.rows.tolist() == [2, 4]
    assert str(found) == (
        "2 of 5 rows of the pool are in the test set too (row 2 of the pool is row 2 of the test set)"
    )
    assert find_overlap(first, check_rows(Dataset.from_list(others[:1]), preparation, "test set")) is None


def make_texts(count: int, seed: int, length: int = 30) -> list[list[str]]:
    generator = random.Random(seed)
    return [[f"w{generator.randint(0, 999)}" for _ in range(length)] for _ in range(count)]


def read(texts: list[list[str]]) -> list[list[Any]]:
    return [list_words({"text": " ".join(words)}) for words in texts]


def test_edited_rows_are_near_and_others_are_not() -> None:
    pool, others = make_texts(3000, seed=0), make_texts(40, seed=1)
    edited = [word.upper() + "," for word in pool[2500]]
    edited[10] = "another"
    others[7] = edited
    others[9] = [*pool[1400][:12], *others[9][12:]]  # less than half of it
    others[11] = pool[3][::-1]
    found = find_near_copies(read(pool), len(pool), read(others))
    assert list(found) == [7] and found[7][0] == 2500
    assert find_near_copies(read(pool[:2500]), 2500, read(others)) == {}


def test_a_template_makes_no_copies_and_short_rows_are_left_out() -> None:
    template = "below is an instruction that describes a task write a response that completes the request".split()
    pool = [[*template, *words] for words in make_texts(200, seed=0, length=6)]
    others = [[*template, *words] for words in make_texts(20, seed=1, length=6)]
    assert find_near_copies(read(pool), len(pool), read(others)) == {}
    assert list(find_near_copies(read(pool), len(pool), read([*others, pool[5]]))) == [20]
    assert find_near_copies(read([["yes", "it", "is"]]), 1, read([["yes", "it", "is"]])) == {}
