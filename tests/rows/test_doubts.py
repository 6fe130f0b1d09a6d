"""What SFT would train on, or leave out, without a word: it is told, and what is told is so."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from helpers import CHAT_TEMPLATE, make_tokenizer, make_trainer
from tokenizers.processors import TemplateProcessing

from hf_in2core.rows.checks import check_rows
from hf_in2core.rows.doubts import say_doubts
from hf_in2core.rows.preparation import Preparation, prepare_batch


# Reads tools, calls, reasoning and parts, unlike the helpers' own.
READS_ALL = (
    "{% for tool in tools or [] %}<{{ tool.function.name }}>{% endfor %}"
    "{% for m in messages %}<|{{ m.role }}|>{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for part in m.content or [] %}{{ part.text }}{% endfor %}{% endif %}{{ m.reasoning_content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}"
    "</s>{% endfor %}"
)
# Leaves out calls, tools, reasoning, parts, and every role but two.
READS_LITTLE = (
    "{% for m in messages %}{% if m.role in ['user', 'assistant'] %}<|{{ m.role }}|>"
    "{% if m.content is string %}{{ m.content }}{% endif %}</s>{% endif %}{% endfor %}"
)
TOOL = {"type": "function", "function": {"name": "look", "description": "d", "parameters": {}}}


def ask(content: Any = "the cat sat", role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": content}


def answer(content: Any = "on a mat", **others: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **others}


def call(arguments: Any) -> dict[str, Any]:
    return answer("", tool_calls=[{"type": "function", "function": {"name": "look", "arguments": arguments}}])


def tell(rows: list[dict[str, Any]], template: str = CHAT_TEMPLATE, **settings: Any) -> list[str]:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    dataset = Dataset.from_list(rows, on_mixed_types="use_json")
    checked = check_rows(dataset, Preparation(tokenizer, **settings), "pool")
    assert not checked.bad
    return say_doubts(checked)


@pytest.mark.parametrize(
    "mark", [{"weight": 0}, {"train": False}, {"training": False}, {"loss": False}, {"masked": True}]
)
@pytest.mark.parametrize("preset", [None, "sharegpt", "openai"])
def test_turns_that_are_marked_as_not_trained_on(mark: dict[str, Any], preset: str | None) -> None:
    """OpenAI's, Axolotl's, ms-swift's and torchtune's marks: read by one preset, told of where they are not."""
    opposite = {key: not value for key, value in mark.items()}
    turns = [ask(), answer("red", **mark), ask(), answer("blue", **opposite)]
    rows = [{"messages": turns}] * 2
    if preset == "sharegpt":
        speakers = {"user": "human", "assistant": "gpt"}
        rows = [
            {"conversations": [turn | {"from": speakers[turn["role"]], "value": turn["content"]} for turn in turns]}
        ]
        rows = [
            {
                "conversations": [
                    {k: v for k, v in turn.items() if k not in ("role", "content")}
                    for turn in rows[0]["conversations"]
                ]
            }
        ] * 2
    columns = [preset] if preset else None
    settings: dict[str, Any] = {"columns": columns, "assistant_only_loss": True, "completion_only_loss": True}
    (key,) = mark
    said = tell(rows, **settings)
    if preset != "openai":
        assert len(said) == 1 and f"2 assistant turns of the pool have `{key}`" in said[0] and "carry loss" in said[0]
        return
    assert said == []
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    (row,), _ = prepare_batch({"messages": [turns]}, Preparation(tokenizer, **settings))
    assert tokenizer.decode([token for token in row["labels"] if token != -100]) == "blue</s>"


def test_marks_of_a_prompt_are_no_doubt() -> None:
    marked = {"prompt": [ask(), answer("red", weight=0), ask()], "completion": [answer("blue", weight=1)]}
    assert tell([marked], completion_only_loss=True) == []
    (said,) = tell([marked], completion_only_loss=False)
    assert "1 assistant turns of the pool have `weight` 0" in said


def test_turns_of_others_in_completions() -> None:
    rows = [{"messages": [ask(), answer(), ask("and a"), answer("wall")]}] * 3
    (said,) = tell(rows, columns=["openai"], completion_only_loss=True)
    assert "3 turns in the completions of the pool are not the assistant's" in said and "--assistant_only_loss" in said
    assert tell(rows, columns=["openai"], completion_only_loss=True, assistant_only_loss=True) == []
    assert tell(rows) == []


def test_answers_that_are_missing_empty_or_bad() -> None:
    (said,) = tell([{"messages": [ask()]}, {"messages": [ask(), answer()]}])
    assert "1 conversations of the pool have no assistant turn" in said
    (said,) = tell(
        [{"prompt": "a", "completion": " "}, {"prompt": "a", "completion": " b"}], completion_only_loss=True
    )
    assert "1 rows of the pool have nothing to learn but the end" in said
    (said,) = tell([{"prompt": [ask()], "completion": [answer("")]}], completion_only_loss=True)
    assert "1 rows of the pool have nothing to learn but the end" in said
    (said,) = tell([{"prompt": "a", "completion": "b", "label": number > 0} for number in range(3)])
    assert "1 rows of the pool have a `label` that is false" in said
    assert tell([{"text": "a", "label": 0}]) == []


def test_texts_that_begin_twice() -> None:
    tokenizer = make_tokenizer()
    texts = [{"text": "<s>the cat"}, {"text": "the cat"}]
    assert say_doubts(check_rows(Dataset.from_list(texts), Preparation(tokenizer), "pool")) == []
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    for rows in (texts, [{"prompt": row["text"], "completion": " sat"} for row in texts]):
        (said,) = say_doubts(check_rows(Dataset.from_list(rows), Preparation(tokenizer), "pool"))
        assert "1 texts of the pool begin with the token" in said


@pytest.mark.parametrize("row", [{"prompt": "a", "completion": "b"}, {"messages": [ask(), answer()]}])
def test_columns_that_say_something_and_are_not_read(row: dict[str, Any]) -> None:
    used = {"system": "Be kind.", "history": [["a", "b"]], "note": "x"}
    said = tell([row | used, row | {"system": "", "history": []}])
    assert [text.split("`")[1] for text in said] == ["system", "history"]
    assert tell([row | {"system": " ", "history": [], "functions": None}]) == []
    names = {name: name for name in row}
    assert tell([row | used], columns=[f"{new}={old}" for new, old in names.items()]) == []


def test_roles_that_answer_by_another_name() -> None:
    template = CHAT_TEMPLATE + "{% if 'model' %}{% endif %}"
    assert tell([{"messages": [ask(), ask("on a mat", "model")]}], template) == []


LEFT_OUT: dict[str, dict[str, Any]] = {
    "`tool_calls`": {"messages": [ask(), call({"a": 1}), ask("ok"), answer()]},
    "`tools`": {"messages": [ask(), answer()], "tools": [TOOL]},
    "`reasoning_content`": {"messages": [ask(), answer(reasoning_content="hm")]},
    "turns of the role `developer`": {"messages": [ask("be kind", "developer"), ask(), answer()]},
    "in contents that are lists parts of the type `text`": {
        "messages": [ask([{"type": "text", "text": "red"}]), answer()],
    },
}


@pytest.mark.parametrize("what", LEFT_OUT)
def test_what_the_chat_template_leaves_out(what: str) -> None:
    row = LEFT_OUT[what]
    said = [text for text in tell([row] * 30, READS_LITTLE) if "leaves out" in text]
    assert len(said) == 1 and f"leaves out {what}, which 30 rows of the pool have" in said[0]
    assert tell([row] * 2, READS_ALL) == []
    if what == "`tools`":
        assert tell([row | {"tools": "[]"}], READS_LITTLE) == []
    # A template that reads it now and then, as thoughts of the last turn alone, reads it.
    late = READS_LITTLE + "{% if messages[0].content == 'now' %}{{ messages }}{{ tools }}{% endif %}"
    shown = json.loads(json.dumps(row).replace("the cat sat", "now"))
    shown["messages"][0] = shown["messages"][0] | {"content": "now"} if what[0] == "`" else shown["messages"][0]
    assert (tell([row, shown], late) == []) == (what[0] == "`")


def test_parts_of_a_type_that_the_template_does_not_know() -> None:
    """Such as OpenAI's `input_text` and `refusal`, Anthropic's `tool_use`."""
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}"
        "{% endif %}{% endfor %}</s>{% endfor %}"
    )
    rows = [
        {"messages": [ask([{"type": kind, "text": "red"}]), answer([{"type": "text", "text": "b"}])]}
        for kind in ("text", "input_text")
    ]
    (said,) = tell(rows, template)
    assert "leaves out in contents that are lists parts of the type `input_text`, which 1 rows" in said


def test_parts_that_are_written_as_code() -> None:
    rows = [{"messages": [ask([{"type": "text", "text": "red"}]), answer()]}, {"messages": [ask(), answer()]}]
    (said,) = tell(rows, CHAT_TEMPLATE)
    assert "The contents of 1 rows of the pool are lists of parts, which the chat template writes as code" in said


def test_arguments_of_calls_that_are_json_as_text() -> None:
    rows = [{"messages": [ask(), call('{"city": "a"}'), ask("ok"), answer()]}]
    (said,) = tell(rows, READS_ALL)
    assert "arguments that are JSON as text" in said and "--columns openai" in said
    preparation: dict[str, Any] = {"columns": ["openai"], "completion_only_loss": True, "assistant_only_loss": False}
    assert not [text for text in tell(rows, READS_ALL, **preparation) if "JSON" in text]
    tokenizer = make_tokenizer()
    tokenizer.chat_template = READS_ALL
    for given in ([row["messages"] for row in rows], [[ask(), call(""), ask("ok"), answer()]]):
        (row,), _ = prepare_batch({"messages": given}, Preparation(tokenizer, **preparation))
        text = tokenizer.decode(row["input_ids"])
        assert ('look{"city": "a"}' in text) or ("look{}" in text)


@pytest.mark.parametrize(
    ("row", "column", "reason"),
    [
        ({"messages": [ask(), call("{a")]}, "messages", r"arguments of a tool call in turn 1 that are no JSON"),
        ({"messages": [ask(), answer(None, function_call={"name": "f"})]}, "messages", "`function_call` in turn 1"),
        ({"messages": [ask(), answer()], "functions": [{"name": "f"}]}, "functions", "older form of `tools`"),
    ],
)
def test_older_and_broken_calls_are_refused(row: dict[str, Any], column: str, reason: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = READS_ALL
    rows = Dataset.from_list([row])
    with pytest.raises(ValueError, match=rf"row 0: `{column}` .*{reason}"):
        make_trainer(tmp_path, rows, rows, tokenizer=tokenizer, columns=["openai"])


def test_a_run_tells_of_pool_and_validation_set(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    pool = Dataset.from_list(
        [{"messages": [ask(f"the cat {n}", "user"), answer(f"a {n}", train=False)]} for n in range(4)]
    )
    make_trainer(tmp_path, pool, Dataset.from_list([{"messages": [ask("red")]}]), tokenizer=tokenizer)
    assert "4 assistant turns of the pool have `train` false" in caplog.text
    assert "1 conversations of the validation set have no assistant turn" in caplog.text
