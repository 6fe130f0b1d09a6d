"""A row as plain text for people, whatever its columns hold; whoever shows it escapes it as its last step."""

import json
from collections.abc import Mapping
from typing import Any


# What is read as one text, in the order in which it is trained on.
TEXT_COLUMNS = ("prompt", "completion", "messages", "conversations", "text")
# What belongs to tokens and says nothing more where they are shown as text.
TOKEN_COLUMNS = ("input_ids", "labels", "attention_mask", "completion_mask", "assistant_masks")
CUT = "\N{HORIZONTAL ELLIPSIS}"


def render_row(row: Mapping[str, Any], limit: int, tokenizer: Any = None) -> str:
    """
    A row as plain text: what it trains on in one of TRL's formats, then its other columns by name.

    Args:
        row (`Mapping[str, Any]`):
            Values by column; a missing one (`None`) is left out.
        limit (`int`):
            Longest text in characters; see [`cut_text`].
        tokenizer (`transformers.PreTrainedTokenizerBase`, *optional*):
            Decodes the `input_ids` of a row that is tokens already.

    Returns:
        `str`: paragraphs.
    """
    if tokenizer is not None and row.get("input_ids") is not None:
        texts, read = [str(tokenizer.decode(row["input_ids"]))], list(TOKEN_COLUMNS)
    else:
        read = [name for name in TEXT_COLUMNS if row.get(name) is not None]
        texts = [render_value(row[name], limit) for name in read]
        if all(isinstance(row[name], str) for name in read):
            texts = ["".join(texts)] if read else []
    others = {name: value for name, value in row.items() if name not in read and value is not None}
    texts += [f"{name}: {render_value(value, limit)}" for name, value in others.items()]
    return cut_text("\n\n".join(texts), limit)


def render_value(value: Any, limit: int) -> str:
    """
    A value of any column as plain text.

    Args:
        value (`Any`):
            A conversation becomes a paragraph for each turn (`role` and `content`, or `from` and `value`; parts of a
            content that are no text by their type, tool calls as JSON); bytes are read as UTF-8 with what is none of
            it replaced; anything else that is no text becomes JSON.
        limit (`int`):
            Longest text in characters; see [`cut_text`].

    Returns:
        `str`
    """
    if isinstance(value, bytes):
        # As many bytes as that many characters may take, and no more of a text of gigabytes.
        value = value[: 4 * (limit + 1)].decode("utf-8", "replace")
    elif isinstance(value, list) and value and all(_is_turn(turn) for turn in value):
        value = "\n\n".join(_render_turn(turn) for turn in value)
    return cut_text(value if isinstance(value, str) else _write_json(value), limit)


def render_line(text: str, limit: int) -> str:
    """Text in one line of at most `limit` characters, without those that steer how a page or a terminal shows it."""
    # Cut before and after: cleaning a text of megabytes is wasted, and cleaning changes the length.
    shown = (c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text[: 4 * limit])
    line = " ".join("".join(shown).split())
    return cut_text(line, limit) if len(text) <= 4 * limit else line[:limit] + CUT


def cut_text(text: str, limit: int) -> str:
    """Text of at most `limit` characters, and an ellipsis where some are missing."""
    return text if len(text) <= limit else text[:limit] + CUT


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, Mapping) and (
        ("role" in turn and not turn.keys().isdisjoint(("content", "tool_calls"))) or {"from", "value"} <= turn.keys()
    )


def _render_turn(turn: Mapping[str, Any]) -> str:
    speaker, content = ("role", "content") if "role" in turn else ("from", "value")
    said = turn.get(content)
    if isinstance(said, list):
        said = "\n".join(map(_render_part, said))
    texts = [] if said is None else [said if isinstance(said, str) else _write_json(said)]
    texts += [_write_json(turn["tool_calls"])] if turn.get("tool_calls") else []
    return f"{turn[speaker]}: {' '.join(texts)}"


def _render_part(part: Any) -> str:
    """A part of a turn's content: its text, or of what kind it is."""
    if not isinstance(part, Mapping) or "type" not in part:
        return _write_json(part)
    text = part.get("text")
    return text if isinstance(text, str) else f"<{part['type']}>"


def _write_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=lambda item: f"<{type(item).__name__}>")
