"""What is wrong with a file that cannot be read, by file and line: the readers' own words name neither."""

import csv
import json
import lzma
import sys
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from zlib import error as ZlibError

import fsspec


SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "vertical bars", ",": "commas"}
SHOWN_LENGTH = 60


class SourceError(ValueError):
    """An error whose text is the reader's."""


def find_fault(files: Iterable[Path]) -> str | None:
    """
    What is wrong with the first of some files that is not what its ending says.

    Args:
        files (`Iterable[Path]`): Files of rows, packed or not.

    Returns:
        `str`: the file, the line where there is one, the reason and what to do; `None` where nothing is found.
    """
    return next(filter(None, (_find_missing_package(file) or _find_fault(file) for file in files)), None)


def _find_missing_package(file: Path) -> str | None:
    if file.suffix.lower() != ".zst" or find_spec("zstandard") is not None:
        return None
    return f"`{file}` is unpacked by the package zstandard, which is not installed: `pip install zstandard`."


def _find_fault(file: Path) -> str | None:
    endings = [suffix.lower() for suffix in file.suffixes]
    if endings[-1:] == [".parquet"]:
        with file.open("rb") as opened:
            if opened.read(4) == b"PAR1":
                return None
        return f"`{file}` is no Parquet file, whatever its ending. Give it the ending of what it is, such as .jsonl."
    try:
        with fsspec.open(str(file), "rb", compression="infer") as opened:
            content: bytes = opened.read()
    except EOFError:
        return f"`{file}` ends in the middle of its packed data. Copy or pack it again."
    except (OSError, lzma.LZMAError, ZlibError) as error:
        if isinstance(error, PermissionError):
            return f"`{file}` may not be read by you. Change its permissions (`chmod`), or copy it."
        return f"`{file}` is not packed as its ending {endings[-1]} says ({error}). Take the ending off, or pack it."
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return f"`{file}` is UTF-16 text. Save it as UTF-8: `iconv -f utf-16 -t utf-8`."
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            line.decode()
        except UnicodeDecodeError as error:
            return (
                f"`{file}`, line {number}: the byte 0x{line[error.start]:02x} is no UTF-8 text. Save the file as "
                "UTF-8, for example with `iconv -f latin1 -t utf-8`."
            )
    if {".csv", ".tsv"} & set(endings):
        return None
    texts = [line.decode() for line in lines]
    if endings[:1] == [".json"] and _is_object("\n".join(texts)):
        return f"`{file}` is one JSON object. Make it a list of rows, or one row a line (.jsonl)."
    if content.lstrip()[:1] == b"[" and endings[:1] != [".jsonl"]:
        return _find_fault_of_list(file, "\n".join(texts))
    return next(filter(None, (_find_fault_of_line(file, *item) for item in enumerate(texts, 1))), None)


def holds_one_object(file: Path) -> bool:
    """Whether a file is one JSON object and no rows, such as the metadata beside them."""
    return file.suffix.lower() == ".json" and _is_object(file.read_text(encoding="utf-8-sig", errors="replace"))


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def _find_fault_of_line(file: Path, number: int, line: str) -> str | None:
    if not line.strip():
        return None
    shown = line.strip() if len(line.strip()) <= SHOWN_LENGTH else line.strip()[:SHOWN_LENGTH] + "…"
    try:
        row = json.loads(line, object_pairs_hook=_refuse_twins)
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return f"`{file}`, line {number} has half a character (a lone surrogate): {shown} Mend or remove the line."
    except ValueError as error:
        reason = (
            f"is no JSON ({error.msg}, column {error.colno})" if isinstance(error, json.JSONDecodeError) else error
        )
        return f"`{file}`, line {number} {reason}: {shown} Each line is to be one JSON object; mend or remove it."
    if isinstance(row, dict):
        return None
    return f"`{file}`, line {number} is no JSON object: {shown} Each line is to be one, with the columns as its keys."


def _refuse_twins(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object of JSON, with no key twice."""
    keys = [key for key, _ in pairs]
    twin = next((key for key in keys if keys.count(key) > 1), None)
    if twin is not None:
        raise ValueError(f"has the key `{twin}` twice in one object")
    return dict(pairs)


def find_wrapped_rows(file: Path, row: Mapping[str, object], known: Iterable[str]) -> str | None:
    """
    What is wrong with a file of one JSON object that holds rows, or columns, instead of being one.

    Args:
        file (`Path`): The file.
        row (`Mapping[str, object]`): The only row that was read from it.
        known (`Iterable[str]`): Columns that may hold lists of objects.
    """
    lists = {name: value for name, value in row.items() if isinstance(value, list) and value}
    inside = [name for name, value in lists.items() if isinstance(value[0], dict) and name not in set(known)]
    if inside:
        return (
            f"`{file}` is one JSON object, whose rows seem to be the list `{inside[0]}`. Save that list alone, or one "
            f"row a line: `jq -c '.{inside[0]}[]' {file} > rows.jsonl`."
        )
    lengths = {len(value) for value in lists.values()}
    firsts = [value[0] for value in lists.values()]
    if len(lists) == len(row) and len(lengths) == 1 and any(isinstance(first, str) for first in firsts):
        return (
            f"`{file}` is one JSON object of columns. Save rows instead, such as by `pandas.read_json(...)` and "
            "`to_json('rows.jsonl', orient='records', lines=True)`."
        )
    return None


def _find_fault_of_list(file: Path, text: str) -> str | None:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        return f"`{file}`, line {error.lineno} is no JSON ({error.msg}, column {error.colno}). Mend the list there."
    number = next((number for number, row in enumerate(rows) if not isinstance(row, dict)), None)
    return None if number is None else f"`{file}`: item {number} of its list is no JSON object. Mend or remove it."


def find_other_separator(file: Path, header: list[str], separator: str) -> str | None:
    """
    What is wrong with a CSV or TSV file whose header is one name that another separator would cut.

    Args:
        file (`Path`): The file.
        header (`list[str]`): Its columns, as `separator` cuts them.
        separator (`str`): The one that its ending means.
    """
    found = (
        next((other for other in SEPARATORS if other != separator and other in header[0]), None) if header else None
    )
    if len(header) != 1 or found is None:
        return None
    remedy = {"\t": "name it .tsv", ",": "name it .csv"}.get(found, "save the rows as JSON lines")
    return (
        f"the header of `{file}` is one column, `{header[0]}`: its cells are apart by {SEPARATORS[found]}, and those "
        f"of a {'.tsv' if separator != ',' else '.csv'} file are to be by {SEPARATORS[separator]}. Save it with "
        f"those, or {remedy}."
    )


def find_uneven_line(file: Path, separator: str) -> str | None:
    """
    What is wrong with a CSV or TSV file of which a line has more or fewer cells than the header.

    The reader shifts the cells of a longer one by a column, and leaves those of a shorter one blank, without a word.

    Args:
        file (`Path`): The file, packed or not.
        separator (`str`): What its cells are apart by.
    """
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        with fsspec.open(str(file), "rt", encoding="utf-8-sig", newline="", compression="infer") as opened:
            lines = csv.reader(opened, delimiter=separator)
            width, end = 0, 0
            for cells in lines:
                if cells == ["\x1a"]:
                    return (
                        f"`{file}`, line {end + 1} is the end of a file of DOS (Ctrl-Z), which would be read as a "
                        "row. Take it off: `tr -d '\\032'`."
                    )
                # The reader passes over these, also before the header.
                is_blank = len(cells) < 2 and not "".join(cells).strip(" \t")
                if not width and not is_blank:
                    width = len(cells)
                elif not is_blank and len(cells) != width:
                    return (
                        f"`{file}`, line {end + 1} has {len(cells)} cells, and the header {width}: which cell belongs "
                        "to which column is a guess. Write cells with commas, quotes or line ends in them in double "
                        "quotes, or save the rows as JSON lines."
                    )
                end = lines.line_num
    except csv.Error:
        return None  # the reader's own words
    finally:
        csv.field_size_limit(limit)
    return None
