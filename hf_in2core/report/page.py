"""The report page of a run: one self-contained HTML file that works offline.

The page is made of a template, a style sheet and a script of its own (`assets/`), pictures as SVG and rows as
JSON. Nothing from the data is ever markup: the template escapes, the script sets text only, and the content security
policy allows no script and no style but these two.
"""

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from hf_in2core.evaluation.arms import (
    FIGURES,
    explain_means,
    list_costs,
    list_differences,
    require_arms,
    split_by_budget,
    tabulate_auc,
    tabulate_tasks,
    tabulate_tournament,
)
from hf_in2core.evaluation.formats import is_step_unsure, show_step
from hf_in2core.evaluation.leakage import list_near_copies, say_judge
from hf_in2core.files import write_whole
from hf_in2core.names import INFLUENCE, TAKEN_BY, list_added_columns, list_method_columns
from hf_in2core.rows.scored import find_set_columns, read_numbers
from hf_in2core.selection.lengths import correlate_with_length
from hf_in2core.selection.taking import say_overlap
from hf_in2core.selection.turns import DecidingScore, name_taker

from .analyses import show_coverage, show_layers
from .results import show_provenance, show_verdict
from .rows import (
    MAX_SETS,
    Groups,
    Pool,
    choose_rows,
    find_groups,
    find_text_columns,
    read_cells,
    read_pool,
    summarize_groups,
)
from .run import Run, read_run
from .tokens import choose_mask_rows, compute_masks, find_query_rows, read_validation_sets


PAGE = "report.html"
ASSETS = "assets"


def write_report(folder: str | Path, path: str | Path | None = None) -> Path:
    """
    Write the report page of a run.

    Args:
        folder (`str` or `Path`):
            Folder of `in2core run`.
        path (`str` or `Path`, *optional*):
            File to write; `report.html` in the folder by default. It is replaced whole or not at all.

    Returns:
        `Path`: the file. The same folder gives the same file.

    Raises:
        ReportError: the folder holds no run that could be shown; the message says what to do.
    """
    run = read_run(folder)
    page = Path(path) if path is not None else run.folder / PAGE
    write_whole(page, render_page(run), errors="replace")  # rows may hold anything
    return page


def render_page(run: Run) -> str:
    """Render the page of a run as HTML."""
    plots: dict[str, Markup] = {}
    notes = run.notes
    notes += [
        text for name in ("agreement", "lengths", "answers") if isinstance(text := run.get(name, "warning"), str)
    ]
    if find_spec("matplotlib") is None:
        notes.append("There are no pictures: matplotlib is not installed (`pip install hf-in2core[report]`).")
    values: dict[str, Any] = {"pool": None, "groups": [], "queries": 0, "shown": set(), "data": {}}
    arms, layers, coverage = require_arms(run.results), show_layers(run), show_coverage(run)
    if run.scored is not None:
        values |= _show_pool(run, plots, coverage)
    if find_spec("matplotlib") is not None:
        _draw_results(run, layers, coverage, plots)
    style, script = load_asset("page.css"), load_asset("page.js")
    data = json.dumps(values.pop("data"), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return _compile_page().render(
        style=Markup(style),
        script=Markup(script),
        policy=make_policy(style, script),
        data=Markup(escape_json(data)),
        name=run.name,
        verdict=show_verdict(run),
        budgets=split_by_budget(arms),
        figures=FIGURES,
        judge=say_judge(run.get("data")),
        near_copies=list_near_copies(run.get("data")),
        means=explain_means(arms),
        differences=list_differences(run.get("verdict", "by_fraction")),
        tasks=tabulate_tasks(run.results),
        tournament=tabulate_tournament(run.results),
        auc=tabulate_auc(run.results),
        layers=layers,
        coverage=coverage,
        cost=list_costs(run.results),
        provenance=show_provenance(run),
        config=json.dumps(run.get("config"), indent=2, ensure_ascii=False) if run.get("config") else "",
        plots=plots,
        notes=notes,
        **values,
    )


@cache
def _compile_page() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"influence": format_influence, "percent": lambda value: f"{value:.0%}".replace("%", " %")}
    return environment.from_string(load_asset("page.html"))


def _draw_results(
    run: Run, layers: dict[str, Any] | None, coverage: dict[str, Any] | None, plots: dict[str, Markup]
) -> None:
    """Draw what needs results.json alone."""
    from .plots import PAGE_WIDTH, draw_arms, draw_coverage, draw_layers

    label = "Test loss of each arm, mean and interval over seeds"
    _add_plot(plots, "arms", draw_arms, label, run.results, "", PAGE_WIDTH)
    if layers is not None and "candidates" in layers:
        label = "Rank correlation with all layers against the share of gradient memory"
        _add_plot(plots, "layers", draw_layers, label, layers["candidates"], layers["chosen"])
    if coverage is not None and "loss" in coverage:
        label = "Loss of test rows against their coverage by the pool"
        _add_plot(plots, "coverage", draw_coverage, label, coverage["coverage"], coverage["loss"], coverage["top_k"])


def load_asset(name: str) -> str:
    """A file of the page; its line ends are those that a browser hashes."""
    text = resources.files("hf_in2core.report").joinpath(ASSETS, name).read_text(encoding="utf-8")
    return text.replace("\r\n", "\n")


def make_policy(style: str, script: str) -> str:
    """The content security policy: this style sheet and this script, pictures in the page, and nothing else."""

    def hash_source(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; script-src {hash_source(script)}; style-src {hash_source(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def format_influence(value: float) -> str:
    """Influence with its sign and four digits, as the table of examples shows it."""
    if value != 0 and not 1e-3 <= abs(value) < 1e7:
        return f"{value:+.2e}"
    return f"{float(f'{value:.4g}'):+,.10g}"


def escape_json(text: str) -> str:
    """JSON that stands in a script element: no character in it could end the element or begin markup."""
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


# --- the pool ---


def _show_pool(run: Run, plots: dict[str, Markup], coverage: dict[str, Any] | None) -> dict[str, Any]:
    """What the page says of the scored pool, and the rows of its table, those that cover test rows among them."""
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
    linked = {pair[0] for query in queries for pair in (*query["proponents"], *query["opponents"])}
    helpers = {pair["row"] for row in (coverage or {}).get("rows", []) for pair in row["proponents"]}
    rows = choose_rows(pool, linked | {row for row in helpers if row < len(pool.influence)})
    data = _collect_rows(run, pool, rows, text_columns, groups)
    data["queries"] = queries
    if len(rows) < len(pool.influence):
        run.notes.append(
            f"The table holds {len(rows):,} of {len(pool.influence):,} rows: the first and the last by "
            f"{pool.deciding.name}, and a random sample of the rest. Plots and counts are of all rows."
        )
    summaries: list[dict[str, Any]] = [
        {"column": found.column, "groups": lines, "note": note}
        for found in groups
        for lines, note in [summarize_groups(found, pool)]
        if lines
    ]
    deciding = pool.deciding
    whole = deciding.takers is not None or deciding.is_turns
    for summary in summaries:
        for group in summary["groups"]:
            median = group["quantiles"][2]
            group["median"] = f"{median:,.0f}" if whole else format_influence(median)
    captions = _draw_pool(pool, summaries, plots)
    return {
        "pool": {
            "rows": len(pool.influence),
            "shown": len(rows),
            "without_loss": len(pool.influence) - with_loss,
            "proponents": int((pool.influence < 0).sum()),
            "opponents": int(pool.is_opponent.sum()),
            "kept_positive": int(((pool.influence > 0) & ~pool.is_opponent).sum()),
            "in_turn": deciding.takers is not None and deciding.taking is None,
            "by_influence": deciding.name == INFLUENCE,
            "score": deciding.name,
            "how": deciding.how,
            "meaning": deciding.meaning,
            "halves": _say_halves(run, deciding),
            "headline": pool.headline,
            "kept": int(pool.is_kept.sum()),
            **captions,
        },
        "groups": summaries,
        "queries": len(queries),
        "shown": set(rows.tolist()),
        "data": data,
    }


def _say_halves(run: Run, deciding: DecidingScore) -> str:
    """How far halves of the validation rows choose alike where they take rows in turn; of others nothing."""
    by_rows = deciding.takers is not None and deciding.takers.dtype.kind != "U"
    not_measured, _ = say_overlap(None, 1.0)
    return str(run.get("agreement", "in_turn") or (not_measured if by_rows or deciding.is_turns else ""))


def _draw_pool(pool: Pool, summaries: Sequence[Mapping[str, Any]], plots: dict[str, Markup]) -> dict[str, str]:
    """Draw what there is to draw of the pool, and say in words what the pictures show."""
    from .plots import PAGE_WIDTH, draw_groups, draw_influence, draw_length, find_cut

    name, values, tokens = pool.deciding.name, pool.deciding.values[pool.has_loss], pool.num_loss_tokens[pool.has_loss]
    kept = pool.is_kept[pool.has_loss]
    shown, drawn = pool.deciding.histogram
    cut = find_cut(drawn[pool.has_loss], kept)
    known = bool((tokens >= 1).all())
    captions = {"cut": "" if cut is None else f"{cut:,.4g}", "correlation": "", "influence_note": "", "drawn": shown}
    captions["of"] = "taking" if pool.deciding.taking is not None else "other" if pool.deciding.is_turns else "score"
    if known and (correlation := correlate_with_length(values, tokens)) is not None:
        captions["correlation"] = f"{correlation:+.2f}"
    if find_spec("matplotlib") is None:
        return captions
    is_kept = pool.is_kept if kept.any() else None
    figure, note = draw_influence(drawn, is_kept, PAGE_WIDTH, shown)
    captions["influence_note"] = note[:1].upper() + note[1:]
    _add_plot(plots, "influence", lambda: figure, f"How many rows have which {shown}")
    if known:
        label = f"{name.capitalize()} of rows against loss tokens"
        _add_plot(plots, "length", draw_length, label, values, tokens, kept, name)
    for index, summary in enumerate(summaries):
        label = f"Spread of {name} by {summary['column']}"
        _add_plot(plots, f"groups{index}", draw_groups, label, summary["groups"], name)
    return captions


def _add_plot(plots: dict[str, Markup], name: str, draw: Any, label: str, *values: Any) -> None:
    from .svg import render_svg

    plots[name] = Markup(render_svg(draw(*values), label, name))


def _collect_rows(
    run: Run, pool: Pool, rows: np.ndarray, text_columns: Sequence[str], groups: Sequence[Groups]
) -> dict[str, Any]:
    """The rows of the table as the script reads them: a list for each column."""
    scored = run.scored
    assert scored is not None
    sets = find_set_columns(scored.features)[:MAX_SETS]
    told = list_method_columns([pool.deciding.name]) if pool.deciding.name in TAKEN_BY else [pool.deciding.name]
    added = (*list_added_columns([], per_query=True, per_checkpoint=True), *sets, *told)
    others = [name for name in scored.column_names if name not in added and name not in text_columns]
    cells, cut, limit = read_cells(scored, rows, [*text_columns, *others])
    masks, note = compute_masks(run, scored, pool, choose_mask_rows(pool, rows))
    sets_of_rows = read_validation_sets(run)
    # Of several coresets the smallest that has a row tells what chose it.
    taken: dict[int, dict[str, Any]] = {}
    for _, coreset in sorted(pool.chosen.items(), reverse=True):
        words = coreset.describe_rows(sets_of_rows)
        for place, row in enumerate(coreset.positions if words else ()):
            assert coreset.turns is not None and coreset.scores is not None
            by = None if coreset.takers is None else name_taker(coreset.takers[place], sets_of_rows)
            taken[row] = {"words": words[row], "turn": coreset.turns[place], "by": by, "for": coreset.scores[place]}
    return {
        "rows": rows.tolist(),
        "influence": _to_list(pool.influence[rows]),
        "rank": _to_list(pool.deciding.ranks[rows], whole=True),
        "percentile": _to_list(pool.deciding.percentiles[rows]),
        "standing": [
            pool.deciding.describe(row, sets_of_rows, taken[row]["turn"] if row in taken else None)
            for row in rows.tolist()
        ],
        "taken": [taken.get(row) for row in rows.tolist()],
        "takers": _list_takers(pool.deciding, rows, sets_of_rows),
        "steps": [show_step(run.get("calibration"), value) for value in pool.influence[rows].tolist()],
        "unsure": [is_step_unsure(run.get("calibration"), value) for value in pool.influence[rows].tolist()],
        "choice": {
            "inTurn": pool.deciding.takers is not None,
            "isTurns": pool.deciding.is_turns,
            "byInfluence": pool.deciding.name == INFLUENCE,
            "score": pool.deciding.name,
            "takenFor": "influence on it" if pool.deciding.taking is None else pool.deciding.taking.words,
            "meaning": pool.deciding.meaning,
        },
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


def _list_takers(
    deciding: DecidingScore, rows: np.ndarray, validation_sets: Mapping[str, int]
) -> list[dict[str, Any] | None]:
    """Who took each row or will, where every row has its turn, and for what; else nothing."""
    if deciding.taking is None or deciding.takers is None:
        return []
    scores = _to_list(deciding.taking.scores[rows])
    return [
        None if score is None else {"by": name_taker(taker, validation_sets), "for": score}
        for taker, score in zip(deciding.takers[rows].tolist(), scores, strict=True)
    ]


def _to_list(values: np.ndarray, whole: bool = False) -> list[float | int | None]:
    """Numbers for JSON: NaN as null, six digits where they are not whole."""
    return [
        None if not math.isfinite(value) else int(value) if whole else float(f"{value:.6g}")
        for value in values.tolist()
    ]
