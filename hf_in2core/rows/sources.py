"""Rows from wherever a user has them: Hub ids, saved datasets, folders and files; and rows that sets share."""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import (
    Dataset,
    DatasetDict,
    ReadInstruction,
    concatenate_datasets,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.data_files import FILES_TO_IGNORE

from hf_in2core.names import VALIDATION

from .cells import TEXT_COLUMNS, find_dates, find_options, keep_texts
from .columns import check_sources
from .faults import SourceError, find_fault, find_wrapped_rows, holds_one_object
from .places import describe_missing, is_hub_id


# File suffix -> builder of `datasets.load_dataset`.
FILE_FORMATS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
ACCEPTED = ".jsonl, .ndjson, .json, .csv, .tsv (each also .gz, .bz2, .xz or .zst) or .parquet file"
NAMED_SOURCE = re.compile(r"([A-Za-z][\w.-]*)=(.+)", re.DOTALL)
# A colon that is not inside the brackets of a slice such as `train[:10%]`.
COLON = re.compile(r":(?![^\[]*\])")
# A part of a split, or several.
PART = re.compile(r"[\[+]")
# Beside those that `datasets` passes over, what saved datasets and exports keep beside their rows.
NO_ROWS = ("state.json", "stats.json")
# Where a folder's README says which files are which split.
DECLARED_SPLITS = re.compile(r"\A---\n(?:.*\n)*?configs:")


def load_rows(
    source: str, what: str = "dataset", revision: str | None = None, columns: Iterable[str] | None = None
) -> Dataset:
    """
    Load rows from the Hub or from disk.

    Args:
        source (`str`):
            Hub id (`user/name`, `user/name:split`, `user/name:config:split`), a folder (of `save_to_disk`, or one that
            `load_dataset` reads, such as one of parts; `folder:split`), or a `.jsonl`, `.ndjson`, `.json`, `.csv`,
            `.tsv` or `.parquet` file, those of text also compressed. A split may be sliced and joined to others:
            `user/name:train[:1000]`, `folder:train+test`. Without a split: `train`, or the only one there is; a folder
            of which a file would be in no split is refused.
        what (`str`, *optional*, defaults to `"dataset"`):
            What the rows are for, named in errors.
        revision (`str`, *optional*):
            Branch, tag or commit of a Hub id.
        columns (`Iterable[str]`, *optional*):
            Column mapping as of [`columns.apply_columns`]. The cells of the columns that it reads, and of those with
            the names of TRL's formats and of the presets, stay text in CSV and JSON (`01234`, `2024-05-01`, `null` in
            a CSV; a blank cell is empty text); other columns get their types from the cells.

    Returns:
        [`~datasets.Dataset`] with at least one row.

    Raises:
        FileNotFoundError: if a local path does not exist.
        ValueError: if the source cannot be read, has no such split, or has no rows; the message says what was given.
    """
    try:
        path, split = _split_local(source)
        if path is None:
            dataset = _load_from_hub(source, revision)
        else:
            with _told_here():
                texts = {*TEXT_COLUMNS, *(item.partition("=")[2] for item in columns or [])}
                dataset = _load_local(path, split, texts)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"The {what} `{source}` cannot be loaded: {error}") from error
    except SourceError as error:
        raise ValueError(f"The {what} `{source}` cannot be loaded: {error}") from error
    except Exception as error:  # datasets raises many types, whose own text names neither the source nor a remedy
        reason = error.__cause__ or error
        if "corresponds to no data" not in str(reason):  # a split without rows
            text = " ".join(str(reason).split())
            told = _explain(source, f"{type(reason).__name__}: {text[:400]}")
            raise ValueError(f"The {what} `{source}` cannot be loaded: {told}") from error
        dataset = Dataset.from_dict({})
    if len(dataset) == 0:
        raise ValueError(f"The {what} `{source}` has no rows. Check the file or the split's name.")
    return dataset


@contextmanager
def _told_here() -> Iterator[None]:
    """Without the line that the reader of JSON logs before it raises: the error says more."""
    reader = logging.getLogger("datasets.packaged_modules.json.json")
    before, reader.disabled = reader.disabled, True
    try:
        yield
    finally:
        reader.disabled = before


def load_raw_rows(source: str, what: str, columns: list[str] | None = None, revision: str | None = None) -> Dataset:
    """
    [`load_rows`] of a set that is to be trained on or judged by: its columns are what the mapping reads, too.

    Raises:
        FileNotFoundError, ValueError: as [`load_rows`], and if the columns are not.
    """
    rows = load_rows(source, what, revision, columns)
    try:
        check_sources(rows.column_names, columns)
    except ValueError as error:
        raise ValueError(f"The {what} `{source}` cannot be read: {error}") from error
    return rows


def _explain(source: str, reason: str) -> str:
    """Why a source cannot be read: what is wrong with its files, or what is near its name; else the reader's words."""
    path, _ = _split_local(source)
    if path is None:
        return f"{describe_missing(COLON.split(source)[0])} As a Hub id: {reason}"
    parts = _list_parts(path) if path.is_dir() else [path]
    fault = find_fault(parts)
    if fault is None and "column names don't match" in reason:
        fault = _compare_columns(path, parts)
    return fault or f"{reason} Give a Hub id with an optional `:split`, a folder, or a {ACCEPTED}."


def _compare_columns(folder: Path, parts: list[Path]) -> str | None:
    """Which of some files in a folder has other columns than the first; `None` where none has."""
    read = {part.relative_to(folder).as_posix(): ", ".join(_read_header(part)) for part in parts}
    columns = {name: told for name, told in read.items() if told}
    first = next(iter(columns), "")
    other = next((name for name, told in columns.items() if told != columns[first]), None)
    return other and (
        f"its files have different columns: {first} has {columns[first]}, and {other} has {columns[other]}. Give all "
        "of them the same, null where there is nothing, or take out those that are no rows of this set."
    )


def _read_header(file: Path) -> list[str]:
    """The columns of the first row of a file; none where it has no rows."""
    builder = _get_format(file)
    assert builder is not None
    separator = {"sep": "\t"} if ".tsv" in file.name.lower() else {}
    try:
        rows = iter(load_dataset(builder, data_files=str(file), split="train", streaming=True, **separator))
        return sorted(next(rows, {}))
    except Exception:  # a reader may raise anything, and this only explains what another said
        return []


def _split_local(source: str) -> tuple[Path | None, str | None]:
    """The local path and split that a source names; no path for a Hub id."""
    whole = Path(source).expanduser()
    if whole.exists():
        return whole, None
    parts = COLON.split(source)
    path = Path(parts[0]).expanduser()
    if len(parts) == 2 and path.is_dir():
        return path, parts[1]
    if len(parts) == 2 and path.is_file():
        raise SourceError(f"it is a file, which has no splits. Leave out `:{parts[1]}`.")
    if "*" in source:
        raise SourceError("patterns of names are not expanded. Give a folder: every file of rows in it is read.")
    if _get_format(path) is not None or not is_hub_id(parts[0]):
        raise FileNotFoundError(f"{describe_missing(parts[0])} It is no Hub id either.")
    return None, None


def _get_format(path: Path) -> str | None:
    """The builder that reads a file, by its ending; `None` where none does."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = bool(suffixes) and suffixes[-1] in COMPRESSED
    if packed:
        suffixes.pop()
    found = FILE_FORMATS.get(suffixes[-1]) if suffixes else None
    return None if packed and found == "parquet" else found


def _load_local(path: Path, split: str | None, texts: set[str]) -> Dataset:
    """Load a file or a folder, the columns `texts` as text."""
    if path.is_file():
        builder = _get_format(path)
        if builder is None:
            ending = f"this one in `{path.suffix}`" if path.suffix else "this one has no ending"
            raise SourceError(f"files end in {', '.join(FILE_FORMATS)}, {ending}. Save it as one of these.")
        if path.stat().st_size == 0:
            return Dataset.from_dict({})
        loaded = load_dataset(builder, data_files=str(path), split="train", **find_options(builder, [path], texts))
        if builder != "json":
            return loaded
        if len(loaded) == 1 and (told := find_wrapped_rows(path, loaded[0], texts | {"tools"})):
            raise SourceError(told)
        loaded.data.validate(full=True)  # Arrow reads bytes that are no text without a word
        return keep_texts(loaded, [path], texts)
    return _load_folder(path, split, texts)


def _load_folder(path: Path, split: str | None, texts: set[str]) -> Dataset:
    """A folder of `save_to_disk`, or one of files."""
    parts = _list_parts(path)
    is_saved = (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
    if is_saved and (not parts or next(path.rglob("*.arrow"), None) is not None):
        saved = load_from_disk(str(path))
        if isinstance(saved, DatasetDict):
            return _take_split(saved, split)
        if split is not None:
            raise SourceError(f"it is a single dataset without splits. Leave out `:{split}`.")
        return saved
    if not any(file.is_file() for file in path.rglob("*")):
        raise SourceError("the folder has no files in it. Give one with rows, or a file.")
    builders = {_get_format(part) for part in parts}
    options = find_options("csv", parts, texts) if builders == {"csv"} else {}
    # As `load_dataset` does it, which refuses any folder with a file state.json.
    builder: Any = load_dataset_builder(str(path), **options)
    if not _declares_splits(path):
        if found := _leave_out_metadata(builder.config.data_files):
            builder = load_dataset_builder(str(path), data_files=found, **options)
        if split is None:
            _refuse_left_out(path, parts, builder.config.data_files)
    builder.download_and_prepare()
    if split is not None and PART.search(split):
        return builder.as_dataset(split)
    splits = builder.as_dataset()
    loaded = _take_split(splits, split)
    if builders != {"json"} or not find_dates(loaded, texts):
        return loaded
    # The order in which datasets reads parts is its own: they are read again, as one list in ours. If that gives
    # other rows, what looks like a date stays one, and is refused by row where it should be text.
    ordered = load_dataset("json", data_files=[str(part) for part in parts], split="train")
    if len(splits) != 1 or len(ordered) != len(loaded):
        return loaded
    return keep_texts(ordered, parts, texts)


def _refuse_left_out(folder: Path, parts: list[Path], files: Mapping[Any, list[str]]) -> None:
    """Refuse a folder of which `load_dataset` leaves out files: it takes those named after splits, of one format."""
    read = {name: [Path(file) for file in listed] for name, listed in files.items()}
    known = {file.resolve() for listed in read.values() for file in listed}
    others = [part for part in parts if part.resolve() not in known]
    left = [str(part.relative_to(folder)) for part in others if not holds_one_object(part)]
    if left:
        splits = ", ".join(f"`{name}` ({listed[0].name})" for name, listed in read.items())
        raise SourceError(
            f"its files would be read as {splits}, by their names and the commonest format, and of "
            f"{', '.join(left[:3])}{' and others' if len(left) > 3 else ''} nothing would be read. Give the file that "
            "is meant, or a folder with the files of this set alone, in one format and named like part-0.jsonl. Where "
            f"one of those splits is meant, name it, such as `{folder}:{next(iter(read))}`."
        )


def _declares_splits(folder: Path) -> bool:
    readme = folder / "README.md"
    return readme.is_file() and bool(DECLARED_SPLITS.match(readme.read_text(encoding="utf-8", errors="replace")))


def _leave_out_metadata(files: Mapping[Any, list[str]]) -> dict[str, list[str]]:
    """The files of each split without those that hold no rows; nothing where all of them do."""
    kept = {str(name): [file for file in listed if Path(file).name not in NO_ROWS] for name, listed in files.items()}
    return {} if sum(map(len, kept.values())) == sum(map(len, files.values())) else kept


def _list_parts(folder: Path) -> list[Path]:
    """The files of rows in a folder and those below it, in our order; hidden ones and what tells of rows are none."""
    files = (part for part in folder.rglob("*") if part.is_file() and _get_format(part) is not None)
    files = (part for part in files if part.name not in (*FILES_TO_IGNORE, *NO_ROWS))
    return sorted(part for part in files if not re.search(r"(^|/)(\.|__)", part.relative_to(folder).as_posix()))


def _take_split(splits: DatasetDict, split: str | None) -> Dataset:
    if split is not None and PART.search(split):
        rows = {name: len(found) for name, found in splits.items()}
        try:
            parts = ReadInstruction.from_spec(split).to_absolute(rows)
        except ValueError as error:  # an unknown split, or one that is cut outside of its rows
            raise SourceError(f"{str(error).rstrip('.')}.") from error
        return concatenate_datasets([splits[part.splitname].select(range(part.from_, part.to)) for part in parts])
    name = split or ("train" if "train" in splits or len(splits) != 1 else next(iter(splits)))
    if name not in splits:
        raise SourceError(
            f"it has the splits {', '.join(map(str, splits))}, not `{name}`. Add `:split` with one of them."
        )
    return splits[name]


def _load_from_hub(source: str, revision: str | None) -> Dataset:
    name, *rest = COLON.split(source)
    if len(rest) > 2:
        raise ValueError("a Hub id takes at most `:config:split`")
    config = rest[0] if len(rest) == 2 else None
    if rest:
        return load_dataset(name, config, split=rest[-1], revision=revision)
    return _take_split(load_dataset(name, config, revision=revision), None)


def parse_named_sources(sources: list[str]) -> dict[str, str]:
    """
    Read `--validation V`, `--validation name=V name2=V2` or `--validation V name2=V2`.

    Args:
        sources (`list[str]`):
            A single source, or several of which one at most has no name.

    Returns:
        `dict[str, str]`: source by name; a source without one is called `validation`.

    Raises:
        ValueError: if several sources lack names, or a name is given twice.
    """
    named: dict[str, str] = {}
    for source in sources:
        match = None if Path(source).expanduser().exists() else NAMED_SOURCE.fullmatch(source)
        name, value = (match.group(1), match.group(2)) if match else (VALIDATION, source)
        if not match and VALIDATION in named:
            raise ValueError(
                f"`--validation` has {len(sources)} sources, and `{source}` is not the first without a name. Name "
                "them: `--validation math=data/math.jsonl code=data/code.jsonl`."
            )
        if name in named:
            raise ValueError(f"`--validation` has the name `{name}` twice. Give each source a name of its own.")
        named[name] = value
    return named


def find_hub_id(source: str) -> str | None:
    """Hub id of a source of [`load_rows`]; `None` for anything else."""
    try:
        path, _ = _split_local(source)
    except (FileNotFoundError, SourceError):
        return None
    return None if path is not None else COLON.split(source)[0]


def find_sources(pool: str | None) -> list[str]:
    """Hub ids that a pool comes from."""
    hub_id = find_hub_id(str(pool)) if pool else None
    return [] if hub_id is None else [hub_id]
