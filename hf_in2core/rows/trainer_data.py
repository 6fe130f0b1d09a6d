"""The rows that an [`InfluenceTrainer`] takes over from SFT: prepared and unpacked, with what was lost told."""

import logging

import numpy as np
import trl
from datasets import Dataset

from hf_in2core.engine.batches import read_lengths, read_token_rows

from .preparation import ROW_COLUMN, Preparation, keep_token_columns, prepare_batch, prepare_mapped


logger = logging.getLogger(__name__)

ROWS_AT_ONCE = 10_000
ROWS_COMPARED = 4
# The versions that the tests run on: constraints-oldest.txt and constraints-newest.txt.
TESTED_TRL = "1.14.0", "1.16.0"


def take_over_rows(
    trained: Dataset,
    mapped: Dataset,
    num_rows: int,
    preparation: Preparation,
    what: str,
    max_length: int | None,
    context: int | None,
    warn: bool,
) -> Dataset:
    """
    Rows that SFT has prepared for itself, for the passes; prepared again, unpacked, where SFT packs them.

    Args:
        trained ([`~datasets.Dataset`]):
            The trainer's rows.
        mapped ([`~datasets.Dataset`]):
            The same before preparation, numbered.
        num_rows (`int`):
            Rows of the set, those without a label among them.
        preparation ([`Preparation`]):
            How to prepare them.
        what (`str`):
            What messages call them.
        max_length (`int`, *optional*):
            Tokens that rows were cut to.
        context (`int`, *optional*):
            Tokens that the model was made for.
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
            f"No row of the {what} ({num_rows} rows) carries a loss token after preparation with "
            f"`max_length={max_length}`: the prompts may fill it, or the loss masks hide every token. Raise "
            "`max_length` or check the completions."
        )
    lost = num_rows - len(prepared)
    if lost and warn:
        logger.warning(
            "%d of %d rows of the %s carry no loss token (cut at `max_length=%s`, empty, or without a turn that is "
            "trained on); their influence is null.",
            lost,
            num_rows,
            what,
            max_length,
        )
    lengths = read_lengths(prepared) if warn else np.zeros(1)
    if context is not None and lengths.max() > context:
        logger.warning(
            "Rows of the %s have up to %d tokens, and the model was made for %d: it knows no positions beyond, and "
            "where they are learnt it fails there. Set `max_length=%d` or less.",
            what,
            lengths.max(),
            context,
            context,
        )
    if warn and (cut := int((lengths == max_length).sum())):
        logger.warning(
            "%d rows of the %s have the full `max_length=%d` tokens and were cut unless they are exactly that long; "
            "their influence is that of the part kept, as in training.",
            cut,
            what,
            max_length,
        )
    return prepared


def check_first_rows(pool: Dataset, prepared: Dataset, preparation: Preparation) -> None:
    """
    Check that the scorer's preparation of the first rows with loss is that of SFT.

    A scorer prepares raw rows by TRL's private preparation, outside the trainer, so another TRL may part the two. Rows
    that SFT packs are not its own any more, and agree.

    Args:
        pool ([`~datasets.Dataset`]):
            Raw rows.
        prepared ([`~datasets.Dataset`]):
            What [`take_over_rows`] took over from SFT.
        preparation ([`Preparation`]):
            How the scorer will prepare rows.

    Raises:
        ValueError: if tokens or labels differ, naming the row, the token and the version of TRL.
    """
    first = prepared.with_format(None)[:ROWS_COMPARED]
    batch, _ = prepare_batch(pool.with_format(None)[first["row"]], preparation)
    found = {row["row"]: row for row in batch}
    for position, row in enumerate(first["row"]):
        for column in ("input_ids", "labels"):
            trained: list[int] = first[column][position]
            scored: list[int] = found[position][column] if position in found else []
            if trained == scored:
                continue
            pairs = zip(trained, scored, strict=False)
            shorter = min(len(trained), len(scored))
            token = next((token for token, (one, other) in enumerate(pairs) if one != other), shorter)
            raise ValueError(
                f"TRL {trl.__version__} prepares row {row} of the pool for training in another way than for scoring: "
                f"`{column}` differs at token {token} ({trained[token:][:5]} … of {len(trained)} in training, "
                f"{scored[token:][:5]} … of {len(scored)} in scoring). Scores of new rows would be those of other "
                f"tokens than are trained on. Install a tested TRL (`pip install 'trl>={TESTED_TRL[0]},"
                f"<={TESTED_TRL[1]}'`), or tokenise the rows yourself: `input_ids` and `labels` are taken as they are."
            )


def count_loss_tokens(prepared: Dataset, num_rows: int) -> np.ndarray:
    """Labelled tokens of every raw row, int64 `[num_rows]`; 0 for those that carry no loss."""
    counts = np.zeros(num_rows, dtype=np.int64)
    for start in range(0, len(prepared), ROWS_AT_ONCE):
        token_rows = read_token_rows(prepared, start, min(start + ROWS_AT_ONCE, len(prepared)))
        counts[token_rows.row] = token_rows.num_loss_tokens
    return counts
