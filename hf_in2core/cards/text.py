"""Text of cards: templates, and any data turned into Markdown that does nothing.

Nothing that comes from data is trusted. A template's expressions are escaped unless they are [`Markdown`], and rows
are shown as JSON in which no character could end the block or begin markup. Data is never a template.
"""

import json
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np

from hf_in2core.shipped import find_shipped


_LONGEST_TEXT, _LONGEST_LIST, _LONGEST_ROW = 400, 8, 4000
# Control and format characters, surrogates and odd line ends. Some turn the direction of writing.
_INVISIBLE = ("Cc", "Cf", "Cs", "Zl", "Zp")
_JOINERS = "\u200c\u200d"


class Markdown(str):
    """Text that is Markdown already: a template writes it as it is."""


def load_template(name: str) -> str:
    """
    Load a template of `dataset_cards/`: from the package when it was installed from a wheel, else from the checkout.

    Args:
        name (`str`):
            File name, as `"influence_dataset.md"`.

    Returns:
        `str`: the template.

    Raises:
        FileNotFoundError: neither place has it.
    """
    return find_shipped(f"dataset_cards/{name}").read_text(encoding="utf-8")


def render_template(name: str, **values: Any) -> str:
    """Fill a template. Every expression is escaped unless it is [`Markdown`]; a missing value is an error."""
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markdown) else escape_markdown(str(value)),
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )
    return environment.from_string(load_template(name)).render(**values)


def escape_markdown(text: str) -> Markdown:
    """
    Make any text harmless in one line of Markdown: it reads as it is and does nothing.

    Markup becomes character references, which cannot stand for markup; line breaks and control characters (among them
    those that turn the direction of writing) become spaces.
    """
    text = "".join(" " if _is_invisible(c) else c for c in text)
    text = re.sub(r"[&<>`*_\[\]#|~\\$^:@{}]|\.(?=[^\s\d])", lambda match: f"&#{ord(match.group())};", text)
    return Markdown(text)


def format_code(text: str) -> Markdown:
    """A name as code; through HTML when it holds what a code span could not."""
    if re.fullmatch(r"[\w./=@:+ -]{1,200}", text, flags=re.ASCII) and text == text.strip():
        return Markdown(f"`{text}`")
    return Markdown(f"<code>{escape_markdown(text)}</code>")


def format_row(row: Mapping[str, Any]) -> Markdown:
    """A row as JSON for a fenced block: shortened, and with every character escaped that could end or mark it."""
    text = json.dumps(_shorten(row), indent=2, ensure_ascii=False, default=lambda value: f"<{type(value).__name__}>")
    if len(text) > _LONGEST_ROW:
        names = list(row)[:_LONGEST_LIST]
        text = json.dumps({_shorten(k): f"<{type(row[k]).__name__}>" for k in names}, indent=2, ensure_ascii=False)
    # Line breaks of the layout stay; those inside strings are \n already.
    return Markdown("".join(f"\\u{ord(c):04x}" if _is_unsafe(c) else c for c in text))


def _is_unsafe(character: str) -> bool:
    return character in "<>&`~" or (character != "\n" and _is_invisible(character))


def _is_invisible(character: str) -> bool:
    return unicodedata.category(character) in _INVISIBLE and character not in _JOINERS


def _shorten(value: Any) -> Any:
    if isinstance(value, str):
        value = "".join(c for c in value if ord(c) < 1 << 16 or not _is_invisible(c))  # four digits cannot escape them
        return value if len(value) <= _LONGEST_TEXT else f"{value[:_LONGEST_TEXT]} … ({len(value):,} characters)"
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    if isinstance(value, Mapping):
        return {_shorten(str(key)): _shorten(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        rest = len(value) - _LONGEST_LIST
        return [_shorten(item) for item in value[:_LONGEST_LIST]] + ([f"… ({rest} more)"] if rest > 0 else [])
    return value


def format_number(value: Any, form: str) -> Markdown:
    """A number by a format; a dash for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return Markdown("–")
    return Markdown(format(value, form))


def format_mean(values: Sequence[Any], form: str) -> Markdown:
    """The mean of numbers, ± their standard deviation when there are several and they differ."""
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)]
    if not numbers or len(numbers) < len(values):
        return Markdown("–")
    spread = f" ± {format(np.std(numbers, ddof=1), form)}" if len(numbers) > 1 and np.ptp(numbers) > 0 else ""
    return Markdown(format(float(np.mean(numbers)), form) + spread)
