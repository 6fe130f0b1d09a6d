"""Pictures, sound and films beside text: TRL trains on them with models for them, and only text is trained on here."""

from typing import Any

import pyarrow.compute as pc
from datasets import Dataset

from .presets import RowError


# The columns that TRL and LLaMA-Factory read them from.
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
REASON = (
    "is not empty, and only text can be trained on here; where the text is complete without it, name what is read: "
    "`--columns prompt=prompt completion=completion`"
)


def list_media(dataset: Dataset) -> dict[int, RowError]:
    """
    Why rows of a set are refused, by position: they have pictures, sound or films. Columns for them may be empty.

    Nothing is decoded. Whoever names the columns of text has said that the text is complete without.
    """
    refused: dict[int, RowError] = {}
    for name in (name for name in MEDIA if name in dataset.column_names):
        start = 0
        for table in dataset.select_columns([name]).with_format("arrow").iter(batch_size=1000):
            column: Any = table[name]
            for position, value in enumerate(_measure(column), start):
                if value:
                    refused.setdefault(position, RowError(name, REASON))
            start += len(table)
    return refused


def _measure(column: Any) -> list[int]:
    """Whether each value of a column holds anything: its length, or 1 for what has none."""
    for measure in (pc.list_value_length, pc.binary_length):
        try:
            return pc.fill_null(measure(column), 0).to_pylist()
        except (NotImplementedError, ValueError):  # of another type
            continue
    return pc.cast(pc.is_valid(column), "int32").to_pylist()
