"""How results show in a notebook: escaped HTML."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any


def render_html(
    title: str, rows: Iterable[Sequence[Any]], *, columns: Sequence[str] = (), notes: Sequence[str] = ()
) -> str:
    """
    A table as HTML for `_repr_html_`; every text is escaped.

    Args:
        title (`str`):
            What it is of.
        rows (`Iterable[Sequence]`):
            Cells; the first of each row names it.
        columns (`Sequence[str]`, *optional*):
            Heads of the columns.
        notes (`Sequence[str]`, *optional*):
            Sentences below it.

    Returns:
        `str`: HTML without style or script of its own.
    """

    def cell(value: Any, kind: str) -> str:
        return f"<{kind}>{escape(str(value))}</{kind}>"

    head = f"<thead><tr>{''.join(cell(name, 'th') for name in columns)}</tr></thead>" if columns else ""
    body = "".join(f"<tr>{cell(row[0], 'th')}{''.join(cell(value, 'td') for value in row[1:])}</tr>" for row in rows)
    below = "".join(f"<p>{escape(note)}</p>" for note in notes if note)
    return f"<div><p><strong>{escape(title)}</strong></p><table>{head}<tbody>{body}</tbody></table>{below}</div>"


def show_figure(value: float | None) -> str:
    """A figure in four digits; a dash where it is not known."""
    return "\N{EN DASH}" if value is None else f"{value:.4g}"
