"""What `--analyses` adds to the report page: fewer layers against all, and how well the pool covers the test rows."""

from collections.abc import Mapping, Sequence
from typing import Any

from hf_in2core.evaluation.formats import DASH, format_number, get_value, is_number
from hf_in2core.rows.text import render_line

from .run import Run


MAX_LEAST_COVERED = 20
MAX_PROPONENTS = 5
LONGEST_TEXT = 240
AGGREGATIONS = {
    "coverage_top_k": "mean of the {} strongest",
    "coverage_sum": "sum of proponents",
    "coverage_mean": "mean over all rows",
    "coverage_share": "share of proponents",
}
CONCLUSIONS = {
    "negative": "Better covered rows have the lower loss here. Where the test set has several tasks, that may be no "
    "more than the difference between them.",
    "positive": "Better covered rows have the higher loss here, so coverage does not say that a row goes well: what "
    "the reference gets wrong has a large gradient, and everything influences a large gradient more.",
    "none": "Coverage does not tell the loss of these rows: the interval holds 0, or there is nothing to correlate.",
}


def show_layers(run: Run) -> dict[str, Any] | None:
    """
    How well fewer layers rank the rows, from `layers` of `results.json`.

    Returns:
        `dict` or `None`: `refused` (why it was not computed), or what the page shows: `sentences`, `candidates` (for
        [`report_plots.draw_layers`]), `chosen` and `lines` (the best and the last layers of each number). `None`
        where the run has no such analysis, or, with a note, one of an unknown shape.
    """
    found = run.get("layers")
    if found is None or (refusal := _read_refusal(found)) is not None:
        return None if found is None else {"refused": refusal}
    names = ("budget", "rows", "memory", "spearman", "held_out_spearman", "overlap", "backward_layers")
    values = {name: get_value(found, name) for name in names}
    chosen, everything = get_value(found, "layers"), get_value(found, "all_layers")
    candidates = _read_candidates(get_value(found, "candidates"))
    shares = (values["budget"], values["memory"], values["overlap"])
    fits = candidates and _is_layers(chosen) and _is_layers(everything) and all(is_number(v) for v in values.values())
    if not fits or not all(0 <= share <= 1 for share in shares):
        run.notes.append(_name_shape("The layers are"))
        return None
    low, high = get_value(found, "low"), get_value(found, "high")
    interval = f" (95 % interval {low:+.3f} to {high:+.3f})" if is_number(low) and is_number(high) else ""
    last = everything[-len(chosen) :]
    at_last = next((entry for entry in candidates if entry["layers"] == last), None)
    sentences = [
        f"With {_percent(values['budget'])} of the gradient memory at most, {_name_layers(chosen)} of the "
        f"{len(everything)} layers rank {values['rows']:,} rows of a pilot sample most like all of them: Spearman "
        f"{values['spearman']:+.3f}{interval}; 1 would be the same order.",
        f"How stable the choice is: made by one half of these rows and judged by the other, it has "
        f"{values['held_out_spearman']:+.3f}, and the choices of the halves share {_percent(values['overlap'])} of "
        "their layers with it (100 % = every half chooses the same).",
        f"What it means: with influence_layers={chosen} the gradient store and the directions of the scorer take "
        f"{_percent(values['memory'])} of the memory, and rows are ranked about as above; the backward pass goes down "
        f"through {values['backward_layers']} layers, and that is what decides over the time.",
    ]
    if at_last is not None and last != chosen:
        sentences[2] += (
            f" As many at the end ({_name_layers(last)}) have Spearman {at_last['spearman']:+.3f} and a "
            f"backward pass through {at_last['backward_layers']}."
        )
    return {
        "sentences": sentences,
        "candidates": candidates,
        "chosen": chosen,
        "lines": _compare_numbers(candidates, everything),
    }


def _compare_numbers(candidates: Sequence[Mapping[str, Any]], everything: list[int]) -> list[dict[str, str]]:
    """The best candidate of every number of layers, and as many at the end."""
    lines = []
    for count in sorted({len(entry["layers"]) for entry in candidates}):
        members = [entry for entry in candidates if len(entry["layers"]) == count]
        best = max(members, key=lambda entry: entry["spearman"])
        last = next((entry for entry in members if entry["layers"] == everything[-count:]), None)
        lines.append(
            {
                "count": str(count),
                "layers": " ".join(map(str, best["layers"])),
                "memory": _percent(best["memory"]),
                "spearman": f"{best['spearman']:+.3f}",
                "backward": str(best["backward_layers"]),
                "last": format_number(get_value(last, "spearman"), "+.3f"),
                "last_backward": format_number(get_value(last, "backward_layers"), "d"),
            }
        )
    return lines


def _read_candidates(value: Any) -> list[dict[str, Any]]:
    """The candidates, where all of them are what they should be; else none."""
    if not isinstance(value, list):
        return []
    fits = all(
        _is_layers(get_value(entry, "layers"))
        and _is_within(get_value(entry, "memory"), 0, 1)
        and _is_within(get_value(entry, "spearman"), -1, 1)
        and _is_whole(get_value(entry, "backward_layers"))
        and isinstance(get_value(entry, "name"), str)
        for entry in value
    )
    return value if fits else []


def show_coverage(run: Run) -> dict[str, Any] | None:
    """
    How well the pool covers the test rows, from `coverage` of `results.json`.

    Returns:
        `dict` or `None`: `refused` (why it was not computed), or what the page shows: `coverage` and `loss` (lists of
        equal length for [`report_plots.draw_coverage`]), `top_k`, `headline`, `lines` (correlation of each
        aggregation) and `rows` (the least covered). `None` where the run has no such analysis, or, with a note, one
        of an unknown shape.
    """
    found = run.get("coverage")
    if found is None or (refusal := _read_refusal(found)) is not None:
        return None if found is None else {"refused": refusal}
    top_k, total = get_value(found, "top_k"), get_value(found, "test_rows")
    coverage, loss = (get_value(found, "points", name) for name in ("coverage", "loss"))
    lines = _read_correlations(get_value(found, "correlations"), top_k)
    rows = _read_least_covered(get_value(found, "least_covered"))
    lists = all(isinstance(v, list) and v and all(is_number(x) for x in v) for v in (coverage, loss))
    if not (lists and len(coverage) == len(loss) and lines and rows and _is_whole(top_k) and _is_whole(total)):
        run.notes.append(_name_shape("The coverage of the test rows is"))
        return None
    headline = next((line for line in lines if line["key"] == "coverage_top_k"), lines[0])
    sample = f"A random sample of {len(loss):,} of {total:,} test rows. " if len(loss) < total else ""
    return {
        "coverage": coverage,
        "loss": loss,
        "top_k": top_k,
        "estimator": str(get_value(found, "estimator") or ""),
        "sample": sample,
        "headline": f"Rank correlation of the {headline['name']} with the loss: {headline['estimate']} (95 % interval "
        f"{headline['interval']}). {headline['conclusion']}",
        "lines": lines,
        "rows": rows,
    }


def _read_correlations(value: Any, top_k: Any) -> list[dict[str, str]]:
    """Correlations that are known, as cells."""
    lines = []
    for key, name in AGGREGATIONS.items():
        entry = get_value(value, key)
        conclusion = get_value(entry, "conclusion")
        if not isinstance(conclusion, str) or conclusion not in CONCLUSIONS:
            continue
        estimate, low, high = (get_value(entry, part) for part in ("estimate", "low", "high"))
        lines.append(
            {
                "key": key,
                "name": name.format(top_k),
                "estimate": format_number(estimate, "+.2f"),
                "interval": f"{low:+.2f} to {high:+.2f}" if is_number(low) and is_number(high) else DASH,
                "conclusion": CONCLUSIONS[conclusion],
            }
        )
    return lines


def _read_least_covered(value: Any) -> list[dict[str, Any]]:
    """The least covered rows that are whole, with their strongest proponents."""
    rows = []
    for entry in value[:MAX_LEAST_COVERED] if isinstance(value, list) else []:
        position, loss, coverage, text, proponents = (
            get_value(entry, name) for name in ("row", "loss", "coverage", "text", "proponents")
        )
        if not (_is_whole(position) and is_number(loss) and is_number(coverage) and isinstance(text, str)):
            continue
        pairs = [
            {"row": get_value(pair, "row"), "influence": get_value(pair, "influence")}
            for pair in (proponents[:MAX_PROPONENTS] if isinstance(proponents, list) else [])
        ]
        pairs = [pair for pair in pairs if _is_whole(pair["row"]) and is_number(pair["influence"])]
        rows.append(
            {
                "row": position,
                "loss": f"{loss:.3f}",
                "coverage": coverage,
                "text": render_line(text, LONGEST_TEXT),
                "proponents": pairs,
            }
        )
    return rows


def _read_refusal(found: Any) -> str | None:
    """Why an analysis was not computed, where the run says so."""
    refusal = get_value(found, "refused")
    return refusal if isinstance(refusal, str) else None


def _name_shape(what: str) -> str:
    return (
        f"{what} not shown: results.json holds what another version of hf_in2core wrote, or is damaged. Run the "
        "`in2core run` again into this folder."
    )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _is_layers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_whole(layer) for layer in value)


def _is_within(value: Any, low: float, high: float) -> bool:
    return is_number(value) and low <= value <= high


def _percent(share: float) -> str:
    return f"{share:.0%}".replace("%", "\N{NO-BREAK SPACE}%")


def _name_layers(layers: Sequence[int]) -> str:
    return f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"
