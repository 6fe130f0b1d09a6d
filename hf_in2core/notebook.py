"""How results show in a notebook: escaped HTML, and dictionaries that read as what they found."""

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


class Verdict(dict[str, Any]):
    """What [`~hf_in2core.evaluation.judge.judge`] returns: a `dict` that shows as sentences and the losses of arms."""

    def __repr__(self) -> str:
        return f"Verdict: {self['headline']}. {self['text']} (keys: {', '.join(self)})"

    def _repr_html_(self) -> str:
        rows = [
            (
                arm if arm == "full" else f"{arm} {entry['fraction']:g}",
                f"equal {entry['budget']}",
                _show(loss["mean"]),
                _show(loss["half_width"]),
                loss["n"],
            )
            for entry in self["by_fraction"]
            for arm, loss in entry["losses"].items()
        ]
        columns = ["arm", "budget", "test loss (lower is better)", f"± ({self['level']:.0%} interval)", "seeds"]
        return render_html(self["headline"], rows, columns=columns, notes=[self["text"]])


class Lengths(dict[str, Any]):
    """What [`~hf_in2core.selection.lengths.compare_lengths`] returns: a `dict` that shows as a comparison."""

    def __repr__(self) -> str:
        return f"Lengths({', '.join(f'{name} {value}' for name, value in self._rows())}; {self['warning'] or 'alike'})"

    def _repr_html_(self) -> str:
        note = "A rank correlation below 0 means that long rows come first (negative influence = proponent)."
        return render_html("Lengths of the coreset against the pool", self._rows(), notes=[self["warning"], note])

    def _rows(self) -> list[tuple[str, str]]:
        return [
            ("loss tokens per row of the pool", _show(self["pool_tokens"])),
            ("of the coreset", _show(self["coreset_tokens"])),
            ("ratio", _show(self["ratio"])),
            ("gap (0 = the same lengths, 1 = no overlap)", _show(self["gap"])),
            ("rank correlation with length", _show(self["spearman"])),
        ]


def _show(value: float | None) -> str:
    return "\N{EN DASH}" if value is None else f"{value:.4g}"
