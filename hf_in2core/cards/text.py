"""Text of cards: templates, and any data turned into Markdown that does nothing.

Nothing that comes from data is trusted. A template's expressions are escaped unless they are [`Markdown`], and rows
are shown in blocks that no character of theirs could end. Data is never a template.
"""

import re
import unicodedata
from functools import cache
from typing import Any

import jinja2

from hf_in2core.shipped import find_shipped


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
    return _compile_template(name).render(**values)


@cache
def _compile_template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markdown) else escape_markdown(str(value)),
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )
    return environment.from_string(load_template(name))


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


def format_block(text: str) -> Markdown:
    """Text of several lines as a block that keeps them; through HTML, as data could end or mark a fenced one."""
    lines = "\n".join(escape_markdown(line) for line in text.split("\n"))
    return Markdown(f"<pre><code>{lines}</code></pre>")


def _is_invisible(character: str) -> bool:
    return unicodedata.category(character) in _INVISIBLE and character not in _JOINERS
