"""Loading rows from wherever they are, with errors that say what was given; and rows that sets share."""

import bz2
import gzip
import json
import lzma
import re
import shlex
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from hf_in2core.rows.columns import check_sources
from hf_in2core.rows.hashes import find_shared_rows, hash_rows
from hf_in2core.rows.sources import find_hub_id, load_rows, parse_named_sources


ROWS = [{"prompt": f"{number} :", "completion": f" number {number + 1}"} for number in range(5)]


def write(folder: Path, form: str) -> str:
    """The same rows in one of the forms that users have."""
    dataset = Dataset.from_list(ROWS)
    path = folder / f"rows{form}"
    if form in (".jsonl", ".ndjson", ".JSONL"):
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    elif form == ".json":
        path.write_text(json.dumps(ROWS), encoding="utf-8")
    elif form == ".parquet":
        dataset.to_parquet(path)
    elif form == ".csv":
        dataset.to_csv(path)
    elif form == ".tsv":
        dataset.to_csv(path, sep="\t")
    elif form == "-saved":
        dataset.save_to_disk(path)
    elif form == "-splits":
        DatasetDict({"train": dataset, "test": dataset.select([4])}).save_to_disk(path)
    elif form == "-files":
        path.mkdir()
        dataset.to_parquet(path / "train-00000.parquet")
        dataset.select([4]).to_parquet(path / "test-00000.parquet")
    elif form.startswith("-parts"):
        write_parts(path, form.partition(".")[2])
    elif path.suffix in (".gz", ".xz", ".bz2"):
        plain = Path(write(folder, form.rpartition(".")[0]))
        opened: Any = {".gz": gzip, ".xz": lzma, ".bz2": bz2}[path.suffix]
        path.write_bytes(opened.compress(plain.read_bytes()))
    return str(path)


def write_parts(path: Path, ending: str) -> None:
    path.mkdir()
    for number, rows in enumerate((ROWS[:3], ROWS[3:])):
        part = path / f"part-{number}.{ending}"
        if ending == "csv":
            Dataset.from_list(rows).to_csv(part)
            continue
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        part.write_bytes(gzip.compress(content) if ending.endswith(".gz") else content)


FORMS = [
    ".jsonl",
    ".json",
    ".parquet",
    ".csv",
    "-saved",
    "-splits",
    "-files",
    ".tsv",
    ".ndjson",
    ".JSONL",
    ".jsonl.gz",
]
FORMS += [".json.xz", ".csv.bz2", "-parts.jsonl", "-parts.csv", "-parts.jsonl.gz"]


@pytest.mark.parametrize("form", FORMS)
def test_every_local_form_gives_the_same_rows(tmp_path: Path, form: str) -> None:
    assert load_rows(write(tmp_path, form)).to_list() == ROWS


@pytest.mark.parametrize("form", ["-splits", "-files"])
def test_a_split_of_a_folder(tmp_path: Path, form: str) -> None:
    assert load_rows(write(tmp_path, form) + ":test").to_list() == ROWS[4:]


def test_a_slice_of_a_split_and_a_colon_in_a_path(tmp_path: Path) -> None:
    folder = tmp_path / "a:b"
    folder.mkdir()
    assert load_rows(write(folder, ".jsonl")).to_list() == ROWS
    assert load_rows(write(tmp_path, "-files") + ":train[1:3]").to_list() == ROWS[1:3]


def test_the_only_split_is_taken_whatever_its_name(tmp_path: Path) -> None:
    DatasetDict({"coreset_25": Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "one")
    assert len(load_rows(str(tmp_path / "one"))) == 5


@pytest.mark.parametrize("source", ["no/such/folder", "missing.jsonl", "./missing", "~/missing-folder-of-nobody"])
def test_missing_path(source: str) -> None:
    with pytest.raises(FileNotFoundError) as raised:
        load_rows(source, "pool")
    assert source in str(raised.value) and "pool" in str(raised.value) and str(Path.cwd()) in str(raised.value)


def test_missing_split_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="splits train, test, not `validation`"):
        load_rows(write(tmp_path, "-splits") + ":validation", "pool")
    with pytest.raises(ValueError, match="without splits"):
        load_rows(write(tmp_path, "-saved") + ":train", "pool")


def test_unreadable_file_is_named_with_the_reason(tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a"\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"test set `.*broken.jsonl` cannot be loaded"):
        load_rows(str(broken), "test set")
    other = tmp_path / "rows.txt"
    other.write_text("a", encoding="utf-8")
    with pytest.raises(ValueError, match=r"this one in `\.txt`"):
        load_rows(str(other))


CELLS = "zip,when,note\n01234,2024-05-01,null\n00012,2024-05-02,\n,,NA\n"


def test_cells_of_texts_stay_as_they_are_written(tmp_path: Path) -> None:
    """Text columns by name or by mapping; any other column keeps the type that its cells have."""
    table = tmp_path / "a.csv"
    table.write_text(CELLS.replace("zip,when", "prompt,completion"))
    rows = load_rows(str(table))
    assert rows["prompt"][:] == ["01234", "00012", ""] and rows["completion"][:] == ["2024-05-01", "2024-05-02", ""]
    assert rows["note"][:] == [None, None, None]
    table.write_text(CELLS)
    assert load_rows(str(table))["zip"][:] == [1234, 12, None]
    mapped = load_rows(str(table), columns=["prompt=zip", "completion=note"])
    assert mapped["zip"][:] == ["01234", "00012", ""] and mapped["note"][:] == ["null", "", "NA"]

    lines = tmp_path / "a.jsonl"
    turns = [[{"role": "assistant", "content": f"2024-05-0{day}"}] for day in (1, 2)]
    values = [{"messages": turn, "output": turn[0]["content"], "made": turn[0]["content"], "n": 1} for turn in turns]
    lines.write_text("".join(json.dumps(row) + "\n" for row in values))
    read = load_rows(str(lines))
    assert read["output"][:] == ["2024-05-01", "2024-05-02"] and read["messages"][:] == turns
    assert read.column_names == ["messages", "output", "made", "n"] and str(read["made"][0]).startswith(
        "2024-05-01 00"
    )
    folder = tmp_path / "parts"
    folder.mkdir()
    for number, row in enumerate(values):
        (folder / f"{number}.jsonl").write_text(json.dumps(row) + "\n")
    assert load_rows(str(folder))["output"][:] == ["2024-05-01", "2024-05-02"]
    # Whatever order the parts are read in, a text stays with its row.
    for number in range(2, 12):
        text = f"2024-06-{number:02}"
        (folder / f"{number}.jsonl").write_text(json.dumps(values[0] | {"output": text, "n": number}) + "\n")
    assert all(row["output"] == f"2024-06-{row['n']:02}" for row in load_rows(str(folder)) if row["n"] != 1)


def test_empty_file(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).select([]).to_parquet(tmp_path / "empty.parquet")
    (tmp_path / "empty.jsonl").touch()
    for name in ("empty.parquet", "empty.jsonl"):
        with pytest.raises(ValueError, match=f"pool `.*{name}` has no rows"):
            load_rows(str(tmp_path / name), "pool")


def test_unreachable_hub_dataset_is_named() -> None:
    with pytest.raises(ValueError, match="The pool `nobody/nothing:train` cannot be loaded"):
        load_rows("nobody/nothing:train", "pool")


@pytest.mark.parametrize(
    ("source", "hub_id"),
    [("tatsu-lab/alpaca", "tatsu-lab/alpaca"), ("user/repo:config:train[:10%]", "user/repo"), ("squad", "squad")],
)
def test_hub_id(source: str, hub_id: str) -> None:
    assert find_hub_id(source) == hub_id


def test_hub_id_of_a_local_file(tmp_path: Path) -> None:
    assert find_hub_id(write(tmp_path, ".jsonl")) is None


def test_named_sources(tmp_path: Path) -> None:
    assert parse_named_sources(["a.jsonl"]) == {"validation": "a.jsonl"}
    assert parse_named_sources(["math=a.jsonl", "code=user/repo:test"]) == {
        "math": "a.jsonl",
        "code": "user/repo:test",
    }
    assert parse_named_sources(["a.jsonl", "code=b.jsonl"]) == {"validation": "a.jsonl", "code": "b.jsonl"}
    assert parse_named_sources(["gsm-8k=a.jsonl", "v1.5=b"]) == {"gsm-8k": "a.jsonl", "v1.5": "b"}
    # A file whose name looks like a named source is a file.
    path = tmp_path / "lr=1.jsonl"
    path.write_text("{}", encoding="utf-8")
    assert parse_named_sources([str(path)]) == {"validation": str(path)}


def test_named_sources_refused() -> None:
    with pytest.raises(ValueError, match="`b.jsonl` is not the first without a name"):
        parse_named_sources(["a.jsonl", "math=c.jsonl", "b.jsonl"])
    with pytest.raises(ValueError, match="`math` twice"):
        parse_named_sources(["math=a.jsonl", "math=b.jsonl"])


def test_shared_rows_are_found_by_content() -> None:
    rows = Dataset.from_list([*ROWS, ROWS[0]])
    # The same content with its columns in another order, and a column that is null.
    others = [{"completion": row["completion"], "tools": None, "prompt": row["prompt"]} for row in ROWS[:2]]
    others.append({"completion": ROWS[2]["completion"] + ".", "tools": None, "prompt": ROWS[2]["prompt"]})
    shared = find_shared_rows(hash_rows(rows), hash_rows(Dataset.from_list(others)))
    assert shared.tolist() == [True, True, False, False, False, True]


def test_hash_tells_columns_and_rows_apart() -> None:
    hashes = hash_rows(Dataset.from_list([{"prompt": "a", "completion": "b"}, {"prompt": "ab", "completion": ""}]))
    swapped = hash_rows(Dataset.from_list([{"prompt": "b", "completion": "a"}]))
    assert len({*hashes, *swapped}) == 3


def test_hash_of_conversations_ignores_fields_that_are_null() -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    with_null = [turn | {"tool_calls": None} for turn in turns]
    assert hash_rows(Dataset.from_list([{"messages": turns}])) == hash_rows(
        Dataset.from_list([{"messages": with_null}])
    )


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.parametrize("left", ["pool.jsonl", "more/pool.jsonl", "a.csv"])
def test_a_folder_of_which_files_would_be_left_out_is_refused(tmp_path: Path, left: str) -> None:
    """Files named after splits hide the others from `load_dataset`, and so do those of the commonest format."""
    taken = "validation.jsonl" if left.endswith("pool.jsonl") else "part.jsonl"
    write_lines(tmp_path / taken, ROWS[3:])
    if left.endswith(".csv"):
        Dataset.from_list(ROWS[:3]).to_csv(tmp_path / left)
    else:
        write_lines(tmp_path / left, ROWS[:3])
    with pytest.raises(ValueError, match=rf"\({taken}\), by their names .* and of {left} nothing would be read"):
        load_rows(str(tmp_path), "pool")
    split = "validation" if taken.startswith("validation") else "train"
    assert load_rows(f"{tmp_path}:{split}").to_list() == ROWS[3:]
    # Metadata is no rows.
    (tmp_path / left).rename(tmp_path.parent / "kept")
    (tmp_path / "dataset_infos.json").write_text('{"default": {}}', encoding="utf-8")
    assert load_rows(str(tmp_path)).to_list() == ROWS[3:]
    (tmp_path.parent / "kept").rename(tmp_path / left)
    # A README that says what is read, and hidden files, are no accident.
    card = f"---\nconfigs:\n- config_name: default\n  data_files: {taken}\n---\nRows.\n"
    (tmp_path / "README.md").write_text(card)
    assert load_rows(str(tmp_path)).to_list() == ROWS[3:]
    (tmp_path / "README.md").unlink()
    (tmp_path / left).rename(tmp_path / ("." + Path(left).name))
    assert load_rows(str(tmp_path)).to_list() == ROWS[3:]


@pytest.mark.parametrize("form", ["-splits", "-files"])
def test_slices_and_sums_of_splits(tmp_path: Path, form: str) -> None:
    source = write(tmp_path, form)
    assert load_rows(f"{source}:train[1:3]+test").to_list() == [*ROWS[1:3], ROWS[4]]
    assert load_rows(f"{source}:train[:40%]").to_list() == ROWS[:2]
    with pytest.raises(ValueError, match='Unknown split "dev"'):
        load_rows(f"{source}:dev[:2]")


@pytest.mark.parametrize(("ending", "separator"), [(".csv", ","), (".tsv", "\t")])
@pytest.mark.parametrize(("lines", "number", "cells"), [(["a,b", '"c\nd",e,f'], 3, 3), (['a,"b\nc"', "d"], 4, 1)])
def test_cells_that_would_move_to_another_column(
    tmp_path: Path, lines: list[str], number: int, cells: int, ending: str, separator: str
) -> None:
    """The reader takes the first cell of a longer line for an index, and leaves those of a shorter one blank."""
    path = tmp_path / f"rows{ending}"
    text = "\n".join(["prompt,completion", *lines, ""]).replace(",", separator)
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"line {number} has {cells} cells, and the header 2"):
        load_rows(str(path))
    path.write_text(text.replace(f"{separator}f\n", "\n").replace("\nd\n", f"\nd{separator}\n\n"), encoding="utf-8")
    assert len(load_rows(str(path))) == 2
    path.write_text(f"prompt{separator}completion\n\na{separator}b\n  \n", encoding="utf-8")
    assert load_rows(str(path)).to_list() == [{"prompt": "a", "completion": "b"}]


def test_lines_that_the_reader_passes_over(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    for text in ("prompt,completion\na,b\n   \n", "\nprompt,completion\na,b\n", " \nprompt,completion\n \t\na,b\n"):
        path.write_text(text, encoding="utf-8")
        assert load_rows(str(path)).to_list() == [{"prompt": "a", "completion": "b"}]
    path.write_text("prompt,completion\na,b\n\x1a", encoding="utf-8")
    with pytest.raises(ValueError, match=r"line 3 is the end of a file of DOS .Ctrl-Z.*tr -d"):
        load_rows(str(path))


def test_parts_of_different_columns_are_named(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", ROWS[:3])
    write_lines(tmp_path / "b.jsonl", [row | {"id": 1} for row in ROWS[3:]])
    with pytest.raises(ValueError, match=r"a\.jsonl has completion, prompt, and b\.jsonl has completion, id, prompt"):
        load_rows(str(tmp_path))
    # Also where a part is empty, and where two have one name.
    (tmp_path / "a.jsonl").rename(tmp_path / "c.jsonl")
    (tmp_path / "a.jsonl").write_text("\n")
    (tmp_path / "more").mkdir()
    (tmp_path / "b.jsonl").rename(tmp_path / "more" / "c.jsonl")
    with pytest.raises(ValueError, match=r" c\.jsonl has completion, prompt, and more/c\.jsonl has completion, id,"):
        load_rows(str(tmp_path))


METADATA = ["dataset_infos.json", "dataset_info.json", "dataset_dict.json", "config.json", "state.json", "stats.json"]


@pytest.mark.parametrize("name", [*METADATA, "README.md"])
@pytest.mark.parametrize("form", ["-parts.jsonl", "-parts.csv", "-files", "data"])
def test_what_tells_of_a_folder_is_none_of_its_rows(tmp_path: Path, name: str, form: str) -> None:
    if form == "data":
        folder = tmp_path
        (folder / "data").mkdir()
        Dataset.from_list(ROWS).to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    else:
        folder = Path(write(tmp_path, form))
    (folder / name).write_text("{}" if name.endswith(".json") else "Rows.", encoding="utf-8")
    assert load_rows(str(folder)).to_list() == ROWS
    if form == "-parts.csv":
        cells = [row | {"completion": "null"} for row in ROWS]
        for number, rows in enumerate((cells[:3], cells[3:])):
            Dataset.from_list(rows).to_csv(folder / f"part-{number}.csv")
        assert load_rows(str(folder)).to_list() == cells
    if form == "-parts.jsonl":
        for number in range(2):
            write_lines(folder / f"part-{number}.jsonl", [{"prompt": "a", "completion": f"2024-05-0{number + 1}"}])
        assert load_rows(str(folder))["completion"][:] == ["2024-05-01", "2024-05-02"]


def test_a_package_that_unpacks_is_named_where_it_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.zst"
    if find_spec("zstandard") is None:
        path.write_bytes(b"\x28\xb5\x2f\xfd")
        with pytest.raises(ValueError, match="pip install zstandard"):
            load_rows(str(path))
    else:
        zstandard: Any = import_module("zstandard")
        path.write_bytes(zstandard.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))
        assert load_rows(str(path)).to_list() == ROWS


def test_a_pattern_of_names_and_a_packed_parquet(tmp_path: Path) -> None:
    write(tmp_path, ".parquet")
    (tmp_path / "rows.parquet").rename(tmp_path / "rows.parquet.gz")
    for source, told in (("*.jsonl", "patterns of names are not expanded"), ("rows.parquet.gz", "this one in `.gz`")):
        with pytest.raises(ValueError, match=told):
            load_rows(str(tmp_path / source))


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"prompt": "a", "completion": "\\ud800"}', "line 2 has half a character"),
        ('{"prompt": "a", "prompt": "b", "completion": "c"}', "line 2 has the key `prompt` twice"),
    ],
)
def test_lines_that_the_reader_refuses_are_named(tmp_path: Path, line: str, told: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=told):
        load_rows(str(path))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"version": 1, "data": ROWS}, "whose rows seem to be the list `data`"),
        ({name: [row[name] for row in ROWS] for name in ROWS[0]}, "is one JSON object of columns"),
    ],
)
def test_rows_inside_an_object(tmp_path: Path, content: dict[str, Any], told: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=told):
        load_rows(str(path))
    # One row is one row, whatever it holds.
    turns = [{"role": "user", "content": "a"}]
    for row in (
        ROWS[0],
        {"messages": turns},
        {"input_ids": [1, 2], "labels": [1, 2]},
        {"prompt": turns, "completion": turns},
    ):
        path.write_text(json.dumps(row), encoding="utf-8")
        assert len(load_rows(str(path))) == 1


@pytest.mark.parametrize(
    ("names", "remedy"),
    [
        (["instruction", "input", "output"], "--columns alpaca`"),
        (["instruction", "context", "response"], "--columns alpaca input=context output=response`"),
        (["query", "response"], "--columns prompt=query completion=response`"),
        (["instruction", "generation", "model_name"], "--columns prompt=instruction completion=generation`"),
        (["Prompt", "Completion"], "--columns prompt=Prompt completion=Completion`"),
        (["prompt", " completion"], "--columns prompt=prompt 'completion= completion'`"),
        (["Instruction", "Context", "Response"], "alpaca instruction=Instruction input=Context output=Response`"),
        (["Instruction", "input", "Output"], "--columns alpaca instruction=Instruction output=Output`"),
        (["Messages"], "--columns messages=Messages`"),
        (["prompt", "chosen", "rejected"], "prompt=prompt completion=chosen`, or `--columns messages=chosen"),
        (["question", "chosen", "rejected"], "prompt=question completion=chosen`, or `--columns messages=chosen"),
        (["chosen", "rejected"], "one answer: `--columns messages=chosen` .*, or `--columns text=chosen"),
        (["segments"], "`input_ids` and `labels`"),
        (["a", "b"], r"use a preset \(alpaca"),
        (["messages", "prompt", "completion"], "--columns messages=messages`"),
    ],
)
def test_columns_of_no_format_are_answered_with_a_mapping(names: list[str], remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy) as raised:
        check_sources(names, None)
    # What is proposed can be done.
    for told in re.findall(r"(?<!for example )`--columns ([^`]*)`", str(raised.value)):
        check_sources(names, shlex.split(told))
