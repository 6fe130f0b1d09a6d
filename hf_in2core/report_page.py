"""The report page of a run: one self-contained HTML file that works offline.

The page is made of a template, a style sheet and a script of its own (`report_assets/`), pictures as SVG and rows as
JSON. Nothing from the data is ever markup: the template escapes, the script sets text only, and the content security
policy allows no script and no style but these two.
"""

import base64
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from scipy.stats import spearmanr

from .report_arms import ARM_COLUMNS, BUDGETS, LEVEL, count_seeds, format_arm, summarize_arms, summarize_tasks
from .report_rows import (
    Groups,
    Pool,
    choose_rows,
    find_groups,
    find_set_columns,
    find_text_columns,
    read_cells,
    read_pool,
    summarize_groups,
)
from .report_run import Run, get_value, is_number, read_numbers, read_run
from .report_tokens import choose_mask_rows, compute_masks, find_query_rows


PAGE = "report.html"
ASSETS = "report_assets"
OUTCOMES = {"better": "lower loss", "worse": "higher loss", "no worse": "no worse", "inconclusive": "inconclusive"}


def write_report(folder: str | Path, path: str | Path | None = None) -> Path:
    """
    Write the report page of a run.

    Args:
        folder (`str` or `Path`):
            Folder of `recipes/in2core.py`.
        path (`str` or `Path`, *optional*):
            File to write; `report.html` in the folder by default. It is replaced whole or not at all.

    Returns:
        `Path`: the file. The same folder gives the same file.

    Raises:
        ReportError: the folder holds no run that could be shown; the message says what to do.
    """
    run = read_run(folder)
    page = Path(path) if path is not None else run.folder / PAGE
    text = render_page(run)
    temporary = page.with_name(f".{page.name}.tmp")
    # What no encoding can hold (half of a surrogate pair) becomes a question mark.
    temporary.write_bytes(text.encode("utf-8", "replace"))
    os.replace(temporary, page)
    return page


def render_page(run: Run) -> str:
    """Render the page of a run as HTML."""
    plots: dict[str, Markup] = {}
    notes = run.notes
    if find_spec("matplotlib") is None:
        notes.append("There are no pictures: matplotlib is not installed (`pip install hf-in2core[report]`).")
    values: dict[str, Any] = {"pool": None, "groups": [], "queries": 0, "data": {}}
    if run.scored is not None:
        values |= _show_pool(run, plots)
    if find_spec("matplotlib") is not None:
        from .report_plots import PAGE_WIDTH, draw_arms

        label = "Test loss of each arm, mean and interval over seeds"
        _add_plot(plots, "arms", draw_arms, label, run.results, "", PAGE_WIDTH)
    style, script = load_asset("page.css"), load_asset("page.js")
    data = json.dumps(values.pop("data"), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"influence": format_influence, "percent": lambda value: f"{value:.0%}".replace("%", " %")}
    return environment.from_string(load_asset("page.html")).render(
        style=Markup(style),
        script=Markup(script),
        policy=make_policy(style, script),
        data=Markup(escape_json(data)),
        name=run.name,
        verdict=_show_verdict(run),
        arms=_show_arms(run),
        comparisons=_show_comparisons(run),
        tasks=summarize_tasks(run.results),
        auc=_show_auc(run),
        cost=_show_cost(run),
        provenance=_show_provenance(run),
        config=json.dumps(run.get("config"), indent=2, ensure_ascii=False) if run.get("config") else "",
        plots=plots,
        notes=notes,
        **values,
    )


def load_asset(name: str) -> str:
    """A file of the page; its line ends are those that a browser hashes."""
    text = resources.files("hf_in2core").joinpath(ASSETS, name).read_text(encoding="utf-8")
    return text.replace("\r\n", "\n")


def make_policy(style: str, script: str) -> str:
    """The content security policy: this style sheet and this script, pictures in the page, and nothing else."""

    def hash_source(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; script-src {hash_source(script)}; style-src {hash_source(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def show_number(value: Any, form: str) -> str:
    """A number by a format; a dash for what is none."""
    return format(value, form) if is_number(value) else "\N{EN DASH}"


def format_influence(value: float) -> str:
    """Influence with its sign and four digits, as the table of examples shows it."""
    if value != 0 and not 1e-3 <= abs(value) < 1e7:
        return f"{value:+.2e}"
    return f"{float(f'{value:.4g}'):+,.10g}"


def escape_json(text: str) -> str:
    """JSON that stands in a script element: no character in it could end the element or begin markup."""
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


# --- the pool ---


def _show_pool(run: Run, plots: dict[str, Markup]) -> dict[str, Any]:
    """What the page says of the scored pool, and the rows of its table."""
    scored = run.scored
    assert scored is not None
    pool = read_pool(run, scored)
    with_loss = int(pool.has_loss.sum())
    if with_loss == 0:
        run.notes.append("No row of the pool carries loss, so there is no influence to show. Check the labels.")
        return {}
    text_columns = find_text_columns(run, scored)
    groups = find_groups(run, scored, text_columns)
    queries = find_query_rows(run, scored, run.notes)
    rows = choose_rows(pool, {pair[0] for query in queries for pair in (*query["proponents"], *query["opponents"])})
    data = _collect_rows(run, pool, rows, text_columns, groups)
    data["queries"] = queries
    if len(rows) < len(pool.influence):
        run.notes.append(
            f"The table holds {len(rows):,} of {len(pool.influence):,} rows: the strongest proponents and opponents "
            "and a random sample of the rest. Plots and counts are of all rows."
        )
    summaries = [
        {"column": found.column, "groups": lines, "note": note}
        for found in groups
        for lines, note in [summarize_groups(found, pool)]
        if lines
    ]
    captions = _draw_pool(pool, summaries, plots)
    return {
        "pool": {
            "rows": len(pool.influence),
            "shown": len(rows),
            "without_loss": len(pool.influence) - with_loss,
            "proponents": int((pool.influence < 0).sum()),
            "opponents": int((pool.influence > 0).sum()),
            "headline": pool.headline,
            "kept": int(pool.is_kept.sum()),
            **captions,
        },
        "groups": summaries,
        "queries": len(queries),
        "data": data,
    }


def _draw_pool(pool: Pool, summaries: Sequence[Mapping[str, Any]], plots: dict[str, Markup]) -> dict[str, str]:
    """Draw what there is to draw of the pool, and say in words what the pictures show."""
    influence, tokens = pool.influence[pool.has_loss], pool.num_loss_tokens[pool.has_loss]
    # Only a coreset of the smallest influence ends at a cut.
    cut = float(pool.influence[pool.is_kept].max()) if pool.is_kept.any() else None
    if cut is not None and (pool.influence[pool.has_loss & ~pool.is_kept] < cut).any():
        cut = None
    known = bool((tokens >= 1).all())
    captions = {"cut": "" if cut is None else format_influence(cut), "correlation": "", "influence_note": ""}
    if known and len(influence) > 2 and np.ptp(tokens) > 0 and np.ptp(influence) > 0:
        captions["correlation"] = f"{spearmanr(influence, tokens).statistic:+.2f}"
    if find_spec("matplotlib") is None:
        return captions
    from .report_plots import PAGE_WIDTH, draw_groups, draw_influence, draw_length

    figure, captions["influence_note"] = draw_influence(pool.influence, cut, PAGE_WIDTH)
    _add_plot(plots, "influence", lambda: figure, "How many rows have which influence")
    if known:
        kept = pool.is_kept[pool.has_loss]
        _add_plot(plots, "length", draw_length, "Influence of rows against loss tokens", influence, tokens, kept)
    for index, summary in enumerate(summaries):
        label = f"Spread of influence by {summary['column']}"
        _add_plot(plots, f"groups{index}", draw_groups, label, summary["groups"])
    return captions


def _add_plot(plots: dict[str, Markup], name: str, draw: Any, label: str, *values: Any) -> None:
    from .report_svg import render_svg

    plots[name] = Markup(render_svg(draw(*values), label, name))


def _collect_rows(
    run: Run, pool: Pool, rows: np.ndarray, text_columns: Sequence[str], groups: Sequence[Groups]
) -> dict[str, Any]:
    """The rows of the table as the script reads them: a list for each column."""
    scored = run.scored
    assert scored is not None
    sets = find_set_columns(scored)
    lists = ("influence_per_query", "influence_per_checkpoint")
    added = ("influence", "influence_rank", "num_loss_tokens", *lists, *sets)
    others = [name for name in scored.column_names if name not in added and name not in text_columns]
    cells, cut, limit = read_cells(scored, rows, [*text_columns, *others])
    masks, note = compute_masks(run, scored, pool, choose_mask_rows(pool, rows))
    return {
        "rows": rows.tolist(),
        "influence": _to_list(pool.influence[rows]),
        "rank": _to_list(pool.rank[rows], whole=True),
        "tokens": _to_list(pool.num_loss_tokens[rows], whole=True),
        "coreset": _to_list(pool.coreset[rows]),
        "fractions": pool.fractions,
        "sets": {name: _to_list(read_numbers(scored, name)[rows]) for name in sets},
        "groups": [{"column": g.column, "names": g.names, "codes": g.codes[rows].tolist()} for g in groups],
        "textColumns": list(text_columns),
        "columns": cells,
        "cut": cut,
        "limit": limit,
        "masks": masks,
        "maskNote": note,
    }


def _to_list(values: np.ndarray, whole: bool = False) -> list[float | int | None]:
    """Numbers for JSON: NaN as null, six digits where they are not whole."""
    return [
        None if not math.isfinite(value) else int(value) if whole else float(f"{value:.6g}")
        for value in values.tolist()
    ]


# --- what results.json says ---


def _show_verdict(run: Run) -> dict[str, Any]:
    """The verdict in a sentence, the paragraph, and how to look at it."""
    text, headline = run.get("verdict", "text"), run.get("verdict", "headline")
    text = text if isinstance(text, str) else "The results hold no verdict."
    finished = run.get("complete") is not False
    if not isinstance(headline, str):
        headline = "No verdict" if finished else "The comparison is not finished"
    beats, matches = run.get("verdict", "beats_random"), run.get("verdict", "matches_full")
    is_warning = "WARNING" in text
    good = beats is True and matches is True and not is_warning
    return {
        "headline": headline,
        "text": text,
        "kind": "warning" if is_warning else "good" if good else "open",
        "checks": [
            {"label": "beats random rows beyond noise", "value": beats},
            {"label": "matches the full pool", "value": matches},
        ]
        if isinstance(beats, bool) and isinstance(matches, bool)
        else [],
    }


def _show_arms(run: Run) -> dict[str, Any]:
    """The arms as tables, one for each budget."""
    rows = summarize_arms(run.results)
    budgets = list(dict.fromkeys(row["budget"] for row in rows))
    return {
        "columns": ARM_COLUMNS,
        "tables": [
            {
                "budget": BUDGETS.get(budget, budget),
                "rows": [{"arm": row["arm"], "cells": format_arm(row)} for row in rows if row["budget"] == budget],
            }
            for budget in budgets
        ],
        "note": f"Means over {count_seeds(rows)}, ± half of the {LEVEL * 100:g} % Student-t interval.",
    }


def _show_comparisons(run: Run) -> list[dict[str, str]]:
    """Differences between arms with their intervals, for every fraction and budget."""
    lines = []
    entries = run.get("verdict", "by_fraction")
    for entry in entries if isinstance(entries, list) else []:
        intervals = get_value(entry, "intervals")
        for name, interval in (intervals if isinstance(intervals, dict) else {}).items():
            mean, low, high = (get_value(interval, key) for key in ("mean", "low", "high"))
            if not is_number(mean):
                continue
            budget = str(get_value(entry, "budget"))
            lines.append(
                {
                    "name": str(name).replace("_", " ").replace(" minus ", " − "),
                    "where": f"{show_number(get_value(entry, 'fraction'), 'g')}, {BUDGETS.get(budget, budget)}",
                    "mean": show_number(mean, "+.3f"),
                    "interval": f"{low:+.3f} to {high:+.3f}" if is_number(low) and is_number(high) else "none",
                    "seeds": show_number(get_value(interval, "n"), ".0f"),
                    "outcome": OUTCOMES.get(str(get_value(interval, "outcome")), "no interval"),
                }
            )
    return lines


def _show_auc(run: Run) -> dict[str, Any]:
    """How well scores find the rows that are looked for."""
    auc = run.get("auc")
    auc = auc if isinstance(auc, dict) else {}
    by_kind = {str(kind): scores for kind, scores in auc.items() if isinstance(scores, dict)}
    scores = list(dict.fromkeys(str(score) for found in by_kind.values() for score in found))
    return {
        "scores": scores,
        "lines": [
            {
                "kind": kind,
                "rows": show_number(run.get("auc_rows", kind), ",.0f"),
                "values": [show_number(found.get(score), ".3f") for score in scores],
            }
            for kind, found in by_kind.items()
        ],
    }


def _show_cost(run: Run) -> list[tuple[str, str]]:
    """What the run cost, in words."""

    def seconds(value: Any) -> str:
        return f"{show_number(value, ',.1f')} s" if is_number(value) else ""

    trained = {(arm["arm"], arm["fraction"], arm["seed"], arm.get("seconds")) for arm in run.results["arms"]}
    spent = [entry[3] for entry in trained if is_number(entry[3])]
    resumed = " (of the last part alone: the run was resumed)" if run.get("selection", "resumed") is True else ""
    runs = run.get("verdict", "cost", "break_even_runs")
    lines = [
        ("Training the reference", seconds(run.get("selection", "reference_seconds"))),
        ("Computing influence", seconds(run.get("selection", "seconds")) + resumed),
        ("Training and testing the arms", f"{seconds(sum(spent))} for {len(spent)} runs" if spent else ""),
        ("Saved by each target run at equal epochs", seconds(run.get("verdict", "cost", "saving_per_run"))),
        ("Target runs until selecting has paid", show_number(runs, ",") if is_number(runs) else str(runs or "")),
    ]
    return [(label, value) for label, value in lines if value]


def _show_provenance(run: Run) -> list[tuple[str, str]]:
    """What the figures were made from and with."""
    sets = get_value(run.scorer, "validation_sets")
    machine = run.get("machine")
    machine = machine if isinstance(machine, dict) else {}
    hardware = [machine.get("gpu") or machine.get("cpu"), f"{machine.get('processes', 1)} process(es)"]
    hardware += [f"{machine['cores']} cores"] if machine.get("cores") else []
    libraries = [f"{name} {machine[name]}" for name in machine if name in LIBRARIES]
    revision = get_value(run.scorer, "base_model_revision")
    lines = [
        ("Reference model", run.get("config", "model_name_or_path") or get_value(run.scorer, "base_model")),
        ("Its revision", revision),
        ("Target model", run.get("config", "target_model_name_or_path") or run.get("config", "model_name_or_path")),
        ("Pool", run.get("config", "pool")),
        ("Validation (selects)", _join(run.get("config", "validation"))),
        ("Rows of the validation sets", _join(sets)),
        ("Test (judges)", run.get("config", "test")),
        ("Estimator", get_value(run.scorer, "estimator") or run.get("selection", "estimator")),
        ("Loss of a row", f"{get_value(run.scorer, 'loss_reduction')} over its labelled tokens" if run.scorer else ""),
        ("Damping scale", get_value(run.scorer, "damping_scale")),
        ("Layers", (get_value(run.scorer, "influence_layers") or "all") if run.scorer else ""),
        ("Rows the scorer was fitted on", get_value(run.scorer, "num_fit_examples")),
        ("Machine", ", ".join(str(part) for part in hardware if part) if machine else ""),
        ("Libraries", ", ".join(libraries)),
        ("Command", run.get("command")),
    ]
    return [(label, str(value)) for label, value in lines if value not in (None, "", [])]


LIBRARIES = ("python", "torch", "transformers", "trl", "peft", "datasets", "accelerate")


def _join(value: Any) -> str:
    """A list or a dictionary in one line."""
    if isinstance(value, dict):
        value = [f"{name}: {item:,}" if isinstance(item, int) else f"{name}: {item}" for name, item in value.items()]
    return ", ".join(str(item) for item in value) if isinstance(value, list) else ""
