"""Rows of known formats: what each cell means, and what is no text refused by row."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from helpers import CHAT_TEMPLATE, make_tokenizer, make_trainer

from hf_in2core.rows.checks import check_rows
from hf_in2core.rows.columns import apply_columns, check_columns, check_sources, map_row
from hf_in2core.rows.doubts import say_doubts
from hf_in2core.rows.hashes import hash_rows, hash_set, hash_value
from hf_in2core.rows.preparation import Preparation, prepare_batch
from hf_in2core.rows.presets import ALPACA_WITH_INPUT, ALPACA_WITHOUT_INPUT
from hf_in2core.rows.sources import load_rows


def make_chat_tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def map_all(rows: list[dict[str, Any]], preset: str, tokenizer: Any = None) -> list[dict[str, Any]]:
    """Mapped rows, from a dataset and from a stream, which have to be the same."""
    tokenizer = tokenizer or make_chat_tokenizer()
    mapped = list(apply_columns(Dataset.from_list(rows), [preset], tokenizer))
    stream = IterableDataset.from_generator(lambda: iter(Dataset.from_list(rows)))
    assert list(apply_columns(stream, [preset], tokenizer)) == mapped
    return mapped


@pytest.mark.parametrize("context", [None, "", "  "])
def test_alpaca_without_an_input(context: str | None) -> None:
    rows = [{"instruction": "do", "input": text, "output": answer} for text, answer in ((context, "done"), ("it", ""))]
    first, second = map_all(rows, "alpaca", make_tokenizer())
    assert first == {"prompt": ALPACA_WITHOUT_INPUT.format(instruction="do"), "completion": "done"}
    assert second == {"prompt": ALPACA_WITH_INPUT.format(instruction="do", input="it"), "completion": ""}
    first, second = map_all(rows, "alpaca")
    assert first["prompt"] == [{"role": "user", "content": "do"}]
    assert second["prompt"] == [{"role": "user", "content": "do\n\nit"}]


def test_alpaca_with_system_history_and_tools() -> None:
    row = {
        "instruction": "and now?",
        "output": "done",
        "system": "Be kind.",
        "history": [["a?", "b"]],
        "tools": json.dumps([{"name": "look"}]),
    }
    (mapped,) = map_all([row], "alpaca")
    assert [(turn["role"], turn["content"]) for turn in mapped["prompt"]] == [
        ("system", "Be kind."),
        ("user", "a?"),
        ("assistant", "b"),
        ("user", "and now?"),
    ]
    assert mapped["completion"] == [{"role": "assistant", "content": "done"}] and mapped["tools"] == row["tools"]
    with pytest.raises(ValueError, match="`history` needs a tokenizer with a chat template"):
        map_all([row], "alpaca", make_tokenizer())
    assert map_all([row | {"history": [], "tools": "[]"}], "alpaca", make_tokenizer())
    plain = {"instruction": "do", "output": "done", "system": "Be kind."}
    assert map_all([plain], "alpaca", make_tokenizer())[0]["prompt"].startswith("Be kind.\n\nBelow is")


def test_sharegpt_speakers_system_and_tools() -> None:
    rows = [
        {
            "system": "One word.",
            "tools": "",
            "conversations": [
                {"from": "human", "value": "a?"},
                {"from": "function_call", "value": '{"name": "look"}'},
                {"from": "observation", "value": "b"},
                {"from": "gpt", "value": "b"},
            ],
        },
        {
            "system": None,
            "tools": "[]",
            "conversations": [{"from": "user", "value": "c"}, {"from": "assistant", "value": "d"}],
        },
    ]
    first, second = map_all(rows, "sharegpt")  # type: ignore
    assert [turn["role"] for turn in first["messages"]] == ["system", "user", "assistant", "tool", "assistant"]
    assert first["messages"][0]["content"] == "One word." and first["tools"] is None
    assert [turn["role"] for turn in second["messages"]] == ["user", "assistant"] and second["tools"] == "[]"
    spelled = [{"conversations": [{"role": "user", "content": "c"}, {"role": "gpt", "content": "d"}]}]
    assert map_all(spelled, "sharegpt")[0]["messages"] == second["messages"]
    own = [{"system": "x", "conversations": [{"from": "system", "value": "y"}, *rows[1]["conversations"]]}]  # type: ignore
    assert map_all(own, "sharegpt")[0]["messages"][0]["content"] == "y"


@pytest.mark.parametrize("many", [False, True])
def test_sharegpt_calls_are_written_as_the_template_writes_them(many: bool) -> None:
    """As in LLaMA-Factory; where a template knows no calls they are the assistant's text, and so is what is none."""
    call = {"name": "look", "arguments": {"at": "it"}}
    row = {
        "conversations": [
            {"from": "human", "value": "a?"},
            {"from": "function_call", "value": json.dumps([call, call] if many else call)},
            {"from": "observation", "value": "b"},
            {"from": "function_call", "value": "no call"},
        ]
    }
    tokenizer = make_chat_tokenizer()
    text = map_all([row], "sharegpt", tokenizer)[0]["messages"]
    assert text[1] == {"role": "assistant", "content": row["conversations"][1]["value"]}
    tokenizer.chat_template += "{{ messages[1].tool_calls }}"
    asked, called, seen, said = map_all([row], "sharegpt", tokenizer)[0]["messages"]
    assert [turn["function"] for turn in called["tool_calls"]] == [call] * (2 if many else 1)
    assert called["role"] == "assistant" and not called["content"] and "tool_calls" not in asked | seen | said
    assert said == {"role": "assistant", "content": "no call"}


WRITES_CALLS = (
    "{% for m in messages %}{{ m.content }}{% for call in m.tool_calls or [] %}"
    "{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}{% endfor %}"
)


CANNOT: dict[str, tuple[tuple[str, str], list[bool]]] = {
    "it can": (("", ""), [True, True]),
    "adds arguments to text, as DeepSeek-V3": (
        ("call.function.arguments | tojson", "'' + call.function.arguments"),
        [False] * 2,
    ),
    "leaves out calls beside a content that is text, as DeepSeek-R1": (
        ("m.tool_calls or []", "(m.tool_calls if m.content is none else [])"),
        [False] * 2,
    ),
    "refuses two at once, as Llama 3.1": (
        ("call.function.name", "raise_exception('one') if m.tool_calls | length > 1 else call.function.name"),
        [True, False],
    ),
    "where there are tools": (("m.tool_calls or []", "(m.tool_calls if tools else [])"), [False] * 2),
}


@pytest.mark.parametrize("which", CANNOT)
def test_calls_that_a_template_cannot_write_stay_text(which: str) -> None:
    change, known = CANNOT[which]
    tokenizer = make_tokenizer()
    tokenizer.chat_template = WRITES_CALLS.replace(*change)
    call = {"name": "look", "arguments": {"at": "it"}}
    for calls, is_call in zip((call, [call, call]), known, strict=True):
        turns = [{"from": "human", "value": "a?"}, {"from": "function_call", "value": json.dumps(calls)}]
        rows = [{"conversations": turns}]
        _, turn = map_all(rows, "sharegpt", tokenizer)[0]["messages"]
        assert ("tool_calls" in turn) == (turn["content"] == "") == is_call
        checked = check_rows(Dataset.from_list(rows), Preparation(tokenizer, ["sharegpt"]), "pool")
        assert not checked.bad and not [said for said in say_doubts(checked) if "leaves out" in said]
        if which == "where there are tools":
            tools = json.dumps([{"type": "function", "function": {"name": "look"}}])
            assert "tool_calls" in map_all([rows[0] | {"tools": tools}], "sharegpt", tokenizer)[0]["messages"][1]


def test_rows_that_are_read_otherwise_than_before_are_other_rows() -> None:
    """What version 0.2.0 computed of them is of other tokens; all other rows keep their identity."""
    call = {"type": "function", "function": {"name": "look", "arguments": '{"at": "it"}'}}
    spoken = [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}]
    called = [spoken[0], {"from": "function_call", "value": '{"name": "look", "arguments": {}}'}]
    asked = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]
    again = [*asked, *asked]
    sets: list[tuple[str, dict[str, Any], bool]] = [
        ("sharegpt", {"conversations": spoken}, False),
        ("sharegpt", {"conversations": called}, True),
        ("openai", {"messages": asked}, False),
        ("openai", {"messages": make_turns(0, 1)}, False),
        ("openai", {"messages": [asked[0], asked[1] | {"train": True}]}, False),
        ("openai", {"messages": [asked[0], asked[1] | {"train": False}, *asked]}, True),
        ("openai", {"messages": [*again[:3], asked[1] | {"masked": True}]}, False),
        ("openai", {"messages": [asked[0], {"role": "assistant", "content": None, "tool_calls": [call]}]}, True),
    ]
    for preset, row, is_new in sets:
        rows = Dataset.from_list([row])
        before = hash_value(hash_rows(rows))
        assert hash_set(rows, None if preset == "sharegpt" else [preset], []) == before
        assert (hash_set(rows, [preset], [WRITES_CALLS]) != before) == is_new
        assert (hash_set(rows, ["alpaca", "or", preset], [WRITES_CALLS]) != before) == is_new
        # A template that writes no calls reads them as text, as before.
        assert (hash_set(rows, [preset], [CHAT_TEMPLATE]) != before) == (is_new and preset == "openai")


def make_turns(*weights: int | None) -> list[dict[str, Any]]:
    turns = []
    for number, weight in enumerate(weights):
        turns += [{"role": "user", "content": f"a{number}", "weight": None}]
        turns += [{"role": "assistant", "content": f"b{number}", "weight": weight}]  # type: ignore
    return turns


@pytest.mark.parametrize(
    ("weights", "trained", "left"),
    [
        ([None], ["b0"], 0),
        ([1], ["b0"], 0),
        ([0, 1], ["b1"], 0),
        ([0, 0, 1], ["b2"], 0),
        ([1, 1], ["b0", "b1"], 0),
        ([0, 1, 1], ["b1", "b2"], 0),
        ([1, 0, 1], ["b0", "b1", "b2"], 1),
        ([0, 0], [], 0),
    ],
)
def test_openai_turns_of_no_weight_carry_no_loss(weights: list[int | None], trained: list[str], left: int) -> None:
    tokenizer = make_chat_tokenizer()
    rows = [{"messages": make_turns(*weights)}]
    preparation = Preparation(tokenizer, columns=["openai"], completion_only_loss=True, assistant_only_loss=True)
    prepared, refused = prepare_batch({"messages": [rows[0]["messages"]]}, preparation)
    text = ""
    if trained:
        (row,) = prepared
        text = tokenizer.decode([token for token in row["labels"] if token != -100])
    assert text == "".join(f"{answer}</s>" for answer in trained)
    assert refused == ({} if trained else {0: "no token of it carries loss"})
    checked = check_rows(Dataset.from_list(rows), preparation, "pool")
    assert checked.doubts.silent_turns == left and bool(say_doubts(checked)) == bool(left)


def test_a_weight_without_the_preset_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = Dataset.from_list([{"messages": make_turns(0, 1)}, {"messages": make_turns(0, 0)}])
    make_trainer(tmp_path, rows, rows, tokenizer=make_chat_tokenizer())
    assert "3 assistant turns of the pool have `weight` 0, but carry loss" in caplog.text
    assert "--columns openai" in caplog.text


@pytest.mark.parametrize(
    ("preset", "row", "reason"),
    [
        ("alpaca", {"instruction": None, "output": "a"}, "`instruction` is null, not text"),
        ("alpaca", {"instruction": "a", "output": 3}, r"`output` is a number \(3\), not text"),
        ("alpaca", {"instruction": "a", "input": 2.5, "output": "a"}, r"`input` is a number \(2.5\), not text"),
        ("sharegpt", {"conversations": []}, "`conversations` is an empty conversation"),
        ("sharegpt", {"conversations": [{"from": "dog", "value": "a"}]}, "has the speaker 'dog' in turn 0; known: "),
        ("sharegpt", {"conversations": [{"from": "human", "value": None}]}, "has null as the text of turn 0"),
        ("openai", {"messages": [{"role": "assistant", "content": "a"}]}, "`messages` begins with an assistant turn"),
        ("openai", {"messages": [{"role": "user", "content": 3, "weight": 0}]}, r"has a number \(3\) as the content"),
    ],
)
def test_cells_that_are_no_text_are_refused(preset: str, row: dict[str, Any], reason: str, tmp_path: Path) -> None:
    rows = Dataset.from_list([row])
    with pytest.raises(ValueError, match=f"1 of 1 rows of the pool:\n  - row 0: .*{reason}"):
        make_trainer(tmp_path, rows, rows, columns=[preset], tokenizer=make_chat_tokenizer())


def test_extra_keys_of_turns_stay_apart(tmp_path: Path) -> None:
    """A turn among mixed objects gets no key of its neighbours', nor does `conversations` without a preset."""
    path = tmp_path / "rows.jsonl"
    arguments: list[Any] = [{"a": 1}, {"b": "x"}, 3]
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [call]}]}
        for call in arguments
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    mapped = list(apply_columns(load_rows(str(path)), ["openai"], make_chat_tokenizer()))
    assert [row["completion"][0]["tool_calls"][0] for row in mapped] == arguments
    turns = [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b", "name": "x"}]
    (row,) = apply_columns(Dataset.from_list([{"conversations": turns, "x": 1}]), None, make_chat_tokenizer())
    assert row["messages"][1] == {"role": "assistant", "content": "b", "name": "x"}


@pytest.mark.parametrize(
    ("preset", "names", "row"),
    [
        (
            "alpaca",
            {"input": "context", "output": "response"},
            {"instruction": "do", "input": "it", "output": "done", "system": "Be kind."},
        ),
        ("sharegpt", {"conversations": "items"}, {"conversations": [{"from": "human", "value": "a"}], "system": "s"}),
        ("openai", {"messages": "chat"}, {"messages": make_turns(0, 1, 0)}),
    ],
)
def test_a_preset_reads_columns_of_other_names(preset: str, names: dict[str, str], row: dict[str, Any]) -> None:
    """As it reads its own, in a set, in a batch, and in what is counted and named."""
    tokenizer = make_chat_tokenizer()
    renamed = {names.get(name, name): value for name, value in row.items()} | {
        "input" if preset != "alpaca" else "x": 3
    }
    columns = [preset, *(f"{new}={old}" for new, old in names.items())]
    (expected,) = map_all([row], preset, tokenizer)
    rows = Dataset.from_list([renamed])
    assert apply_columns(rows, columns, tokenizer).to_list() == [expected]
    assert list(apply_columns(rows.to_iterable_dataset(), columns, tokenizer)) == [expected]
    settings: dict[str, Any] = {"completion_only_loss": True, "assistant_only_loss": True}
    checked = check_rows(rows, Preparation(tokenizer, columns, **settings), "pool")
    own = check_rows(Dataset.from_list([row]), Preparation(tokenizer, [preset], **settings), "pool")
    assert checked.doubts == own.doubts and checked.hashes == own.hashes
    source = next(iter(names.values()))
    (bad,) = check_rows(Dataset.from_list([renamed | {source: 3}]), Preparation(tokenizer, columns), "pool").bad
    assert bad.column == source
    with pytest.raises(ValueError, match=f"needs the column.s. .*{source}, but"):
        check_rows(Dataset.from_list([row]), Preparation(tokenizer, columns), "pool")
    with pytest.raises(ValueError, match="with a target among .*, system|with a target among messages"):
        check_columns([preset, "completion=x"])


def test_a_column_that_is_read_by_another_name_is_not_read_by_its_own_too() -> None:
    renamed = Dataset.from_list([{"input": "do", "output": "done"}])
    columns = ["alpaca", "instruction=input", "output=output"]
    (expected,) = map_all([{"instruction": "do", "output": "done"}], "alpaca", make_chat_tokenizer())
    assert apply_columns(renamed, columns, make_chat_tokenizer()).to_list() == [expected]
    assert map_row(renamed[0], columns, CHAT_TEMPLATE) == expected


def test_sets_of_different_formats(tokenizer) -> None:
    """Each set is read by the first of several ways that its columns fit, and as it would be by that one alone."""
    both = ["alpaca", "or", "prompt=question", "completion=answer", "or", "trl"]
    sets: dict[tuple[str, ...] | None, dict[str, str]] = {
        ("alpaca",): {"instruction": "the cat", "input": "", "output": " sat"},
        ("prompt=question", "completion=answer"): {"question": "the cat", "answer": " sat", "text": "other"},
        None: {"prompt": "the cat", "completion": " sat", "note": "x"},
    }
    for alone, row in sets.items():
        rows = Dataset.from_list([row] * 3)
        expected = apply_columns(rows, None if alone is None else list(alone), tokenizer)
        assert apply_columns(rows, both, tokenizer).to_list() == expected.to_list()
        assert map_row(row, both, template="") == expected[0]
    with pytest.raises(ValueError, match=r"columns \(q, a\) fit none of `--columns alpaca or .* or trl`"):
        apply_columns(Dataset.from_list([{"q": "a", "a": "b"}]), both, tokenizer)
    with pytest.raises(ValueError, match="Did you mean `sharegpt`"):
        check_columns(["alpaca", "or", "sharegtp"])
    with pytest.raises(ValueError, match="Write for example `--columns openai messages=chat`"):
        check_columns(["openai", "alpac"])
    with pytest.raises(ValueError, match="neither a preset"):
        check_columns(["alpaca", "or"])


@pytest.mark.parametrize(
    ("names", "columns", "remedy"),
    [
        (["prompt", "completion"], ["alpaca"], r"in one of TRL's formats already: .* \(`--columns alpaca or trl`\)"),
        (["prompt", "completion"], ["prompt=promt", "completion=completion"], "Did you mean `prompt` for `promt`"),
        (["q", "a"], ["prompt=question", "completion=answer"], "Name the right columns with `columns`, for example"),
    ],
)
def test_a_mapping_of_other_columns_is_answered_with_what_helps(
    names: list[str], columns: list[str], remedy: str
) -> None:
    with pytest.raises(ValueError, match=remedy):
        check_sources(names, columns)
