"""What tokens alone tell of a row: which of them carried loss, and whom a validation row is helped by."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from hf_in2core.evaluation.formats import get_value
from hf_in2core.names import PER_QUERY, VALIDATION
from hf_in2core.rows.scored import list_own_columns
from hf_in2core.rows.sources import find_hub_id, load_rows, parse_named_sources
from hf_in2core.rows.text import render_line, render_row

from .rows import LIMITS, Pool
from .run import Run


MAX_MASKS = 300
MASK_CHUNK = 50
MAX_QUERIES, MAX_QUERY_ROWS = 100, 8
QUERY_CHUNK = 10_000


def choose_mask_rows(pool: Pool, rows: np.ndarray) -> np.ndarray:
    """Choose the rows whose mask is shown, a third each: first in line, last in line, a sample; `[<= 300]`."""
    with_loss = rows[pool.has_loss[rows]]
    order = with_loss[np.argsort(pool.deciding.ranks[with_loss], kind="stable")]
    third = MAX_MASKS // 3
    strongest = np.union1d(order[:third], order[-third:])
    rest = np.setdiff1d(order, strongest)
    sample = np.random.default_rng(0).permutation(rest)[: MAX_MASKS - len(strongest)]
    return np.union1d(strongest, sample)


def compute_masks(run: Run, scored: Dataset, pool: Pool, rows: np.ndarray) -> tuple[dict[str, list], str]:
    """
    Prepare rows as the scorer does, and tell which parts of their text carried loss.

    Args:
        run ([`Run`]): The run, whose scorer's folder has the tokenizer and the settings of the preparation.
        scored (`datasets.Dataset`): The scored pool.
        pool ([`Pool`]): Its influence and lengths.
        rows (`np.ndarray`): Positions of the rows.

    Returns:
        `tuple`: by position, as a string, `[number of tokens, [text, carried loss as 0 or 1], …]`; and a note.
    """
    if not run.scorer:
        return {}, "Which tokens carried loss is not shown: the run has no scorer/ to prepare the rows with."
    try:
        # Imported here: TRL and its preparation take seconds, and a page without masks does not need them.
        from transformers import AutoTokenizer

        from hf_in2core.influence.scorer_files import TOKENIZER_FOLDER, read_scorer_config
        from hf_in2core.rows.preparation import Preparation, prepare_batch

        folder = run.folder / "scorer"
        config = read_scorer_config(folder)
        tokenizer = AutoTokenizer.from_pretrained(
            folder / TOKENIZER_FOLDER, local_files_only=True, trust_remote_code=False
        )
        preparation = Preparation(processing_class=tokenizer, **config.preparation)
    except Exception as error:  # a damaged folder fails in many ways, and the page can do without it
        return {}, f"Which tokens carried loss is not shown: scorer/ cannot be used ({_say(error)})."
    raw = scored.select_columns(list_own_columns(scored)).with_format(None)
    masks: dict[str, list] = {}
    reason = ""
    for start in range(0, len(rows), MASK_CHUNK):
        chunk = rows[start : start + MASK_CHUNK]
        try:
            prepared, _ = prepare_batch(raw.select(chunk)[:], preparation)
        except Exception as error:  # the rows are other people's; the page shows them without their mask
            reason = _say(error)
            continue
        for row in prepared:
            position = int(chunk[row["row"]])
            carries_loss = np.array(row["labels"]) != -100
            carries_loss[0] = False  # nothing predicts the first token
            # Another number of tokens than was scored means another preparation.
            if carries_loss.sum() == pool.num_loss_tokens[position]:
                parts = split_by_loss(row["input_ids"], carries_loss, tokenizer)
                masks[str(position)] = [len(row["input_ids"]), *parts]
    missing = len(rows) - len(masks)
    why = f" ({reason})" if reason else ", as their tokens are not those that were scored"
    note = f" Of {missing:,} more rows it could not be made{why}." if missing else ""
    return masks, f"The mask is shown for {len(masks):,} rows: the first and last in line and a sample.{note}"


def split_by_loss(input_ids: Sequence[int], carries_loss: np.ndarray, tokenizer: Any) -> list[list[Any]]:
    """
    Split the text of a row where loss begins and ends.

    Args:
        input_ids (`Sequence[int]` of length `T`): Tokens.
        carries_loss (`np.ndarray` of shape `[T]`, bool): Whether a token carried loss.
        tokenizer (`transformers.PreTrainedTokenizerBase`): Decodes them.

    Returns:
        `list[list]`: `[text, 0 or 1]` for each part.
    """
    ends = [*np.flatnonzero(np.diff(carries_loss)) + 1, len(input_ids)]
    parts: list[list[Any]] = []
    start, before = 0, ""
    for end in (int(end) for end in ends):
        # Parts are differences of prefixes: decoded on its own a part may lose the blank that it begins with.
        text = tokenizer.decode(input_ids[:end], clean_up_tokenization_spaces=False)
        begins = text.startswith(before)
        part = text[len(before) :] if begins else tokenizer.decode(input_ids[start:end])
        parts.append([part[: LIMITS[0]], int(carries_loss[start])])
        start, before = end, text
    return parts


def _say(error: Exception) -> str:
    """An error in one line that fits a note."""
    return render_line(f"{type(error).__name__}: {error}", 200)


# --- validation rows ---


def find_query_rows(run: Run, scored: Dataset, notes: list[str]) -> list[dict[str, Any]]:
    """
    Find the training rows that help and hurt each of a sample of validation rows most, from `influence_per_query`.

    Returns:
        `list[dict]`: for each validation row `set`, `row` (its position), `text` (or `None`), `proponents` and
        `opponents` (`[position, influence]`, strongest first).
    """
    if PER_QUERY not in scored.column_names:
        return []
    try:
        queries, proponents, opponents = _find_strongest(scored)
    except (ValueError, pa.ArrowException) as error:
        notes.append(f"Validation rows are not shown: {PER_QUERY} cannot be read ({_say(error)}).")
        return []
    names = [(name, row) for name, rows in read_validation_sets(run).items() for row in range(rows)]
    texts = _read_validation(run, notes)
    found = []
    for index, query in enumerate(queries):
        name, row = names[query] if query < len(names) else (VALIDATION, int(query))
        found.append(
            {
                "set": name,
                "row": row,
                "text": texts[name][row] if name in texts and row < len(texts[name]) else None,
                "proponents": proponents[index],
                "opponents": opponents[index],
            }
        )
    return found


def _find_strongest(scored: Dataset) -> tuple[np.ndarray, list, list]:
    """A seeded sample of queries, and the strongest rows of either sign for each; one chunk of the pool at a time."""
    column = scored.select_columns([PER_QUERY])
    queries = np.zeros(0, dtype=np.int64)
    values, positions = np.zeros((0, 0)), np.zeros((0, 0), dtype=np.int64)
    for start in range(0, len(scored), QUERY_CHUNK):
        chunk = column[start : start + QUERY_CHUNK].column(0)
        rows = np.flatnonzero(chunk.is_valid().to_numpy())
        if len(rows) == 0:
            continue
        scores = pc.list_flatten(chunk).to_numpy().astype(np.float64).reshape(len(rows), -1)
        if len(queries) == 0:
            chosen = np.random.default_rng(0).permutation(scores.shape[1])[:MAX_QUERIES]
            queries = np.sort(chosen)
            values, positions = np.zeros((0, len(queries))), np.zeros((0, len(queries)), dtype=np.int64)
        values = np.concatenate([values, scores[:, queries]])
        positions = np.concatenate([positions, np.repeat(rows[:, None] + start, len(queries), axis=1)])
        order = np.argsort(values, axis=0, kind="stable")
        if len(order) > 2 * MAX_QUERY_ROWS:
            order = np.concatenate([order[:MAX_QUERY_ROWS], order[-MAX_QUERY_ROWS:]])
        values, positions = np.take_along_axis(values, order, 0), np.take_along_axis(positions, order, 0)
    pairs = [
        [[int(p), float(v)] for p, v in zip(positions[:, q], values[:, q], strict=True)] for q in range(len(queries))
    ]
    proponents = [[pair for pair in query if pair[1] < 0][:MAX_QUERY_ROWS] for query in pairs]
    opponents = [[pair for pair in reversed(query) if pair[1] > 0][:MAX_QUERY_ROWS] for query in pairs]
    return queries, proponents, opponents


def read_validation_sets(run: Run) -> dict[str, int]:
    """How many rows each validation set has, by its name, in the order of the queries; empty where it is not known."""
    sets = get_value(run.scorer, "validation_sets")
    known = isinstance(sets, dict) and all(isinstance(rows, int) for rows in sets.values())
    return {str(name): rows for name, rows in sets.items()} if known else {}


def _read_validation(run: Run, notes: list[str]) -> dict[str, list[str]]:
    """Texts of the validation sets, where they are files on this machine and have as many rows as were fitted on."""
    sources, sets = run.get("config", "validation"), get_value(run.scorer, "validation_sets")
    sources = sources if isinstance(sources, list) else []
    texts: dict[str, list[str]] = {}
    try:
        for name, source in parse_named_sources([str(source) for source in sources]).items():
            rows = load_rows(source, "validation set") if find_hub_id(source) is None else None
            if rows is not None and len(rows) == get_value(sets, name):
                texts[name] = [render_row(row, LIMITS[0]) for row in rows]
    except (OSError, ValueError) as error:
        notes.append(f"The texts of the validation rows are not shown: {_say(error)}")
    return texts
