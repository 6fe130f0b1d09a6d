"""Progress bars of every pass: on the main process, sensible in a log, silenced by the libraries' own switches."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import datasets
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging


# How often a bar is drawn in a terminal and in a log, in seconds.
OFTEN, MINUTE = 0.2, 60.0
# A state in a log.
LINE = "{desc}: {n_fmt} of {total_fmt} {unit}s, {rate_fmt}, about {remaining} left{postfix}"


class _Lines:
    """Where a bar writes outside a terminal: each state as a line of its own, and none that only clears it."""

    def write(self, text: str) -> None:
        """Write what tqdm would draw over the last state; that nothing is done yet says nothing."""
        if (text := text.strip()) and ": 0 of " not in text:
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()

    def flush(self) -> None:
        """Every line is out already."""


def get_bar_settings(shown: bool = True, brief: bool = False) -> dict[str, Any]:
    """
    How a bar of `tqdm` shows, as keyword arguments.

    Nothing shows on other processes than the main one, nor after `datasets.disable_progress_bars()` or
    `transformers.logging.disable_progress_bar()`. Outside a terminal a bar writes one line a minute.

    Args:
        shown (`bool`, *optional*, defaults to `True`):
            Whether it is wanted.
        brief (`bool`, *optional*, defaults to `False`):
            For one of many short passes: the bar goes when it ends, and a pass of less than a minute leaves nothing in
            a log.
    """
    terminal = sys.stderr.isatty()
    wanted = datasets.is_progress_bar_enabled() and transformers_logging.is_progress_bar_enabled()
    lines = {"file": _Lines(), "bar_format": LINE} if not terminal else {}
    return lines | {
        "leave": not brief,
        "disable": not (shown and wanted) or os.environ.get("RANK", "0") != "0",
        "mininterval": OFTEN if terminal else MINUTE,
        "delay": MINUTE if brief and not terminal else 0.0,
    }


def make_bar(
    total: int, description: str, unit: str = "row", *, shown: bool = True, initial: int = 0, brief: bool = False
) -> tqdm:
    """
    A bar over `total` items with an ETA, of which an earlier run has done `initial`; see [`get_bar_settings`].

    Returns:
        `tqdm.tqdm`, to be updated by hand.
    """
    return tqdm(total=total, initial=initial, desc=description, unit=unit, **get_bar_settings(shown, brief))


@contextmanager
def without_bars() -> Iterator[None]:
    """No bar for what is done inside, neither of ours nor of `datasets` or `transformers`; as it was afterwards."""
    shown, loading = datasets.is_progress_bar_enabled(), transformers_logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
        if loading:
            transformers_logging.enable_progress_bar()
