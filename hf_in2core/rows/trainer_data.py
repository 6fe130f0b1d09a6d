"""The rows that an [`InfluenceTrainer`] takes over from SFT: prepared and unpacked, with what was lost told."""

import logging

import numpy as np
from datasets import Dataset

from hf_in2core.engine.batches import read_token_rows

from .preparation import ROW_COLUMN, Preparation, keep_token_columns, prepare_mapped


logger = logging.getLogger(__name__)

ROWS_AT_ONCE = 10_000


def take_over_rows(
    trained: Dataset, mapped: Dataset, preparation: Preparation, what: str, max_length: int | None, warn: bool
) -> Dataset:
    """
    Rows that SFT has prepared for itself, for the passes; prepared again, unpacked, where SFT packs them.

    Args:
        trained ([`~datasets.Dataset`]):
            The trainer's rows.
        mapped ([`~datasets.Dataset`]):
            The same before preparation, numbered.
        preparation ([`Preparation`]):
            How to prepare them.
        what (`str`):
            What messages call them.
        max_length (`int`, *optional*):
            Tokens that rows were cut to.
        warn (`bool`):
            Whether this process tells of rows that lost their loss or their end.

    Returns:
        [`~datasets.Dataset`]: `row`, `input_ids` and `labels`, without rows that carry no loss.

    Raises:
        ValueError: if no row carries a loss token.
    """
    prepared = keep_token_columns(
        trained if ROW_COLUMN in trained.column_names else prepare_mapped(mapped, preparation)
    )
    if len(prepared) == 0:
        raise ValueError(
            f"No row of the {what} ({len(mapped)} rows) carries a loss token after preparation with "
            f"`max_length={max_length}`: the prompts may fill it, or the loss masks hide every token. Raise "
            "`max_length` or check the completions."
        )
    lost = len(mapped) - len(prepared)
    if lost and warn:
        logger.warning(
            "%d of %d rows of the %s carry no loss token (cut at `max_length=%s`, or empty); their influence is null.",
            lost,
            len(mapped),
            what,
            max_length,
        )
    if warn and (cut := _count_rows_of_length(prepared, max_length)):
        logger.warning(
            "%d rows of the %s have the full `max_length=%d` tokens and were cut unless they are exactly that long; "
            "their influence is that of the part kept, as in training.",
            cut,
            what,
            max_length,
        )
    return prepared


def _count_rows_of_length(prepared: Dataset, length: int | None) -> int:
    starts = range(0, len(prepared), ROWS_AT_ONCE)
    chunks = (read_token_rows(prepared, start, min(start + ROWS_AT_ONCE, len(prepared))) for start in starts)
    return sum(int((chunk.lengths == length).sum()) for chunk in chunks)


def count_loss_tokens(prepared: Dataset, num_rows: int) -> np.ndarray:
    """Labelled tokens of every raw row, int64 `[num_rows]`; 0 for those that carry no loss."""
    counts = np.zeros(num_rows, dtype=np.int64)
    for start in range(0, len(prepared), ROWS_AT_ONCE):
        token_rows = read_token_rows(prepared, start, min(start + ROWS_AT_ONCE, len(prepared)))
        counts[token_rows.row] = token_rows.num_loss_tokens
    return counts
