"""The rows that the page shows: which of a large pool, their text, and the groups they fall into."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset

from hf_in2core.evaluation.formats import is_number
from hf_in2core.names import INFLUENCE, NUM_LOSS_TOKENS
from hf_in2core.rows.scored import rank_rows, read_numbers
from hf_in2core.rows.text import render_value
from hf_in2core.selection.record import Coreset, describe_choice, take_coresets
from hf_in2core.selection.turns import DecidingScore, read_deciding_score

from .run import Run


MAX_ROWS = 5000
# Of all texts in the page; each text is cut to the longest of the limits with which they fit.
MAX_CHARACTERS = 8_000_000
LIMITS = (20_000, 8_000, 4_000, 2_000, 1_000, 400)
CHUNK = 64
MAX_GROUPS, MAX_GROUP_COLUMNS, MAX_SETS = 12, 3, 6
# A column of another name is taken for text, however few values it has.
GROUP_NAMES = ("task", "source", "dataset", "subset", "category", "topic", "domain", "language", "lang", "type")
TEXT_FORMATS = (
    ("messages",),
    ("conversations",),
    ("prompt", "completion"),
    ("text",),
    ("instruction", "input", "output"),
    ("instruction", "context", "response"),
    ("question", "answer"),
    ("input_ids",),
)


@dataclass
class Pool:
    """
    What is known of every row of a scored pool.

    Attributes:
        influence (`np.ndarray` of shape `[n]`): Negative = proponent; NaN where a row carries no loss.
        num_loss_tokens (`np.ndarray` of shape `[n]`): NaN where it is not known.
        deciding ([`~hf_in2core.selection.turns.DecidingScore`]): By what the coresets were chosen.
        coreset (`np.ndarray` of shape `[n]`): Smallest fraction whose coreset has the row; NaN where none has.
        chosen (`dict[float, Coreset]`): The coresets by their fraction.
        fractions (`list[float]`): Fractions of the coreset arms, smallest first.
        headline (`float`, *optional*): The fraction that the verdict speaks of.
    """

    influence: np.ndarray
    num_loss_tokens: np.ndarray
    deciding: DecidingScore
    coreset: np.ndarray
    chosen: dict[float, Coreset]
    fractions: list[float]
    headline: float | None

    @property
    def has_loss(self) -> np.ndarray:
        """Whether a row carries loss, bool of shape `[n]`."""
        return np.isfinite(self.influence)

    @property
    def is_opponent(self) -> np.ndarray:
        """Whether a row has positive influence and no coreset that leaves rows out keeps it, bool of shape `[n]`."""
        return (self.influence > 0) & ~(self.coreset < 1)

    @property
    def is_kept(self) -> np.ndarray:
        """Whether the coreset of the headline's fraction has a row, bool of shape `[n]`."""
        return np.zeros(len(self.influence), bool) if self.headline is None else self.coreset <= self.headline


@dataclass
class Groups:
    """A column that splits the pool: the name of each group, largest first, and the group of every row, `[n]`."""

    column: str
    names: list[str]
    codes: np.ndarray


def read_pool(run: Run, scored: Dataset) -> Pool:
    """Read influence, the score that chose and lengths of the whole pool, and which coresets have a row."""
    influence = read_numbers(scored, INFLUENCE)
    strategy = str(run.get("config", "strategy") or "top")
    found = {float(arm["fraction"]) for arm in run.results["arms"] if arm["arm"] == "coreset"}
    fractions = sorted(fraction for fraction in found if 0 < fraction <= 1)
    coreset = np.full(len(influence), np.nan)
    wanted = {
        fraction: describe_choice("coreset", fraction, strategy=strategy)
        for fraction in reversed(fractions)
        if round(fraction * np.isfinite(influence).sum()) > 0
    }
    chosen = {}
    try:
        coresets = take_coresets(run.folder, scored, dict(wanted.values()))
        for fraction, (name, _) in wanted.items():
            chosen[fraction] = coresets[name]
            coreset[coresets[name].positions] = fraction
    except (ValueError, TypeError) as error:
        run.notes.append(f"Which rows the coresets have is not shown: {error}")
    # The record knows what chose, also where the run found its strategy by itself.
    shown = chosen.get(fractions[0]) if fractions else None
    try:
        deciding = read_deciding_score(scored, **(shown.arguments if shown else {"strategy": strategy}))
    except (ValueError, TypeError) as error:
        run.notes.append(f"What chose the rows is not shown: {error}")
        deciding = DecidingScore(influence, rank_rows(influence), influence)
    headline = run.get("verdict", "fraction")
    if not is_number(headline) or headline not in fractions:
        headline = fractions[0] if fractions else None
    lengths = read_numbers(scored, NUM_LOSS_TOKENS)
    return Pool(influence, lengths, deciding, coreset, chosen, fractions, headline)


def choose_rows(pool: Pool, also: Iterable[int]) -> np.ndarray:
    """
    Choose the rows of the table: all, or of a large pool the first and last in line and a sample of the rest.

    Args:
        pool ([`Pool`]): The whole pool.
        also (`Iterable[int]`): Rows that have to be among them.

    Returns:
        `np.ndarray` of int64: positions, ascending.
    """
    num_rows = len(pool.influence)
    if num_rows <= MAX_ROWS:
        return np.arange(num_rows)
    order = np.argsort(pool.deciding.ranks, kind="stable")[: int(pool.has_loss.sum())]
    quarter = MAX_ROWS // 4
    strongest = np.union1d(order[:quarter], order[len(order) - min(quarter, len(order)) :])
    rest = np.setdiff1d(np.arange(num_rows), strongest)
    sample = np.random.default_rng(0).choice(rest, size=min(MAX_ROWS - len(strongest), len(rest)), replace=False)
    return np.union1d(np.union1d(strongest, sample), np.fromiter(also, dtype=np.int64))


def find_text_columns(run: Run, scored: Dataset) -> list[str]:
    """Columns that hold what is trained on, in the order in which it is read."""
    mapping = run.get("config", "columns")
    if isinstance(mapping, list):
        sources = [str(item).partition("=")[2] for item in mapping if "=" in str(item)]
        if sources and all(source in scored.column_names for source in sources):
            return list(dict.fromkeys(sources))
    for names in TEXT_FORMATS:
        # The optional middle part, as in Alpaca, may be missing.
        found = [name for name in names if name in scored.column_names]
        if found and found[0] == names[0] and found[-1] == names[-1]:
            return found
    return [name for name in scored.column_names if getattr(scored.features[name], "dtype", "") == "string"][:4]


# --- groups ---


def find_groups(run: Run, scored: Dataset, text_columns: Sequence[str]) -> list[Groups]:
    """Find the columns that name a row's task, source or other group, those that the run names first."""
    named = [name for name in (run.get("config", "task_column"), run.get("config", "wrong_column")) if name]
    usual = [name for name in scored.column_names if name.lower() in GROUP_NAMES]
    flags = [name for name in scored.column_names if getattr(scored.features[name], "dtype", "") == "bool"]
    found = []
    for column in dict.fromkeys(str(name) for name in [*named, *usual, *flags]):
        if column in scored.column_names and column not in text_columns:
            groups = read_groups(scored, column)
            if groups is not None and (column in named or 2 <= len(groups.names) <= 50):
                found.append(groups)
    return found[:MAX_GROUP_COLUMNS]


def read_groups(scored: Dataset, column: str) -> Groups | None:
    """Read the groups that a column of strings, integers or booleans makes; `None` for any other column."""
    values = scored.select_columns([column])[:].column(0)
    kind = values.type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if not (is_text or pa.types.is_boolean(kind) or pa.types.is_integer(kind)):
        return None
    # As bytes: a string that is no UTF-8 is an error only when it is decoded.
    values = values.cast(pa.large_binary()) if is_text else values
    encoded = values.combine_chunks().dictionary_encode()
    codes = encoded.indices.fill_null(len(encoded.dictionary)).to_numpy()
    feature = scored.features[column]
    names = []
    for value in encoded.dictionary.to_pylist():
        if isinstance(value, bytes):
            names.append(value.decode("utf-8", "replace")[:200] or "(empty)")
        elif isinstance(feature, ClassLabel):
            names.append(feature.int2str(value) if 0 <= value < feature.num_classes else "(none)")
        else:
            names.append(str(value).lower() if isinstance(value, bool) else str(value))
    names.append("(none)")
    unique = list(dict.fromkeys(names))
    index = {name: code for code, name in enumerate(unique)}
    codes = np.array([index[name] for name in names])[codes]
    counts = np.bincount(codes, minlength=len(unique))
    order = [int(code) for code in np.argsort(-counts, kind="stable") if counts[code]]
    place = np.zeros(len(unique), dtype=np.int64)
    place[order] = np.arange(len(order))
    return Groups(column, [unique[code] for code in order], place[codes])


def summarize_groups(groups: Groups, pool: Pool) -> tuple[list[dict[str, Any]], str]:
    """
    Sum up the score that chose in each group.

    Returns:
        `tuple`: for each group `name`, `rows`, `without_loss`, `kept` (share that the coreset has), `proponents`
        (share of negative influence), `tokens` (median of loss tokens) and `quantiles` (5, 25, 50, 75, 95 %), lowest
        median first; and what is left out.
    """
    found = []
    for code, name in enumerate(groups.names[:MAX_GROUPS]):
        members = groups.codes == code
        values = pool.deciding.values[members & pool.has_loss]
        if len(values) == 0:
            continue
        lengths = pool.num_loss_tokens[members & pool.has_loss]
        found.append(
            {
                "name": name,
                "rows": int(members.sum()),
                "without_loss": int(members.sum()) - len(values),
                "kept": float(pool.is_kept[members & pool.has_loss].mean()),
                "proponents": float((pool.influence[members & pool.has_loss] < 0).mean()),
                "tokens": float(np.median(lengths)),
                "quantiles": [float(value) for value in np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95])],
            }
        )
    left = len(groups.names) - MAX_GROUPS
    note = f"The {MAX_GROUPS} largest of {len(groups.names)} groups." if left > 0 else ""
    return sorted(found, key=lambda group: group["quantiles"][2]), note


# --- texts ---


def read_cells(scored: Dataset, rows: np.ndarray, columns: Sequence[str]) -> tuple[dict[str, list], list[int], int]:
    """
    Read columns as what a page can show.

    Args:
        scored (`datasets.Dataset`): The scored pool, as arrow.
        rows (`np.ndarray`): Positions to read.
        columns (`Sequence[str]`): Which columns.

    Returns:
        `tuple`: a list of strings, numbers, booleans and `None` for each column; the indices into `rows` of those with
        a text that was cut; and to how many characters.
    """
    cells: dict[str, list[Any]] = {name: [] for name in columns}
    if not columns:
        return cells, [], LIMITS[0]
    selected = scored.select_columns(list(columns))
    for start in range(0, len(rows), CHUNK):
        table = selected.select(rows[start : start + CHUNK]).with_format("arrow")[:]
        for name in columns:
            cells[name] += [_show_cell(value) for value in _read_values(table.column(name))]
    lengths = np.array([len(cell) for column in cells.values() for cell in column if isinstance(cell, str)])
    fitting = (limit for limit in LIMITS if np.minimum(lengths, limit).sum() <= MAX_CHARACTERS)
    limit = next(fitting, LIMITS[-1])
    is_cut = {i for column in cells.values() for i, c in enumerate(column) if isinstance(c, str) and len(c) > limit}
    for column in cells.values():
        column[:] = [cell[:limit] if isinstance(cell, str) else cell for cell in column]
    return cells, sorted(is_cut), limit


def _read_values(column: pa.ChunkedArray) -> list[Any]:
    """Values of a column; strings as bytes, since they may be no UTF-8."""
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return column.cast(pa.large_binary()).to_pylist()
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_read_value(value) for value in column]


def _read_value(value: pa.Scalar) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return "(this value is not UTF-8 and cannot be shown)"


def _show_cell(value: Any) -> Any:
    """A value as a string, a number or a boolean; a text longer than the longest limit stays longer than it."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return render_value(value, LIMITS[0])
