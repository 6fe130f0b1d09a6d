"""Pictures, sound and films beside text: TRL trains on them with models for them, and only text is trained on here."""

from typing import Any

import pyarrow as pa
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

    Nothing is decoded. Whoever names what is read, by `columns`, has said that the text is complete without.
    """
    refused: dict[int, RowError] = {}
    for name in (name for name in MEDIA if name in dataset.column_names):
        start = 0
        for table in dataset.select_columns([name]).with_format("arrow").iter(batch_size=1000):
            column: Any = table[name]
            for position, value in enumerate(_list_filled(column), start):
                if value:
                    refused.setdefault(position, RowError(name, REASON))
            start += len(table)
    return refused


def _list_filled(column: Any) -> list[bool]:
    """Whether each value of a column of Arrow holds anything; lists and objects of what is empty do not."""
    kind = column.type
    if pa.types.is_struct(kind):
        parts = [_list_filled(pc.struct_field(column, [place])) for place in range(kind.num_fields)]
        return [any(values) for values in zip(*parts, strict=True)] if parts else [False] * len(column)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        filled = [False] * len(column)
        parents = pc.list_parent_indices(column).to_pylist()
        for parent, is_filled in zip(parents, _list_filled(pc.list_flatten(column)), strict=True):
            filled[parent] |= is_filled
        return filled
    try:
        # Of pictures kept as bytes none is copied to be looked at.
        return [bool(length) for length in pc.binary_length(column).to_pylist()]
    except NotImplementedError:  # numbers, truth values and what else there is; NaN is how tables leave a cell blank
        return [bool(value) and value == value for value in column.to_pylist()]
