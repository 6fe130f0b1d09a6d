"""Cells of CSV and JSON that become what is trained on: read as text, as they stand."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pandas
from datasets import Dataset, Features, List, Value, concatenate_datasets

from .faults import SourceError, find_other_separator, find_uneven_line


# Columns that become what is trained on: they are read as text, whatever their cells look like.
TEXT_COLUMNS = {
    *("text", "prompt", "completion", "messages", "conversations", "instruction", "input", "output", "system"),
    *("history", "tools"),
}
# What pandas takes for a missing value.
MISSING = (
    *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA"),
    *("NULL", "NaN", "None", "n/a", "nan", "null"),
)


def find_options(builder: str, files: list[Path], texts: set[str]) -> dict[str, Any]:
    """Settings of a builder: in CSV the columns of texts are read as they stand."""
    if builder != "csv":
        return {}
    separator = "\t" if any(suffix.lower() == ".tsv" for file in files for suffix in file.suffixes) else ","
    names = set()
    for file in files:
        header = [str(name) for name in pandas.read_csv(file, sep=separator, nrows=0).columns]
        if told := find_other_separator(file, header, separator) or find_uneven_line(file, separator):
            raise SourceError(told)
        names |= set(header)
    return {
        "sep": separator,
        "converters": dict.fromkeys(sorted(names & texts), str),
        # Words such as `null` mean a missing value in the other columns alone.
        "keep_default_na": False,
        "na_values": dict.fromkeys(sorted(names - texts), list(MISSING)),
    }


def keep_texts(loaded: Dataset, files: list[Path], texts: set[str]) -> Dataset:
    """Texts of JSON that Arrow took for dates, read again as they stand; all else stays as it is."""
    if not (wanted := find_dates(loaded, texts)):
        return loaded
    values = [{name: row.get(name) for name in wanted} for file in files for row in _read_json(file)]
    again = Dataset.from_list(values, features=Features(wanted))
    kept = loaded.remove_columns(list(wanted))
    return concatenate_datasets([kept, again], axis=1).select_columns(loaded.column_names)


def find_dates(loaded: Dataset, texts: set[str]) -> dict[str, Any]:
    """The columns of texts that hold dates, and the types that they should have."""
    wanted = {name: _read_dates_as_text(feature) for name, feature in loaded.features.items() if name in texts}
    return {name: feature for name, feature in wanted.items() if feature != loaded.features[name]}


def _read_dates_as_text(feature: Any) -> Any:
    if isinstance(feature, Value):
        return Value("string") if feature.dtype.startswith(("timestamp", "date", "time")) else feature
    if isinstance(feature, List):
        return List(_read_dates_as_text(feature.feature), length=feature.length)
    return {key: _read_dates_as_text(item) for key, item in feature.items()} if isinstance(feature, dict) else feature


def _read_json(file: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines, or of one list."""
    with fsspec.open(str(file), "rt", encoding="utf-8-sig", compression="infer") as opened:
        content = opened.read()
    if content.lstrip().startswith("["):
        yield from json.loads(content)
    else:
        yield from (json.loads(line) for line in content.split("\n") if line.strip())
