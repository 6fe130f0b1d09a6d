"""Rows of known formats as the columns that TRL's preparation reads; each a function of the row alone."""

import datetime
import decimal
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from datasets import Features, Json, List, Value

from .calls import read_calls, writes_calls


ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n"
    "### Response:\n"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
# Speakers of ShareGPT's rows, of its own and of the chat templates' spelling.
SPEAKERS = {
    **{"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"},
    **{"chatgpt": "assistant", "model": "assistant", "observation": "tool", "tool": "tool"},
    "function_call": "assistant",
}
# How a turn says that it is not trained on: OpenAI's key, Axolotl's two, ms-swift's and torchtune's.
MARKS = {"weight": False, "train": False, "training": False, "loss": False, "masked": True}
# A turn may say what it has to say in these instead of `content`.
OTHER_CONTENTS = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "refusal")
TURNS = List({"role": Value("string"), "content": Value("string")})


class RowError(ValueError):
    """
    A row that cannot be trained on.

    Attributes:
        column (`str`): Where the reason lies.
        reason (`str`): What is wrong, as the end of a sentence that begins with the column.
    """

    def __init__(self, column: str, reason: str) -> None:
        super().__init__(f"`{column}` {reason}")
        self.column, self.reason = column, reason


def describe_value(value: Any) -> str:
    """What a cell holds, in words."""
    shown = repr(value) if len(repr(value)) <= 40 else repr(value)[:40] + "…"
    kinds: tuple[tuple[Any, str], ...] = (
        (type(None), "null"),
        (bool, f"a truth value ({value})"),
        ((int, float), f"a number ({shown})"),
        ((datetime.date, datetime.time), f"a date ({value})"),
        (str, f"text ({shown})"),
        ((bytes, bytearray), "bytes"),
        (decimal.Decimal, f"a decimal number ({value})"),
        (list, "a list"),
        (Mapping, "an object"),
    )
    return next((words for kind, words in kinds if isinstance(value, kind)), f"a {type(value).__name__}")


def read_text(row: Mapping[str, Any], column: str, optional: bool = False) -> str:
    """
    The text of a cell; of an optional one, null and a missing column are no text.

    Raises:
        RowError: if the cell holds anything else.
    """
    value = row.get(column)
    if isinstance(value, str):
        return value
    if value is None and optional:
        return ""
    raise RowError(column, f"is {describe_value(value)}, not text")


def from_alpaca(row: Mapping[str, Any], template: str) -> dict[str, Any]:
    """
    `instruction`, `input` and `output`, with LLaMA-Factory's `system`, `history` and `tools`.

    Blank and null `input`, `system` and `history` mean that there is none.
    """
    instruction, output = read_text(row, "instruction"), read_text(row, "output")
    context, system = (read_text(row, name, optional=True) for name in ("input", "system"))
    history = row.get("history") or []
    if not isinstance(history, list) or not all(_is_exchange(exchange) for exchange in history):
        raise RowError("history", "is no list of pairs of texts")
    if template:
        turns = [{"role": "system", "content": system}] if system.strip() else []
        for question, answer in history:
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        content = f"{instruction}\n\n{context}" if context.strip() else instruction
        turns.append({"role": "user", "content": content})
        return {"prompt": turns, "completion": [{"role": "assistant", "content": output}], **take_tools(row)}
    if history or read_tools(take_tools(row)):
        raise RowError("history" if history else "tools", "needs a tokenizer with a chat template")
    template = ALPACA_WITH_INPUT if context.strip() else ALPACA_WITHOUT_INPUT
    prompt = template.format(instruction=instruction, input=context)
    return {"prompt": f"{system}\n\n{prompt}" if system.strip() else prompt, "completion": output}


def _is_exchange(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(text, str) for text in value)


def take_tools(row: Mapping[str, Any]) -> dict[str, Any]:
    """The column `tools` where a row has it; blank text means none."""
    if "tools" not in row:
        return {}
    tools = row["tools"]
    return {"tools": None if isinstance(tools, str) and not tools.strip() else tools}


def from_sharegpt(row: Mapping[str, Any], template: str) -> dict[str, Any]:
    """
    `conversations` with `from` and `value` (or `role` and `content`), with LLaMA-Factory's `system` and `tools`.

    What `function_call` says becomes tool calls, which a chat template writes in its own form, as it does in
    LLaMA-Factory; where the template cannot write those of the row, all of them stay the assistant's text.
    """
    messages: list[dict[str, Any]] = []
    calls: dict[int, list[dict[str, Any]]] = {}
    tools = take_tools(row)
    for number, turn in enumerate(read_turns(row, "conversations")):
        speaker = turn.get("from") if turn.get("from") is not None else turn.get("role")
        said = turn.get("value") if turn.get("value") is not None else turn.get("content")
        role = SPEAKERS.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            raise RowError(
                "conversations", f"has the speaker {speaker!r} in turn {number}; known: {', '.join(SPEAKERS)}"
            )
        if not isinstance(said, str):
            raise RowError("conversations", f"has {describe_value(said)} as the text of turn {number}")
        if speaker == "function_call" and (found := read_calls(said)):
            calls[number] = found
        messages.append({"role": role, "content": said})
    together = max(map(len, calls.values()), default=0)
    if together and writes_calls(template, min(together, 2), bool(read_tools(tools))):
        for number, found in calls.items():
            messages[number] = {"role": "assistant", "content": "", "tool_calls": found}
    system = read_text(row, "system", optional=True)
    if system.strip() and not (messages and messages[0]["role"] == "system"):
        messages.insert(0, {"role": "system", "content": system})
    return {"messages": messages, **tools}


def read_turns(row: Mapping[str, Any], column: str) -> list[Mapping[str, Any]]:
    """
    The turns of a conversation; there may be none.

    Raises:
        RowError: if the cell holds anything else than a list of objects.
    """
    turns = row.get(column)
    if isinstance(turns, list):
        for number, turn in enumerate(turns):
            if not isinstance(turn, Mapping):
                raise RowError(column, f"has {describe_value(turn)} as turn {number}, not an object with a role")
        return turns
    if isinstance(turns, str) and turns.lstrip()[:1] in ("[", "{"):
        kind, parser = ("JSON", "json.loads") if _is_json(turns) else ("a list of Python's", "ast.literal_eval")
        raise RowError(
            column,
            f"is {kind} as text, not a list of turns; parse it first: "
            f'`dataset.map(lambda row: {{"{column}": {parser}(row["{column}"])}})`',
        )
    raise RowError(column, f"is {describe_value(turns)}, not a list of turns")


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def from_openai(row: Mapping[str, Any], template: str = "") -> dict[str, Any]:
    """
    `messages` of OpenAI's fine-tuning files: the completion begins with the first assistant turn that is trained on.

    A turn of `weight` 0 (or another of [`MARKS`]) before it carries no loss with the prompt. One after it can only be
    masked with the others of the completion; see [`doubts.Doubts`]. A row in which no turn is trained on has an empty
    completion. Arguments of tool calls, JSON as text in these files, become the objects that chat templates expect.
    """
    if row.get("functions"):
        raise RowError(
            "functions", 'is the older form of `tools`, which is not read; write {"type": "function", "function": …}'
        )
    given = read_turns(row, "messages")
    turns = [_parse_calls(turn, number) for number, turn in enumerate(given)]
    trained = [number for number, turn in enumerate(given) if _is_trained(turn)]
    start = trained[0] if trained else len(turns)
    if start == 0 and turns:
        raise RowError("messages", "begins with an assistant turn that is trained on, so that nothing is its prompt")
    return {"prompt": turns[:start], "completion": turns[start:], **take_tools(row)}


def _parse_calls(turn: Mapping[str, Any], number: int) -> dict[str, Any]:
    """A turn of OpenAI's without its mark, and with the arguments of its calls as objects."""
    if turn.get("function_call"):
        raise RowError(
            "messages", f"has a `function_call` in turn {number}, the older form of `tool_calls`; write those"
        )
    kept = {key: value for key, value in turn.items() if key not in MARKS}
    calls = kept.get("tool_calls")
    if not isinstance(calls, list):
        return kept
    parsed = []
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        if isinstance(function, Mapping) and isinstance(function.get("arguments"), str):
            text = function["arguments"]
            try:
                arguments = json.loads(text) if text.strip() else {}
            except ValueError:
                raise RowError(
                    "messages",
                    f"has arguments of a tool call in turn {number} that are no JSON: {describe_value(text)}",
                ) from None
            call = {**call, "function": {**function, "arguments": arguments}}
        parsed.append(call)
    return {**kept, "tool_calls": parsed}


def from_conversations(row: Mapping[str, Any], template: str = "") -> dict[str, Any]:
    """`conversations` without a preset: the keys `from` and `value` renamed, as TRL does, and no role changed."""
    names = {"from": "role", "value": "content"}
    turns = [{names.get(key, key): value for key, value in turn.items()} for turn in read_turns(row, "conversations")]
    kept = {name: row[name] for name in ("tools", "chat_template_kwargs") if name in row}
    return {"messages": turns, **kept}


def find_silent_mark(turn: Mapping[str, Any]) -> str | None:
    """How a turn says that it is not trained on, in words; `None` where it does not."""
    for key, silent in MARKS.items():
        value = turn.get(key)
        if isinstance(value, bool | int | float) and bool(value) is silent:
            shown = "0" if key == "weight" else str(silent).lower()
            return f"`{key}` {shown}"
    return None


def _is_trained(turn: Mapping[str, Any]) -> bool:
    return turn.get("role") == "assistant" and find_silent_mark(turn) is None


def is_read_anew(row: Mapping[str, Any], mapped: Mapping[str, Any], preset: str | None) -> bool:
    """
    Whether version 0.2.0 read a row otherwise, so that what was computed of it does not belong to what is.

    Args:
        row (`Mapping[str, Any]`): The row, with the names that its preset reads.
        mapped (`Mapping[str, Any]`): What the preset makes of it.
        preset (`str`, *optional*): The preset.
    """
    if preset == "sharegpt":
        return any("tool_calls" in turn for turn in mapped["messages"])
    if preset != "openai":
        return False
    # Then only `weight` was a mark, and arguments stayed text.
    weighed = (_is_trained({name: turn.get(name) for name in ("role", "weight")}) for turn in row["messages"])
    start = next((number for number, is_trained in enumerate(weighed) if is_trained), len(row["messages"]))
    calls = [turn.get("tool_calls") for turn in row["messages"]]
    return start != len(mapped["prompt"]) or calls != [
        turn.get("tool_calls") for turn in mapped["prompt"] + mapped["completion"]
    ]


class Preset(NamedTuple):
    """How a known format is read, by `read(row, template)`: the columns that it needs, and that it may have."""

    read: Callable[[Mapping[str, Any], str], dict[str, Any]]
    needed: tuple[str, ...]
    optional: tuple[str, ...]


PRESETS = {
    "alpaca": Preset(from_alpaca, ("instruction", "output"), ("input", "system", "history", "tools")),
    "sharegpt": Preset(from_sharegpt, ("conversations",), ("system", "tools")),
    "openai": Preset(from_openai, ("messages",), ("tools", "functions")),
}


def describe_mapped(features: Mapping[str, Any], preset: str | None, template: str) -> Features:
    """
    The types of what a preset makes of rows (`None`: of `conversations`), so that none is inferred from some rows.

    An object in a conversation keeps the keys that its column has, and no row gets those of another.
    """
    kept = {name: features[name] for name in ("tools", "chat_template_kwargs") if name in features}
    tools = {name: value for name, value in kept.items() if name == "tools"}
    if preset == "alpaca":
        if not template:
            return Features({"prompt": Value("string"), "completion": Value("string")})
        return Features({"prompt": TURNS, "completion": TURNS, **tools})
    if preset == "sharegpt":
        is_written = any(writes_calls(template, 1, with_tools) for with_tools in (False, True))
        return Features({"messages": List(Json()) if is_written else TURNS, **tools})
    if preset == "openai":
        turns = _describe_turns(features["messages"], lambda key: None if key in MARKS else key)
        if isinstance(turns.feature, Mapping) and "tool_calls" in turns.feature:
            turns = List({**turns.feature, "tool_calls": List(Json())})
        return Features({"prompt": turns, "completion": turns, **tools})
    names = {"from": "role", "value": "content"}
    return Features({"messages": _describe_turns(features["conversations"], lambda key: names.get(key, key)), **kept})


def _describe_turns(feature: Any, rename: Callable[[str], str | None]) -> Any:
    turn = getattr(feature, "feature", None)
    if not isinstance(turn, Mapping):
        return List(Json())
    return List({name: value for key, value in turn.items() if (name := rename(key)) is not None})


def read_tools(row: Mapping[str, Any]) -> list[Any] | None:
    """
    The tools of a row, parsed where they are JSON as text (which TRL parses too).

    Raises:
        RowError: if they are anything else than a list of objects.
    """
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError:
            raise RowError("tools", f"is {describe_value(tools)}, which is no JSON; null means no tools") from None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise RowError("tools", f"is {describe_value(tools)}, not a list of tools; null means no tools")
    return tools
