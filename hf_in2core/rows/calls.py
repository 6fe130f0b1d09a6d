"""Tool calls that are written as text in a row, and whether a chat template can write them."""

import json
from collections.abc import Mapping
from functools import cache
from typing import Any


@cache
def writes_calls(template: str, together: int = 1, with_tools: bool = False) -> bool:
    """
    Whether a chat template writes the names and the arguments of tool calls, by what it makes of some.

    That it names `tool_calls` does not say so: DeepSeek's templates refuse arguments that are objects, or leave out
    calls beside a content, and Llama 3's refuse two calls at once.

    Args:
        template (`str`): The template; empty where there is none.
        together (`int`): How many calls the assistant makes at once.
        with_tools (`bool`): Whether the row has tools.
    """
    if "tool_calls" not in template:
        return False
    from transformers.utils.chat_template_utils import render_jinja_template  # takes seconds

    names = [f"look_for_{number}" for number in range(together)]
    arguments = {name: {f"key_{name}": f"value_{name}"} for name in names}
    calls = [{"type": "function", "function": {"name": name, "arguments": arguments[name]}} for name in names]
    function = {"name": "known", "description": "It looks.", "parameters": {"type": "object", "properties": {}}}
    call: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": calls}
    settings: dict[str, Any] = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "")
    settings["tools"] = [{"type": "function", "function": function}] if with_tools else None
    turns = [{"role": "user", "content": "Look."}, call]
    try:
        rendered = str(render_jinja_template(conversations=[turns], chat_template=template, **settings))
    except Exception:  # a template may raise anything
        return False
    # A key holds its name, so that this is a name beside its arguments.
    return all(f"key_{name}" in rendered and rendered.count(name) >= 3 for name in names)


def read_calls(text: str) -> list[dict[str, Any]]:
    """The calls that a text is, one or a list of them; none where it is anything else."""
    try:
        found = json.loads(text)
    except ValueError:
        return []
    calls = found if isinstance(found, list) else [found]
    if not all(isinstance(call, Mapping) and isinstance(call.get("name"), str) for call in calls):
        return []
    return [
        {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}
        for call in calls
    ]
