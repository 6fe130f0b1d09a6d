"""What a command has told its user is not told again by the trainers of its steps, which look at the same rows."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


_TOLD: set[str] = set()


def note_told(message: str) -> None:
    """Remember what was told."""
    _TOLD.add(message)


@contextmanager
def telling_once() -> Iterator[None]:
    """Within a command, let what is known of the rows be told once."""
    _TOLD.clear()
    logger = logging.getLogger("hf_in2core.influence.checks")
    logger.addFilter(_is_new)
    try:
        yield
    finally:
        logger.removeFilter(_is_new)


def _is_new(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    is_new = message not in _TOLD
    _TOLD.add(message)
    return is_new
