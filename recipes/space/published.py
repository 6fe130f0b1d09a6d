"""What the explorer shows of a published pool: read from the Hub without credentials, and trusted in nothing.

A repository may hold anything. Only its parquet files are opened, and of them the columns that are shown, of which no
more is read than a budget of bytes and rows; all text goes on as text. Negative influence = proponent.
"""

import fnmatch
import html
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import HfApi, HfFileSystem, hf_hub_download
from huggingface_hub import errors as hub_errors
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import httpx, validate_repo_id


# What is read and kept at most. A free Space has 16 GB of memory, shared by its visitors.
MAX_BYTES = 200_000_000
MAX_ROWS = 5_000
MAX_POINTS = 2_000
MAX_INFLUENCES = 2_000_000
MAX_CARD_BYTES = 5_000_000
MAX_FILES = 10_000
MAX_TEXT_CHARACTERS = 20_000
MAX_SETS, MAX_TEXT_COLUMNS = 6, 6

PARQUET = re.compile(r"(?P<folder>[\w.=-]+)/(?P<split>\w+(\.\w+)*)-\d{5}-of-\d{5}\.parquet", re.ASCII)
# In the order in which they are read; the first and the last of a line must be there.
TEXT_FORMATS = (
    ("messages",),
    ("conversations",),
    ("instruction", "input", "output"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("text",),
)
GROUP_NAMES = ("task", "source", "category", "subset", "dataset", "language", "kind")
REMEDY = (
    "Give the id of a dataset that was published with `push_influence_dataset`, `in2core publish` or `--hub_id`, "
    "such as `user/alpaca-in2core`."
)


class CannotShow(Exception):
    """A repository that cannot be shown: what was given, why not, and what to do instead."""


@dataclass
class Published:
    """
    A published pool, or a sample of it.

    Attributes:
        repo_id, commit (`str`):
            What was read.
        rows (`int`):
            Rows of the whole pool.
        table (`pandas.DataFrame`):
            The rows that are shown, strongest proponent first: `row` (position in the pool), `rank`, `influence`,
            `tokens`, `coreset`, one column per validation set, `group` and `text`.
        influence (`numpy.ndarray`):
            Every influence that was read, without nulls.
        lengths (`pandas.DataFrame`, *optional*):
            `loss tokens` and `influence` of rows drawn evenly from those that were read.
        verdict (`str`):
            The card's sentence about the comparison, or that there is none.
        splits (`dict[str, int]`):
            Rows of each coreset.
        notes (`list[str]`):
            What was left out.
    """

    repo_id: str
    commit: str
    rows: int
    table: pd.DataFrame
    influence: np.ndarray
    lengths: pd.DataFrame | None
    verdict: str
    splits: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_published(name: str) -> Published:
    """
    Read a published pool.

    Args:
        name (`str`):
            Dataset repository, `user/name`, or its address on the Hub.

    Returns:
        [`Published`]

    Raises:
        CannotShow: there is no such repository, or it holds no scored pool.
    """
    repo_id = parse_name(name)
    try:
        # Without a token: a Space's own secret would open private repositories to every visitor.
        api = HfApi(token=False)
        commit = str(api.dataset_info(repo_id).sha)
        tree = api.list_repo_tree(repo_id, repo_type="dataset", revision=commit, recursive=True)
        paths = {item.path: item.size for item in islice(tree, MAX_FILES) if isinstance(item, RepoFile)}
        folder, splits, others = find_splits(repo_id, paths)
        reader = _Reader(repo_id, commit)
        published = _read(reader, splits)
        published.verdict = read_verdict(reader, folder, paths)
    except hub_errors.GatedRepoError as error:
        raise CannotShow(
            f"{repo_id} is gated: its owner grants access one by one. This page reads public datasets."
        ) from error
    except hub_errors.RepositoryNotFoundError as error:
        raise CannotShow(
            f"There is no public dataset {repo_id}. Check its spelling; private ones are not shown. {REMEDY}"
        ) from error
    except hub_errors.OfflineModeIsEnabled as error:
        raise CannotShow("HF_HUB_OFFLINE is set where this page runs, so it reaches no Hub. Unset it.") from error
    except (hub_errors.HfHubHTTPError, httpx.HTTPError) as error:
        raise CannotShow(
            f"The Hub did not deliver {repo_id} ({type(error).__name__}). Try again in a minute."
        ) from error
    except (pa.ArrowException, OSError, ValueError) as error:
        raise CannotShow(
            f"The parquet files of {repo_id} cannot be read ({type(error).__name__}). Publish them again."
        ) from error
    if others:
        published.notes.append(f"The repository holds further scored pools that are not shown: {', '.join(others)}.")
    return published


def parse_name(name: str) -> str:
    """The repository that a user typed: an id or an address."""
    typed = name.strip()
    repo_id = re.sub(r"^https?://[^/]+/datasets/", "", typed).split("?")[0].split("#")[0].strip("/")
    repo_id = "/".join(repo_id.split("/")[:2])
    try:
        validate_repo_id(repo_id)
    except hub_errors.HFValidationError as error:
        raise CannotShow(f"{typed[:200]!r} is no dataset id. {REMEDY}") from error
    if "/" not in repo_id:
        raise CannotShow(f"{typed[:200]!r} names no user. {REMEDY}")
    return repo_id


def find_splits(repo_id: str, paths: Iterable[str]) -> tuple[str, dict[str, list[str]], list[str]]:
    """The folder of the pool, its parquet files by split, and the folders of other pools."""
    folders: dict[str, dict[str, list[str]]] = {}
    for path in sorted(paths):
        if match := PARQUET.fullmatch(path):
            folders.setdefault(match["folder"], {}).setdefault(match["split"], []).append(path)
    pools = [name for name in folders if "train" in folders[name]]
    if not pools:
        raise CannotShow(f"{repo_id} holds no scored pool: there is no data/train-*.parquet in it. {REMEDY}")
    folder = "data" if "data" in pools else pools[0]
    return folder, folders[folder], [name for name in pools if name != folder]


class _Reader:
    """Parquet files and small files of one commit."""

    def __init__(self, repo_id: str, commit: str) -> None:
        self.repo_id, self.commit = repo_id, commit
        self.files = HfFileSystem(token=False)

    def open(self, path: str) -> pq.ParquetFile:
        # Parquet knows what it needs and asks for it in few pieces; a cache of blocks would read far more.
        file = self.files.open(f"datasets/{self.repo_id}@{self.commit}/{path}", cache_type="none")
        return pq.ParquetFile(file, pre_buffer=True)

    def read_small(self, path: str) -> str:
        local = hf_hub_download(self.repo_id, path, repo_type="dataset", revision=self.commit, token=False)
        with open(local, encoding="utf-8", errors="replace") as file:
            return file.read()


# --- rows ---


def _read(reader: _Reader, splits: dict[str, list[str]]) -> Published:
    files = [reader.open(path) for path in splits["train"]]
    schema = files[0].schema_arrow
    if "influence" not in schema.names or not pa.types.is_floating(schema.field("influence").type):
        raise CannotShow(f"{reader.repo_id} is not scored: its rows have no number `influence`. {REMEDY}")
    if any(file.schema_arrow.names != schema.names for file in files):
        raise CannotShow(f"The parquet files of {reader.repo_id} have different columns. Publish them again.")
    notes: list[str] = []
    columns = choose_columns(schema)
    table, total = read_sample(files, columns, notes)
    influence = table["influence"].to_numpy(zero_copy_only=False).astype(float)
    chosen = choose_rows(influence)
    if len(chosen) < len(influence):
        notes.append(
            f"{len(chosen):,} rows are shown: the strongest proponents and opponents, and random ones between them."
        )
    coresets, sizes = read_coresets(reader, splits, notes)
    shown = build_table(table.take(pa.array(chosen)), coresets)
    return Published(
        reader.repo_id,
        reader.commit,
        total,
        shown,
        influence[np.isfinite(influence)],
        draw_lengths(table, influence),
        "",
        sizes,
        notes,
    )


def choose_columns(schema: pa.Schema) -> list[str]:
    """The columns that are shown: scores, one group, and the text that is trained on."""
    names = schema.names
    whole = [name for name in ("influence_rank", "num_loss_tokens") if name in names]
    scores = ["influence", *(name for name in whole if pa.types.is_integer(schema.field(name).type))]
    sets = [
        name
        for name in names
        if name.startswith("influence_") and name not in scores and pa.types.is_floating(schema.field(name).type)
    ]
    texts: list[str] = []
    for form in TEXT_FORMATS:
        found = [name for name in form if name in names]
        if found and found[0] == form[0] and found[-1] == form[-1]:
            texts = found
            break
    else:
        texts = [name for name in names if _is_text(schema.field(name).type)][:MAX_TEXT_COLUMNS]
    groups = [
        name for name in GROUP_NAMES if name in names and name not in texts and _is_text(schema.field(name).type)
    ]
    return [*scores, *sets[:MAX_SETS], *groups[:1], *texts]


def read_sample(files: list[pq.ParquetFile], columns: list[str], notes: list[str]) -> tuple[pa.Table, int]:
    """Row groups of the pool within the budget, spread over it evenly, with `row`; and how many rows it has."""
    groups: list[tuple[int, int, int, int, int]] = []  # file, group, first row, rows, bytes
    total = 0
    for number, file in enumerate(files):
        for index in range(file.metadata.num_row_groups):
            part = file.metadata.row_group(index)
            size = sum(
                part.column(c).total_uncompressed_size
                for c in range(part.num_columns)
                if part.column(c).path_in_schema.split(".")[0] in columns
            )
            groups.append((number, index, total, part.num_rows, size))
            total += part.num_rows
    if total == 0:
        raise CannotShow("The pool has no rows. Publish one that has.")
    order = np.random.default_rng(0).permutation(len(groups)) if len(groups) > 1 else np.arange(len(groups))
    budget, rows = MAX_BYTES, MAX_INFLUENCES
    taken: list[int] = []
    for position in order:
        *_, count, size = groups[position]
        if size > budget or count > rows:
            continue
        taken.append(int(position))
        budget, rows = budget - size, rows - count
    if not taken:
        raise CannotShow(
            f"Each row group of the pool has more than {MAX_BYTES:,} bytes or {MAX_INFLUENCES:,} rows. Publish it "
            "again with `push_influence_dataset`, which writes smaller ones."
        )
    parts = []
    for number, index, first, count, _ in (groups[position] for position in sorted(taken)):
        part = files[number].read_row_group(index, columns=columns)
        parts.append(part.append_column("row", pa.array(np.arange(first, first + count))))
    table = pa.concat_tables(parts)
    if len(table) < total:
        notes.append(
            f"The pool is large: {len(table):,} of its {total:,} rows were read, in {len(parts)} random parts."
        )
    return table, total


def choose_rows(influence: np.ndarray) -> np.ndarray:
    """Rows to show, strongest proponent first: all of them, or both ends and a random part of the middle."""
    order = np.argsort(np.where(np.isfinite(influence), influence, np.inf), kind="stable")
    if len(order) <= MAX_ROWS:
        return order
    ends = MAX_ROWS // 5
    last = int(np.isfinite(influence).sum())
    middle = np.random.default_rng(0).choice(np.arange(ends, last - ends), MAX_ROWS - 2 * ends, replace=False)
    return order[np.sort(np.concatenate([np.arange(ends), middle, np.arange(last - ends, last)]))]


def draw_lengths(table: pa.Table, influence: np.ndarray) -> pd.DataFrame | None:
    """Loss tokens and influence of some rows, each as likely as any other."""
    if "num_loss_tokens" not in table.column_names:
        return None
    tokens = table["num_loss_tokens"].to_numpy(zero_copy_only=False).astype(float)
    known = np.flatnonzero(np.isfinite(tokens) & np.isfinite(influence))
    drawn = np.random.default_rng(0).permutation(known)[:MAX_POINTS]
    return pd.DataFrame({"loss tokens": tokens[drawn], "influence": influence[drawn]})


def read_coresets(
    reader: _Reader, splits: dict[str, list[str]], notes: list[str]
) -> tuple[dict[str, set[int]], dict[str, int]]:
    """Ranks of the rows of each coreset, where rows have a rank; and its number of rows."""
    ranks: dict[str, set[int]] = {}
    sizes: dict[str, int] = {}
    for split, paths in splits.items():
        if not fnmatch.fnmatchcase(split, "coreset_*"):
            continue
        files = [reader.open(path) for path in paths]
        sizes[split] = sum(file.metadata.num_rows for file in files)
        if all("influence_rank" in file.schema_arrow.names for file in files) and sizes[split] <= MAX_INFLUENCES:
            parts = [file.read(columns=["influence_rank"])["influence_rank"] for file in files]
            ranks[split] = {rank for part in parts for rank in part.to_pylist() if rank is not None}
        else:
            notes.append(f"Which rows are in {split} is not shown: its rows have no `influence_rank`.")
    return ranks, sizes


def build_table(table: pa.Table, coresets: dict[str, set[int]]) -> pd.DataFrame:
    """The rows as they are shown and searched."""
    names = [name for name in table.column_names if name != "row"]
    shown = pd.DataFrame({"row": table["row"].to_numpy()})
    ranks = table["influence_rank"].to_pylist() if "influence_rank" in names else [None] * len(table)
    if "influence_rank" in names:
        shown["rank"] = pd.array(ranks, dtype="Int64")
    shown["influence"] = table["influence"].to_numpy(zero_copy_only=False)
    if "num_loss_tokens" in names:
        shown["tokens"] = pd.array(table["num_loss_tokens"].to_pylist(), dtype="Int64")
    if coresets:
        # The smallest coreset that a row is in; larger ones of the same strategy hold it too.
        order = sorted(coresets, key=lambda split: len(coresets[split]))
        shown["coreset"] = [next((split for split in order if rank in coresets[split]), "") for rank in ranks]
    scores = ("influence", "influence_rank", "num_loss_tokens")
    for name in names:
        if name.startswith("influence_") and name not in scores:
            shown[name[:50]] = table[name].to_numpy(zero_copy_only=False)
    rest = [name for name in names if name not in scores and not name.startswith("influence_")]
    if (group := next((name for name in rest if name in GROUP_NAMES), None)) is not None and len(rest) > 1:
        shown["group"] = [show_value(value)[:80] for value in _to_pylist(table[group])]
        rest.remove(group)
    columns = [_to_pylist(table[name]) for name in rest]
    shown["text"] = (
        [
            "\n\n".join(f"{name}: {show_value(value)}" for name, value in zip(rest, row, strict=True))
            for row in zip(*columns, strict=True)
        ]
        if columns
        else [""] * len(table)
    )
    return shown


def show_value(value: Any) -> str:
    """A cell as text; conversations turn by turn."""
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        pairs = [(turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))) for turn in value]
        text = "\n".join(f"[{role}] {content}" for role, content in pairs)
    else:
        text = "" if value is None else value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    if len(text) > MAX_TEXT_CHARACTERS:
        text = f"{text[:MAX_TEXT_CHARACTERS]} … ({len(text):,} characters)"
    # Half of a surrogate pair cannot be sent to a browser.
    return text.encode("utf-8", "replace").decode()


def _to_pylist(column: pa.ChunkedArray) -> list[Any]:
    # As bytes: a string that is no UTF-8 is an error only when it is decoded.
    return (column.cast(pa.large_binary()) if _is_text(column.type) else column).to_pylist()


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


# --- the card ---


def read_verdict(reader: _Reader, folder: str, paths: dict[str, int]) -> str:
    """The verdict on the repository's card, as plain text; or that there is none."""
    nothing = (
        "No comparison with random rows has been published for these rows. Whether a coreset beats random rows at the "
        "same budget has to be measured before it is relied on."
    )
    if not 0 < paths.get("README.md", 0) <= MAX_CARD_BYTES:
        return nothing
    name = re.escape("default" if folder == "data" else folder)
    card = reader.read_small("README.md")
    section = re.search(rf"<!-- in2core:begin {name} -->(.*?)<!-- in2core:end {name} -->", card, re.DOTALL)
    found = re.search(r"^### Did selecting help\?\s+> (.+)$", section[1] if section else "", re.MULTILINE)
    return html.unescape(found[1])[:2000] if found else nothing
