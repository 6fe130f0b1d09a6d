"""Rows as plain text: every format of TRL, every spelling of a conversation, and values of any type."""

import datetime
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_in2core.rows.text import CUT, render_line, render_row, render_value


TURNS = [{"role": "user", "content": "two and two?"}, {"role": "assistant", "content": "four"}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": "zwölf"}}}


class Spell:
    """A tokenizer that spells."""

    def decode(self, input_ids: list[int]) -> str:
        return "".join(map(chr, input_ids))


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"text": "all of it"}, "all of it"),
        ({"prompt": "two and two?", "completion": " four"}, "two and two? four"),
        ({"messages": TURNS}, "user: two and two?\n\nassistant: four"),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, "user: two and two?\n\nassistant: four"),
        (
            {"conversations": [{"from": "human", "value": "two and two?"}, {"from": "gpt", "value": "four"}]},
            "human: two and two?\n\ngpt: four",
        ),
        ({"instruction": "Add.", "input": None, "output": "four"}, "instruction: Add.\n\noutput: four"),
        ({"id": 7, "completion": " four", "prompt": "two?", "wrong": True}, "two? four\n\nid: 7\n\nwrong: true"),
        ({}, ""),
    ],
)
def test_every_format(row: dict[str, Any], text: str) -> None:
    assert render_row(row, 100) == text


def test_tokens_are_decoded_where_there_is_a_tokenizer() -> None:
    row = {"input_ids": [97, 98], "labels": [-100, 98], "task": "spell"}
    assert render_row(row, 100, Spell()) == "ab\n\ntask: spell"
    assert render_row(row, 100) == "input_ids: [97, 98]\n\nlabels: [-100, 98]\n\ntask: spell"


def test_parts_of_a_content_and_calls_of_tools() -> None:
    parts = [{"type": "text", "text": "what is this?"}, {"type": "image", "text": None}]
    turns = [
        {"role": "user", "content": parts, "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "name": "add", "content": {"sum": 14}},
    ]
    user, assistant, tool = render_value(turns, 500).split("\n\n")
    assert user == "user: what is this?\n<image>"
    assert json.loads(assistant.removeprefix("assistant: ")) == [CALL] and "zwölf" in assistant
    assert tool == 'tool: {"sum": 14}'


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (b"\xff\xfe broken", "\N{REPLACEMENT CHARACTER}" * 2 + " broken"),
        ([{"role": "user"}, {"role": "user", "content": "x"}], '[{"role": "user"}, {"role": "user", "content": "x"}]'),
        ([], "[]"),
        (1.5, "1.5"),
        ({"blob": b"\x00", "when": datetime.date(2026, 1, 1)}, '{"blob": "<bytes>", "when": "<date>"}'),
    ],
)
def test_values_of_any_type(value: Any, text: str) -> None:
    assert render_value(value, 100) == text


def test_long_texts_are_cut_and_it_is_said() -> None:
    assert render_value("x" * 10, 10) == "x" * 10 and render_value("x" * 11, 10) == "x" * 10 + CUT
    # No character is lost to the limit in bytes.
    assert render_value("é".encode() * 50, 10) == "é" * 10 + CUT
    assert render_row({"prompt": "x" * 50, "completion": "y"}, 10) == "x" * 10 + CUT
    assert render_line("\n".join(["ab"] * 4), 11) == "ab ab ab ab" and render_line("x" * 12, 11) == "x" * 11 + CUT
    assert render_line(" " * 100 + "late", 11) == CUT


@given(st.text(max_size=50))
def test_a_line_steers_nothing(text: str) -> None:
    line = render_line(text, 20)
    assert all(c.isprintable() for c in line) and len(line) <= 21 and "  " not in line


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text() | st.binary(), st.lists, max_leaves=8))
def test_nothing_fails(value: Any) -> None:
    assert len(render_row({"messages": value, "other": value}, 60)) <= 61
