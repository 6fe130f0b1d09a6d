"""A Space that shows a published pool: the verdict, the distribution of influence, and its rows.

    python recipes/space/app.py            # then open http://127.0.0.1:7860/?dataset=user/alpaca-in2core

Negative influence = proponent. Nothing of a repository is ever markup: text goes through `html.escape`, into cells of
plain text or into text boxes.
"""

import html

import gradio as gr
import numpy as np
import pandas as pd
from published import CannotShow, Published, read_published


PREVIEW_CHARACTERS = 60
BINS = 60
INTRODUCTION = """
# In2Core explorer

The influence of every row of a published pool on its validation loss.
**Negative influence = proponent** (training on the row lowers the validation loss), positive = opponent.
"""
CSS = """
.gradio-container { width: 100% !important; max-width: 1200px !important; margin: 0 auto !important; }
.notes p { margin: 0.3em 0; overflow-wrap: anywhere; }
.notes .verdict { font-size: 1.1em; border-left: 4px solid var(--color-accent); padding-left: 0.8em; }
.notes .failed { border-left: 4px solid #d55e00; padding-left: 0.8em; }
#row-text textarea { font-family: monospace; }
"""
ROWS = ["all", "proponents", "opponents", "in a coreset", "in no coreset"]
# Order → column, and whether it rises.
ORDERS = {
    "strongest proponents first": ("influence", True),
    "strongest opponents first": ("influence", False),
    "shortest first": ("tokens", True),
    "longest first": ("tokens", False),
    "as in the pool": ("row", True),
}


def open_dataset(name: str) -> tuple:
    """Read a dataset for every part of the page: what is known of it, its state, plots and rows."""
    if not name.strip():
        return show_failure("Type the id of a published pool, such as user/alpaca-in2core.")
    try:
        published = read_published(name)
    except CannotShow as error:
        return show_failure(str(error))
    return (
        show_notes(published),
        published.table,
        gr.update(visible=True),
        draw_influence(published.influence),
        gr.update(value=published.lengths, visible=published.lengths is not None),
        *list_rows(published.table, "", ROWS[0], next(iter(ORDERS))),
        *FRESH,
    )


# Nothing is searched for, and no row is open.
CLOSED = ("", gr.update(value="", visible=False))
FRESH = ("", ROWS[0], next(iter(ORDERS)), *CLOSED)


def show_failure(text: str) -> tuple:
    """The page of what cannot be shown."""
    message = f'<div class="notes"><p class="failed" role="alert">{html.escape(text)}</p></div>'
    return (message, None, gr.update(visible=False), None, None, None, "", *FRESH)


def show_notes(published: Published) -> str:
    """Verdict, facts and notes as HTML, with everything escaped."""
    count = len(published.influence)
    proponents = int((published.influence < 0).sum())
    facts = [f"{published.rows:,} rows", f"{proponents / max(count, 1):.0%} of those read are proponents"]
    facts += [f"{split}: {rows:,} rows" for split, rows in published.splits.items()]
    lines = [f'<p class="verdict">{html.escape(published.verdict)}</p>', f"<p>{html.escape(' · '.join(facts))}</p>"]
    lines += [f"<p>{html.escape(note)}</p>" for note in published.notes]
    source = html.escape(f"{published.repo_id} at commit {published.commit[:12]}")
    return f'<div class="notes">{"".join(lines)}<p><small>{source}</small></p></div>'


def draw_influence(influence: np.ndarray) -> pd.DataFrame | None:
    """How many rows have which influence; what lies outside the inner 99 % is counted in the outermost bins."""
    if len(influence) == 0:
        return None
    low, high = np.quantile(influence, [0.005, 0.995])
    counts, edges = np.histogram(np.clip(influence, low, high), bins=BINS)
    middles = (edges[:-1] + edges[1:]) / 2
    kinds = np.where(middles < 0, "proponents", "opponents")
    return pd.DataFrame({"influence": middles, "rows": counts, "sign": kinds})


def list_rows(table: pd.DataFrame | None, words: str, which: str, order: str) -> tuple[pd.DataFrame | None, str]:
    """The rows that match, in an order and with the beginnings of their texts; and how many they are."""
    if table is None:
        return None, ""
    found = table
    if which == "proponents":
        found = found[found["influence"] < 0]
    elif which == "opponents":
        found = found[found["influence"] > 0]
    elif "coreset" in which and "coreset" in found:
        found = found[(found["coreset"] != "") == (which == "in a coreset")]
    if words.strip():
        found = found[found["text"].str.contains(words.strip(), case=False, regex=False)]
    column, rises = ORDERS[order]
    if column in found:
        found = found.sort_values(column, ascending=rises, kind="stable")
    listed = found.assign(text=found["text"].str.slice(0, PREVIEW_CHARACTERS).str.replace(r"\s+", " ", regex=True))
    for name in listed.select_dtypes("floating"):
        # Numbers stay numbers, or they would be sorted as text.
        listed[name] = [float(f"{value:.4g}") for value in listed[name]]
    # What fits a phone comes first.
    first = ["row", "influence", "text"]
    listed = listed[[*first, *(name for name in listed if name not in first)]]
    return listed, f"{len(found):,} of {len(table):,} rows"


def open_clicked(table: pd.DataFrame | None, event: gr.SelectData) -> tuple:
    """The row that was clicked, wherever sorting has put it: its number stands in the first cell."""
    return open_row(table, int(event.row_value[0])) if event.row_value else CLOSED


def open_row(table: pd.DataFrame | None, number: float | None) -> tuple:
    """A row's facts and its whole text, by its number in the pool."""
    if table is None or number is None:
        return CLOSED
    rows = table[table["row"] == number]
    if rows.empty:
        return f"Row {number:.0f} is not among those that are shown.", gr.update(value="", visible=False)
    row = rows.iloc[0]
    facts = [f"{name} {format_cell(row[name])}" for name in table.columns if name not in ("row", "text")]
    return f"Row {row['row']}: {', '.join(facts)}", gr.update(value=row["text"], visible=True)


def format_cell(value: object) -> str:
    """A value of a row's list of facts."""
    if isinstance(value, float):
        return f"{value:+.4g}" if np.isfinite(value) else "–"
    return "–" if value is pd.NA or value == "" else str(value)


def open_address(request: gr.Request) -> tuple | dict:
    """Open the dataset that the page's address names (`?dataset=user/name`), if it names one."""
    name = str(dict(request.query_params).get("dataset", ""))[:200]
    return (name, *open_dataset(name)) if name else gr.skip()


def make_app() -> gr.Blocks:
    """The page."""
    with gr.Blocks(title="In2Core explorer", analytics_enabled=False) as app:
        table = gr.State()
        gr.Markdown(INTRODUCTION)
        with gr.Row(equal_height=True):
            name = gr.Textbox(label="Dataset", placeholder="user/alpaca-in2core", scale=4, elem_id="dataset")
            button = gr.Button("Show", variant="primary", scale=1, elem_id="show")
        notes = gr.HTML(elem_id="notes")
        with gr.Column(visible=False, elem_id="pool") as pool:
            with gr.Row():
                influence = gr.BarPlot(
                    x="influence",
                    y="rows",
                    color="sign",
                    color_map={"proponents": "#0072b2", "opponents": "#d55e00"},
                    x_title="influence (left of 0: proponents)",
                    title="Rows by influence",
                    buttons=[],
                )
                lengths = gr.ScatterPlot(
                    x="loss tokens",
                    y="influence",
                    y_title="influence (below 0: proponents)",
                    title="Influence against length",
                    buttons=[],
                )
            with gr.Row():
                words = gr.Textbox(label="Search the whole text (Enter)", scale=3, elem_id="search")
                which = gr.Dropdown(ROWS, label="Rows", value=ROWS[0], scale=1, elem_id="which")
                order = gr.Dropdown(list(ORDERS), label="Order", value=next(iter(ORDERS)), scale=1, elem_id="order")
            with gr.Row():
                count = gr.Text(label="Found", interactive=False, scale=3, elem_id="count")
                number = gr.Number(label="Open row number (Enter)", precision=0, scale=1, elem_id="number")
            rows = gr.Dataframe(
                label="Rows: select one to read it whole",
                interactive=False,
                datatype="str",
                max_height=520,
                elem_id="rows",
                buttons=[],
            )
            facts = gr.Textbox(
                label="Row",
                placeholder="Select a row of the table.",
                interactive=False,
                max_lines=4,
                elem_id="row-facts",
            )
            text = gr.Textbox(
                label="Text", interactive=False, lines=6, max_lines=25, visible=False, elem_id="row-text"
            )
        parts = [notes, table, pool, influence, lengths, rows, count, words, which, order, facts, text]
        gr.on([button.click, name.submit], open_dataset, name, parts, api_visibility="private")
        changes = [words.submit, which.input, order.input]
        gr.on(changes, list_rows, [table, words, which, order], [rows, count], api_visibility="private")
        rows.select(open_clicked, table, [facts, text], api_visibility="private")
        number.submit(open_row, [table, number], [facts, text], api_visibility="private")
        app.load(open_address, None, [name, *parts], api_visibility="private")
    return app


if __name__ == "__main__":
    make_app().launch(css=CSS, footer_links=[], ssr_mode=False)
